"""Queries from JSON lines; the halves that iterations alternate between."""

import dataclasses
import json

import pytest

from sami_jax.data.queries import Query, alternating_half, read_queries
from sami_jax.errors import BadDataError

GOOD = {"example_id": "a", "text": "What?"}


def write(folder, *records):
    path = folder / "queries.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_reads_in_file_order(tmp_path):
    facts = {"topic": "3"}
    path = write(tmp_path, {"text": "B?", "example_id": "b", "facts": facts}, GOOD)
    assert read_queries(path) == [Query("b", "B?", facts), Query("a", "What?")]


def test_round_trip(tmp_path):
    queries = [Query("a", "A\n {x}"), Query("b", "B", {"mood": "sad"})]
    assert read_queries(write(tmp_path, *map(dataclasses.asdict, queries))) == queries


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no queries"),
        ([GOOD, ["b", "B?"]], "entry 2: expected an object with example_id, text"),
        ([GOOD, {"example_id": "b"}], "entry 2: expected an object"),
        ([GOOD | {"answer": "x"}], "entry 1: expected an object"),
        ([GOOD | {"text": " \n"}], "entry 1: .*text must be non-empty text"),
        ([GOOD | {"text": None}], "entry 1: .*text must be non-empty text"),
        ([GOOD | {"example_id": 7}], "entry 1: example_id must be text"),
        ([GOOD | {"facts": [1]}], "entry 1: facts must be an object"),
        ([GOOD, GOOD | {"example_id": "b"}, GOOD], "entry 3: example_id 'a' stands twice"),
    ],
)
def test_mistakes_are_named_with_file_and_entry(tmp_path, records, message):
    with pytest.raises(BadDataError, match=rf"queries.jsonl.*{message}"):
        read_queries(write(tmp_path, *records))


def test_halves_alternate_and_never_overlap():
    queries = [Query(str(i), "x") for i in range(7)]
    first, second, third = (list(alternating_half(queries, iteration)) for iteration in (1, 2, 3))
    assert [q.example_id for q in first] == ["0", "2", "4", "6"]
    assert [q.example_id for q in second] == ["1", "3", "5"]
    assert third == first
