"""Principles: a name, a definition and its antithesis, read from a file."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sami_jax.errors import BadDataError
from sami_jax.files import read_json


class Statement(NamedTuple):
    """A sentence of a constitution.

    Attributes:
      principle: name of the one it is about.
      asked: it is the definition, else the antithesis.
      text: the sentence.
    """

    principle: str
    asked: bool
    text: str


@dataclasses.dataclass(frozen=True)
class Principle:
    """One thing a response can follow or oppose (paper, section 3.1).

    Attributes:
      name: short and unique.
      definition: what a response following it is like, one sentence.
      antithesis: the opposite, one sentence.
      held_out: kept from training, for evaluation only.
    """

    name: str
    definition: str
    antithesis: str
    held_out: bool = False

    def statement(self, asked: bool) -> Statement:
        """The definition where it is asked for, else the antithesis."""
        return Statement(self.name, asked, self.definition if asked else self.antithesis)


def learned(principles: Sequence[Principle]) -> list[Principle]:
    """Those that SAMI trains on: all but the held-out ones."""
    return [principle for principle in principles if not principle.held_out]


def read_principles(path: Path) -> list[Principle]:
    """Reads `[{"name", "definition", "antithesis", "held_out"?}, ...]`.

    Raises:
      BadDataError: the file, the entry and what is wrong with it.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise BadDataError(f"{path}: expected a list of at least one principle.")
    principles = []
    for index, entry in enumerate(entries):
        try:
            principle = Principle(**entry)
        except TypeError as error:
            raise BadDataError(
                f"{path}, entry {index}: a principle has name, definition, antithesis and held_out ({error})."
            ) from error
        texts = (principle.name, principle.definition, principle.antithesis)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise BadDataError(f"{path}, entry {index}: name, definition and antithesis must be non-empty text.")
        if not isinstance(principle.held_out, bool):
            raise BadDataError(f"{path}, entry {index}: held_out must be true or false.")
        principles.append(principle)
    names = [principle.name for principle in principles]
    if len(set(names)) != len(names):
        raise BadDataError(f"{path}: two principles share a name; names must be unique.")
    return principles
