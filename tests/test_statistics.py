"""Win rates and what corrects them: hand-computed cases, the paper's example, coverage by simulation, invariances."""

import math

import numpy as np
import pytest
import scipy.optimize

from sami_jax.evaluation.statistics import (
    Estimate,
    detectable_difference,
    inconsistency,
    length_balanced,
    length_corrected,
    mean_with_interval,
    position_bias,
    principle_rates,
    queries_needed,
    win_rate,
    win_scores,
)

TABLE_4 = [1.0] * 177 + [0.0] * 73


def test_paper_example():
    # Table 4: 177 of 250 won, no ties. p = 0.708, se = sqrt(0.708 * 0.292 / 250) = 0.028757.
    result = win_rate(TABLE_4)
    assert round(100 * result.estimate.mean, 2) == 70.80
    assert (round(100 * result.estimate.low, 2), round(100 * result.estimate.high, 2)) == (65.16, 76.44)
    assert result.t is not None and round(result.t, 2) == 7.23
    assert (result.wins, result.losses, result.ties, result.estimate.n) == (177, 73, 0, 250)
    assert 0 < result.p < 1e-10  # two-sided, 249 degrees of freedom


def test_wilson_interval_by_hand():
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4 n^2)) / (1 + z^2 / n), z = 1.959964, p = 0.708, n = 250:
    # z^2 / n = 0.0153658; centre 0.7156829 / 1.0153658 = 0.7048523, half 1.959964 x 0.0290226 / 1.0153658 = 0.0560223
    result = win_rate(TABLE_4)
    np.testing.assert_allclose(result.wilson, (0.7048523 - 0.0560223, 0.7048523 + 0.0560223), atol=1e-6)


def test_the_sign_test_where_there_is_no_t():
    # All of 8 won: 2 x 0.5^8. Wilson's interval has a width where the normal one has none.
    result = win_rate([1.0] * 8)
    assert result.t is None and result.p == pytest.approx(2 * 0.5**8)
    assert result.wilson.low == pytest.approx(8 / (8 + 1.959964**2), rel=1e-6) and result.wilson.high == 1.0
    assert win_rate([0.75] * 8).p == pytest.approx(2 * 0.5**8)
    assert win_rate([0.5] * 8).p == 1.0 and win_rate([1.0]).p == 1.0


def test_the_bootstrap_is_the_same_each_time_and_near_the_others():
    result, scores = win_rate(TABLE_4), np.random.default_rng(8).random(50)
    assert win_rate(scores).bootstrap == win_rate(scores).bootstrap
    np.testing.assert_allclose(result.bootstrap, result.estimate[1:3], atol=0.01)
    shuffled = np.random.default_rng(0).permutation(TABLE_4)
    np.testing.assert_allclose(win_rate(shuffled).bootstrap, result.bootstrap, atol=0.01)


def test_p_is_that_of_students_t():
    # t = 1 with 3 degrees of freedom (see below): p = 1 - 2 (arctan(1 / sqrt 3) + (1 / sqrt 3) / (1 + 1 / 3)) / pi
    expected = 1 - 2 / math.pi * (math.pi / 6 + (1 / math.sqrt(3)) / (4 / 3))
    assert win_rate([1, 0.5, 0.5, 0.5]).p == pytest.approx(expected)


def test_mean_with_interval_by_hand():
    # 1, 2, 3: mean 2, sd = sqrt((1 + 0 + 1) / 2) = 1, half width = 1.96 / sqrt(3) = 1.13161
    estimate = mean_with_interval([1.0, 2.0, 3.0])
    np.testing.assert_allclose(estimate, (2.0, 2 - 1.1316065, 2 + 1.1316065, 3), rtol=1e-7)


def test_shift_and_scale():
    values = np.random.default_rng(0).normal(size=40)
    base, moved = mean_with_interval(values), mean_with_interval(3 * values + 7)
    np.testing.assert_allclose(moved[:3], 3 * np.asarray(base[:3]) + 7, rtol=1e-12)


def test_interval_covers_the_truth_95_percent():
    draws = np.random.default_rng(1).choice([0.0, 0.5, 1.0], p=[0.1, 0.5, 0.4], size=(2000, 200))  # true mean 0.65
    estimates = [mean_with_interval(scores) for scores in draws]
    covered = np.mean([e.low <= 0.65 <= e.high for e in estimates])
    assert 0.93 < covered < 0.97  # 0.95 +- 4 standard errors of 2000 draws


def test_win_scores():
    scores = win_scores([2, 1, 0, -np.inf, -np.inf], [1, 1, 1, 0, -np.inf])
    np.testing.assert_array_equal(scores, [1, 0.5, 0, 0, 0.5])


def test_swapping_the_sides_mirrors_the_result():
    policy, baseline = [3, 1, 2, 2], [1, 2, 2, 1]
    there, back = win_rate(win_scores(policy, baseline)), win_rate(win_scores(baseline, policy))
    assert there.estimate.mean == 1 - back.estimate.mean
    assert (there.wins, there.losses, there.ties) == (back.losses, back.wins, back.ties) == (2, 1, 1)
    assert there.t == -back.t and there.p == back.p
    np.testing.assert_allclose(there.wilson, 1 - np.array(back.wilson)[::-1])


def test_ties_use_the_sample_deviation():
    # 1, 0.5, 0.5, 0.5: mean 0.625, sd = sqrt((0.375^2 + 3 * 0.125^2) / 3) = 0.25, se = 0.125, t = 0.125 / 0.125 = 1
    result = win_rate([1, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(result.estimate, (0.625, 0.625 - 1.96 * 0.125, 0.625 + 1.96 * 0.125, 4))
    assert result.t == pytest.approx(1.0)
    assert (result.wins, result.losses, result.ties) == (1, 0, 3)


def test_means_over_constitutions_count_on_their_side():
    result = win_rate([0.75, 0.25, 1.0, 0.75])
    assert (result.wins, result.losses, result.ties) == (3, 1, 0)
    expected = np.std([0.75, 0.25, 1.0, 0.75], ddof=1) / 2
    assert result.estimate.high - result.estimate.mean == pytest.approx(1.96 * expected)


def test_degenerate_samples():
    assert mean_with_interval([4.0]) == Estimate(4.0, None, None, 1)
    assert win_rate([0.5, 0.5]).t is None
    assert win_rate([1.0, 1.0]).estimate == Estimate(1.0, 1.0, 1.0, 2)
    assert win_rate([0.5]).estimate == Estimate(0.5, None, None, 1)
    assert win_rate([1.0]).estimate == Estimate(1.0, None, None, 1) and win_rate([1.0]).bootstrap is None


@pytest.mark.parametrize("function", [mean_with_interval, win_rate, lambda v: win_scores(v, v)])
@pytest.mark.parametrize(
    ("values", "message"), [([], "empty"), ([0.5, np.nan], r"NaN at positions \[1\]"), ([[0.5]], "one axis")]
)
def test_refusals(function, values, message):
    with pytest.raises(ValueError, match=message):
        function(values)


def test_other_refusals():
    with pytest.raises(ValueError, match="infinity at positions"):
        mean_with_interval([1.0, np.inf])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        win_rate([0.5, 1.5])
    with pytest.raises(ValueError, match="2 scores and baseline 1"):
        win_scores([1, 2], [1])


@pytest.mark.parametrize("true_rate", [0.65, 0.97])
def test_wilson_and_bootstrap_cover_the_truth(true_rate):
    draws = np.random.default_rng(2).random((500, 100)) < true_rate
    rates = [win_rate(scores) for scores in draws]
    wilson = np.mean([rate.wilson.low <= true_rate <= rate.wilson.high for rate in rates])
    bootstrap = np.mean([rate.bootstrap.low <= true_rate <= rate.bootstrap.high for rate in rates])
    normal = np.mean([rate.estimate.low <= true_rate <= rate.estimate.high for rate in rates])
    assert 0.91 < wilson < 0.99  # 0.95 +- 4 standard errors of 500 draws
    if true_rate == 0.65:
        assert 0.91 < bootstrap < 0.99 and 0.91 < normal < 0.99
    else:  # why Wilson's is given: of 100 queries, few are lost
        assert normal < 0.91 and bootstrap < wilson


class TestLengthBalanced:
    def test_by_hand(self):
        # Longer: 1, 1, 0, 1 = 0.75; not longer: 0, 0.5, 0, 0.5 = 0.25; mean 0.5, where the raw mean is 0.5, too.
        scores, extra = [1, 1, 0, 1, 0, 0.5, 0, 0.5], [3, 1, 2, 9, 0, -1, 0, -5]
        estimate, undefined = length_balanced(scores, extra)
        # Errors: sqrt(0.75 x 0.25 / 4) = 0.2165064; sd sqrt(4 x 0.0625 / 3) = 0.2886751, over 2 = 0.1443376.
        half = 1.96 * math.hypot(0.2165064, 0.1443376) / 2
        np.testing.assert_allclose(estimate, (0.5, 0.5 - half, 0.5 + half, 8), rtol=1e-6)
        assert undefined == ""

    def test_a_policy_that_only_writes_more_gains_nothing(self):
        scores, extra = [1] * 9 + [0], [5] * 9 + [-5]
        assert win_rate(scores).estimate.mean == 0.9
        assert length_balanced(scores, extra).estimate.mean == 0.5

    @pytest.mark.parametrize(
        ("extra", "reason"), [([0, -1], "no response is longer"), ([1, 2], "every response is longer")]
    )
    def test_an_empty_stratum_is_not_defined(self, extra, reason):
        estimate, undefined = length_balanced([1, 0], extra)
        assert estimate is None and reason in undefined

    def test_a_stratum_of_one_has_no_interval(self):
        assert length_balanced([1, 0, 0], [1, -1, -1]).estimate == Estimate(0.5, None, None, 3)

    def test_covers_the_truth(self):
        rng, covered = np.random.default_rng(3), []
        for _ in range(1000):
            extra = rng.choice([-1, 1], size=120, p=[0.3, 0.7])
            scores = rng.random(120) < np.where(extra > 0, 0.8, 0.4)  # balanced: 0.6; raw: 0.68
            estimate = length_balanced(scores, extra).estimate
            covered.append(estimate.low <= 0.6 <= estimate.high)
        assert 0.92 < np.mean(covered) < 0.98


class TestLengthCorrected:
    def test_two_lengths_by_hand(self):
        # Differences -1 and 1, 4 queries each: the regression meets both means, 1 / 4 and 3 / 4; half-way between their
        # logits, -log 3 and log 3, lies logit 0. Three lengths (-1, 1, 1): a = (logit p1 + logit p2) / 2 likewise.
        extra = [-1] * 4 + [1] * 4
        assert length_corrected([0, 0, 0, 1, 1, 1, 1, 0], extra).estimate.mean == pytest.approx(0.5)
        estimate, undefined = length_corrected([0, 0, 1, 1, 1, 1, 1, 0], extra)
        assert estimate.mean == pytest.approx(1 / (1 + math.exp(-math.log(3) / 2))) and undefined == ""
        assert estimate.low < estimate.mean < estimate.high and estimate.n == 8

    def test_the_error_of_ties_is_their_own(self):
        # Half as far from their means as wins and losses, the same means: half the error on the scale of logits.
        extra = np.array([-1, -1, 1, 1] * 10)
        wide = length_corrected([0.0, 0.5, 1.0, 0.5] * 10, extra).estimate
        narrow = length_corrected([0.125, 0.375, 0.875, 0.625] * 10, extra).estimate
        assert narrow.mean == pytest.approx(wide.mean)
        logits = [math.log(e.high / (1 - e.high)) - math.log(e.mean / (1 - e.mean)) for e in (wide, narrow)]
        assert logits[1] == pytest.approx(logits[0] / 2)

    def test_the_unit_of_length_changes_nothing_and_swapping_the_sides_mirrors(self):
        rng = np.random.default_rng(4)
        extra, scores = rng.normal(1.0, 2.0, size=80), rng.choice([0.0, 0.5, 1.0], size=80)
        found = length_corrected(scores, extra).estimate
        np.testing.assert_allclose(length_corrected(scores, 7 * extra).estimate, found, rtol=1e-6)
        back = length_corrected(1 - scores, -extra).estimate
        np.testing.assert_allclose(back[:3], (1 - found.mean, 1 - found.high, 1 - found.low), rtol=1e-6)

    @pytest.mark.parametrize(
        ("scores", "extra", "reason"),
        [
            ([0.25, 0.75], [1, 2], "needs three queries or more"),
            ([1, 0, 1, 0], [2, 2, 2, 2], "differ from the baseline's by the same"),
            ([1, 1, 1, 1], [1, 2, 3, 4], "every query was won"),
            ([0, 0, 0, 0], [1, 2, 3, 4], "every query was lost"),
            ([0, 0, 1, 1], [1, 2, 3, 4], "length alone separates"),
            ([1, 1, 0, 0], [1, 2, 3, 4], "length alone separates"),
            ([0, 0, 1, 1, 1], [1, 2, 2, 3, 4], "length alone separates"),  # but for one length: statsmodels is silent
            ([0, 0.5, 1, 1], [1, 2, 3, 4], "length alone separates"),
        ],
    )
    def test_where_it_is_not_defined(self, scores, extra, reason):
        estimate, undefined = length_corrected(scores, extra)
        assert estimate is None and reason in undefined

    def test_small_samples_give_the_best_fit_or_a_reason_and_never_nan(self):
        rng, fitted, reasons = np.random.default_rng(7), 0, set()
        hard = [([1.0, 0.75, 0.25, 1.0], [-3.0, 0.0, 1.0, -40.0]), ([0.25, 0.0, 0.25], [0.0, -3.0, -3.0])]
        drawn = [
            (rng.choice([0, 0.25, 0.5, 0.75, 1], n), rng.choice([-40.0, -3, -1, 0, 1, 2, 7], n))
            for n in rng.integers(3, 8, size=100)
        ]
        for scores, extra in [*hard, *drawn]:
            estimate, undefined = length_corrected(scores, extra)
            if estimate is None:
                reasons.add(undefined)
                continue
            fitted += 1
            scores, extra = np.array(scores), np.array(extra)
            design = np.stack([np.ones_like(extra), np.tanh(extra / extra.std())], axis=1)
            found = scipy.optimize.minimize(
                lambda x, s=scores, d=design: np.sum(np.logaddexp(0, d @ x) - s * (d @ x)), [0.0, 0.0], tol=1e-9
            )
            assert estimate.mean == pytest.approx(1 / (1 + math.exp(-found.x[0])), abs=1e-3)  # flat near separation
            assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
        assert fitted > 70 and "length alone separates the won queries from the lost" in reasons

    def test_covers_the_truth_where_the_raw_rate_does_not(self):
        rng, corrected, raw = np.random.default_rng(5), [], []
        for _ in range(300):
            extra = rng.normal(1.0, 1.0, size=250)
            p = 1 / (1 + np.exp(-(0.2 + 1.5 * np.tanh(extra / extra.std()))))
            scores = rng.random(250) < p
            truth, estimate, win = 1 / (1 + math.exp(-0.2)), length_corrected(scores, extra).estimate, scores.mean()
            corrected.append(estimate.low <= truth <= estimate.high)
            raw.append(abs(win - truth) < 1.96 * math.sqrt(win * (1 - win) / 250))
        assert 0.9 < np.mean(corrected) < 0.995 and np.mean(raw) < 0.2


def test_equal_scores_give_no_nan():
    extra = np.arange(-3.0, 5.0)
    for value in (0.0, 0.5, 0.75, 1.0):
        scores = np.full(8, value)
        rate = win_rate(scores)
        numbers = [*rate.estimate, *rate.wilson, *rate.bootstrap, rate.p]
        for corrected in (length_balanced(scores, extra), length_corrected(scores, extra)):
            numbers += corrected.estimate or ()
        assert np.isfinite(numbers).all() and rate.estimate.mean == value
        assert principle_rates({"one": scores})["one"].p_holm == rate.p
    np.testing.assert_allclose(length_corrected(np.full(8, 0.5), extra).estimate, (0.5, 0.5, 0.5, 8))


def test_position_bias_by_hand():
    nan = math.nan
    # First wins in both orders: 1; in neither: 0; the same response in both: 0.5; (tie, first): 0.75; one order: 1.
    first, second = [1.0, 0.0, 1.0, 0.5, 1.0, nan, 1.0], [0.0, 1.0, 1.0, 0.0, nan, nan, 0.0]
    found = position_bias(first, second)
    assert found.n == 6 and found.mean == pytest.approx((1 + 0 + 0.5 + 0.75 + 1 + 1) / 6)
    # Both orders have a verdict in five pairs, of which three contradict themselves.
    assert inconsistency(first, second) == mean_with_interval([1.0, 1.0, 0.0, 0.0, 1.0])
    assert position_bias([nan], [nan]) is None and inconsistency([nan], [1.0]) is None
    with pytest.raises(ValueError, match="one score or NaN a pair"):
        position_bias([1.0], [1.0, 0.0])


def test_principles_are_corrected_for_their_number():
    # Of 10: all won, p = 2 / 1024 = 0.00195; 9 of 10, t = 0.4 / sqrt(0.09 / 10), p = 0.00225; even, p = 1. Holm: times
    # 4, 3, 2, 1 from the least on, and never less than the one before.
    scores = {"even": [1.0, 0.0] * 5, "all": [1.0] * 10, "most": [1.0] * 9 + [0.0], "few": [0.0] * 9 + [1.0]}
    rates = principle_rates(scores)
    most = win_rate(scores["most"]).p
    assert list(rates) == list(scores) and 2 / 1024 < most < 8 / 3072
    assert [rates[name].p_holm for name in scores] == pytest.approx([1.0, 8 / 1024, 8 / 1024, 8 / 1024])
    others = principle_rates({name: scores[name] for name in ("even", "most")})
    assert [rate.p_holm for rate in others.values()] == pytest.approx([1.0, 2 * most])
    verdicts = {name: rate.verdict for name, rate in rates.items()}
    assert verdicts == {"even": "no clear difference", "all": "better", "most": "better", "few": "worse"}
    alone = principle_rates({"seven": [1.0] * 7 + [0.0]})["seven"]
    together = principle_rates({str(i): [1.0] * 7 + [0.0] for i in range(10)})
    assert alone.verdict == "better" and {rate.verdict for rate in together.values()} == {"no clear difference"}
    assert principle_rates({}) == {}


def test_power_is_what_it_says():
    # (1.96 + 0.8416)^2 x 0.25 / 0.1^2 = 196.2 by the normal distribution, two more by Student's.
    assert queries_needed(0.1) == 199 and queries_needed(0.1, deviation=0.25) == 52
    assert queries_needed(0.5, deviation=0.01) == 4
    assert detectable_difference(199) == pytest.approx(0.1, abs=5e-4)
    draws = np.random.default_rng(6).random((1000, 199)) < 0.6
    found = np.mean([abs(m.mean - 0.5) > m.mean - m.low for m in map(mean_with_interval, draws)])
    assert 0.75 < found < 0.86  # 0.8 +- 4 standard errors of 1000 draws, and a little for the normal quantile
    for difference, deviation in ((0.0, 0.5), (0.6, 0.5), (0.1, 0.0)):
        with pytest.raises(ValueError, match="must lie in"):
            queries_needed(difference, deviation=deviation)
    with pytest.raises(ValueError, match="at least 2"):
        detectable_difference(1)


@pytest.mark.parametrize("function", [length_balanced, length_corrected])
def test_lengths_that_do_not_fit_are_refused(function):
    for extra in ([1.0], [1.0, np.inf]):
        with pytest.raises(ValueError, match="extra_length must be 2 finite numbers"):
            function([1.0, 0.0], extra)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        function([1.0, 2.0], [1.0, 2.0])
