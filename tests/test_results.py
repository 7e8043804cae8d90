"""A line of results.jsonl is read back as it was written, and refused where it is anything else."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from sami_jax.errors import BadDataError
from sami_jax.evaluation.results import QueryResult, read_results, write_results
from sami_jax.evaluation.verdicts import Verdict


def result(**changes: Any) -> QueryResult:
    values: dict[str, Any] = {
        "split": "learned",
        "example_id": "q1",
        "query": "Wie geht\u2019s?",
        "constitutions": ["1. Be kind.", "1. Be rude."],
        "responses": ["Fine, dear.", "Go away."],
        "response_tokens": [4, 3],
        "logps": np.array([[-1.25, -2.0], [-3.0, -0.1]], np.float32),
        "base_logps": np.array([-1.5, -0.75], np.float32),
        "mi_nats": 0.5,
        "verdicts": [Verdict(True, False, {"kind": True, "brief": False}), Verdict(False, False, {"kind": False})],
    }
    return QueryResult(**values | changes)


def test_round_trip_of_values_and_bytes(tmp_path):
    results = [result(), result(example_id="q2", logps=None, base_logps=None, mi_nats=None, verdicts=None)]
    write_results(tmp_path / "results.jsonl", results)
    found = read_results(tmp_path / "results.jsonl")
    assert found[0].verdicts == results[0].verdicts and found[1].verdicts is None and found[1].logps is None
    np.testing.assert_array_equal(found[0].logps, results[0].logps)
    np.testing.assert_array_equal(found[0].base_logps, results[0].base_logps)
    write_results(tmp_path / "again.jsonl", found)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "results.jsonl").read_bytes()


def test_the_line_has_what_people_read(tmp_path):
    write_results(tmp_path / "results.jsonl", [result()])
    line = json.loads((tmp_path / "results.jsonl").read_text())
    first, second = line["verdicts"]
    assert line["logps"] == [[-1.25, -2.0], [-3.0, float(np.float32(-0.1))]]
    assert (first["adherence"], first["score"], first["strict_score"]) == (0.5, 0.5, -1.0)
    assert (second["adherence"], second["score"], second["strict_score"]) == (0.0, -1.0, -1.0)


def test_values_of_a_query_by_hand():
    found = result()
    assert found.per_query("mi_nats") == 0.5 and found.per_query("length_tokens") == 3.5
    assert found.per_query("distinct") == 1.0 and result(responses=["a", "a"]).per_query("distinct") == 0.0
    assert found.per_query("adherence") == 0.25 and found.per_query("well_formed") == 0.5
    assert found.per_query("unknown") is None and result(verdicts=None).per_query("adherence") is None
    assert result(logps=None, base_logps=None, mi_nats=None).per_query("mi_nats") is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"responses": ["one"]}, "q1 has not one value of each kind for each of 2 constitutions"),
        ({"base_logps": [0.0]}, "q1 has not one value of each kind"),
        ({"logps": [[0.0], [0.0]]}, "no matrix of 2 x 2"),
        ({"logps": "x"}, "could not convert"),
        ({"verdicts": 3}, "TypeError"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"verdicts": [{"well_formed": True}] * 2}, "KeyError: 'faithful'"),
        (
            {"verdicts": [{"well_formed": True, "faithful": True, "followed": {"a": True}, "adherence": 0.0}] * 2},
            "scores do not follow",
        ),
    ],
)
def test_other_lines_are_refused_by_file_and_number(tmp_path: pathlib.Path, change, says):
    path = tmp_path / "results.jsonl"
    write_results(path, [result()])
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | change) + "\n")
    with pytest.raises(BadDataError, match=r"results.jsonl, entry 2 is not as a run writes it") as error:
        read_results(path)
    assert says in str(error.value)


def test_a_missing_field_is_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"split": "learned"}\n[1]\n')
    with pytest.raises(BadDataError, match="entry 1 is not as a run writes it"):
        read_results(path)
