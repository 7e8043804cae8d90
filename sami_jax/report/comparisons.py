"""A run's judged comparisons: read from its judge/ folders, and as tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sami_jax.evaluation.results import naming
from sami_jax.evaluation.statistics import Estimate
from sami_jax.files import read_json, read_jsonl
from sami_jax.report.cells import Cell, NumberTable
from sami_jax.report.measures import RATE, SPLIT_LABELS, T_STATISTIC, iteration_label
from sami_jax.stage_folder import check_sealed

OPPONENTS = {"base": "the base", "instruct": "the instruction-tuned model"}
OUTCOMES = {
    "win": "won against the base",
    "loss": "lost against the base",
    "tie": "tied with the base",
    "inconsistent": "judged differently in each order",
    "invalid": "no verdict",
    "error": "no verdict",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One judge/OPPONENT/SPLIT of an iteration.

    Attributes:
      iteration: whose responses are compared.
      opponent: "base" or "instruct".
      split: "learned" or "held_out".
      summary: see `evaluation.comparison.summarize_pairs`.
      details: see `evaluation.comparison.detail_pairs`.
      outcomes: (example id, constitution or principle) -> outcome.
    """

    iteration: int
    opponent: str
    split: str
    summary: Mapping[str, Any]
    details: Mapping[str, Any]
    outcomes: Mapping[tuple[str, str], str]

    @property
    def judge(self) -> str:
        return self.details["judge"]

    @property
    def win_rate(self) -> Estimate | None:
        found = self.summary["win_rate"]
        return None if found["mean"] is None else Estimate(**found, n=self.summary["n"])


def read_comparisons(iteration: int, folder: Path) -> list[Comparison]:
    """The comparisons of an iteration's folder; none where nothing was judged.

    Raises:
      BadDataError: a file is malformed, or was changed since it was sealed.
    """
    found = []
    for opponent in OPPONENTS:
        for split in SPLIT_LABELS:
            place = folder / "judge" / opponent / split
            if not (place / "summary.json").exists():
                continue
            check_sealed(place)
            with naming(place):
                lines = read_jsonl(place / "verdicts.jsonl")
                outcomes = {(line["name"], line["constitution"]): line["outcome"] for line in lines}
                summary, details = (read_json(place / f"{name}.json") for name in ("summary", "details"))
                comparison = Comparison(iteration, opponent, split, summary, details, outcomes)
                _rows([comparison])  # for what would fail there
                found.append(comparison)
    return found


def comparison_tables(comparisons: Sequence[Comparison]) -> list[NumberTable]:
    """One table for each opponent and split: raw, length-corrected and per-principle win rates by iteration."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.opponent, comparison.split), []).append(comparison)
    return [
        NumberTable(
            name=f"compared with {OPPONENTS[opponent]}: {SPLIT_LABELS[split]}",
            judge=of_one[-1].judge,
            columns=[iteration_label(comparison.iteration) for comparison in of_one],
            rows=_rows(of_one),
        )
        for (opponent, split), of_one in groups.items()
    ]


def _rows(comparisons: Sequence[Comparison]) -> list[tuple[str, list[Cell | None]]]:
    summaries = [comparison.summary for comparison in comparisons]
    counts = ("wins", "ties", "losses", "inconsistent", "excluded")
    tallies = [Cell(" / ".join(str(summary[count]) for count in counts)) for summary in summaries]
    rows: list[tuple[str, list[Cell | None]]] = [
        ("Win rate, raw", [_rate(s["win_rate"]) for s in summaries]),
        ("Win rate, length-balanced", [_corrected(s["length_balanced"]) for s in summaries]),
        ("Win rate, length-corrected", [_corrected(s["length_corrected"]) for s in summaries]),
        *_principle_rows(summaries),
        ("Won / tied / lost / inconsistent / left out", [*tallies]),
        ("t", [None if s["t"] is None else Cell(T_STATISTIC.number(s["t"])) for s in summaries]),
        ("p", [None if s["p"] is None else Cell(f"{s['p']:.2g}") for s in summaries]),
        ("Response shown first wins", [_rate(s["position_bias"]) for s in summaries]),
        ("Words, and the opponent's", [_words(comparison.details["words"]) for comparison in comparisons]),
        ("Queries judged", [Cell(str(s["n"]), f"{s['coverage']:.1%}") for s in summaries]),
    ]
    return [(label, cells) for label, cells in rows if any(cells)]


def _principle_rows(summaries: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Cell | None]]]:
    names = dict.fromkeys(name for summary in summaries for name in summary["per_principle"])
    return [(f"Win rate on: {name}", [_principle(s["per_principle"].get(name)) for s in summaries]) for name in names]


def _principle(found: Mapping[str, Any] | None) -> Cell | None:
    cell = _rate(found["win_rate"]) if found else None
    if cell is None or not found:
        return None
    return Cell(cell.text, f"{cell.interval} n {found['n']}, p {found['p_holm']:.2g}".strip())


def _rate(found: Mapping[str, Any] | None) -> Cell | None:
    if not found or found["mean"] is None:
        return None
    estimate = Estimate(found["mean"], found["low"], found["high"], 0)
    return Cell(RATE.short(estimate.mean), RATE.interval(estimate))


def _corrected(found: Mapping[str, Any]) -> Cell | None:
    return Cell("not defined", found["undefined"]) if found["undefined"] else _rate(found)


def _words(found: Mapping[str, Any]) -> Cell:
    return Cell(f"{found['response']['mean']:.1f}", f"{found['baseline']['mean']:.1f}")
