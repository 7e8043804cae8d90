"""Queries: what the model is asked about, read from JSON lines and split into alternating halves."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sami_jax.errors import BadDataError
from sami_jax.files import read_jsonl


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


def read_queries(path: Path) -> list[Query]:
    """Reads one `{"example_id", "text", "facts"?}` a line, in file order.

    Raises:
      BadDataError: the file, the line and what is wrong with it.
    """
    queries, seen = [], set()
    for number, record in enumerate(read_jsonl(path), start=1):
        where = f"{path}, entry {number}"
        if not isinstance(record, dict) or not {"example_id", "text"} <= record.keys() <= {
            "example_id",
            "text",
            "facts",
        }:
            raise BadDataError(f"{where}: expected an object with example_id, text and optionally facts.")
        query = Query(**record)
        if not isinstance(query.example_id, str) or not isinstance(query.text, str) or not query.text.strip():
            raise BadDataError(f"{where}: example_id must be text, and text must be non-empty text.")
        if not isinstance(query.facts, dict):
            raise BadDataError(f"{where}: facts must be an object.")
        if query.example_id in seen:
            raise BadDataError(f"{where}: example_id {query.example_id!r} stands twice.")
        seen.add(query.example_id)
        queries.append(query)
    if not queries:
        raise BadDataError(f"{path} holds no queries.")
    return queries


def alternating_half(queries: Sequence[Query], iteration: int) -> Sequence[Query]:
    """The half that iteration 1, 2, 3, ... samples on, so that no model samples on queries it was trained on."""
    return queries[(iteration - 1) % 2 :: 2]
