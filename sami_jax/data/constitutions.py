"""Constitutions: for each of a few principles its definition or its antithesis, as a numbered list."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from sami_jax.data.principles import Principle
from sami_jax.errors import BadConfigError


@dataclasses.dataclass(frozen=True)
class Constitution:
    """What a response is asked to follow.

    Attributes:
      statements: (principle, asked): the definition is asked for where `asked` is True, else the antithesis.
    """

    statements: tuple[tuple[Principle, bool], ...]

    @property
    def text(self) -> str:
        """`1. ...\\n2. ...`."""
        sentences = (p.definition if asked else p.antithesis for p, asked in self.statements)
        return "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, start=1))

    @property
    def asked(self) -> dict[str, bool]:
        """Principle name -> definition (True) or antithesis (False)."""
        return {principle.name: asked for principle, asked in self.statements}

    def shuffled(self, rng: np.random.Generator) -> "Constitution":
        """The same statements in another order, so that order carries no signal (paper, appendix on prompts)."""
        return Constitution(tuple(self.statements[i] for i in rng.permutation(len(self.statements))))


def draw_constitutions(
    principles: Sequence[Principle], rng: np.random.Generator, *, count: int, per_query: int, pairing: str
) -> list[Constitution]:
    """The contrasting constitutions of one query: the same principles in one order, different signs.

    Args:
      principles: to draw from.
      rng: the query's own generator.
      count: C, how many constitutions.
      per_query: principles in each.
      pairing: "symmetric": any `count` sign patterns that differ, in random order (C = 2: every ordered pair alike);
        "authors": the first has all definitions, the others are distinct other patterns.

    Raises:
      BadConfigError: there are too few principles or sign patterns.
    """
    if per_query > len(principles):
        raise BadConfigError(
            f"Constitutions of {per_query} principles each cannot be drawn from {len(principles)} principles; lower "
            "config.constitutions.principles_per_query, or give more principles."
        )
    patterns = list(itertools.product((True, False), repeat=per_query))
    if count > len(patterns):
        raise BadConfigError(
            f"{per_query} principles have {len(patterns)} sign patterns, too few for {count} constitutions that "
            "differ; lower config.constitutions.count, or raise config.constitutions.principles_per_query."
        )
    drawn = [principles[i] for i in rng.permutation(len(principles))[:per_query]]
    first = [0] if pairing == "authors" else []
    others = [i for i in rng.permutation(len(patterns)) if i not in first]
    return [Constitution(tuple(zip(drawn, patterns[i], strict=True))) for i in (first + others)[:count]]
