"""Estimates of one split, from results small enough for arithmetic by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

from sami_jax.evaluation.results import QueryResult
from sami_jax.evaluation.summary import query_mi_nats, summarize
from sami_jax.evaluation.verdicts import Verdict


def verdict(score: float, *, faithful: bool = True) -> Verdict:
    """Tone and detail are followed at score 1, tone alone at 0.5, neither at 0; -1 is malformed."""
    return Verdict(score >= 0, faithful, {"tone": score >= 0.5, "detail": score == 1})


def result(example_id: str, scores, *, mi=0.1, tokens=(10, 20), base_logps=(-1.0, -3.0), **kwargs) -> QueryResult:
    return QueryResult(
        split="learned",
        example_id=example_id,
        query="?",
        constitutions=["x", "y"],
        responses=["a", "b"],
        response_tokens=list(tokens),
        logps=None if mi is None else np.zeros((2, 2)),
        base_logps=None if mi is None else np.array(base_logps),
        mi_nats=mi,
        verdicts=None if scores is None else [verdict(score, **kwargs) for score in scores],
    )


class TestSummarize:
    results = [result("a", (1.0, 0.5), mi=0.2), result("b", (0.5, 0.5), mi=0.4), result("c", (0.0, -1.0), mi=0.6)]
    baseline = [result("a", (0.5, 0.5), mi=0.1), result("b", (0.5, 0.5), mi=0.1), result("c", (0.5, 0.0), mi=0.1)]

    def test_means_by_hand(self):
        summary = summarize(self.results, None)
        assert (summary["n_queries"], summary["n_unscored"]) == (3, 0)
        # 0.2, 0.4, 0.6: mean 0.4, sd 0.2, half width 1.96 x 0.2 / sqrt(3).
        half = 1.96 * 0.2 / math.sqrt(3)
        assert summary["mi_nats"] == pytest.approx({"mean": 0.4, "low": 0.4 - half, "high": 0.4 + half, "n": 3})
        assert summary["length_tokens"]["mean"] == 15.0
        assert summary["base_logp"]["mean"] == -2.0
        # Per query 0.75, 0.5 and 0: the mean over its constitutions.
        assert summary["adherence"]["mean"] == pytest.approx(1.25 / 3)
        assert summary["well_formed"]["mean"] == pytest.approx((1 + 1 + 0.5) / 3)
        assert summary["per_principle"]["tone"]["mean"] == pytest.approx((1 + 1 + 0) / 3)
        assert summary["per_principle"]["detail"]["mean"] == pytest.approx((0.5 + 0 + 0) / 3)
        assert [summary[key] for key in ("mi_gain_nats", "adherence_gain", "win_rate", "wins", "ties")] == [None] * 5
        assert summary["win_rate_t"] is None

    def test_comparison_by_hand(self):
        summary = summarize(self.results, self.baseline)
        # a: won, tied = 0.75; b: tied, tied = 0.5; c: lost, lost (malformed against 0) = 0.
        assert (summary["wins"], summary["ties"], summary["losses"]) == (1, 1, 1)
        assert summary["win_rate"]["mean"] == pytest.approx(1.25 / 3)
        # Deviations 1/3, 1/12, -5/12: variance (16 + 1 + 25) / 144 / 2 = 7 / 48; t = (5/12 - 1/2) / sqrt(7 / 48 / 3).
        assert summary["win_rate_t"] == pytest.approx(-(1 / 12) / math.sqrt(7 / 144))
        assert summary["mi_gain_nats"]["mean"] == pytest.approx((0.1 + 0.3 + 0.5) / 3)
        # Adherence 0.75, 0.5, 0 against 0.5, 0.5, 0.25.
        assert summary["adherence_gain"]["mean"] == pytest.approx((0.25 + 0.0 - 0.25) / 3)
        assert summary["adherence_gain"]["n"] == 3

    def test_each_response_meets_the_one_under_the_same_constitution(self):
        ours, theirs = [result("a", (1.0, 0.0))], [result("a", (0.0, 1.0))]
        assert summarize(ours, theirs)["win_rate"]["mean"] == 0.5
        assert summarize(ours, ours)["win_rate"]["mean"] == 0.5
        assert summarize([result("a", (1.0, 1.0))], theirs)["win_rate"]["mean"] == 0.75

    def test_strict_win_rate_counts_wrong_content_as_malformed(self):
        ours, theirs = [result("a", (1.0, 1.0), faithful=False)], [result("a", (0.5, 0.5))]
        summary = summarize(ours, theirs)
        assert (summary["win_rate"]["mean"], summary["strict_win_rate"]["mean"]) == (1.0, 0.0)
        assert summary["faithful"]["mean"] == 0.0

    def test_queries_with_an_empty_response_are_counted_and_left_out(self):
        results = [*self.results, result("d", (0.5, -1.0), mi=None, tokens=(0, 40))]
        summary = summarize(results, [*self.baseline, result("d", (0.5, 0.5))])
        assert (summary["n_queries"], summary["n_unscored"]) == (4, 1)
        assert summary["mi_nats"]["mean"] == pytest.approx(0.4) and summary["mi_nats"]["n"] == 3
        assert summary["base_logp"]["n"] == summary["mi_gain_nats"]["n"] == 3
        assert summary["length_tokens"]["mean"] == pytest.approx((15 * 3 + 20) / 4)
        assert summary["win_rate"]["n"] == 4

    def test_a_gain_needs_both_sides(self):
        baseline = [*self.baseline[:2], result("c", (0.5, 0.0), mi=None)]
        assert summarize(self.results, baseline)["mi_gain_nats"]["n"] == 2
        nothing = [result("a", (0.5, 0.5), mi=None)]
        summary = summarize(nothing, nothing)
        assert summary["mi_nats"] is None and summary["mi_gain_nats"] is None and summary["n_unscored"] == 1

    def test_distinct_is_the_share_of_queries_whose_responses_differ(self):
        same = dataclasses.replace(self.results[0], example_id="d", responses=["a", "a"])
        assert summarize([*self.results, same], None)["distinct"]["mean"] == 0.75

    def test_without_a_judge_there_are_no_verdicts_to_average(self):
        results = [result("a", None), result("b", None, mi=0.3)]
        summary = summarize(results, results)
        assert [summary[key] for key in ("adherence", "well_formed", "faithful", "per_principle")] == [None] * 4
        assert [summary[key] for key in ("win_rate", "strict_win_rate", "wins", "adherence_gain")] == [None] * 4
        assert summary["mi_gain_nats"]["mean"] == 0.0

    def test_principles_asked_for_in_some_queries_only_are_averaged_over_these(self):
        tone_alone = [Verdict(True, True, {"tone": True})] * 2
        both = [Verdict(True, True, {"tone": True, "detail": detail}) for detail in (False, True)]
        results = [self.results[2], *(dataclasses.replace(self.results[0], verdicts=v) for v in (tone_alone, both))]
        per_principle = summarize(results, None)["per_principle"]
        assert (per_principle["tone"]["n"], per_principle["detail"]["n"]) == (3, 2)
        assert per_principle["detail"]["mean"] == 0.25  # (0.5 + 0) / 2

    @pytest.mark.parametrize("baseline", [baseline[:2], baseline[::-1]])
    def test_a_baseline_of_other_queries_is_refused(self, baseline):
        with pytest.raises(ValueError, match="other queries, or in another order"):
            summarize(self.results, baseline)

    def test_is_plain_json(self):
        summary = summarize(self.results, self.baseline)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_query_mi_nats_by_hand():
    # Softmax over constitutions: response 0 is 3 times as likely under its own, response 1 as likely under both.
    logps = np.log(np.array([[[0.6, 0.2], [0.2, 0.2]], [[1.0, 1.0], [1.0, 1.0]]], np.float32))
    expected = [math.log(2) + (math.log(3 / 4) + math.log(1 / 2)) / 2, 0.0]
    np.testing.assert_allclose(query_mi_nats(logps), expected, atol=1e-6)
