"""Tasks: a query and the constitutions it is to be answered under."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sami_jax.config.data import ConstitutionsConfig
from sami_jax.data.constitutions import Constitution, draw_constitutions
from sami_jax.data.principles import Principle
from sami_jax.data.prompts import render
from sami_jax.data.queries import Query


@dataclasses.dataclass(frozen=True)
class Task:
    """A query and its C constitutions."""

    query: Query
    constitutions: tuple[Constitution, ...]

    def prompts(self, template: str) -> list[str]:
        """The C prompts of a template."""
        return [render(template, constitution=c.text, query=self.query.text) for c in self.constitutions]


def draw_task(
    query: Query, principles: Sequence[Principle], config: ConstitutionsConfig, rng: np.random.Generator
) -> Task:
    """The query with constitutions drawn for it from the principles by its own generator.

    Raises:
      BadConfigError: there are too few principles.
    """
    drawn = draw_constitutions(
        principles, rng, count=config.count, per_query=config.principles_per_query, pairing=config.pairing
    )
    return Task(query, tuple(drawn))
