"""Writes a run's page, made from the files of its run directory alone, without scripts or requests."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from sami_jax.evaluation.statistics import Estimate
from sami_jax.files import write_text
from sami_jax.report import charts, findings, samples, tables
from sami_jax.report.comparisons import OUTCOMES, comparison_tables
from sami_jax.report.measures import (
    ADHERENCE,
    FAITHFUL,
    LENGTH,
    LOG_PROB,
    MI,
    NATS,
    SPLIT_LABELS,
    WELL_FORMED,
    WIN_RATE,
    Metric,
    iteration_label,
)
from sami_jax.report.reading import Run, SplitSummary, read_run

N_OPEN_SAMPLES = 2  # per split, unfolded on the page
TEMPLATES = Path(__file__).parents[1] / "templates"


class TileEntry(NamedTuple):
    """A main number of one split."""

    split: str
    style: int
    value: str
    unit: str
    detail: str
    direction: findings.Direction | None


def write_report(run_dir: Path) -> Path:
    """Writes `report/index.html` of a run.

    Args:
      run_dir: a run directory whose base, at least, has been evaluated.

    Returns:
      The path of the page.

    Raises:
      BadDataError: a file of the run is missing or malformed; the message names it and the remedy.
      SaveFailedError: the page could not be written.
    """
    path = run_dir / "report" / "index.html"
    write_text(path, render(read_run(run_dir)))
    return path


def render(run: Run) -> str:
    """The page as HTML. Every text is escaped; the same run gives the same bytes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "duration": duration,
        "followed": samples.followed_text,
        "iteration": iteration_label,
        "log_prob": LOG_PROB.number,
        "nats": NATS.number,
        "posterior": lambda logps: samples.constitution_posterior(logps).tolist(),
        "split": SPLIT_LABELS.get,
    }
    changes = findings.changes_from_base(run)
    first, *sentences = findings.headline(run)
    return environment.get_template("report.html.jinja").render(
        run=run,
        last_name=iteration_label(run.last.iteration),
        headline=first,
        sentences=sentences,
        findings=_grouped(changes),
        tiles=_tiles(run, changes),
        charts=charts,
        iteration_charts=charts.iteration_charts(run),
        training_charts=charts.training_charts(run),
        tables=[*tables.number_tables(run), *comparison_tables(run.comparisons)],
        outcomes=_outcomes(run),
        principles=tables.principle_tables(run),
        samples=samples.samples_by_split(run),
        n_first=samples.N_FIRST,
        n_changed=samples.N_CHANGED,
        n_open=N_OPEN_SAMPLES,
        config=list(_flat(run.config)),
        info=list(_flat(run.info)),
    )


def _outcomes(run: Run) -> dict[tuple[str, str, str], str]:
    """(split, example id, constitution) -> what became of the last iteration's response against the base's."""
    return {
        (comparison.split, *pair): OUTCOMES[outcome]
        for comparison in run.last.comparisons
        if comparison.opponent == "base"
        for pair, outcome in comparison.outcomes.items()
    }


def _grouped(changes: Sequence[findings.Change]) -> dict[str, dict[str, list[findings.Change]]]:
    """Direction -> metric's label -> changes."""
    groups: dict[str, dict[str, list[findings.Change]]] = {"rose": {}, "unchanged": {}, "fell": {}}
    for change in changes:
        groups[change.direction].setdefault(change.metric.label, []).append(change)
    return groups


def _tiles(run: Run, changes: Sequence[findings.Change]) -> dict[str, list[TileEntry]]:
    """Label -> the last iteration's number in each split."""
    by_place = {(change.metric, change.split): change for change in changes}
    tiles: dict[str, list[TileEntry]] = {}
    for metric in (WIN_RATE, ADHERENCE, MI, WELL_FORMED, FAITHFUL, LENGTH):
        for style, (name, split) in enumerate(run.last.splits.items()):
            estimate, change = split.estimates.get(metric.key), by_place.get((metric, name))
            if estimate is not None:
                tiles.setdefault(metric.label, []).append(
                    TileEntry(
                        SPLIT_LABELS[name],
                        style,
                        value=metric.unit.number(estimate.mean),
                        unit=metric.unit.suffix,
                        detail=_detail(metric, estimate, split, change),
                        direction=change.direction if change else None,
                    )
                )
    return tiles


def _detail(metric: Metric, estimate: Estimate, split: SplitSummary, change: findings.Change | None) -> str:
    unit = metric.unit
    if metric is WIN_RATE:
        tally = f"{split.wins} queries above ½, {split.ties} at ½, {split.losses} below"
        return f"{unit.interval(estimate)} \N{MIDDLE DOT} {tally}"
    if change is None or change.base is None:
        return unit.interval(estimate)
    text = f"base {unit.value(change.base.mean)}"
    if change.gain is None:
        return text
    return f"{text}, {unit.change(change.gain.mean)} {unit.interval(change.gain, sign=True)}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 05 s, 2 h 07 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in sorted(config.items()):
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
