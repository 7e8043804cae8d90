"""The quantities a run measures, in the words and digits of its report."""

import dataclasses

from sami_jax.evaluation.statistics import Estimate


@dataclasses.dataclass(frozen=True)
class Unit:
    """How a quantity's numbers are written."""

    scale: float
    decimals: int
    suffix: str
    change_suffix: str
    heading: str  # names the unit behind a title; numbers under it carry no suffix

    def number(self, value: float, *, sign: bool = False) -> str:
        text = f"{value * self.scale:{'+' if sign else ''}.{self.decimals}f}"
        if float(text) == 0:  # no "-0.0"
            text = text.lstrip("+-")
        return text.replace("-", "\N{MINUS SIGN}")

    def value(self, value: float) -> str:
        return self.number(value) + self.suffix

    def change(self, value: float) -> str:
        return self.number(value, sign=True) + self.change_suffix

    def interval(self, estimate: Estimate, *, sign: bool = False) -> str:
        if estimate.low is None or estimate.high is None:
            return "no interval"
        return f"[{self.number(estimate.low, sign=sign)}, {self.number(estimate.high, sign=sign)}]"

    def short(self, value: float) -> str:
        return self.number(value) + ("" if self.heading else self.suffix)

    def tick(self, value: float) -> str:
        text = f"{value * self.scale:.6g}".replace("-", "\N{MINUS SIGN}")
        return text + ("" if self.heading else self.suffix)


RATE = Unit(100.0, 1, " %", " points", "")
NATS = Unit(1.0, 3, " nats", "", " (nats)")
TOKENS = Unit(1.0, 1, " tokens", "", " (tokens)")
LOG_PROB = Unit(1.0, 3, "", "", "")
T_STATISTIC = Unit(1.0, 2, "", "", "")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One measured quantity of a split."""

    key: str  # its field in eval/summary.json
    label: str
    unit: Unit
    note: str  # one line under its chart; {normalize} is the run's, "mean" or "sum"
    gain_key: str | None = None  # the summary's paired difference from the base, where it has one
    is_comparison: bool = False  # compares with the base by itself: 0.5 is no difference
    fall_is_bad: bool = True


WIN_RATE = Metric(
    "win_rate",
    "Win rate against the base",
    RATE,
    "A tie counts half. Above 50 %: better than the base.",
    is_comparison=True,
)
STRICT_WIN_RATE = Metric(
    "strict_win_rate", "Strict win rate", RATE, "As the win rate, but wrong content also loses.", is_comparison=True
)
ADHERENCE = Metric(
    "adherence",
    "Principles followed",
    RATE,
    "Share of the asked principles that the judge saw followed.",
    gain_key="adherence_gain",
)
MI = Metric(
    "mi_nats",
    "Mutual information",
    NATS,
    "Lower bound from {normalize} log-probabilities: what a response tells of its rules.",
    gain_key="mi_gain_nats",
)
DISTINCT = Metric(
    "distinct",
    "Responses differ by constitution",
    RATE,
    "Queries whose responses all differ. Near 0 %, constitutions are ignored.",
)
WELL_FORMED = Metric("well_formed", "Well-formed responses", RATE, "Falls when the model over-optimises.")
FAITHFUL = Metric("faithful", "Content copied rightly", RATE, "Form may be fine while the content is wrong.")
LENGTH = Metric(
    "length_tokens",
    "Response length",
    TOKENS,
    "Watch this beside the win rate: judges may like length.",
    fall_is_bad=False,
)
BASE_LOGP = Metric(
    "base_logp",
    "Likelihood under the base",
    LOG_PROB,
    "Log-probability, {normalize} over tokens. A large fall hints at over-optimisation.",
    fall_is_bad=False,
)
METRICS = (WIN_RATE, STRICT_WIN_RATE, ADHERENCE, MI, DISTINCT, WELL_FORMED, FAITHFUL, LENGTH, BASE_LOGP)

SPLIT_LABELS = {"learned": "learned principles", "held_out": "held-out principles"}


def iteration_label(iteration: int) -> str:
    """ "base" for iteration 0, "iteration k" for the others."""
    return "base" if iteration == 0 else f"iteration {iteration}"
