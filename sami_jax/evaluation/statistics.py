"""Statistics of a judged comparison: win rates with 95 % intervals, corrected for length, and how sure they are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sami_jax.seeds import generator

# scipy and statsmodels take seconds to import: where they are used, not here.
Z_95 = 1.96  # the paper's normal quantile, not the exact 1.95996...: the published intervals come out to the digit
POWER = 0.8  # the chance that a difference is found, in sample sizes
_RESAMPLES, _AT_ONCE = 5000, 2_000_000  # of the bootstrap; values in memory


class Estimate(NamedTuple):
    """A mean over queries with its 95 % interval, all in the unit of the values."""

    mean: float
    low: float | None  # None: one value has a mean but no interval
    high: float | None
    n: int  # queries


class Interval(NamedTuple):
    """The ends of a 95 % interval."""

    low: float
    high: float


class WinRate(NamedTuple):
    """How often a policy's responses beat a baseline's; a tie counts half."""

    estimate: Estimate  # mean score in [0, 1]; 0.5 = no difference. The interval is the normal one
    wilson: Interval  # never leaves [0, 1], and has a width where all scores are equal
    bootstrap: Interval | None  # of queries drawn anew, each with both its responses; None: a single query
    wins: int  # queries with a score above 0.5
    losses: int  # below 0.5
    ties: int  # exactly 0.5
    t: float | None  # (mean - 0.5) / standard error; None where the standard error is zero or unknown
    p: float  # two-sided, of "no difference": of t, n - 1 degrees of freedom; without t of the sign test


class Corrected(NamedTuple):
    """A win rate with the effect of length taken out."""

    estimate: Estimate | None
    undefined: str  # why there is none; "" where there is one


class PrincipleRate(NamedTuple):
    """A principle's win rate, judged together with those of the other principles."""

    win_rate: WinRate
    p_holm: float  # p, corrected for the number of principles (Holm)
    verdict: Literal["better", "worse", "no clear difference"]  # at 5 % of p_holm


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
    """Mean score with its 95 % intervals and a test against 0.5.

    Where every score is 0 or 1 the interval is the paper's, p +- 1.96 sqrt(p (1 - p) / n), and
    t = (p - 0.5) / sqrt(p (1 - p) / n) (paper, Table 4: 70.80 % of 250 is [65.16, 76.44] with t = 7.23). With any
    other score (ties; means over several constitutions) that variance is too large, so the sample's own standard
    deviation (ddof=1) is used. Both give a width of zero when all scores are equal: that is a property of the normal
    interval, not certainty. Wilson's interval then has a width, and p is the sign test's. Wilson's takes a score for so
    much of a win, which makes it too wide rather than too narrow where there are ties.

    Args:
        scores: [Q] one score in [0, 1] per query: 1 won, 0.5 tied, 0 lost. A query judged under several
            constitutions has the mean of its scores.
    Returns:
        The win rate; wins, losses and ties count queries above, below and at 0.5.
    Raises:
        ValueError: no scores, a NaN, or a score outside [0, 1].
    """
    import scipy.stats
    from statsmodels.stats.proportion import proportion_confint

    array = _checked_scores(scores)
    standard_error = _score_error(array)
    estimate = _estimate(array, standard_error)
    wins, losses = int((array > 0.5).sum()), int((array < 0.5).sum())
    t = (estimate.mean - 0.5) / standard_error if standard_error else None
    if t is not None:
        p = 2 * float(scipy.stats.t.sf(abs(t), array.size - 1))
    else:
        p = float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    bootstrap = None
    if array.size > 1:
        rng = generator(0, "bootstrap")  # always the same draws: equal scores, equal intervals
        how = {"method": "percentile", "n_resamples": _RESAMPLES, "batch": max(1, _AT_ONCE // array.size)}
        drawn = scipy.stats.bootstrap((array,), np.mean, rng=rng, **how)
        bootstrap = Interval(*map(float, drawn.confidence_interval))
    return WinRate(
        estimate=estimate,
        wilson=Interval(*map(float, proportion_confint(float(array.sum()), array.size, method="wilson"))),
        bootstrap=bootstrap,
        wins=wins,
        losses=losses,
        ties=array.size - wins - losses,
        t=t,
        p=p,
    )


def length_balanced(scores: ArrayLike, extra_length: ArrayLike) -> Corrected:
    """Mean of the win rates of two strata: responses longer than the baseline's, and the others.

    A policy gains nothing by being longer more often. The interval is the normal one, of two independent samples.

    Args:
        scores: [Q] as of `win_rate`.
        extra_length: [Q] length of the response minus the baseline's, in any unit.
    Returns:
        The rate; undefined where a stratum is empty.
    Raises:
        ValueError: as `win_rate`, or the arrays do not match.
    """
    array, extra = _checked_lengths(scores, extra_length)
    longer, others = array[extra > 0], array[extra <= 0]
    if not longer.size or not others.size:
        which = "no response is longer" if not longer.size else "every response is longer"
        return Corrected(None, f"{which} than the baseline's")
    mean = (float(longer.mean()) + float(others.mean())) / 2
    errors = [_score_error(stratum) for stratum in (longer, others)]
    if None in errors:
        return Corrected(Estimate(mean, None, None, array.size), "")
    half = Z_95 * math.hypot(*(error for error in errors if error is not None)) / 2
    return Corrected(Estimate(mean, mean - half, mean + half, array.size), "")


def length_corrected(scores: ArrayLike, extra_length: ArrayLike) -> Corrected:
    """The win rate that a logistic regression on length gives responses as long as the baseline's.

    logit E[score] = a + b tanh(extra_length / its standard deviation), as in AlpacaEval's length-controlled win rate
    (arXiv:2404.04475); the rate is sigmoid(a). Its interval is that of a, by a covariance that holds for ties (HC1).

    Args:
        scores: [Q] as of `win_rate`.
        extra_length: [Q] length of the response minus the baseline's, in any unit.
    Returns:
        The rate; undefined with fewer than three queries, where all lengths differ by the same, where length alone
        separates the scores, so that the regression has no finite solution, or where it finds none.
    Raises:
        ValueError: as `win_rate`, or the arrays do not match.
    """
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.generalized_linear_model import GLM

    array, extra = _checked_lengths(scores, extra_length)
    if array.size < 3:
        return Corrected(None, "a regression needs three queries or more")
    if np.ptp(extra) == 0:
        return Corrected(None, "all lengths differ from the baseline's by the same")
    # A tie is half a win and half a loss. No finite solution, if some length has all wins on one side and all losses on
    # the other; statsmodels warns of the strict case alone, and returns numbers.
    won, lost = extra[array > 0], extra[array < 1]
    if not won.size or not lost.size:
        return Corrected(None, f"every query was {'won' if won.size else 'lost'}")
    if won.min() >= lost.max() or won.max() <= lost.min():
        return Corrected(None, "length alone separates the won queries from the lost")
    design = np.stack([np.ones_like(extra), np.tanh(extra / extra.std())], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of separation, for one, where all scores are the same
        # Not the defaults, reweighted least squares and the observed Hessian: near separation they come to NaN.
        how = {"method": "bfgs", "optim_hessian": "eim", "maxiter": 500, "disp": False}
        fit = GLM(array, design, family=Binomial()).fit(cov_type="HC1", **how)
    at, variance = float(fit.params[0]), float(fit.cov_params()[0, 0])
    if not fit.mle_retvals["converged"] or not math.isfinite(at + variance):
        return Corrected(None, "the regression finds no solution: length all but separates won from lost")
    error = math.sqrt(max(0.0, variance))  # 0 may have been rounded to less
    low, mean, high = (_sigmoid(at + z * error) for z in (-Z_95, 0.0, Z_95))
    return Corrected(Estimate(mean, low, high, array.size), "")


def position_bias(shown_first: ArrayLike, shown_second: ArrayLike) -> Estimate | None:
    """How often the response that a judge sees first wins; 0.5 is no bias, a tie counts half.

    Args:
        shown_first: [P] a pair's score where the policy's response was shown first: 1 won, 0.5 tied, 0 lost; NaN where
            that order has no verdict.
        shown_second: [P] the same where it was shown second.
    Returns:
        Mean over the pairs that have a verdict, with its normal interval; None where none has.
    """
    first, second = _checked_orders(shown_first, shown_second)
    of_the_first = np.stack([first, 1 - second])[:, np.isfinite(first) | np.isfinite(second)]
    return mean_with_interval(np.nanmean(of_the_first, axis=0)) if of_the_first.size else None


def inconsistency(shown_first: ArrayLike, shown_second: ArrayLike) -> Estimate | None:
    """Share of pairs, of those with a verdict in both orders, whose two verdicts name different winners.

    Args: as of `position_bias`.
    """
    first, second = _checked_orders(shown_first, shown_second)
    both = np.isfinite(first) & np.isfinite(second)
    return mean_with_interval(np.abs(first - second)[both] == 1) if both.any() else None


def principle_rates(scores: Mapping[str, ArrayLike]) -> dict[str, PrincipleRate]:
    """Principle by principle, with p corrected by Holm's method: the more there are, the more must one show.

    Args:
        scores: principle -> [Q] scores of the queries that ask for it, as of `win_rate`.
    Raises:
        ValueError: as `win_rate`.
    """
    from statsmodels.stats.multitest import multipletests

    rates = {name: win_rate(values) for name, values in scores.items()}
    if not rates:
        return {}
    corrected = multipletests([rate.p for rate in rates.values()], method="holm")[1]
    found: dict[str, PrincipleRate] = {}
    for (name, rate), p_holm in zip(rates.items(), map(float, corrected), strict=True):
        better: Literal["better", "worse"] = "better" if rate.estimate.mean > 0.5 else "worse"
        found[name] = PrincipleRate(rate, p_holm, better if p_holm < 0.05 else "no clear difference")
    return found


def queries_needed(difference: float, *, deviation: float = 0.5) -> int:
    """Number of queries with which a win rate of 0.5 + difference is told from 0.5, in 80 % of studies, at 5 %.

    Args:
        difference: of the win rate from 0.5, in (0, 0.5].
        deviation: standard deviation of the scores; 0.5 without ties, less with them.
    Raises:
        ValueError: an argument is outside its range.
    """
    from statsmodels.stats.power import TTestPower

    if not 0 < difference <= 0.5 or not 0 < deviation <= 0.5:
        raise ValueError(f"difference {difference} and deviation {deviation} must lie in (0, 0.5]")
    effect = min(difference / deviation, 3.0)  # of which 4 queries are enough; statsmodels fails on much larger ones
    return math.ceil(TTestPower().solve_power(effect_size=effect, alpha=0.05, power=POWER))


def detectable_difference(n: int, *, deviation: float = 0.5) -> float:
    """The difference of a win rate from 0.5 that n queries find, in 80 % of studies, at 5 %.

    Raises ValueError where n is below 2, or the scores' deviation not in (0, 0.5].
    """
    from statsmodels.stats.power import TTestPower

    if n < 2 or not 0 < deviation <= 0.5:
        raise ValueError(f"n is {n}, deviation {deviation}: they must be at least 2, and lie in (0, 0.5]")
    return float(TTestPower().solve_power(nobs=n, alpha=0.05, power=POWER)) * deviation


def _checked_scores(scores: ArrayLike) -> NDArray[np.float64]:  # [Q]
    array = _checked_values(scores, "scores")
    outside = np.flatnonzero((array < 0) | (array > 1))
    if outside.size:
        raise ValueError(f"scores must lie in [0, 1], but position {outside[0]} holds {array[outside[0]]}")
    return array


def _checked_lengths(scores: ArrayLike, extra_length: ArrayLike) -> list[NDArray[np.float64]]:  # [Q] each
    array, extra = _checked_scores(scores), _checked_values(extra_length, "extra_length")
    if array.shape != extra.shape or not np.isfinite(extra).all():
        raise ValueError(f"extra_length must be {array.size} finite numbers, one for each score")
    return [array, extra]


def _checked_orders(shown_first: ArrayLike, shown_second: ArrayLike) -> list[NDArray[np.float64]]:  # [P] each
    orders = [np.asarray(scores, np.float64) for scores in (shown_first, shown_second)]
    if orders[0].ndim != 1 or orders[0].shape != orders[1].shape:
        raise ValueError(f"both orders must have one score or NaN a pair: {orders[0].shape}, {orders[1].shape}")
    return orders


def _score_error(scores: NDArray[np.float64]) -> float | None:
    """Standard error of a win rate: binomial without ties, else the sample's own; None of a single query."""
    if scores.size > 1 and np.isin(scores, (0.0, 1.0)).all():
        p = float(scores.mean())
        return math.sqrt(p * (1 - p) / scores.size)
    return _standard_error(scores)


def _sigmoid(x: float) -> float:
    return math.exp(-np.logaddexp(0.0, -x))
