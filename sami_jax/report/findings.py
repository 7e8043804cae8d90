"""What moved from the base to the last iteration, and the sentences that say so, from the intervals alone."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from sami_jax.evaluation.statistics import Estimate, mean_with_interval
from sami_jax.report.measures import (
    ADHERENCE,
    BASE_LOGP,
    FAITHFUL,
    METRICS,
    MI,
    NATS,
    RATE,
    SPLIT_LABELS,
    WELL_FORMED,
    WIN_RATE,
    Metric,
)
from sami_jax.report.reading import Run

NO_CHANGE = 1e-9  # a change within rounding error of zero is none
LOW_SHARE = 0.8  # of form or content; a base at or below it says little by not falling (the miniature's gate)

Direction = Literal["rose", "fell", "unchanged"]


def direction(low: float | None, high: float | None, centre: float = 0.0) -> Direction:
    """ "rose" / "fell" where the whole interval lies above / below the centre."""
    if low is None or high is None:
        return "unchanged"
    return "rose" if low > centre + NO_CHANGE else "fell" if high < centre - NO_CHANGE else "unchanged"


def unpaired_direction(before: Estimate, after: Estimate) -> Direction:
    """ "rose" / "fell" where the two intervals do not overlap."""
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return "unchanged"
    return direction(after.low - before.high, after.high - before.low)


@dataclasses.dataclass(frozen=True)
class Change:
    """How a metric of a split moved from the base to the last iteration."""

    metric: Metric
    split: str
    direction: Direction
    base: Estimate | None  # None for comparisons with the base
    last: Estimate
    gain: Estimate | None  # paired difference over the same queries, where there is one

    @property
    def is_concern(self) -> bool:
        return self.direction == "fell" and self.metric.fall_is_bad

    @property
    def amount(self) -> str:
        unit = self.metric.unit
        if self.base is None:
            return f"{unit.value(self.last.mean)} {unit.interval(self.last)}"
        arrow = f"{unit.number(self.base.mean)} \N{RIGHTWARDS ARROW} {unit.value(self.last.mean)}"
        if self.gain is None:
            return f"{arrow} (intervals {'overlap' if self.direction == 'unchanged' else 'do not overlap'})"
        return f"{arrow} ({unit.change(self.gain.mean)} {unit.interval(self.gain, sign=True)})"


def changes_from_base(run: Run) -> list[Change]:
    """Every change that can be computed, by metric, then split; none while there is only the base."""
    if run.last_results is None:
        return []
    found = [_change(run, split, metric) for metric in METRICS for split in run.last.splits]
    return [change for change in found if change is not None]


def _change(run: Run, split: str, metric: Metric) -> Change | None:
    """How a metric moved, judged by an interval; None where base or last was not measured.

    Comparisons are held against 0.5. Other metrics use the paired difference (the summary's, else one made from
    results.jsonl); without one, a change needs two intervals that do not overlap.
    """
    last = run.last.splits[split].estimates.get(metric.key)
    if last is None:
        return None
    if metric.is_comparison:
        return Change(metric, split, direction(last.low, last.high, 0.5), None, last, None)
    base = run.base.splits[split].estimates.get(metric.key)
    if base is None:
        return None
    gain = run.last.splits[split].estimates.get(metric.gain_key or "") or _paired_gain(run, split, metric)
    moved = unpaired_direction(base, last) if gain is None else direction(gain.low, gain.high)
    return Change(metric, split, moved, base, last, gain)


def _paired_gain(run: Run, split: str, metric: Metric) -> Estimate | None:
    pairs = zip(run.base_results, run.last_results or [], strict=True)
    values = [(b.per_query(metric.key), a.per_query(metric.key)) for b, a in pairs if b.split == split]
    gains = [after - before for before, after in values if before is not None and after is not None]
    return mean_with_interval(gains) if gains else None


def headline(run: Run) -> list[str]:
    """The page's first sentence and those that follow it."""
    if run.last_results is None:
        return _base_alone(run)
    changes = changes_from_base(run)

    def of(*metrics: Metric) -> list[Change]:
        return [change for change in changes if change.metric in metrics]

    after = f"After {run.last.iteration} iteration{'s' if run.last.iteration > 1 else ''}"
    wins = of(WIN_RATE)
    if wins:
        first, *others = (_win_clause(change) for change in wins)
        sentences = [f"{after}, {first}", *(text[0].upper() + text[1:] for text in others)]
    else:
        sentences = [f"{after}, mutual information can be reported, but no win rate: there was no judge."]

    if of(ADHERENCE):
        sentences.append(_joint_sentence("The share of principles followed", of(ADHERENCE)))
    if of(MI):
        text = _joint_sentence(f"Mutual information (at most {NATS.value(run.last.ceiling_nats)})", of(MI))
        if wins and any(c.direction == "rose" for c in of(MI)) and not any(c.direction == "rose" for c in wins):
            text += " By itself that is no improvement: the judge saw none."
        sentences.append(text)

    form = of(WELL_FORMED, FAITHFUL)
    warnings = [f"Warning: {concern}" for concern in map(_form_concern, form) if concern]
    quiet = "No fall in form or content was measured." if form else "Form and content were not judged."
    sentences += warnings or [quiet]
    drifts = [change for change in of(BASE_LOGP) if change.direction == "fell"]
    if drifts:
        sentences.append(
            _joint_sentence("The likelihood of the responses under the base", drifts)
            + " A small fall is the price of any change, a large one a sign of over-optimisation."
        )
    return sentences


def _form_concern(change: Change) -> str | None:
    """What is wrong with form or content: a fall, or a base in which there was little to fall."""
    label = change.metric.label.lower()
    if change.is_concern:
        return f"{label} fell {_on(change.split)}, {change.amount}."
    if change.base is not None and change.base.mean <= LOW_SHARE:
        return f"the share of {label} was low in the base already {_on(change.split)}, {change.amount}."
    return None


def _base_alone(run: Run) -> list[str]:
    sentences = ["Only the base model has been evaluated so far, so nothing can be said yet about SAMI."]
    for name, summary in run.base.splits.items():
        mi, followed = summary.estimates.get(MI.key), summary.estimates.get(ADHERENCE.key)
        parts = []
        if mi:
            at_most = NATS.number(run.base.ceiling_nats)
            parts.append(f"mutual information {NATS.value(mi.mean)} {NATS.interval(mi)} of at most {at_most}")
        if followed:
            parts.append(f"followed in {RATE.value(followed.mean)} of cases")
        if parts:
            sentences.append(f"{SPLIT_LABELS[name].capitalize()}: {', '.join(parts)}.")
    return sentences


def _on(split: str) -> str:
    return f"on the {SPLIT_LABELS[split]}"


def _win_clause(change: Change) -> str:
    what = {
        "rose": "the model beats its base",
        "fell": "the model loses to its base",
        "unchanged": "there is no measurable difference from the base",
    }[change.direction]
    return f"{what} {_on(change.split)}: win rate {change.amount}."


def _joint_sentence(subject: str, changes: Sequence[Change]) -> str:
    verbs = {"rose": "rose", "fell": "fell", "unchanged": "did not change measurably"}
    clauses = [f"{verbs[change.direction]} {_on(change.split)}, {change.amount}" for change in changes]
    return f"{subject} {'; it '.join(clauses)}."
