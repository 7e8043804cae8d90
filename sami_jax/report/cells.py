"""What a table of the report is made of."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Cell(NamedTuple):
    """A number and, in small print, its interval."""

    text: str
    interval: str = ""


@dataclasses.dataclass(frozen=True)
class NumberTable:
    """Quantities (rows) at every iteration (columns); None was not measured."""

    name: str
    judge: str | None
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
