"""Principles from a file; a mistake in it is named with file and entry."""

import dataclasses
import json

import pytest

from sami_jax.data.principles import Principle, read_principles
from sami_jax.errors import BadDataError

CONCISE = {"name": "concise", "definition": "Be brief.", "antithesis": "Be long."}
POLITE = {"name": "polite", "definition": "Say please.", "antithesis": "Do not.", "held_out": True}


def write(folder, value):
    path = folder / "principles.json"
    path.write_text(json.dumps(value))
    return path


def test_reads_in_file_order(tmp_path):
    assert read_principles(write(tmp_path, [POLITE, CONCISE])) == [
        Principle("polite", "Say please.", "Do not.", held_out=True),
        Principle("concise", "Be brief.", "Be long.", held_out=False),
    ]


def test_round_trip(tmp_path):
    principles = [Principle("a", "A.", "Not A."), Principle("b", "B.", "Not B.", held_out=True)]
    assert read_principles(write(tmp_path, [dataclasses.asdict(p) for p in principles])) == principles


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "expected a list of at least one principle"),
        ([], "expected a list of at least one principle"),
        ([CONCISE, POLITE | {"definitoin": "x"}], "entry 1: a principle has name, definition.*definitoin"),
        ([{"name": "concise"}], "entry 0: a principle has.*missing"),
        ([CONCISE, "polite"], "entry 1: a principle has"),
        ([CONCISE | {"definition": " "}], "entry 0: .*must be non-empty text"),
        ([CONCISE, POLITE | {"name": 3}], "entry 1: .*must be non-empty text"),
        ([CONCISE | {"held_out": "no"}], "entry 0: held_out must be true or false"),
        ([CONCISE, POLITE, CONCISE], "two principles share a name"),
    ],
)
def test_mistakes_are_named_with_file_and_entry(tmp_path, value, message):
    with pytest.raises(BadDataError, match=rf"principles.json.*{message}"):
        read_principles(write(tmp_path, value))
