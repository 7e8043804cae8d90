"""Queries: what the model is asked about, in a file of JSON lines, split into alternating halves."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from sami_jax.errors import BadDataError
from sami_jax.files import iterate_jsonl


@dataclasses.dataclass(frozen=True)
class Query:
    """One question, post or instruction.

    Attributes:
      example_id: unique.
      text: what goes into the prompt.
      facts: what a programmatic judge needs to know about it; empty where there is none.
    """

    example_id: str
    text: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


T = TypeVar("T")
COLUMNS = {"example_id", "text", "facts"}


class Queries(Sequence[Query]):
    """The queries of a file, read when they are asked for: a file of any size takes 8 bytes a query of memory."""

    def __init__(self, path: Path, offsets: np.ndarray):
        """Takes the file, and where in it each query's line begins."""
        self._path, self._offsets = path, offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Query]:
        with self._path.open("rb") as file:
            for offset in self._offsets:
                file.seek(offset)
                yield Query(**json.loads(file.readline()))

    @overload
    def __getitem__(self, index: int) -> Query: ...

    @overload
    def __getitem__(self, index: slice) -> "Queries": ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Queries(self._path, self._offsets[index])
        [query] = Queries(self._path, self._offsets[index][None])
        return query


def read_queries(path: Path) -> Queries:
    """The queries of a file with one `{"example_id", "text", "facts"?}` a line, in its order.

    Raises:
      BadDataError: the file, the line and what is wrong with it.
    """
    offsets, seen = [], set()
    for number, offset, record in iterate_jsonl(path):
        where = f"{path}, line {number}"
        if not isinstance(record, dict) or not {"example_id", "text"} <= record.keys() <= COLUMNS:
            raise BadDataError(f"{where}: expected an object with example_id, text and optionally facts.")
        query = Query(**record)
        if not isinstance(query.example_id, str) or not isinstance(query.text, str) or not query.text.strip():
            raise BadDataError(f"{where}: example_id must be text, and text must be non-empty text.")
        if not isinstance(query.facts, dict):
            raise BadDataError(f"{where}: facts must be an object.")
        if query.example_id in seen:
            raise BadDataError(f"{where}: example_id {query.example_id!r} stands twice.")
        seen.add(query.example_id)
        offsets.append(offset)
    if not offsets:
        raise BadDataError(f"{path} holds no queries.")
    return Queries(path, np.array(offsets, np.int64))


def alternating_half(queries: Sequence[T], iteration: int) -> Sequence[T]:
    """The half that iteration 1, 2, 3, ... samples on, so that no model samples on queries it was trained on."""
    return queries[(iteration - 1) % 2 :: 2]
