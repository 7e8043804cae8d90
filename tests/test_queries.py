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
    queries = read_queries(path)
    assert list(queries) == [Query("b", "B?", facts), Query("a", "What?")] and len(queries) == 2
    assert queries[1] == queries[-1] == Query("a", "What?") and list(queries[::-1]) == [queries[1], queries[0]]


def test_lines_are_found_again_behind_a_byte_order_mark_empty_lines_and_characters_of_several_bytes(tmp_path):
    lines = [json.dumps({"example_id": str(i), "text": "é" * i}, ensure_ascii=False) for i in range(1, 5)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())
    queries = read_queries(tmp_path / "a.jsonl")
    assert [query.text for query in queries] == [queries[i].text for i in range(4)] == ["é", "éé", "ééé", "éééé"]


def test_round_trip(tmp_path):
    queries = [Query("a", "A\n {x}"), Query("b", "B", {"mood": "sad"})]
    assert list(read_queries(write(tmp_path, *map(dataclasses.asdict, queries)))) == queries


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no queries"),
        ([GOOD, ["b", "B?"]], "line 2: expected an object with example_id, text"),
        ([GOOD, {"example_id": "b"}], "line 2: expected an object"),
        ([GOOD | {"answer": "x"}], "line 1: expected an object"),
        ([GOOD | {"text": " \n"}], "line 1: .*text must be non-empty text"),
        ([GOOD | {"text": None}], "line 1: .*text must be non-empty text"),
        ([GOOD | {"example_id": 7}], "line 1: example_id must be text"),
        ([GOOD | {"facts": [1]}], "line 1: facts must be an object"),
        ([GOOD, GOOD | {"example_id": "b"}, GOOD], "line 3: example_id 'a' stands twice"),
    ],
)
def test_mistakes_are_named_with_file_and_entry(tmp_path, records, message):
    with pytest.raises(BadDataError, match=rf"queries.jsonl.*{message}"):
        read_queries(write(tmp_path, *records))


def test_halves_alternate_and_never_overlap(tmp_path):
    queries = read_queries(write(tmp_path, *({"example_id": str(i), "text": "x"} for i in range(7))))
    first, second, third = (list(alternating_half(queries, iteration)) for iteration in (1, 2, 3))
    assert [q.example_id for q in first] == ["0", "2", "4", "6"]
    assert [q.example_id for q in second] == ["1", "3", "5"]
    assert third == first
