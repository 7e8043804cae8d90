"""Statistics of a judged comparison: means and win rates with 95 % intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z_95 = 1.96  # the paper's normal quantile, not the exact 1.95996...: the published intervals come out to the digit


class Estimate(NamedTuple):
    """A mean over queries with its 95 % normal interval, all in the unit of the values."""

    mean: float
    low: float | None  # None: one value has a mean but no interval
    high: float | None
    n: int  # queries


class WinRate(NamedTuple):
    """How often a policy's responses beat a baseline's; a tie counts half."""

    estimate: Estimate  # mean score in [0, 1]; 0.5 = no difference
    wins: int  # queries with a score above 0.5
    losses: int  # below 0.5
    ties: int  # exactly 0.5
    t: float | None  # (mean - 0.5) / standard error; None where the standard error is zero or unknown


def _checked_values(values: ArrayLike, name: str) -> NDArray[np.float64]:  # [Q]
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one axis, the queries, but has shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: a statistic over no queries is undefined; check what was filtered out")
    bad = np.flatnonzero(np.isnan(array))
    if bad.size:
        raise ValueError(f"{name} holds NaN at positions {bad[:10].tolist()}: exclude and count such queries first")
    return array


def _standard_error(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else None


def _estimate(values: NDArray[np.float64], standard_error: float | None) -> Estimate:
    mean = float(values.mean())
    if standard_error is None:
        return Estimate(mean, None, None, values.size)
    return Estimate(mean, mean - Z_95 * standard_error, mean + Z_95 * standard_error, values.size)


def mean_with_interval(values: ArrayLike) -> Estimate:
    """Mean over queries and its 95 % normal interval from the sample's own standard deviation.

    mean +- 1.96 * sd(ddof=1) / sqrt(n). The interval may reach beyond the values' range: it is not clipped.

    Args:
        values: [Q] one finite value per query, any unit. For a change, pass the paired differences.
    Returns:
        The estimate in the unit of the values; with one value, `low` and `high` are None.
    Raises:
        ValueError: no values, a NaN or an infinity, or more than one axis.
    """
    array = _checked_values(values, "values")
    if not np.isfinite(array).all():
        raise ValueError(f"values holds an infinity at positions {np.flatnonzero(~np.isfinite(array))[:10].tolist()}")
    return _estimate(array, _standard_error(array))


def win_scores(policy: ArrayLike, baseline: ArrayLike) -> NDArray[np.float64]:
    """Score of each query: 1 where the policy's judge score is higher, 0 where it is lower, 0.5 where they are equal.

    Args:
        policy: [Q] judge scores of the policy's responses, higher is better; -inf may stand for "loses to anything".
        baseline: [Q] judge scores of the baseline's responses to the same queries.
    Returns:
        [Q] scores in {0, 0.5, 1}.
    Raises:
        ValueError: no queries, a NaN, or different lengths.
    """
    policy_scores = _checked_values(policy, "policy")
    baseline_scores = _checked_values(baseline, "baseline")
    if policy_scores.shape != baseline_scores.shape:
        raise ValueError(
            f"policy has {policy_scores.size} scores and baseline {baseline_scores.size}: judge the same queries twice"
        )
    return np.where(policy_scores == baseline_scores, 0.5, np.where(policy_scores > baseline_scores, 1.0, 0.0))


def win_rate(scores: ArrayLike) -> WinRate:
    """Mean score with its 95 % interval and the t statistic against 0.5.

    Where every score is 0 or 1 the interval is the paper's, p +- 1.96 sqrt(p (1 - p) / n), and
    t = (p - 0.5) / sqrt(p (1 - p) / n) (paper, Table 4: 70.80 % of 250 is [65.16, 76.44] with t = 7.23). With any
    other score (ties; means over several constitutions) that variance is too large, so the sample's own standard
    deviation (ddof=1) is used. Both give a width of zero when all scores are equal: that is a property of the normal
    interval, not certainty.

    Args:
        scores: [Q] one score in [0, 1] per query: 1 won, 0.5 tied, 0 lost. A query judged under several
            constitutions has the mean of its scores.
    Returns:
        The win rate; wins, losses and ties count queries above, below and at 0.5.
    Raises:
        ValueError: no scores, a NaN, or a score outside [0, 1].
    """
    array = _checked_values(scores, "scores")
    outside = np.flatnonzero((array < 0) | (array > 1))
    if outside.size:
        raise ValueError(f"scores must lie in [0, 1], but position {outside[0]} holds {array[outside[0]]}")
    if np.isin(array, (0.0, 1.0)).all():
        p = float(array.mean())
        standard_error: float | None = float(np.sqrt(p * (1 - p) / array.size))
    else:
        standard_error = _standard_error(array)
    estimate = _estimate(array, standard_error)
    return WinRate(
        estimate=estimate,
        wins=int((array > 0.5).sum()),
        losses=int((array < 0.5).sum()),
        ties=int((array == 0.5).sum()),
        t=(estimate.mean - 0.5) / standard_error if standard_error else None,
    )
