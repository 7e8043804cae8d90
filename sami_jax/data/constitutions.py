"""Constitutions: for each of a few principles its definition or its antithesis, as a numbered list."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np

from sami_jax.data.principles import Principle, Statement
from sami_jax.errors import BadConfigError


@dataclasses.dataclass(frozen=True)
class Constitution:
    """What a response is asked to follow: statements of principles, in order."""

    statements: tuple[Statement, ...]

    @property
    def text(self) -> str:
        """`1. ...\\n2. ...`."""
        return "\n".join(f"{number}. {statement.text}" for number, statement in enumerate(self.statements, start=1))

    @property
    def asked(self) -> dict[str, bool]:
        """Principle name -> definition (True) or antithesis (False)."""
        return {statement.principle: statement.asked for statement in self.statements}

    def shuffled(self, rng: np.random.Generator) -> "Constitution":
        """The same statements in another order, so that order carries no signal (paper, appendix on prompts)."""
        return Constitution(tuple(self.statements[i] for i in rng.permutation(len(self.statements))))


def read_statements(text: str) -> list[str]:
    """The statements of a constitution's text, without their numbers.

    A statement begins with the number behind the one before it, at the beginning of a line, from 0 or 1 on: other
    numbers stand inside a sentence, and lines without one go on with it. Where no line begins with a number, each is
    a statement of its own, bullets aside.
    """
    lines = [line.strip() for line in re.split(r"\r\n?|\n", text)]
    statements: list[str] = []
    following = None
    for line in filter(None, lines):
        numbered = re.match(r"(\d+)[.)]\s+(?=\S)", line)
        if numbered and (int(numbered[1]) == following or (following is None and int(numbered[1]) <= 1)):
            following = int(numbered[1]) + 1
            statements.append(line[numbered.end() :])
        elif following is None:
            statements.append(re.sub(r"^[-*\u2022]\s+", "", line))
        else:
            statements[-1] += f" {line}"
    return statements


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
        "authors": the first has all definitions, the others are distinct other patterns, as in the six files of each
        of the authors' folders; "diverse": the same, of more principles than `per_query`, of which each query gets
        others (paper, section 4.3: two of fifteen, one or both flipped).

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
    first = [] if pairing == "symmetric" else [0]
    others = [i for i in rng.permutation(len(patterns)) if i not in first]
    return [
        Constitution(tuple(p.statement(asked) for p, asked in zip(drawn, patterns[i], strict=True)))
        for i in (first + others)[:count]
    ]
