"""Win rates against hand-computed cases and the paper's published example."""

import numpy as np
import pytest

from sami_jax.evaluation.win_rates import Estimate, mean_with_interval, win_rate, win_scores


def test_paper_example():
    # Table 4: 177 of 250 won, no ties. p = 0.708, se = sqrt(0.708 * 0.292 / 250) = 0.028757.
    result = win_rate([1.0] * 177 + [0.0] * 73)
    assert round(100 * result.estimate.mean, 2) == 70.80
    assert (round(100 * result.estimate.low, 2), round(100 * result.estimate.high, 2)) == (65.16, 76.44)
    assert result.t is not None and round(result.t, 2) == 7.23
    assert (result.wins, result.losses, result.ties, result.estimate.n) == (177, 73, 0, 250)


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
    estimates = [win_rate(scores).estimate for scores in draws]
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
    assert there.t == -back.t


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
