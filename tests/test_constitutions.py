"""Constitutions contrast: the same principles in one order, different signs, all of them equally often."""

import collections

import numpy as np
import pytest

from sami_jax.data.constitutions import Constitution, draw_constitutions, read_statements
from sami_jax.data.principles import Principle
from sami_jax.errors import BadConfigError

PRINCIPLES = [Principle(f"p{i}", f"Be p{i}.", f"Do not be p{i}.") for i in range(12)]


def draw(seed: int = 0, *, principles=PRINCIPLES, count: int = 2, per_query: int = 2, pairing: str = "symmetric"):
    rng = np.random.default_rng(seed)
    return draw_constitutions(principles, rng, count=count, per_query=per_query, pairing=pairing)


def signs(constitution: Constitution) -> tuple[bool, ...]:
    return tuple(statement.asked for statement in constitution.statements)


class TestConstitution:
    def test_text_is_a_numbered_list(self):
        constitution = Constitution((PRINCIPLES[0].statement(True), PRINCIPLES[1].statement(False)))
        assert constitution.text == "1. Be p0.\n2. Do not be p1."
        assert constitution.asked == {"p0": True, "p1": False}

    def test_lists_of_ten_and_more_keep_their_numbers(self):
        # The authors' code cuts the number off by position and so breaks "10. ".
        lines = Constitution(tuple(p.statement(True) for p in PRINCIPLES)).text.split("\n")
        assert lines == [f"{i + 1}. Be p{i}." for i in range(12)]

    def test_shuffling_keeps_the_statements(self):
        constitution = Constitution(tuple(p.statement(i % 2 == 0) for i, p in enumerate(PRINCIPLES)))
        shuffled = constitution.shuffled(np.random.default_rng(0))
        assert shuffled.statements != constitution.statements
        assert shuffled.asked == constitution.asked and set(shuffled.statements) == set(constitution.statements)

    def test_two_statements_are_shuffled_half_the_time(self):
        constitution = Constitution((PRINCIPLES[0].statement(True), PRINCIPLES[1].statement(False)))
        swapped = [
            constitution.shuffled(np.random.default_rng(seed)).statements != constitution.statements
            for seed in range(400)
        ]
        assert abs(np.mean(swapped) - 0.5) < 4 * 0.025  # 4 standard errors of 400 coin flips


class TestReading:
    @pytest.mark.parametrize(
        ("text", "statements"),
        [
            ("1. Be brief. \n2. Be kind.", ["Be brief.", "Be kind."]),
            ("1. Be brief.\r\n2. Be kind.\r\n", ["Be brief.", "Be kind."]),
            ("1) Be brief.\n\n  2) Be kind.", ["Be brief.", "Be kind."]),
            ("0. Be brief.\n1. Be kind.", ["Be brief.", "Be kind."]),
            ("Be brief.\nBe kind.\n", ["Be brief.", "Be kind."]),
            ("- Be brief.\n* Be kind.", ["Be brief.", "Be kind."]),
            ("1. Write 2. not 3. lines.\n2. Be kind.", ["Write 2. not 3. lines.", "Be kind."]),
            ("1. Write at most\n10. sentences.\n2. Be kind.", ["Write at most 10. sentences.", "Be kind."]),
            ("1. Be brief,\nalways.\n2. 3.5 of 10 is too little.", ["Be brief, always.", "3.5 of 10 is too little."]),
            ("1. Be brief.", ["Be brief."]),
            ("2.5 sentences are enough.", ["2.5 sentences are enough."]),
            (" \n", []),
        ],
    )  # fmt: skip
    def test_by_hand(self, text, statements):
        assert read_statements(text) == statements

    def test_ten_and_more_are_read_as_they_were_written(self):
        constitution = Constitution(tuple(p.statement(True) for p in PRINCIPLES))
        assert read_statements(constitution.text) == [p.definition for p in PRINCIPLES]


class TestDraw:
    @pytest.mark.parametrize("pairing", ["symmetric", "authors", "diverse"])
    @pytest.mark.parametrize(("count", "per_query"), [(2, 1), (2, 2), (4, 2), (3, 5)])
    def test_one_order_and_distinct_signs(self, pairing, count, per_query):
        for seed in range(20):
            drawn = draw(seed, count=count, per_query=per_query, pairing=pairing)
            assert len(drawn) == count
            [names] = {tuple(constitution.asked) for constitution in drawn}
            assert len(set(names)) == per_query
            assert len({signs(constitution) for constitution in drawn}) == count

    def test_symmetric_draws_every_ordered_pair_of_signs_alike(self):
        pairs = collections.Counter(tuple(map(signs, draw(seed))) for seed in range(2400))
        assert len(pairs) == 4 * 3  # ordered pairs of four patterns that differ
        # 200 expected of each; 5 standard deviations of a binomial are 5 x sqrt(200 x 11/12) = 68.
        assert all(132 < number < 268 for number in pairs.values())

    @pytest.mark.parametrize("pairing", ["authors", "diverse"])
    def test_the_first_has_all_definitions_and_the_second_one_or_both_flipped(self, pairing):
        pairs = collections.Counter(tuple(map(signs, draw(seed, pairing=pairing))) for seed in range(1200))
        assert {first for first, _ in pairs} == {(True, True)}
        assert {second for _, second in pairs} == {(True, False), (False, True), (False, False)}
        assert all(300 < number < 500 for number in pairs.values())  # 400 +- 6 standard deviations of 16

    def test_every_principle_comes_up_in_every_place(self):
        places = collections.Counter(
            (place, name) for seed in range(1200) for place, name in enumerate(draw(seed)[0].asked)
        )
        assert len(places) == 2 * len(PRINCIPLES)
        assert all(50 < number < 150 for number in places.values())  # 100 +- 5 standard deviations of 9.6

    def test_the_generator_decides(self):
        assert draw(3) == draw(3)
        assert len({tuple(c.text for c in draw(seed)) for seed in range(20)}) > 15

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"principles": PRINCIPLES[:1]},
                "Constitutions of 2 principles each cannot be drawn from 1 principles; lower "
                "config.constitutions.principles_per_query, or give more",
            ),
            ({"per_query": 40}, "Constitutions of 40 principles"),  # and no 2^40 patterns are made for it
            ({"count": 5}, "2 principles have 4 sign patterns, too few for 5 constitutions .* or raise"),
            ({"count": 3, "per_query": 1}, "1 principles have 2 sign patterns"),
        ],
    )
    def test_too_few_principles_or_patterns_are_refused(self, changes, message):
        with pytest.raises(BadConfigError, match=message):
            draw(**changes)
