"""Where constitutions come from: principles, held-out ones apart, or the pairs of the authors' folders."""

import collections
import json
import pathlib

import numpy as np
import pytest

from sami_jax.config.data import ConstitutionsConfig
from sami_jax.data.authors import read_constitutions, write_constitutions
from sami_jax.data.constitutions import Constitution
from sami_jax.data.pools import read_pools
from sami_jax.data.principles import Statement, read_principles
from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.stages.stage import constitutions_source

SHIPPED = pathlib.Path(__file__).parents[1] / "configs" / "principles"


def pair(number: int, **changed) -> dict:
    return {
        "positive": f"1. Be brief, as file {number} says.  \r\n2. Be complete.",
        "negative": "1. Be long.\n2. Be complete.",
        "identifiers": {"positive": ["pos concise", "pos complete"], "negative": ["neg concise", "pos complete"]},
    } | changed


def folder_of(tmp_path, pairs: dict[str, object]) -> pathlib.Path:
    for name, value in pairs.items():
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return tmp_path


def draws(pool, count=400):
    return [pool.draw(np.random.default_rng(seed)) for seed in range(count)]


class TestFolder:
    def test_is_read_in_order_of_numbers_and_drawn_evenly(self, tmp_path):
        # Written in an order that is neither that of the names nor that of the numbers.
        names = ["10", "2", "0", "11", "1"] + [str(n) for n in range(3, 10)]
        folder = folder_of(tmp_path, {f"{name}.json": pair(int(name)) for name in names} | {"notes.txt": "mine"})
        pairs = read_constitutions(folder)
        assert [positive.text for positive, _ in pairs] == [
            f"1. Be brief, as file {number} says.\n2. Be complete." for number in range(12)
        ]
        positive, negative = pairs[3]
        assert positive.asked == {"concise": True, "complete": True} and negative.asked["concise"] is False
        assert negative.text == "1. Be long.\n2. Be complete."
        config = ConstitutionsConfig(folder=str(folder))
        [pool] = read_pools(folder, config).values()
        assert pool.names == ["concise", "complete"]
        drawn = collections.Counter(draws(pool, 1200))
        assert set(drawn) == set(pairs)
        assert all(52 < count < 148 for count in drawn.values())  # 100 +- 5 standard deviations of 9.6

    def test_identifiers_may_be_missing(self, tmp_path):
        folder = folder_of(tmp_path, {"0.json": pair(0, identifiers={})})
        [(positive, negative)] = read_constitutions(folder)
        assert positive.asked == {"1": True, "2": True} and negative.asked == {"1": False, "2": True}

    def test_round_trip(self, tmp_path):
        statements = [[Statement(f"p{i}", sign, f"{sign} {i}.") for i in range(11)] for sign in (True, False)]
        mixed = [statements[i % 2][i] for i in range(11)]
        pairs = [(Constitution(tuple(statements[0])), Constitution(tuple(other))) for other in (statements[1], mixed)]
        write_constitutions(tmp_path, pairs)
        assert read_constitutions(tmp_path) == pairs
        assert json.loads((tmp_path / "0.json").read_text())["identifiers"]["negative"][10] == "neg p10"

    def test_the_fingerprint_is_that_of_the_contents(self, tmp_path):
        folder = folder_of(tmp_path, {"0.json": pair(0), "notes.txt": "mine"})
        first = constitutions_source(folder).fingerprint
        (folder / "notes.txt").write_text("other")
        assert constitutions_source(folder).fingerprint == first
        folder_of(tmp_path, {"0.json": pair(1)})
        assert constitutions_source(folder).fingerprint != first

    @pytest.mark.parametrize(
        ("pairs", "says"),
        [
            ({}, "holds no constitutions"),
            ({"first.json": pair(0)}, "first.json: the files of a folder of constitutions are called 0.json"),
            ({"1.json": pair(0), "01.json": pair(0)}, "has both 01.json and 1.json"),
            ({"0.json": "{"}, "0.json, line 1: not valid JSON"),
            ({"0.json": {"positive": "a"}}, "0.json: expected an object with the texts positive and negative"),
            ({"0.json": pair(0, positive=" ")}, "0.json: positive has no statements"),
            ({"0.json": pair(0, negative="1. A.", positive="1. A.")}, "positive and negative are the same"),
            ({"0.json": pair(0, negative="1. A.")}, "identifiers of negative must be a list with one for each of"),
            ({"0.json": pair(0, identifiers=["pos a"])}, "identifiers of positive must be a list"),
            ({"0.json": pair(0, identifiers={"positive": ["pos a", "brief"]})}, "'brief' must be `pos NAME` or"),
            ({"0.json": pair(0, identifiers={"positive": ["pos a", "neg a"]})}, "name a principle twice"),
        ],
    )  # fmt: skip
    def test_mistakes_are_named(self, tmp_path, pairs, says):
        with pytest.raises(BadDataError, match=says):
            read_constitutions(folder_of(tmp_path, pairs))

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"principles": "p.json"}, "folder and config.constitutions.principles are both given"),
            ({"count": 3}, "has pairs of constitutions: set config.constitutions.count=2"),
            ({"pairing": "diverse"}, "config.constitutions.pairing=authors or symmetric"),
        ],
    )
    def test_settings_that_do_not_fit_a_folder(self, changes, says):
        with pytest.raises(BadConfigError, match=says):
            ConstitutionsConfig(folder="f", **changes)


class TestPrinciples:
    @pytest.mark.parametrize(
        ("name", "learned", "held_out"),
        [("helpful_harmless", 2, 0), ("concise_comprehensive", 2, 0), ("diverse", 15, 5)],
    )
    def test_what_is_shipped(self, name, learned, held_out):
        principles = read_principles(SHIPPED / f"{name}.json")
        assert [principle.held_out for principle in principles] == [False] * learned + [True] * held_out
        texts = [text for p in principles for text in (p.definition, p.antithesis)]
        assert len(set(texts)) == len(texts) and all(text.endswith(".") for text in texts)

    def test_diverse_draws_two_of_those_that_are_learned_and_evaluates_on_the_others(self):
        config = ConstitutionsConfig(principles=str(SHIPPED / "diverse.json"), pairing="diverse")
        pools = read_pools(pathlib.Path(config.place), config)
        assert {name: len(pool.names) for name, pool in pools.items()} == {"learned": 15, "held_out": 5}
        assert not set(pools["learned"].names) & set(pools["held_out"].names)
        for name, possible in (("learned", 15 * 14 / 2), ("held_out", 5 * 4 / 2)):
            drawn = draws(pools[name])
            assert len({frozenset(first.asked) for first, _ in drawn}) > 0.9 * possible
            for first, second in drawn:
                assert len(first.asked) == 2 and list(first.asked) == list(second.asked)
                assert all(first.asked.values()) and not all(second.asked.values())

    def test_diverse_needs_more_principles_than_it_draws(self):
        config = ConstitutionsConfig(principles=str(SHIPPED / "helpful_harmless.json"), pairing="diverse")
        with pytest.raises(BadConfigError, match="has 2 principles for 2 in each; .*pairing=authors"):
            read_pools(pathlib.Path(config.place), config)
