"""A run's numbers as tables, for the page and for the terminal."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sami_jax.evaluation.statistics import Estimate
from sami_jax.report.cells import Cell, NumberTable
from sami_jax.report.findings import Direction, unpaired_direction
from sami_jax.report.measures import (
    ADHERENCE,
    LENGTH,
    METRICS,
    MI,
    RATE,
    SPLIT_LABELS,
    T_STATISTIC,
    WELL_FORMED,
    WIN_RATE,
    Metric,
    Unit,
    iteration_label,
)
from sami_jax.report.reading import Run, SplitSummary, read_evaluations


@dataclasses.dataclass(frozen=True)
class PrincipleRow:
    """How often a principle was followed by the base and at the last iteration."""

    principle: str
    before: Cell
    after: Cell
    difference: str
    direction: Direction
    n: int


def number_tables(run: Run) -> list[NumberTable]:
    """One table per split."""
    columns = [iteration_label(evaluation.iteration) for evaluation in run.evaluations]
    return [
        NumberTable(SPLIT_LABELS[name], split.judge, columns, _number_rows([e.splits[name] for e in run.evaluations]))
        for name, split in run.last.splits.items()
    ]


def _number_rows(summaries: Sequence[SplitSummary]) -> list[tuple[str, list[Cell | None]]]:
    rows: list[tuple[str, list[Cell | None]]] = []
    for metric in METRICS:
        unit = metric.unit
        rows.append((metric.label + unit.heading, [_cell(s.estimates.get(metric.key), unit) for s in summaries]))
        if metric is WIN_RATE:
            tallies = [None if s.wins is None else Cell(f"{s.wins} / {s.ties} / {s.losses}") for s in summaries]
            rows.append(("Wins / ties / losses", tallies))
            ts = [None if s.win_rate_t is None else Cell(T_STATISTIC.number(s.win_rate_t)) for s in summaries]
            rows.append(("t: the win rate's distance from 50 % in standard errors", ts))
        if metric.gain_key:
            gains = [_cell(s.estimates.get(metric.gain_key), unit, sign=True) for s in summaries]
            rows.append((f"{metric.label}: change from the base{unit.heading or ' (points)'}", gains))
    rows.append(("Queries", [Cell(str(s.n_queries)) for s in summaries]))
    if any(s.n_unscored for s in summaries):
        label = "Queries with an empty response, without mutual information and likelihood"
        rows.append((label, [Cell(str(s.n_unscored)) for s in summaries]))
    return [(label, cells) for label, cells in rows if any(cells)]


def _cell(estimate: Estimate | None, unit: Unit, *, sign: bool = False) -> Cell | None:
    if estimate is None:
        return None
    text = unit.number(estimate.mean, sign=True) if sign else unit.short(estimate.mean)
    return Cell(text, unit.interval(estimate, sign=sign))


def principle_tables(run: Run) -> dict[str, list[PrincipleRow]]:
    """By split; splits without a judge are left out."""
    tables = {}
    for name, split in run.last.splits.items():
        base = run.base.splits[name].per_principle
        rows = [_principle_row(principle, base[principle], after) for principle, after in split.per_principle.items()]
        if rows:
            tables[SPLIT_LABELS[name]] = rows
    return tables


def _principle_row(principle: str, before: Estimate, after: Estimate) -> PrincipleRow:
    return PrincipleRow(
        principle,
        before=Cell(RATE.short(before.mean), RATE.interval(before)),
        after=Cell(RATE.short(after.mean), RATE.interval(after)),
        difference=RATE.number(after.mean - before.mean, sign=True),
        direction=unpaired_direction(before, after),
        n=after.n,
    )


def summary_table(run_dir: Path) -> str:
    """A plain-text table for the terminal: a row per iteration, the main metrics of each split.

    Reads only the summaries. `+-` is half of the 95 % interval's width; rates are in per cent.

    Raises:
      BadDataError: the base was not evaluated, or a summary is malformed.
    """
    evaluations = read_evaluations(run_dir)
    blocks = [("", [["iteration", *(str(e.iteration or "base") for e in evaluations)]])]
    for name in evaluations[-1].splits:
        splits = [e.splits[name] for e in evaluations]
        columns = [
            [title, *(_plain(split.estimates.get(metric.key), metric, with_interval) for split in splits)]
            for title, metric, with_interval in (
                ("win %", WIN_RATE, True),
                ("followed %", ADHERENCE, True),
                ("MI nats", MI, False),
                ("well-formed %", WELL_FORMED, False),
                ("tokens", LENGTH, False),
            )
        ]
        blocks.append((SPLIT_LABELS[name], columns))
    parts = [_aligned(head, columns) for head, columns in blocks]
    return "".join(" | ".join(line).rstrip() + "\n" for line in zip(*parts, strict=True))


def _plain(estimate: Estimate | None, metric: Metric, with_interval: bool) -> str:
    if estimate is None:
        return "-"
    text = metric.unit.number(estimate.mean).replace("\N{MINUS SIGN}", "-")
    if not with_interval or estimate.low is None or estimate.high is None:
        return text
    return f"{text} +-{metric.unit.number((estimate.high - estimate.low) / 2)}"


def _aligned(head: str, columns: Sequence[Sequence[str]]) -> list[str]:
    """Lines of one width: the head to the left, below it the columns to the right."""
    widths = [max(map(len, column)) for column in columns]
    rows = [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in zip(*columns, strict=True)
    ]
    width = max(len(head), len(rows[0]))
    return [head.ljust(width), *(row.rjust(width) for row in rows)]
