"""Queries shown before and after, chosen by a fixed rule."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from sami_jax.evaluation.results import QueryResult
from sami_jax.report.measures import iteration_label
from sami_jax.report.reading import Run

N_FIRST = 6  # per split, in file order, whatever they show
N_CHANGED = 4  # per split, in file order, after the first


@dataclasses.dataclass(frozen=True)
class Sample:
    """One query under each of its constitutions."""

    is_changed: bool  # chosen because it has changed
    versions: Mapping[str, QueryResult]  # "base" and the last iteration's label; the base alone where there is no other

    @property
    def base(self) -> QueryResult:
        return self.versions["base"]


def samples_by_split(run: Run) -> dict[str, list[Sample]]:
    """The first queries of each split, then the first of the later ones that have changed."""
    groups: dict[str, list[Sample]] = {}
    for split in run.last.splits:
        base = [result for result in run.base_results if result.split == split]
        if run.last_results is None:
            groups[split] = [Sample(False, {"base": result}) for result in base[:N_FIRST]]
            continue
        last = [result for result in run.last_results if result.split == split]
        label = iteration_label(run.last.iteration)
        pairs = list(zip(base, last, strict=True))
        changed = [pair for pair in pairs[N_FIRST:] if _has_changed(*pair)][:N_CHANGED]
        groups[split] = [
            Sample(is_changed, {"base": before, label: after})
            for chosen, is_changed in ((pairs[:N_FIRST], False), (changed, True))
            for before, after in chosen
        ]
    return groups


def _has_changed(base: QueryResult, last: QueryResult) -> bool:
    before, after = base.per_query("adherence"), last.per_query("adherence")
    return base.responses != last.responses if before is None else before != after


def constitution_posterior(logps: np.ndarray) -> np.ndarray:
    """p(constitution c | response r) for a uniform prior over the constitutions: softmax over c.

    Args:
      logps: [C, R] log p(response r | constitution c).

    Returns:
      [C, R]; each column sums to 1.
    """
    shifted = np.exp(logps - logps.max(axis=0, keepdims=True))
    return shifted / shifted.sum(axis=0, keepdims=True)


def followed_text(result: QueryResult) -> str:
    """ "3 of 4 followed", over the constitutions and their principles."""
    if result.verdicts is None:
        return "not judged"
    marks = [followed for verdict in result.verdicts for followed in verdict.followed.values()]
    return f"{sum(marks)} of {len(marks)} followed"
