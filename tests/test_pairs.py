"""Pairs in the authors' format: round trips, and mistakes named with file, query, entry and remedy."""

import copy
import json

import pytest

import doubles
from sami_jax.data.pairs import Pair, read_pairs, write_pairs
from sami_jax.errors import BadDataError

TOKENIZER = doubles.byte_tokenizer(("Ġ", "T"), ("h", "e"), ("ĠT", "he"))
AUTHORS = {
    "0": [
        {"prompt": "C0 POST: a\n\nSummary:", "response": "The first", "example_id": 3},
        {"prompt": "C1 POST: a\n\nSummary:", "response": "second.", "example_id": 3},
    ],
    "1": [
        {"prompt": "C1 POST: b\n\nSummary:", "response": "é", "example_id": 8},
        {"prompt": "C0 POST: b\n\nSummary:", "response": "Then [x]", "example_id": 8},
    ],
}


def write(folder, value):
    path = folder / "pairs.json"
    path.write_text(json.dumps(value))
    return path


def read(path, *, max_positions: int = 64, vocab_size: int = TOKENIZER.vocab_size):
    return read_pairs(path, TOKENIZER, boundary="exact", max_positions=max_positions, vocab_size=vocab_size)


class TestRoundTrip:
    def test_the_authors_format(self, tmp_path):
        first, second = read(write(tmp_path, AUTHORS))
        assert (first.example_id, second.example_id) == (3, 8)
        assert first.prompts == ("C0 POST: a\n\nSummary:", "C1 POST: a\n\nSummary:")
        assert first.responses == ("The first", "second.")
        assert second.responses == ("é", "Then [x]")
        for pair in (first, second):
            for prompt, ids in zip(pair.prompts, pair.prompt_ids, strict=True):
                assert list(ids) == TOKENIZER.prompt_ids(prompt)
            # As sampled after "Summary:": with a space in front.
            assert [TOKENIZER.decode(ids) for ids in pair.response_ids] == [f" {text}" for text in pair.responses]
        assert first.response_ids[0][0] == doubles.token(TOKENIZER, " The")

    def test_the_authors_boundary(self, tmp_path):
        path = write(tmp_path, AUTHORS)
        first, _ = read_pairs(path, TOKENIZER, boundary="authors", max_positions=64, vocab_size=TOKENIZER.vocab_size)
        assert [TOKENIZER.decode(ids) for ids in first.response_ids] == ["The first", "second."]

    def test_what_is_written_is_read_back_with_the_sampled_ids(self, tmp_path):
        sampled = tuple(doubles.token(TOKENIZER, text) for text in (" ", "T", "h", "e"))  # not what the tokenizer gives
        prompts = ("p one", "p two", "p three")
        ids = tuple(tuple(TOKENIZER.prompt_ids(prompt)) for prompt in prompts)
        pairs = [
            Pair("a", prompts, ("The", "x", "y"), ids, (sampled, (5,), (6, 7))),
            Pair("b", prompts, ("z", "The", "y"), ids, ((8,), sampled, (6,))),
        ]
        write_pairs(tmp_path / "pairs.json", pairs)
        assert read(tmp_path / "pairs.json") == pairs
        written = json.loads((tmp_path / "pairs.json").read_text())
        assert [len(entries) for entries in written.values()] == [3, 3]  # a key a query, an entry a constitution
        keys = {key for entries in written.values() for key in entries[0]}
        assert keys == {"prompt", "response", "example_id", "prompt_ids", "response_ids"}

    def test_queries_keep_their_order(self, tmp_path):
        # "10" sorts before "2" as text.
        entry = {"prompt": "p", "response": "r"}
        queries = {str(i): [{**entry, "example_id": i}, {**entry, "example_id": i}] for i in range(11)}
        pairs = read(write(tmp_path, queries))
        assert [pair.example_id for pair in pairs] == list(range(11))
        write_pairs(tmp_path / "again.json", pairs)
        assert [pair.example_id for pair in read(tmp_path / "again.json")] == list(range(11))


def changed(path: tuple, value) -> dict:
    lists = copy.deepcopy(AUTHORS)
    level = lists
    for key in path[:-1]:
        level = level[key]
    level[path[-1]] = value
    return lists


class TestMistakes:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ([], "expected an object with one key per query"),
            ({}, "holds no pairs"),
            ({"0": AUTHORS["0"][:1]}, "query '0': expected a list with one entry per constitution, at least two"),
            ({"0": {}}, "query '0': expected a list"),
            ({**AUTHORS, "2": AUTHORS["1"] * 2}, "query '2': 4 constitutions, but the queries before it have 2"),
            (changed(("1", 1), "x"), "query '1', entry 1: expected an object"),
            (changed(("1", 0, "prompt"), None), "query '1', entry 0: prompt must be text"),
            (changed(("0", 1, "response"), 3), "query '0', entry 1: response must be text"),
            (changed(("0", 1, "example_id"), 1.5), "query '0', entry 1: example_id must be a text or a whole number"),
            (changed(("0", 1, "example_id"), True), "query '0', entry 1: example_id must be"),
            (changed(("1", 1, "prompt"), ""), "query '1', entry 1: the prompt is empty"),
            (
                changed(("1", 1, "response_ids"), "5"),
                "query '1', entry 1: response_ids must be a list of whole numbers",
            ),
            (changed(("1", 1, "response_ids"), [5, True]), "query '1', entry 1: response_ids must be"),
            (changed(("1", 1, "example_id"), 9), r"query '1': its entries have different example_ids \[8, 9\]"),
            (changed(("1", 1, "response"), " \n"), "query '1', entry 1: the response has no tokens; remove"),
            (changed(("0", 0, "response_ids"), []), "query '0', entry 0: the response has no tokens"),
            (
                changed(("0", 0, "response_ids"), [TOKENIZER.vocab_size]),
                r"query '0', entry 0: a response id is outside the model's vocabulary of \d+ tokens",
            ),
            (changed(("0", 0, "response_ids"), [-1]), "query '0', entry 0: a response id is outside"),
        ],
    )
    def test_are_named_with_file_query_and_entry(self, tmp_path, value, message):
        with pytest.raises(BadDataError, match=rf"pairs.json.*{message}"):
            read(write(tmp_path, value))

    def test_the_longest_prompt_and_response_must_fit_together(self, tmp_path):
        # Every prompt meets every response, so the longest of each count, whichever constitution they are of.
        lists = changed(("0", 0, "prompt"), "p" * 30)
        lists["0"][1]["response"] = "r" * 19  # and its space: 20 tokens
        path = write(tmp_path, lists)
        assert len(read(path, max_positions=50)) == 2
        with pytest.raises(BadDataError, match="query '0': .* have 50 tokens, but the model has room for 49"):
            read(path, max_positions=49)

    def test_a_tokenizer_of_another_model_is_noticed(self, tmp_path):
        lists = copy.deepcopy(AUTHORS)
        for column in lists.values():
            for entry in column:
                entry["response_ids"] = [2]
        with pytest.raises(BadDataError, match="query '0': the prompt has ids outside .*do not belong together"):
            read(write(tmp_path, lists), vocab_size=20)
