"""Evaluated queries of one split to estimates: mutual information, length, adherence, win rate."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sami_jax.evaluation.win_rates import Estimate, mean_with_interval, win_rate, win_scores
from sami_jax.losses import mi_lower_bound

Record = Mapping[str, Any]  # one line of results.jsonl


def query_mi_nats(logps: np.ndarray) -> np.ndarray:
    """[Q] lower bound on the mutual information of each query's matrix [Q, C, R]; see `losses.mi_lower_bound`."""
    return np.asarray(jax.vmap(mi_lower_bound)(jnp.asarray(logps)))


def summarize(records: Sequence[Record], baseline: Sequence[Record] | None) -> dict[str, Any]:
    """Estimates with 95 % intervals over the queries of one split.

    A query is answered under each of its C constitutions; its value is the mean over them. So are comparisons: each
    response meets the baseline's response under the same constitution. Queries with an empty response have no log-prob:
    they count as `n_unscored` and stay out of `mi_nats`, `mi_gain_nats` and `base_logp`.

    Args:
      records: one line of results.jsonl per query.
      baseline: the same queries answered by the base model, in the same order; None for the base itself.

    Returns:
      JSON value, estimates as {"mean", "low", "high", "n"}, None where undefined (no judge, no baseline). `distinct` is
      the share of queries whose responses are all different: near 0 the model ignores its constitutions.

    Raises:
      ValueError: the baseline holds other queries.
    """
    judged = all(record["verdicts"] is not None for record in records)
    scored = [record for record in records if record["mi_nats"] is not None]
    summary: dict[str, Any] = {
        "n_queries": len(records),
        "n_unscored": len(records) - len(scored),
        "mi_nats": _mean(record["mi_nats"] for record in scored),
        "length_tokens": _mean(float(np.mean(record["response_tokens"])) for record in records),
        "base_logp": _mean(float(np.mean(record["base_logps"])) for record in scored),
        "distinct": _mean(len(set(record["responses"])) == len(record["responses"]) for record in records),
    }
    names = ("adherence", "well_formed", "faithful")
    summary |= {name: mean_with_interval(_per_query(records, name)) if judged else None for name in names}
    summary["per_principle"] = _per_principle(records) if judged else None
    summary |= dict.fromkeys(
        ("mi_gain_nats", "adherence_gain", "win_rate", "win_rate_t", "strict_win_rate", "wins", "losses", "ties")
    )
    if baseline is not None:
        if [r["example_id"] for r in baseline] != [r["example_id"] for r in records]:
            raise ValueError("the baseline was evaluated on other queries, or in another order")
        both = [(r["mi_nats"], b["mi_nats"]) for r, b in zip(records, baseline, strict=True)]
        summary["mi_gain_nats"] = _mean(ours - base for ours, base in both if ours is not None and base is not None)
        if judged:
            gain = _per_query(records, "adherence") - _per_query(baseline, "adherence")
            wins = win_rate(_wins(records, baseline, "score"))
            strict = win_rate(_wins(records, baseline, "strict_score"))
            summary |= {"adherence_gain": mean_with_interval(gain), "win_rate": wins.estimate, "win_rate_t": wins.t}
            summary |= {"wins": wins.wins, "losses": wins.losses, "ties": wins.ties, "strict_win_rate": strict.estimate}
    return {name: _plain(value) for name, value in summary.items()}


def _mean(values: Iterable[float]) -> Estimate | None:
    """The estimate of the values, None where there are none."""
    floats = [float(value) for value in values]
    return mean_with_interval(floats) if floats else None


def _per_query(records: Sequence[Record], name: str) -> np.ndarray:
    return np.array([np.mean([float(verdict[name]) for verdict in record["verdicts"]]) for record in records])


def _wins(records: Sequence[Record], baseline: Sequence[Record], score: str) -> np.ndarray:
    ours, theirs = (np.array([[v[score] for v in r["verdicts"]] for r in rows]) for rows in (records, baseline))
    return np.mean([win_scores(ours[:, c], theirs[:, c]) for c in range(ours.shape[1])], axis=0)


def _per_principle(records: Sequence[Record]) -> dict[str, Estimate]:
    followed: dict[str, list[float]] = {}
    for record in records:
        for name in record["verdicts"][0]["followed"]:
            followed.setdefault(name, []).append(float(np.mean([v["followed"][name] for v in record["verdicts"]])))
    return {name: mean_with_interval(values) for name, values in sorted(followed.items())}


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value._asdict()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
