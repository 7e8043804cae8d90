"""Files of responses to matched pairs, and judged pairs to the numbers of a comparison, by hand."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sami_jax.chat.questions import Answer, Failure, Spent
from sami_jax.data.authors import AnsweredQuestion, responses_text
from sami_jax.errors import BadDataError
from sami_jax.evaluation.comparison import detail_pairs, of_contest, of_verdicts, summarize_pairs, words
from sami_jax.evaluation.comparison_table import comparison_table
from sami_jax.evaluation.contests import Answered, Matched, Pairing, match, read_answered
from sami_jax.evaluation.pairwise_judge import Hearing, Judged
from sami_jax.evaluation.results import QueryResult, write_results
from sami_jax.evaluation.verdicts import Verdict

BRIEF, KIND = "Be brief.", "Be kind."
FILES = (pathlib.Path("ours.json"), pathlib.Path("theirs.json"))


def answered(
    question: str, response: str = "yes", constitution: str = f"1. {BRIEF}\n2. {KIND}", **more: Any
) -> Answered:
    return Answered(question, question, constitution, response, **more)


def judged(pairing: Pairing, first: str | None, second: str | None, **how: Any) -> Any:
    """The line of a pair whose judge said so in the two orders; None is no answer."""
    [contest] = pairing.contests(per_principle=False)
    replies = [
        Failure("timed_out", "is slow") if text is None else Answer(text, True, "big", "now", Spent())
        for text in (first, second)
    ]
    found = Judged(contest, tuple(Hearing(order == 0, reply) for order, reply in enumerate(replies)))
    return of_contest(pairing.ours.name, found, per_principle=how.get("per_principle", False))


class TestReading:
    def test_the_authors_format(self, tmp_path):
        rows = [AnsweredQuestion("1. Be brief.", "POST: a", "yes"), AnsweredQuestion("1. Be kind.", "POST: b", "no")]
        (tmp_path / "a.json").write_text(responses_text(rows))
        found = read_answered(tmp_path / "a.json")
        assert found == [
            Answered("row 0", "POST: a", "1. Be brief.", "yes"),
            Answered("row 1", "POST: b", "1. Be kind.", "no"),
        ]
        assert found[0].statements == ["Be brief."]

    def results(self, path: pathlib.Path, *, judged: bool) -> pathlib.Path:
        verdict = Verdict(True, True, {"brief": True})
        results = [
            QueryResult(
                split=split,
                example_id=f"q{i}",
                query=f"Post {i}",
                constitutions=["1. Be brief.", "1. Do not be brief."],
                responses=[f"{split} {i}", f"{split} {i}, and so on"],
                response_tokens=[1, 2],
                logps=np.zeros((2, 2)),
                base_logps=np.zeros(2),
                mi_nats=0.0,
                verdicts=[verdict, verdict] if judged else None,
            )
            for split in ("learned", "held_out")
            for i in range(2)
        ]
        write_results(path, results)
        return path

    def test_results_give_every_response_under_its_own_constitution(self, tmp_path):
        path = self.results(tmp_path / "results.jsonl", judged=True)
        found = read_answered(path, split="learned")
        assert [(row.name, row.question, row.constitution, row.response) for row in found[:2]] == [
            ("q0", "Post 0", "1. Be brief.", "learned 0"),
            ("q0", "Post 0", "1. Do not be brief.", "learned 0, and so on"),
        ]
        assert len(found) == 4 and found[0].verdict == Verdict(True, True, {"brief": True})
        assert read_answered(self.results(tmp_path / "r.jsonl", judged=False), split="held_out")[0].verdict is None
        with pytest.raises(BadDataError, match="holds no results of the split 'other'"):
            read_answered(path, split="other")

    def test_both_splits_of_one_query_are_refused_where_they_ask_for_the_same(self, tmp_path):
        rows = read_answered(self.results(tmp_path / "results.jsonl", judged=False))
        assert len(rows) == 8
        with pytest.raises(BadDataError, match="ours.json answers a question twice under one constitution"):
            match(rows, rows, files=FILES)


class TestMatching:
    def test_by_question_and_what_is_left_over_is_named(self):
        ours = [answered("a", "ours a"), answered("b", "ours b"), answered("c")]
        theirs = [answered("d"), answered("b", "theirs b"), answered("a", "theirs a")]
        matched = match(ours, theirs, files=FILES)
        assert [(pair.ours.response, pair.theirs.response) for pair in matched.pairings] == [
            ("ours a", "theirs a"),
            ("ours b", "theirs b"),
        ]
        assert (matched.only_ours, matched.only_theirs, matched.other_constitution) == (["c"], ["d"], [])

    def test_one_answer_each_is_enough_and_the_policys_constitution_counts(self):
        ours, theirs = answered("a", constitution="1. Be rude."), answered("a", "no")
        matched = match([ours], [theirs], files=FILES)
        assert matched.pairings == [Pairing(ours, theirs)] and matched.other_constitution == ["a"]
        assert [contest.constitution for contest in matched.pairings[0].contests(per_principle=False)] == [
            "1. Be rude."
        ]

    def test_of_several_constitutions_those_of_the_same_statements_meet(self):
        ours = [answered("a", "1", "1. Be brief.\n2. Be kind."), answered("a", "2", "1. Be rude.")]
        theirs = [answered("a", "3", "1. Be kind.\n2. Be brief."), answered("a", "4", "1. Be long.")]
        matched = match(ours, theirs, files=FILES)
        assert [(pair.ours.response, pair.theirs.response) for pair in matched.pairings] == [("1", "3")]
        assert (matched.only_ours, matched.only_theirs, matched.other_constitution) == (["a"], ["a"], [])

    def test_the_policys_constitution_is_needed_and_no_other(self):
        ours, unasked = answered("a"), answered("a", constitution=" ")
        assert match([ours], [unasked], files=FILES).pairings == [Pairing(ours, unasked)]
        with pytest.raises(BadDataError, match="ours.json: a has an empty constitution"):
            match([unasked], [ours], files=FILES)

    def test_what_cannot_be_matched_is_refused(self):
        with pytest.raises(BadDataError, match=r"ours.json and theirs.json have no question in common.*'a'.*'b'"):
            match([answered("a")], [answered("b")], files=FILES)
        with pytest.raises(BadDataError, match="theirs.json answers a question twice under one constitution"):
            match([answered("a")], [answered("a"), answered("a")], files=FILES)

    def test_one_contest_for_each_principle(self):
        contests = Pairing(answered("a", "x"), answered("a", "y")).contests(per_principle=True)
        assert [(c.constitution, c.query, c.response, c.baseline) for c in contests] == [
            (BRIEF, "a", "x", "y"),
            (KIND, "a", "x", "y"),
        ]


def pairing(question: str, response: str = "one two", baseline: str = "one two three") -> Pairing:
    return Pairing(answered(question, response), answered(question, baseline))


def pairs_of(said: Sequence[tuple[str | None, str | None]]) -> list[Any]:
    return [judged(pairing(f"q{i}"), *orders) for i, orders in enumerate(said)]


class TestNumbers:
    # Won in both orders, lost in both, tied in both, won and tied, contradicted, no verdict, no answer.
    SAID = (("A", "B"), ("B", "A"), ("tie", "tie"), ("A", "tie"), ("A", "A"), ("A", "Well."), (None, "B"))

    def test_by_hand(self):
        summary = summarize_pairs(pairs_of(self.SAID), cost_usd=0.25)
        # Scores 1, 0, 0.5, 0.75, 0.5: mean 0.55; of 7 queries 5 have one.
        assert {key: summary[key] for key in ("n", "wins", "losses", "ties", "inconsistent", "excluded")} == {
            "n": 5,
            "wins": 2,
            "losses": 1,
            "ties": 1,
            "inconsistent": 1,
            "excluded": 2,
        }
        assert summary["win_rate"]["mean"] == pytest.approx(0.55) and summary["coverage"] == pytest.approx(5 / 7)
        deviation = math.sqrt((0.45**2 + 0.55**2 + 2 * 0.05**2 + 0.2**2) / 4)
        assert summary["t"] == pytest.approx(0.05 / (deviation / math.sqrt(5)))
        assert summary["win_rate"]["high"] == pytest.approx(0.55 + 1.96 * deviation / math.sqrt(5))
        # Of the first: (A, B) 0.5; (B, A) 0.5; 0.5; (A, tie) 0.75; (A, A) 1; A alone 1; B alone, second, 0.
        assert summary["position_bias"]["mean"] == pytest.approx((0.5 * 3 + 0.75 + 1 + 1 + 0) / 7)
        assert summary["cost_usd"] == 0.25
        # Every response is shorter by a word.
        assert (
            summary["length_balanced"]["mean"] is None
            and "no response is longer" in summary["length_balanced"]["undefined"]
        )
        assert "by the same" in summary["length_corrected"]["undefined"]
        assert set(summary["per_principle"]) == {BRIEF, KIND}
        assert summary["per_principle"][KIND]["win_rate"]["mean"] == pytest.approx(0.55)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary

    def test_the_keys_are_those_of_the_file(self):
        assert list(summarize_pairs(pairs_of(self.SAID), cost_usd=0.0)) == [
            "n",
            "wins",
            "losses",
            "ties",
            "inconsistent",
            "excluded",
            "win_rate",
            "t",
            "p",
            "length_balanced",
            "length_corrected",
            "position_bias",
            "coverage",
            "per_principle",
            "cost_usd",
        ]

    def test_details_name_what_was_left_out(self):
        matched = Matched([pairing("q0")], ["a", "b"], ["c"], ["d"])
        details = detail_pairs(pairs_of(self.SAID), matched)
        assert details["inconsistent"] == ["q4"] and details["excluded"] == ["q5", "q6"]
        assert details["only_in_responses"] == ["a", "b"] and details["only_in_baseline"] == ["c"]
        assert details["answered_under_another_constitution"] == ["d"]
        assert details["verdicts"] == {"A": 6, "B": 3, "error": 1, "invalid": 1, "tie": 3}
        assert details["inconsistency"]["mean"] == pytest.approx(1 / 5) and details["models"] == ["big"]
        assert (details["words"]["response"]["mean"], details["words"]["baseline"]["mean"]) == (2.0, 3.0)
        assert details["power"]["detectable_difference"] is None  # five queries find nothing below 50 points
        assert details["power"]["queries_for_a_difference_of_0.05"] > 300
        json.dumps(details, allow_nan=False)

    def test_without_any_score_nothing_is_a_number_that_is_none(self):
        pairs = pairs_of([(None, "A"), ("Well.", "B")])
        summary = summarize_pairs(pairs, cost_usd=0.0)
        assert (summary["n"], summary["excluded"], summary["coverage"]) == (0, 2, 0.0)
        assert summary["win_rate"] == {"mean": None, "low": None, "high": None} and summary["t"] is None
        assert "no query has a score" in summary["length_corrected"]["undefined"] and summary["per_principle"] == {}
        details = detail_pairs(pairs, Matched([pairing("q0")], [], [], []))
        json.dumps([summary, details], allow_nan=False)
        about = {"judge": "big", "orders": "both", "per_principle": False}
        assert "not defined: no query has a score" in comparison_table(summary, about | details)

    def test_a_query_under_several_constitutions_has_the_mean_and_needs_them_all(self):
        one, two = (
            Pairing(answered("q", "x", constitution), answered("q", "y y", constitution))
            for constitution in ("1. Be brief.", "1. Be kind.")
        )
        summary = summarize_pairs([judged(one, "A", "B"), judged(two, "A", "A")], cost_usd=0.0)
        assert (summary["n"], summary["wins"], summary["inconsistent"]) == (1, 1, 0)  # 0.75
        assert summary["win_rate"]["mean"] == 0.75
        assert [summary["per_principle"][name]["win_rate"]["mean"] for name in (BRIEF, KIND)] == [1.0, 0.5]
        summary = summarize_pairs([judged(one, "A", "B"), judged(two, "A", None)], cost_usd=0.0)
        assert (summary["n"], summary["excluded"]) == (0, 1) and list(summary["per_principle"]) == [BRIEF]
        even = summarize_pairs([judged(one, "A", "B"), judged(two, "B", "A")], cost_usd=0.0)
        assert (even["ties"], even["inconsistent"]) == (1, 0)

    def test_one_principle_at_a_time(self):
        found = []
        for i, (brief, kind) in enumerate([("AB", "BA"), ("AB", "AB")]):
            contests = pairing(f"q{i}").contests(per_principle=True)
            for contest, said in zip(contests, (brief, kind), strict=True):
                hearings = tuple(
                    Hearing(first, Answer(said[1 - first], True, "big", "now", Spent())) for first in (True, False)
                )
                found.append(of_contest(f"q{i}", Judged(contest, hearings), per_principle=True))
        summary = summarize_pairs(found, cost_usd=0.0)
        assert summary["win_rate"]["mean"] == 0.75 and (summary["n"], summary["wins"], summary["ties"]) == (2, 1, 1)
        assert summary["per_principle"][BRIEF]["wins"] == 2
        assert (summary["per_principle"][KIND]["wins"], summary["per_principle"][KIND]["losses"]) == (1, 1)

    def test_swapping_the_files_mirrors_the_numbers(self):
        rng = np.random.default_rng(0)
        said = [tuple(rng.choice(["A", "B", "tie"], size=2)) for _ in range(40)]
        texts = [["word " * n for n in rng.integers(1, 9, size=2)] for _ in said]
        there = [
            judged(pairing(f"q{i}", *both), *orders) for i, (both, orders) in enumerate(zip(texts, said, strict=True))
        ]
        # The same judge sees the same two texts in the other order of asking.
        back = [
            judged(pairing(f"q{i}", *both[::-1]), *orders[::-1])
            for i, (both, orders) in enumerate(zip(texts, said, strict=True))
        ]
        a, b = (summarize_pairs(pairs, cost_usd=0.0) for pairs in (there, back))
        assert (a["wins"], a["losses"], a["ties"], a["inconsistent"]) == (
            b["losses"],
            b["wins"],
            b["ties"],
            b["inconsistent"],
        )
        assert a["position_bias"] == b["position_bias"] and a["inconsistent"] > 0
        for name in ("win_rate", "length_corrected"):
            assert a[name]["mean"] == pytest.approx(1 - b[name]["mean"]) and a[name]["low"] == pytest.approx(
                1 - b[name]["high"]
            )

    def test_a_program_that_judges_each_response_by_itself(self):
        both, one, none = ({"brief": a, "kind": b} for a, b in ((True, True), (True, False), (False, False)))
        good, fair, malformed = Verdict(True, True, both), Verdict(True, True, one), Verdict(False, False, none)
        cases = ((good, fair, "win", {"brief": 0.5, "kind": 1.0}), (fair, fair, "tie", {"brief": 0.5, "kind": 0.5}))
        for ours, theirs, outcome, principles in (*cases, (malformed, fair, "loss", {"brief": 0.0, "kind": 0.5})):
            found = of_verdicts(Pairing(answered("a", "x", verdict=ours), answered("a", "y z", verdict=theirs)))
            assert (found.outcome, found.principles, found.extra_words) == (outcome, principles, -1)
        summary = summarize_pairs([found], cost_usd=0.0)
        assert summary["losses"] == 1 and summary["position_bias"] is None
        with pytest.raises(ValueError, match="a was not judged"):
            of_verdicts(Pairing(answered("a"), answered("a", verdict=fair)))


def test_words():
    assert words("") == 0 and words(" It's  one,\ntwo - three ") == 5


def test_the_table_says_what_a_person_needs():
    pairs = pairs_of(TestNumbers.SAID)
    matched = Matched([pairing("q0")], [f"n{i}" for i in range(8)], [], [])
    about = {"judge": "big at home", "orders": "both", "per_principle": False}
    table = comparison_table(summarize_pairs(pairs, cost_usd=1.5), about | detail_pairs(pairs, matched))
    for text in (
        "judge: big at home",
        "55.00 % [",
        "2 won, 1 tied, 1 lost, 1 inconsistent",
        "not defined: no response is longer than the baseline's",
        "5 queries, 71.4%; 2 queries without a verdict in every order are left out",
        "$1.5000",
        "--per_principle has each",
        "1 whose two orders name different winners: q4",
        "8 answered in --responses alone: n0, n1, n2, n3, n4, and 3 more",
    ):
        assert text in table, table
