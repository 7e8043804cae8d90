"""Evaluated queries of one split to estimates: mutual information, length, adherence, win rate."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from sami_jax.evaluation.results import QueryResult
from sami_jax.evaluation.statistics import Estimate, mean_with_interval, win_rate, win_scores
from sami_jax.losses import mi_lower_bound


def query_mi_nats(logps: np.ndarray) -> np.ndarray:
    """[Q] lower bound on the mutual information of each query's matrix [Q, C, R]; see `losses.mi_lower_bound`."""
    return np.asarray(jax.jit(jax.vmap(mi_lower_bound))(logps))


def summarize(results: Sequence[QueryResult], baseline: Sequence[QueryResult] | None) -> dict[str, Any]:
    """Estimates with 95 % intervals over the queries of one split.

    A query is answered under each of its C constitutions; its value is the mean over them. So are comparisons: each
    response meets the baseline's response under the same constitution. Queries with an empty response have no log-prob:
    they count as `n_unscored` and stay out of `mi_nats`, `mi_gain_nats` and `base_logp`.

    Args:
      results: one per query.
      baseline: the same queries answered by the base model, in the same order; None for the base itself.

    Returns:
      JSON value, estimates as {"mean", "low", "high", "n"}, None where undefined (no judge, no baseline). `distinct` is
      the share of queries whose responses are all different: near 0 the model ignores its constitutions.

    Raises:
      ValueError: the baseline holds other queries.
    """
    judged = all(result.verdicts is not None for result in results)
    scored = [result for result in results if result.mi_nats is not None]
    summary: dict[str, Any] = {"n_queries": len(results), "n_unscored": len(results) - len(scored)}
    summary |= {name: _mean(result.per_query(name) for result in results) for name in ("mi_nats", "length_tokens")}
    summary["base_logp"] = _mean(
        float(np.mean(r.base_logps, dtype=np.float64)) for r in results if r.base_logps is not None
    )
    summary["distinct"] = _mean(result.per_query("distinct") for result in results)
    names = ("adherence", "well_formed", "faithful")
    summary |= {name: _mean(result.per_query(name) for result in results) if judged else None for name in names}
    summary["per_principle"] = _per_principle(results) if judged else None
    summary |= dict.fromkeys(
        ("mi_gain_nats", "adherence_gain", "win_rate", "win_rate_t", "strict_win_rate", "wins", "losses", "ties")
    )
    if baseline is not None:
        if [b.example_id for b in baseline] != [r.example_id for r in results]:
            raise ValueError("the baseline was evaluated on other queries, or in another order")
        summary["mi_gain_nats"] = _mean_gain(results, baseline, "mi_nats")
        if judged:
            wins = win_rate(_wins(results, baseline, "score"))
            strict = win_rate(_wins(results, baseline, "strict_score"))
            summary["adherence_gain"] = _mean_gain(results, baseline, "adherence")
            summary |= {"win_rate": wins.estimate, "win_rate_t": wins.t}
            summary |= {"wins": wins.wins, "losses": wins.losses, "ties": wins.ties, "strict_win_rate": strict.estimate}
    return {name: _plain(value) for name, value in summary.items()}


def _mean(values: Iterable[float | None]) -> Estimate | None:
    """The estimate of the values that are known, None where none is."""
    known = [value for value in values if value is not None]
    return mean_with_interval(known) if known else None


def _mean_gain(results: Sequence[QueryResult], baseline: Sequence[QueryResult], name: str) -> Estimate | None:
    """Over the queries whose value is known on both sides."""
    both = [(r.per_query(name), b.per_query(name)) for r, b in zip(results, baseline, strict=True)]
    return _mean(ours - theirs for ours, theirs in both if ours is not None and theirs is not None)


def _wins(results: Sequence[QueryResult], baseline: Sequence[QueryResult], score: str) -> np.ndarray:
    ours, theirs = (
        np.array([[getattr(verdict, score) for verdict in result.verdicts or ()] for result in side])
        for side in (results, baseline)
    )  # [Q, C] each
    return np.mean([win_scores(ours[:, c], theirs[:, c]) for c in range(ours.shape[1])], axis=0)


def _per_principle(results: Sequence[QueryResult]) -> dict[str, Estimate]:
    followed: dict[str, list[float]] = {}
    for result in results:
        verdicts = result.verdicts or ()
        for name in verdicts[0].followed:
            followed.setdefault(name, []).append(float(np.mean([verdict.followed[name] for verdict in verdicts])))
    return {name: mean_with_interval(values) for name, values in sorted(followed.items())}


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value._asdict()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
