"""One offline page about a run, made only from the files of its run directory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from sami_jax.errors import BadDataError, SaveFailedError
from sami_jax.evaluation.win_rates import Estimate, mean_with_interval

N_FIRST_SAMPLES = 6  # per split, in file order, whatever they show
N_CHANGED_SAMPLES = 4  # per split, in file order, after the first
N_OPEN_SAMPLES = 2  # per split, unfolded on the page
NO_CHANGE = 1e-9  # a change within rounding error of zero is none


# ---------------------------------------------------------------------------------------------------------------------
# What is measured, and how it is written
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Unit:
    """How a number is written: scaled, with so many decimals, and a suffix."""

    scale: float
    decimals: int
    suffix: str
    change_suffix: str

    def number(self, value: float, *, sign: bool = False) -> str:
        text = f"{value * self.scale:{'+' if sign else ''}.{self.decimals}f}"
        if float(text) == 0:  # no "-0.0"
            text = text.lstrip("+-")
        return text.replace("-", "\N{MINUS SIGN}")

    def value(self, value: float) -> str:
        return self.number(value) + self.suffix

    def change(self, value: float) -> str:
        return self.number(value, sign=True) + self.change_suffix

    def interval(self, estimate: Estimate, *, sign: bool = False) -> str:
        if estimate.low is None or estimate.high is None:
            return "no interval"
        return f"[{self.number(estimate.low, sign=sign)}, {self.number(estimate.high, sign=sign)}]"


RATE = Unit(100.0, 1, " %", " points")
NATS = Unit(1.0, 3, " nats", "")
TOKENS = Unit(1.0, 1, " tokens", "")
LOG_PROB = Unit(1.0, 3, "", "")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One measured quantity of a split."""

    key: str  # its field in eval/summary.json
    label: str
    unit: Unit
    note: str  # one line under its chart
    gain_key: str | None = None  # the summary's paired difference from the base, where it has one
    fall_is_bad: bool = True


WIN_RATE = Metric("win_rate", "Win rate against the base", RATE, "A tie counts half. Above 50 %: better than the base.")
STRICT_WIN_RATE = Metric("strict_win_rate", "Strict win rate", RATE, "As the win rate, but wrong content also loses.")
ADHERENCE = Metric(
    "adherence",
    "Principles followed",
    RATE,
    "Share of the asked principles that the judge saw followed.",
    gain_key="adherence_gain",
)
MI = Metric(
    "mi_nats",
    "Mutual information",
    NATS,
    "Lower bound: how much a response tells about its constitution.",
    gain_key="mi_gain_nats",
)
WELL_FORMED = Metric("well_formed", "Well-formed responses", RATE, "Falls when the model over-optimises.")
FAITHFUL = Metric("faithful", "Content copied rightly", RATE, "Form may be fine while the content is wrong.")
LENGTH = Metric(
    "length_tokens",
    "Response length",
    TOKENS,
    "Watch this beside the win rate: judges may like length.",
    fall_is_bad=False,
)
BASE_LOGP = Metric(
    "base_logp",
    "Likelihood under the base",
    LOG_PROB,
    "Mean log-probability per token. A large fall is a sign of over-optimisation.",
    fall_is_bad=False,
)
METRICS = (WIN_RATE, STRICT_WIN_RATE, ADHERENCE, MI, WELL_FORMED, FAITHFUL, LENGTH, BASE_LOGP)
GAINS = {
    "adherence_gain": Metric("adherence_gain", "Principles followed: change from the base", RATE, ""),
    "mi_gain_nats": Metric("mi_gain_nats", "Mutual information: change from the base", NATS, ""),
}
REQUIRED = {"mi_nats", "length_tokens"}


def split_label(name: str) -> str:
    """A split's name in words."""
    return {"learned": "learned principles", "held_out": "held-out principles"}.get(name, name.replace("_", " "))


def _on_split(name: str) -> str:
    label = split_label(name)
    return (
        f"on the {label}"
        if name in ("learned", "held_out")
        else f"on the split \N{LEFT DOUBLE QUOTATION MARK}{label}\N{RIGHT DOUBLE QUOTATION MARK}"
    )


def iteration_label(iteration: int) -> str:
    """ "base" for iteration 0, "iteration k" for the others."""
    return "base" if iteration == 0 else f"iteration {iteration}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading the run directory
# ---------------------------------------------------------------------------------------------------------------------


def _bad(path: Path, what: str, remedy: str) -> BadDataError:
    return BadDataError(f"{path}: {what}. {remedy}")


def _read_text(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _bad(path, "this file is missing", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(path, f"this file cannot be read ({error})", remedy) from error


def _read_object(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path, remedy))
    except json.JSONDecodeError as error:
        raise _bad(path, f"not valid JSON ({error})", remedy) from error
    if not isinstance(value, dict):
        raise _bad(path, "a JSON object is expected", remedy)
    return value


def _read_lines(path: Path, remedy: str, *, appended: bool) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; the unfinished last line of an appended file (a killed process) is left out."""
    text = _read_text(path, remedy)
    rows: list[dict[str, Any]] = []
    lines = text.split("\n")  # not splitlines: U+2028 may stand inside a text
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (appended and number == len(lines)):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _bad(path, f"line {number} is not valid JSON ({error})", remedy) from error
        if not isinstance(row, dict):
            raise _bad(path, f"line {number} is not a JSON object", remedy)
        rows.append(row)
    return rows


def _finite(value: Any, path: Path, field: str, remedy: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _bad(path, f"{field} must be a finite number, but is {value!r}", remedy)
    return float(value)


def _field(mapping: Mapping[str, Any], key: str, path: Path, where: str, remedy: str) -> Any:
    if key not in mapping:
        raise _bad(path, f"{where} lacks the field {key!r}", remedy)
    return mapping[key]


def _read_estimate(value: Any, path: Path, field: str, remedy: str) -> Estimate | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _bad(path, f"{field} must be an object with mean, low, high and n, but is {value!r}", remedy)
    mean, low, high, n = (_field(value, key, path, field, remedy) for key in ("mean", "low", "high", "n"))
    return Estimate(
        mean=_finite(mean, path, f"{field}.mean", remedy),
        low=None if low is None else _finite(low, path, f"{field}.low", remedy),
        high=None if high is None else _finite(high, path, f"{field}.high", remedy),
        n=int(_finite(n, path, f"{field}.n", remedy)),
    )


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """The numbers of one split at one iteration."""

    n_queries: int
    estimates: Mapping[str, Estimate]  # metric or gain key -> estimate; what was not measured is absent
    per_principle: Mapping[str, Estimate]  # principle -> adherence
    wins: int | None
    losses: int | None
    ties: int | None
    judge: str | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One eval/summary.json."""

    iteration: int
    normalize: str  # "mean" or "sum": which log-probabilities the mutual information was computed from
    ceiling_nats: float
    splits: Mapping[str, SplitSummary]  # learned first, held-out second, then as in the file


def _eval_remedy(iteration: int) -> str:
    return f"Run the evaluation of {iteration_label(iteration)} again; its stage writes this file"


def _read_split(raw: Any, path: Path, name: str, remedy: str) -> SplitSummary:
    where = f"splits.{name}"
    if not isinstance(raw, dict):
        raise _bad(path, f"{where} must be an object", remedy)
    estimates: dict[str, Estimate] = {}
    for key in [*(metric.key for metric in METRICS), *GAINS]:
        value = _field(raw, key, path, where, remedy) if key in REQUIRED else raw.get(key)
        estimate = _read_estimate(value, path, f"{where}.{key}", remedy)
        if estimate is not None:
            estimates[key] = estimate
        elif key in REQUIRED:
            raise _bad(path, f"{where}.{key} is null", remedy)
    per_principle: dict[str, Estimate] = {}
    for principle, value in (raw.get("per_principle") or {}).items():
        estimate = _read_estimate(value, path, f"{where}.per_principle.{principle}", remedy)
        if estimate is not None:
            per_principle[principle] = estimate
    return SplitSummary(
        n_queries=int(_finite(_field(raw, "n_queries", path, where, remedy), path, f"{where}.n_queries", remedy)),
        estimates=estimates,
        per_principle=per_principle,
        wins=raw.get("wins"),
        losses=raw.get("losses"),
        ties=raw.get("ties"),
        judge=raw.get("judge"),
    )


def _read_evaluation(path: Path, iteration: int) -> Evaluation:
    remedy = _eval_remedy(iteration)
    raw = _read_object(path, remedy)
    splits = _field(raw, "splits", path, "the summary", remedy)
    if not isinstance(splits, dict) or not splits:
        raise _bad(path, "splits must be an object with at least one split", remedy)
    rank = {"learned": 0, "held_out": 1}
    names = sorted(splits, key=lambda name: rank.get(name, 2))  # stable: other splits keep the file's order
    return Evaluation(
        iteration=iteration,
        normalize=str(_field(raw, "normalize", path, "the summary", remedy)),
        ceiling_nats=_finite(_field(raw, "ceiling_nats", path, "the summary", remedy), path, "ceiling_nats", remedy),
        splits={name: _read_split(splits[name], path, name, remedy) for name in names},
    )


def _iteration_numbers(run_dir: Path) -> list[int]:
    matches = (re.fullmatch(r"iter_(\d{3,})", entry.name) for entry in run_dir.glob("iter_*"))
    return sorted(int(match[1]) for match in matches if match)


def _iteration_dir(run_dir: Path, iteration: int) -> Path:
    return run_dir / f"iter_{iteration:03d}"


def read_evaluations(run_dir: Path) -> list[Evaluation]:
    """The evaluations of a run, the base first.

    Raises:
        BadDataError: the base was not evaluated, or a summary is malformed.
    """
    base_path = _iteration_dir(run_dir, 0) / "eval" / "summary.json"
    evaluations = [_read_evaluation(base_path, 0)]
    for iteration in _iteration_numbers(run_dir):
        path = _iteration_dir(run_dir, iteration) / "eval" / "summary.json"
        if iteration > 0 and path.exists():
            evaluations.append(_read_evaluation(path, iteration))
    return evaluations


@dataclasses.dataclass(frozen=True)
class QueryResult:
    """One line of eval/results.jsonl: C constitutions, one response each."""

    split: str
    example_id: Any
    query: str
    constitutions: list[str]
    responses: list[str]
    response_tokens: list[float]
    logps: np.ndarray  # [C, R]: mean log p(response r | query, constitution c)
    mi_nats: float
    verdicts: list[dict[str, Any]] | None  # C of them

    def per_query(self, key: str) -> float | None:
        """This query's value of a metric, the mean over its constitutions; None where it was not measured."""
        if key == "mi_nats":
            return self.mi_nats
        if key == "length_tokens":
            return sum(self.response_tokens) / len(self.response_tokens)
        if key not in ("adherence", "well_formed", "faithful") or self.verdicts is None:
            return None
        values = [float(verdict[key]) for verdict in self.verdicts if verdict.get(key) is not None]
        return sum(values) / len(values) if len(values) == len(self.verdicts) else None


def _read_results(run_dir: Path, iteration: int) -> list[QueryResult]:
    path = _iteration_dir(run_dir, iteration) / "eval" / "results.jsonl"
    remedy = _eval_remedy(iteration)
    results = []
    for number, row in enumerate(_read_lines(path, remedy, appended=False), start=1):
        where = f"line {number}"
        values = {
            key: _field(row, key, path, where, remedy)
            for key in (
                "split",
                "example_id",
                "query",
                "constitutions",
                "responses",
                "response_tokens",
                "logps",
                "mi_nats",
            )
        }
        verdicts = row.get("verdicts")
        n = len(values["constitutions"])
        lists = [values["responses"], values["response_tokens"], values["logps"]] + ([verdicts] if verdicts else [])
        if n == 0 or any(len(item) != n for item in lists) or any(len(line) != n for line in values["logps"]):
            raise _bad(path, f"{where}: constitutions, responses, logps and verdicts differ in number", remedy)
        cells = [[_finite(cell, path, f"{where} logps", remedy) for cell in line] for line in values["logps"]]
        results.append(
            QueryResult(
                **{**values, "logps": np.array(cells), "mi_nats": _finite(values["mi_nats"], path, where, remedy)},
                verdicts=verdicts or None,
            )
        )
    return results


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the page is made from."""

    info: Mapping[str, Any]
    config: Mapping[str, Any]
    evaluations: list[Evaluation]
    base_results: list[QueryResult]
    last_results: list[QueryResult] | None  # None: only the base has been evaluated
    funnels: Mapping[int, Mapping[str, Any]]  # iteration -> sample/DONE.json counts
    train_steps: Mapping[int, list[Mapping[str, Any]]]  # iteration -> rows in order of step
    stages: list[tuple[int | None, str, float]]  # iteration, stage, seconds
    unfinished: list[int]  # iterations that began and have no evaluation

    @property
    def base(self) -> Evaluation:
        return self.evaluations[0]

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]


def _read_funnels(run_dir: Path, evaluated: set[int]) -> dict[int, Mapping[str, Any]]:
    funnels: dict[int, Mapping[str, Any]] = {}
    for iteration in _iteration_numbers(run_dir):
        path = _iteration_dir(run_dir, iteration) / "sample" / "DONE.json"
        if iteration == 0 or (iteration not in evaluated and not path.exists()):
            continue
        remedy = f"Run the sample stage of {iteration_label(iteration)} again; it writes this file when it is complete"
        counts = _field(_read_object(path, remedy), "counts", path, "the object", remedy)
        for key in ("queries", "sampled", "kept", "dropped"):
            _field(counts, key, path, "counts", remedy)
        for key, value in [*((k, counts[k]) for k in ("queries", "sampled", "kept")), *counts["dropped"].items()]:
            _finite(value, path, f"counts.{key}", remedy)
        funnels[iteration] = counts
    return funnels


def _read_train_steps(run_dir: Path, *, required: bool) -> dict[int, list[Mapping[str, Any]]]:
    path = run_dir / "metrics.jsonl"
    if not required and not path.exists():
        return {}
    remedy = "The train stage writes it; restore it from where the run was made, or train again"
    latest: dict[tuple[int, int], Mapping[str, Any]] = {}
    for row in _read_lines(path, remedy, appended=True):
        if row.get("stage") == "train":
            key = (_field(row, "iteration", path, "a line", remedy), _field(row, "step", path, "a line", remedy))
            latest[key] = row  # a resumed run repeats steps: the last line wins
    steps: dict[int, list[Mapping[str, Any]]] = {}
    for iteration, step in sorted(latest):
        steps.setdefault(iteration, []).append(latest[iteration, step])
    return steps


def _read_stages(run_dir: Path) -> list[tuple[int | None, str, float]]:
    path = run_dir / "events.jsonl"
    remedy = "Every run writes it from its start; restore it, or make an empty file to do without timings"
    latest: dict[tuple[int | None, str], float] = {}
    for row in _read_lines(path, remedy, appended=True):
        if row.get("event") == "stage_done":
            key = (row.get("iteration"), str(_field(row, "stage", path, "a stage_done event", remedy)))
            seconds = _field(row, "seconds", path, "a stage_done event", remedy)
            latest.pop(key, None)
            latest[key] = _finite(seconds, path, "seconds", remedy)
    return [(iteration, stage, seconds) for (iteration, stage), seconds in latest.items()]


def read_run(run_dir: Path) -> Run:
    """Reads a run directory.

    Raises:
        BadDataError: a file is missing or malformed; the message names it and what to do.
    """
    evaluations = read_evaluations(run_dir)
    last = evaluations[-1].iteration
    base_results = _read_results(run_dir, 0)
    last_results = _read_results(run_dir, last) if last > 0 else None
    if last_results is not None:
        ids = [[(result.split, result.example_id) for result in results] for results in (base_results, last_results)]
        if ids[0] != ids[1]:
            raise _bad(
                _iteration_dir(run_dir, last) / "eval" / "results.jsonl",
                "its queries are not those of iter_000/eval/results.jsonl, or stand in another order",
                "Evaluate both iterations with the same queries",
            )
    evaluated = {evaluation.iteration for evaluation in evaluations}
    remedy = "A run writes it once, at its start; restore it from where the run was made"
    return Run(
        info=_read_object(run_dir / "RUN.json", remedy),
        config=_read_object(run_dir / "config.json", remedy),
        evaluations=evaluations,
        base_results=base_results,
        last_results=last_results,
        funnels=_read_funnels(run_dir, evaluated),
        train_steps=_read_train_steps(run_dir, required=last > 0),
        stages=_read_stages(run_dir),
        unfinished=[iteration for iteration in _iteration_numbers(run_dir) if iteration not in evaluated],
    )


# ---------------------------------------------------------------------------------------------------------------------
# What the numbers say
# ---------------------------------------------------------------------------------------------------------------------


def _direction(low: float | None, high: float | None, centre: float) -> str:
    """ "rose" / "fell" where the whole interval lies above / below the centre, else "unchanged"."""
    if low is None or high is None:
        return "unchanged"
    return "rose" if low > centre + NO_CHANGE else "fell" if high < centre - NO_CHANGE else "unchanged"


@dataclasses.dataclass(frozen=True)
class Change:
    """How a metric of a split moved from the base to the last iteration."""

    metric: Metric
    split: str
    direction: str  # "rose", "fell", "unchanged"
    base: Estimate | None  # None for win rates, which are comparisons already
    last: Estimate
    gain: Estimate | None  # paired difference over the same queries, where there is one

    @property
    def is_concern(self) -> bool:
        return self.direction == "fell" and self.metric.fall_is_bad

    def amount(self) -> str:
        unit = self.metric.unit
        if self.base is None:
            return f"{unit.value(self.last.mean)} {unit.interval(self.last)}"
        arrow = f"{unit.number(self.base.mean)} \N{RIGHTWARDS ARROW} {unit.value(self.last.mean)}"
        if self.gain is None:
            return f"{arrow} (intervals {'overlap' if self.direction == 'unchanged' else 'do not overlap'})"
        return f"{arrow} ({unit.change(self.gain.mean)} {unit.interval(self.gain, sign=True)})"


def _paired_gain(run: Run, split: str, key: str) -> Estimate | None:
    pairs = [
        (base.per_query(key), last.per_query(key))
        for base, last in zip(run.base_results, run.last_results or [], strict=False)
        if base.split == split
    ]
    differences = [last - base for base, last in pairs if base is not None and last is not None]
    return mean_with_interval(differences) if differences and len(differences) == len(pairs) else None


def change_from_base(run: Run, split: str, metric: Metric) -> Change | None:
    """How a metric moved, judged by an interval.

    Win rates are compared with 0.5. Other metrics use the paired difference (the summary's, else one made from
    results.jsonl); without one, a change needs two intervals that do not overlap.

    Returns:
        None where base or last was not measured.
    """
    last_split, base_split = run.last.splits[split], run.base.splits.get(split)
    last = last_split.estimates.get(metric.key)
    if last is None or run.last.iteration == 0:
        return None
    if metric in (WIN_RATE, STRICT_WIN_RATE):
        return Change(metric, split, _direction(last.low, last.high, 0.5), None, last, None)
    base = base_split.estimates.get(metric.key) if base_split else None
    if base is None:
        return None
    gain = last_split.estimates.get(metric.gain_key) if metric.gain_key else None
    gain = gain or _paired_gain(run, split, metric.key)
    if gain is not None:
        direction = _direction(gain.low, gain.high, 0.0)
    elif None in (base.low, base.high, last.low, last.high):
        direction = "unchanged"
    else:
        above, below = last.low - base.high, last.high - base.low  # type: ignore[operator]
        direction = _direction(above, below, 0.0)
    return Change(metric, split, direction, base, last, gain)


def changes_from_base(run: Run) -> list[Change]:
    """Every change that can be computed, by metric, then split."""
    found = [change_from_base(run, split, metric) for metric in METRICS for split in run.last.splits]
    return [change for change in found if change is not None]


VERBS = {"rose": "rose", "fell": "fell", "unchanged": "did not change measurably"}


def _win_clause(change: Change) -> str:
    what = {
        "rose": "the model beats its base",
        "fell": "the model loses to its base",
        "unchanged": "there is no measurable difference from the base",
    }[change.direction]
    return f"{what} {_on_split(change.split)}: win rate {change.amount()}."


def _joint_sentence(subject: str, changes: Sequence[Change]) -> str:
    clauses = [f"{VERBS[change.direction]} {_on_split(change.split)}, {change.amount()}" for change in changes]
    return f"{subject} {'; it '.join(clauses)}."


def headline(run: Run) -> tuple[str, list[str]]:
    """The page's first sentence and those that follow it, worded by the intervals alone."""
    n = run.last.iteration
    if n == 0:
        parts = []
        for name, summary in run.base.splits.items():
            mi, followed = summary.estimates["mi_nats"], summary.estimates.get("adherence")
            text = f"{split_label(name).capitalize()}: mutual information {NATS.value(mi.mean)} {NATS.interval(mi)}"
            text += f" of at most {NATS.number(run.base.ceiling_nats)}"
            parts.append(text + (f", followed in {RATE.value(followed.mean)} of cases." if followed else "."))
        return "Only the base model has been evaluated so far, so nothing can be said yet about SAMI.", parts

    changes = {(change.split, change.metric.key): change for change in changes_from_base(run)}

    def of(metric: Metric) -> list[Change]:
        return [changes[split, metric.key] for split in run.last.splits if (split, metric.key) in changes]

    after = f"After {n} iteration{'s' if n > 1 else ''}"
    wins = of(WIN_RATE)
    sentences = [_win_clause(change) for change in wins]
    if wins:
        sentences = [f"{after}, {sentences[0]}"] + [text[0].upper() + text[1:] for text in sentences[1:]]
        for split in run.last.splits:
            if (split, "win_rate") not in changes:
                sentences.append(f"No judge compared responses with the base's {_on_split(split)}.")
    else:
        sentences = [f"{after}, mutual information can be reported, but no win rate: there was no judge."]

    if of(ADHERENCE):
        sentences.append(_joint_sentence("The share of principles followed", of(ADHERENCE)))
    if of(MI):
        text = _joint_sentence(f"Mutual information (at most {NATS.value(run.last.ceiling_nats)})", of(MI))
        if wins and any(c.direction == "rose" for c in of(MI)) and not any(c.direction == "rose" for c in wins):
            text += " By itself that is no improvement: the judge saw none."
        sentences.append(text)

    falls = [change for metric in (WELL_FORMED, FAITHFUL) for change in of(metric) if change.is_concern]
    for change in falls:
        sentences.append(f"Warning: {change.metric.label.lower()} fell {_on_split(change.split)}, {change.amount()}.")
    if not of(WELL_FORMED) + of(FAITHFUL):
        sentences.append("Form and content were not judged.")
    elif not falls:
        sentences.append("No fall in form or content was measured.")
    drifts = [change for change in of(BASE_LOGP) if change.direction == "fell"]
    if drifts:
        sentences.append(
            _joint_sentence("The likelihood of the responses under the base", drifts)
            + " A small fall is the price of any change, a large one a sign of over-optimisation."
        )
    return sentences[0], sentences[1:]


# ---------------------------------------------------------------------------------------------------------------------
# Charts: pixel geometry here, drawing in the template
# ---------------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 42, 56, 14, 38


@dataclasses.dataclass(frozen=True)
class Mark:
    """One point in pixels, with the ends of its error bar and a text for a pointer that rests on it."""

    x: float
    y: float
    low_y: float | None
    high_y: float | None
    title: str


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    style: int  # picks colour, dash and marker in the template
    opacity: float
    marks: list[Mark]
    end_label: str
    end_label_x: float
    end_label_y: float

    @property
    def points(self) -> str:
        return " ".join(f"{mark.x},{mark.y}" for mark in self.marks)


@dataclasses.dataclass(frozen=True)
class Chart:
    """A line chart with everything the template needs to draw it."""

    title: str
    note: str
    description: str  # read aloud instead of the picture
    x_label: str
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]
    references: list[tuple[float, str]]
    series: list[Series]


def nice_ticks(low: float, high: float, target: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover [low, high]."""
    span = high - low if high > low else max(abs(high), 1.0)
    raw = span / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Moves label positions apart, keeping their order, until neighbours are `gap` pixels from each other."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    overflow = max([moved[index] for index in order] + [0]) - (HEIGHT - BOTTOM + 4)
    return [round(y - max(overflow, 0), 1) for y in moved]


@dataclasses.dataclass(frozen=True)
class Line:
    """Data of one line: x positions and estimates in data units."""

    label: str
    style: int
    opacity: float
    values: list[tuple[float, Estimate]]


def _tick_text(value: float, unit: Unit) -> str:
    text = f"{value * unit.scale:.6g}".replace("-", "\N{MINUS SIGN}")
    return f"{text} %" if unit is RATE else text


def line_chart(
    metric_title: str,
    note: str,
    unit: Unit,
    lines: Sequence[Line],
    *,
    x_label: str,
    x_names: Mapping[float, str] | None,
    y_range: tuple[float, float] | None,
    references: Sequence[tuple[float, str]] = (),
    dodge: float = 0.0,
    end_names: bool = False,
) -> Chart:
    """Lays out a line chart.

    Args:
        lines: what to draw; lines without values are left out.
        x_names: a text for each x; None puts round numbers there.
        y_range: data units; None fits the data.
        references: horizontal lines (data units, label).
        dodge: pixels between the lines' x positions, so that error bars do not cover each other.
        end_names: write the last word of each line's label at its end instead of its last value.
    """
    lines = [line for line in lines if line.values]
    xs = sorted({x for line in lines for x, _ in line.values} | set(x_names or {}))
    bounds = [
        bound for line in lines for _, e in line.values for bound in (e.mean, e.low, e.high) if bound is not None
    ] + [value for value, _ in references]
    if y_range:
        ticks = nice_ticks(*y_range)
        y_low, y_high = y_range
    else:
        ticks = nice_ticks(min(bounds), max(bounds))
        y_low, y_high = ticks[0], ticks[-1]
    x_low, x_high = xs[0], xs[-1]

    def place_x(x: float) -> float:
        share = 0.5 if x_high == x_low else (x - x_low) / (x_high - x_low)
        return LEFT + 16 + share * (WIDTH - LEFT - RIGHT - 28)

    def place_y(y: float) -> float:
        share = min(max((y - y_low) / (y_high - y_low), 0.0), 1.0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    ends = [place_y(line.values[-1][1].mean) for line in lines]
    ends = ends if end_names else _spread(ends, 13)
    series, spoken = [], []
    for index, (line, end_y) in enumerate(zip(lines, ends, strict=True)):
        shift = dodge * (index - (len(lines) - 1) / 2)
        marks = []
        for x, e in line.values:
            name = x_names[x] if x_names else f"{x_label} {x:g}"
            interval = "" if e.low is None else f" {unit.interval(e)}"
            marks.append(
                Mark(
                    x=round(place_x(x) + shift, 1),
                    y=place_y(e.mean),
                    low_y=None if e.low is None or e.low == e.high else place_y(e.low),
                    high_y=None if e.high is None or e.low == e.high else place_y(e.high),
                    title=f"{line.label}, {name}: {unit.value(e.mean)}{interval}",
                )
            )
        end = (
            line.label.split()[-1]
            if end_names
            else unit.value(line.values[-1][1].mean).removesuffix(unit.suffix) + (" %" if unit is RATE else "")
        )
        edge = place_x(line.values[-1][0]) + dodge * (len(lines) - 1) / 2 + 9
        series.append(Series(line.label, line.style, line.opacity, marks, end, round(edge, 1), end_y))
        first, last = marks[0].title, marks[-1].title
        spoken.append(first if len(marks) == 1 else f"{first}; {last}")
    shown_x = (
        x_names
        or {tick: f"{tick:g}" for tick in nice_ticks(x_low, x_high) if x_low <= tick <= x_high and tick == int(tick)}
        or {x_low: f"{x_low:g}"}
    )
    return Chart(
        title=metric_title,
        note=note,
        description=f"{metric_title}. " + ". ".join(spoken) + ".",
        x_label=x_label,
        y_ticks=[(place_y(tick), _tick_text(tick, unit)) for tick in ticks if y_low - 1e-9 <= tick <= y_high + 1e-9],
        x_ticks=[(round(place_x(x), 1), text) for x, text in shown_x.items()],
        references=[(place_y(value), text) for value, text in references],
        series=series,
    )


def split_names(run: Run) -> list[str]:
    """Splits of any iteration: the last one's first."""
    names = list(run.last.splits)
    return names + [name for e in run.evaluations for name in e.splits if name not in names]


def iteration_charts(run: Run) -> list[Chart]:
    """One chart per metric that was measured, a line per split; none while there is only the base."""
    if run.last.iteration == 0:
        return []
    charts = []
    x_names = {float(e.iteration): "base" if e.iteration == 0 else str(e.iteration) for e in run.evaluations}
    names = list(dict.fromkeys(split_names(run)))
    for metric in METRICS:
        lines = [
            Line(
                split_label(name),
                index,
                1.0,
                [
                    (float(e.iteration), e.splits[name].estimates[metric.key])
                    for e in run.evaluations
                    if name in e.splits and metric.key in e.splits[name].estimates
                ],
            )
            for index, name in enumerate(names)
        ]
        if not any(line.values for line in lines):
            continue
        references: list[tuple[float, str]] = []
        y_range: tuple[float, float] | None = (0.0, 1.0) if metric.unit is RATE else None
        title, note = metric.label, metric.note
        if metric in (WIN_RATE, STRICT_WIN_RATE):
            references = [(0.5, "no difference")]
        if metric is MI:
            ceiling = run.last.ceiling_nats
            references = [(ceiling, f"ceiling {ceiling:.3f}")]
            lowest = min(v for line in lines for _, e in line.values for v in (e.mean, e.low) if v is not None)
            y_range = (min(0.0, lowest), ceiling * 1.08)
            title += " (nats)"
            note = f"Lower bound from {run.last.normalize} log-probabilities: what a response tells of its rules."
        if metric is LENGTH:
            title += " (tokens)"
            y_range = (0.0, 1.1 * max(e.high or e.mean for line in lines for _, e in line.values) or 1.0)
        charts.append(
            line_chart(
                title,
                note,
                metric.unit,
                lines,
                x_label="iteration",
                x_names=x_names,
                y_range=y_range,
                references=references,
                dodge=7.0,
            )
        )
    return charts


def training_charts(run: Run) -> list[Chart]:
    """Loss, mutual information and KL by step, a line per iteration."""
    n = len(run.train_steps)
    charts = []
    for key, title, note in (
        ("loss", "Loss (nats)", "Two-sided InfoNCE on the training batch, plus any KL term: lower is better."),
        ("mi_nats", "Mutual information (nats)", "The same lower bound as in the evaluation, on the training batch."),
        ("kl", "KL to the base (nats per token)", "How far the model has moved from its base."),
    ):
        lines = [
            Line(
                f"iteration {iteration}",
                index,
                round(1.0 - 0.62 * (n - 1 - index) / max(n - 1, 1), 2),
                [
                    (float(row["step"]), Estimate(float(row[key]), None, None, 1))
                    for row in rows
                    if isinstance(row.get(key), int | float) and math.isfinite(row[key])
                ],
            )
            for index, (iteration, rows) in enumerate(run.train_steps.items())
        ]
        values = [e.mean for line in lines for _, e in line.values]
        if not values or (key == "kl" and not any(values)):
            continue
        charts.append(line_chart(title, note, NATS, lines, x_label="step", x_names=None, y_range=None, end_names=True))
    return charts


# ---------------------------------------------------------------------------------------------------------------------
# Tables and samples
# ---------------------------------------------------------------------------------------------------------------------


def _cell(estimate: Estimate | None, unit: Unit, *, sign: bool = False) -> tuple[str, str] | None:
    if estimate is None:
        return None
    text = unit.number(estimate.mean, sign=sign)
    return (f"{text} %" if unit is RATE and not sign else text), unit.interval(estimate, sign=sign)


def number_tables(run: Run) -> list[dict[str, Any]]:
    """Per split: every metric (rows) at every iteration (columns)."""
    tables = []
    for name in dict.fromkeys(split_names(run)):
        summaries = [e.splits.get(name) for e in run.evaluations]
        rows: list[tuple[str, list[Any]]] = []
        for metric in METRICS:
            for part, sign in ((metric, False), (GAINS.get(metric.gain_key or ""), True)):
                if part is None or not any(s and part.key in s.estimates for s in summaries):
                    continue
                label = part.label + {NATS: " (nats)", TOKENS: " (tokens)"}.get(part.unit, "")
                label += " (points)" if part.unit is RATE and sign else ""
                cells = [_cell(s.estimates.get(part.key), part.unit, sign=sign) if s else None for s in summaries]
                rows.append((label, cells))
            if metric is WIN_RATE and any(s and s.wins is not None for s in summaries):
                rows.append(
                    (
                        "Wins / ties / losses",
                        [
                            (f"{s.wins} / {s.ties} / {s.losses}", "") if s and s.wins is not None else None
                            for s in summaries
                        ],
                    )
                )
        rows.append(("Queries", [(str(s.n_queries), "") if s else None for s in summaries]))
        judges = list(dict.fromkeys(s.judge for s in summaries if s and s.judge))
        tables.append(
            {
                "name": split_label(name),
                "columns": [iteration_label(e.iteration) for e in run.evaluations],
                "rows": rows,
                "judges": judges,
            }
        )
    return tables


def principle_tables(run: Run) -> list[dict[str, Any]]:
    """Per split: adherence of each principle, base and last iteration."""
    tables = []
    for name, split in run.last.splits.items():
        base_split = run.base.splits.get(name)
        before_all = base_split.per_principle if base_split else {}
        rows = []
        for principle in dict.fromkeys([*before_all, *split.per_principle]):
            before, after = before_all.get(principle), split.per_principle.get(principle)
            verdict, difference = "", ""
            if run.last.iteration > 0 and before and after:
                difference = RATE.number(after.mean - before.mean, sign=True)
                if None in (before.low, before.high, after.low, after.high):
                    verdict = "too few queries"
                else:
                    direction = _direction(
                        after.low - before.high,
                        after.high - before.low,
                        0.0,  # type: ignore[operator]
                    )
                    verdict = {"rose": "rose", "fell": "fell", "unchanged": "no clear change"}[direction]
            rows.append(
                {
                    "principle": principle,
                    "before": _cell(before, RATE),
                    "after": _cell(after, RATE) if run.last.iteration > 0 else None,
                    "difference": difference,
                    "verdict": verdict,
                    "n": (after or before or Estimate(0, 0, 0, 0)).n,
                }
            )
        if rows:
            tables.append({"name": split_label(name), "rows": rows})
    return tables


def constitution_posterior(logps: np.ndarray) -> np.ndarray:
    """p(constitution c | response r) for a uniform prior over the constitutions: softmax over c.

    Args:
        logps: [C, R] log p(response r | constitution c).
    Returns:
        [C, R]; each column sums to 1.
    """
    shifted = np.exp(logps - logps.max(axis=0, keepdims=True))
    return shifted / shifted.sum(axis=0, keepdims=True)


def _response_view(result: QueryResult, index: int, name: str) -> dict[str, Any]:
    verdict = result.verdicts[index] if result.verdicts else None
    followed = (verdict.get("followed") or {}) if verdict else {}
    flags = []
    if verdict and verdict.get("well_formed") is False:
        flags.append("malformed")
    if verdict and verdict.get("faithful") is False:
        flags.append("content wrong")
    return {
        "name": name,
        "text": result.responses[index],
        "tokens": f"{result.response_tokens[index]:g}",
        "judged": verdict is not None,
        "followed": [(principle, bool(value)) for principle, value in followed.items()],
        "flags": flags,
    }


def _matrix_view(result: QueryResult, name: str) -> dict[str, Any]:
    posterior = constitution_posterior(result.logps)
    n = len(result.constitutions)
    return {
        "name": name,
        "mi": NATS.number(result.mi_nats),
        "cells": [
            [
                (LOG_PROB.number(result.logps[c, r]), round(100 * posterior[c, r]), round(float(posterior[c, r]), 3))
                for r in range(n)
            ]
            for c in range(n)
        ],
    }


def _followed_total(result: QueryResult) -> str:
    if result.verdicts is None:
        return "not judged"
    marks = [bool(value) for verdict in result.verdicts for value in (verdict.get("followed") or {}).values()]
    if marks:
        return f"{sum(marks)} of {len(marks)} followed"
    value = result.per_query("adherence")
    return "not judged" if value is None else f"{RATE.value(value)} followed"


def _has_changed(base: QueryResult, last: QueryResult) -> bool:
    before, after = base.per_query("adherence"), last.per_query("adherence")
    return base.responses != last.responses if before is None or after is None else before != after


def sample_groups(run: Run) -> list[dict[str, Any]]:
    """Samples of each split by a fixed rule: the first ones, then the first changed ones after them."""
    last_results = run.last_results or run.base_results
    last_name = iteration_label(run.last.iteration)
    groups = []
    for split in dict.fromkeys(result.split for result in run.base_results):
        pairs = [(base, last) for base, last in zip(run.base_results, last_results, strict=True) if base.split == split]
        later = pairs[N_FIRST_SAMPLES:]
        chosen = [(False, *pair) for pair in pairs[:N_FIRST_SAMPLES]]
        chosen += [(True, *pair) for pair in [pair for pair in later if _has_changed(*pair)][:N_CHANGED_SAMPLES]]
        cards = []
        for is_changed, base, last in chosen:
            versions = [(base, "base")] + ([(last, last_name)] if run.last_results is not None else [])
            cards.append(
                {
                    "is_changed": is_changed,
                    "example_id": base.example_id,
                    "query": base.query,
                    "totals": [(name, _followed_total(result)) for result, name in versions],
                    "constitutions": [
                        {"text": text, "responses": [_response_view(result, c, name) for result, name in versions]}
                        for c, text in enumerate(base.constitutions)
                    ],
                    "matrices": [_matrix_view(result, name) for result, name in versions],
                }
            )
        groups.append({"name": split_label(split), "cards": cards, "n_queries": len(pairs)})
    return groups


def funnel_tables(run: Run) -> dict[str, Any] | None:
    """Queries, drops by rule and kept pairs of each iteration."""
    if not run.funnels:
        return None
    reasons = list(dict.fromkeys(reason for counts in run.funnels.values() for reason in counts["dropped"]))
    columns = []
    for iteration, counts in run.funnels.items():
        dropped = {reason: int(counts["dropped"].get(reason, 0)) for reason in reasons}
        sampled, kept = int(counts["sampled"]), int(counts["kept"])
        unaccounted = sampled - kept - sum(dropped.values())
        total = max(sampled, kept + sum(dropped.values()), 1)
        columns.append(
            {
                "name": iteration_label(iteration),
                "queries": int(counts["queries"]),
                "sampled": sampled,
                "kept": kept,
                "dropped": dropped,
                "unaccounted": unaccounted,
                "kept_percent": f"{100 * kept / max(sampled, 1):.1f} %",
                "segments": [("kept", kept, round(100 * kept / total, 2))]
                + [(reason.replace("_", " "), n, round(100 * n / total, 2)) for reason, n in dropped.items() if n],
            }
        )
    return {"reasons": reasons, "columns": columns, "has_unaccounted": any(c["unaccounted"] for c in columns)}


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 05 s, 2 h 07 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def timing_rows(run: Run) -> list[dict[str, Any]]:
    """Each stage's time, with a bar relative to the longest."""
    longest = max([seconds for *_, seconds in run.stages] + [1e-9])
    return [
        {
            "iteration": "\N{EN DASH}" if iteration is None else iteration_label(iteration),
            "stage": stage.replace("_", " "),
            "time": duration(seconds),
            "percent": round(100 * seconds / longest, 1),
        }
        for iteration, stage, seconds in run.stages
    ]


def _tiles(run: Run) -> list[dict[str, Any]]:
    tiles = []
    for metric in (WIN_RATE, ADHERENCE, MI, WELL_FORMED, FAITHFUL, LENGTH):
        entries = []
        for index, (name, split) in enumerate(run.last.splits.items()):
            last = split.estimates.get(metric.key)
            if last is None:
                continue
            change = change_from_base(run, name, metric)
            detail = metric.unit.interval(last)
            if metric is WIN_RATE and split.wins is not None:
                detail += f" \N{MIDDLE DOT} {split.wins} won, {split.ties} tied, {split.losses} lost"
            elif change and change.base:
                detail = f"base {metric.unit.value(change.base.mean)}"
                if change.gain:
                    detail += f", {metric.unit.change(change.gain.mean)} {metric.unit.interval(change.gain, sign=True)}"
            word = {
                "rose": "\N{BLACK UP-POINTING TRIANGLE} above the base",
                "fell": "\N{BLACK DOWN-POINTING TRIANGLE} below the base",
                "unchanged": "no measurable difference",
            }
            entries.append(
                {
                    "split": split_label(name),
                    "style": index,
                    "value": metric.unit.number(last.mean),
                    "unit": metric.unit.suffix,
                    "detail": detail,
                    "direction": change.direction if change else "",
                    "word": word[change.direction] if change else "",
                }
            )
        if entries:
            tiles.append({"label": metric.label, "entries": entries})
    return tiles


def _finding_groups(run: Run) -> list[dict[str, Any]]:
    changes = changes_from_base(run)
    titles = (
        ("rose", "Rose", "\N{BLACK UP-POINTING TRIANGLE}"),
        ("unchanged", "No measurable change", "\N{EN DASH}"),
        ("fell", "Fell", "\N{BLACK DOWN-POINTING TRIANGLE}"),
    )
    return [
        {
            "kind": kind,
            "title": title,
            "sign": sign,
            "items": [
                {
                    "label": metric.label,
                    "splits": [
                        (split_label(c.split), c.amount(), c.is_concern)
                        for c in changes
                        if c.direction == kind and c.metric is metric
                    ],
                }
                for metric in METRICS
                if any(c.direction == kind and c.metric is metric for c in changes)
            ],
        }
        for kind, title, sign in titles
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in sorted(config.items()):
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def render_report(run: Run) -> str:
    """The page as HTML. Every text is escaped; the same run gives the same bytes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    first, rest = headline(run)
    return environment.get_template("report.html.jinja").render(
        run=run,
        run_id=str(run.info.get("run_id", "unnamed")),
        headline=first,
        sentences=rest,
        findings=_finding_groups(run) if run.last_results is not None else [],
        tiles=_tiles(run),
        splits=[(index, split_label(name)) for index, name in enumerate(dict.fromkeys(split_names(run)))],
        iteration_charts=iteration_charts(run),
        training_charts=training_charts(run),
        tables=number_tables(run),
        principles=principle_tables(run),
        sample_groups=sample_groups(run),
        n_first=N_FIRST_SAMPLES,
        n_changed=N_CHANGED_SAMPLES,
        n_open=N_OPEN_SAMPLES,
        funnel=funnel_tables(run),
        timing=timing_rows(run),
        total_time=duration(sum(seconds for *_, seconds in run.stages)),
        config=list(_flat(run.config)),
        info=list(_flat(run.info)),
        last_name=iteration_label(run.last.iteration),
        geometry={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    )


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SaveFailedError(
            f"{path}: the report could not be written ({error}). Free space or change the folder's "
            "permissions, then run the report again."
        ) from error


def write_report(run_dir: Path) -> Path:
    """Writes `report/index.html` of a run: one page that needs no network and no scripts.

    Args:
        run_dir: a run directory whose base, at least, has been evaluated.
    Returns:
        The path of the page.
    Raises:
        BadDataError: a file of the run is missing or malformed; the message names it and the remedy.
        SaveFailedError: the page could not be written.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report" / "index.html"
    _write_atomically(path, render_report(read_run(run_dir)))
    return path


def summary_table(run_dir: Path) -> str:
    """A plain-text table for the terminal: a row per iteration, the main metrics of each split.

    Reads only the summaries. `+-` is half of the 95 % interval's width; rates are in per cent.

    Raises:
        BadDataError: the base was not evaluated, or a summary is malformed.
    """
    evaluations = read_evaluations(Path(run_dir))
    metrics: tuple[tuple[str, Metric, bool], ...] = (
        ("win %", WIN_RATE, True),
        ("followed %", ADHERENCE, True),
        ("MI nats", MI, False),
        ("well-formed %", WELL_FORMED, False),
        ("tokens", LENGTH, False),
    )

    def text(split: SplitSummary | None, metric: Metric, with_interval: bool) -> str:
        estimate = split.estimates.get(metric.key) if split else None
        if estimate is None:
            return "-"
        unit = metric.unit
        value = unit.number(estimate.mean).replace("\N{MINUS SIGN}", "-")
        if not with_interval or estimate.low is None or estimate.high is None:
            return value
        return f"{value} +-{unit.number((estimate.high - estimate.low) / 2)}"

    names = list(dict.fromkeys(name for e in reversed(evaluations) for name in e.splits))
    blocks = [[["iteration"] + [("base" if e.iteration == 0 else str(e.iteration)) for e in evaluations]]]
    for name in names:
        blocks.append(
            [[title] + [text(e.splits.get(name), metric, wide) for e in evaluations] for title, metric, wide in metrics]
        )

    def pad(column: list[str]) -> list[str]:
        return [item.rjust(max(map(len, column))) for item in column]

    rendered = [["  ".join(row) for row in zip(*map(pad, block), strict=True)] for block in blocks]
    heads = [""] + [split_label(name) for name in names]
    widths = [max(len(head), len(block[0])) for head, block in zip(heads, rendered, strict=True)]
    lines = [" | ".join(head.ljust(width) for head, width in zip(heads, widths, strict=True)).rstrip()]
    for row in zip(*rendered, strict=True):
        lines.append(" | ".join(item.rjust(width) for item, width in zip(row, widths, strict=True)))
    return "\n".join(lines) + "\n"
