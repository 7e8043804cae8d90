"""Judged pairs to the numbers of a comparison: win rates, what corrects them, and what was left out."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sami_jax.chat.questions import Answer
from sami_jax.data.constitutions import read_statements
from sami_jax.evaluation.contests import Matched, Pairing
from sami_jax.evaluation.pairwise_judge import Hearing, Judged, Outcome
from sami_jax.evaluation.statistics import (
    Corrected,
    Estimate,
    Interval,
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

_DIFFERENCE = 0.05  # of a win rate, for which the number of queries that would find it is told


@dataclasses.dataclass(frozen=True)
class JudgedPair:
    """A line of verdicts.jsonl.

    Attributes:
      name: of the query, for people.
      question: its text.
      constitution: that was asked about: all of it, or one principle.
      response: the policy's text.
      baseline: the other.
      outcome: of the response, over the orders; "inconsistent" where they name different winners, "invalid" or "error"
        where an order has no verdict.
      score: 1 won, 0.5 tied or inconsistent, 0 lost; None where an order has no verdict.
      orders: a judge's answers, one for each order.
      principles: principle -> score, of those that this pair says something of.
    """

    name: str
    question: str
    constitution: str
    response: str
    baseline: str
    outcome: Outcome
    score: float | None
    orders: Sequence[Mapping[str, Any]]
    principles: Mapping[str, float]

    @property
    def extra_words(self) -> int:
        """By how many words the response is longer."""
        return words(self.response) - words(self.baseline)

    def score_in(self, *, response_first: bool) -> float:
        """The score in one of the orders; NaN where it has none."""
        scores = [order["score"] for order in self.orders if order["response_first"] == response_first]
        return math.nan if scores in ([], [None]) else scores[0]


def words(text: str) -> int:
    """The length of a response, in the one unit that models of different tokenizers share."""
    return len(text.split())


def of_contest(name: str, judged: Judged, *, per_principle: bool) -> JudgedPair:
    """What a language model said of a pair.

    Args:
      name: of the query.
      judged: the pair and its hearings.
      per_principle: it was asked about one principle; else all principles of the constitution share the score.
    """
    contest, score = judged.contest, judged.score
    asked = [contest.constitution] if per_principle else read_statements(contest.constitution)
    return JudgedPair(
        name=name,
        question=contest.query,
        constitution=contest.constitution,
        response=contest.response,
        baseline=contest.baseline,
        outcome=judged.outcome,
        score=score,
        orders=[_order(hearing) for hearing in judged.hearings],
        principles={} if score is None else dict.fromkeys(asked, score),
    )


def _order(hearing: Hearing) -> dict[str, Any]:
    reply = hearing.reply
    about: dict[str, Any] = {
        "response_first": hearing.response_first,
        "verdict": hearing.verdict,
        "score": hearing.score,
    }
    if isinstance(reply, Answer):
        return {**about, "answer": reply.text, "logps": reply.logps, "model": reply.model, "time": reply.time}
    return {**about, "answer": None, "failure": reply.kind, "reason": reply.reason}


def of_verdicts(pairing: Pairing) -> JudgedPair:
    """What a judge of responses said of a pair, each by itself: the higher score wins."""
    (ours, verdict), (theirs, other) = ((one, one.verdict) for one in pairing)
    if verdict is None or other is None:
        raise ValueError(f"{ours.name} was not judged")
    score = float(win_scores([verdict.score], [other.score])[0])
    followed = {name: (1.0 + done - other.followed.get(name, False)) / 2 for name, done in verdict.followed.items()}
    return JudgedPair(
        name=ours.name,
        question=ours.question,
        constitution=ours.constitution,
        response=ours.response,
        baseline=theirs.response,
        outcome="win" if score > 0.5 else "loss" if score < 0.5 else "tie",
        score=score,
        orders=[],
        principles=followed,
    )


@dataclasses.dataclass(frozen=True)
class _Query:
    """The pairs of one query together."""

    pairs: Sequence[JudgedPair]

    @property
    def score(self) -> float | None:
        """Mean over its pairs; None where one of them has none."""
        scores = [pair.score for pair in self.pairs]
        known = [score for score in scores if score is not None]
        return math.fsum(known) / len(known) if len(known) == len(scores) else None

    @property
    def is_inconsistent(self) -> bool:
        return any(pair.outcome == "inconsistent" for pair in self.pairs)

    @property
    def extra_words(self) -> float:
        return float(np.mean([pair.extra_words for pair in self.pairs]))

    @property
    def principles(self) -> dict[str, float]:
        """Mean over the pairs that say something of a principle."""
        found: dict[str, list[float]] = collections.defaultdict(list)
        for pair in self.pairs:
            for name, score in pair.principles.items():
                found[name].append(score)
        return {name: math.fsum(scores) / len(scores) for name, scores in found.items()}


def _queries(pairs: Sequence[JudgedPair]) -> list[_Query]:
    found: dict[str, list[JudgedPair]] = collections.defaultdict(list)
    for pair in pairs:
        found[pair.question].append(pair)
    return [_Query(of_one) for of_one in found.values()]


def summarize_pairs(pairs: Sequence[JudgedPair], *, cost_usd: float) -> dict[str, Any]:
    """The numbers of a comparison, by query: the content of summary.json.

    A query judged under several constitutions, or by several principles, has the mean of their scores, and is excluded
    where one of them has none. `wins`, `losses`, `ties` and `inconsistent` add up to `n`: the last two are the queries
    of score 0.5, without and with a pair whose two orders contradict each other.

    Args:
      pairs: at least one.
      cost_usd: of the judge.

    Returns:
      JSON value; what is not defined is None, or says by "undefined" why.
    """
    queries = _queries(pairs)
    scored = [(query, score) for query in queries if (score := query.score) is not None]
    scores, extra = [score for _, score in scored], [query.extra_words for query, _ in scored]
    inconsistent = sum(query.is_inconsistent and score == 0.5 for query, score in scored)
    found = win_rate(scores) if scores else None
    principles: dict[str, list[float]] = collections.defaultdict(list)
    for query in queries:
        for name, score in query.principles.items():
            principles[name].append(score)
    return {
        "n": len(scored),
        "wins": found.wins if found else 0,
        "losses": found.losses if found else 0,
        "ties": found.ties - inconsistent if found else 0,
        "inconsistent": inconsistent,
        "excluded": len(queries) - len(scored),
        "win_rate": _interval(found.estimate if found else None),
        "t": found.t if found else None,
        "p": found.p if found else None,
        "length_balanced": _corrected(length_balanced, scores, extra),
        "length_corrected": _corrected(length_corrected, scores, extra),
        "position_bias": _position_bias(pairs),
        "coverage": len(scored) / len(queries),
        "per_principle": {
            name: {
                "n": rate.win_rate.estimate.n,
                "wins": rate.win_rate.wins,
                "losses": rate.win_rate.losses,
                "ties": rate.win_rate.ties,
                "win_rate": _interval(rate.win_rate.estimate),
                "t": rate.win_rate.t,
                "p": rate.win_rate.p,
                "p_holm": rate.p_holm,
                "verdict": rate.verdict,
            }
            for name, rate in principle_rates(principles).items()
        },
        "cost_usd": cost_usd,
    }


def detail_pairs(pairs: Sequence[JudgedPair], matched: Matched) -> dict[str, Any]:
    """What is to be known beside the summary: the content of details.json, as far as it follows from the pairs."""
    queries = _queries(pairs)
    scores = [score for query in queries if (score := query.score) is not None]
    found = win_rate(scores) if scores else None
    deviation = float(np.std(scores)) if scores else 0.0
    detectable = detectable_difference(len(scores), deviation=deviation) if len(scores) > 1 and deviation else None
    sides = {
        "response": [words(pair.ours.response) for pair in matched.pairings],
        "baseline": [words(pair.theirs.response) for pair in matched.pairings],
    }
    verdicts = collections.Counter(order["verdict"] for pair in pairs for order in pair.orders)
    return {
        "win_rate_wilson": _plain(found.wilson if found else None),
        "win_rate_bootstrap": _plain(found.bootstrap if found else None),
        "inconsistency": _plain(inconsistency(*_by_order(pairs))),
        "power": {
            "deviation": deviation,
            "detectable_difference": detectable if detectable and detectable <= 0.5 else None,
            "queries_for_a_difference_of_0.05": queries_needed(_DIFFERENCE, deviation=deviation) if deviation else None,
        },
        "words": {side: _plain(mean_with_interval(lengths)) for side, lengths in sides.items()},
        "verdicts": dict(sorted(verdicts.items())),
        "models": sorted({order["model"] for pair in pairs for order in pair.orders if "model" in order}),
        "inconsistent": list(dict.fromkeys(pair.name for pair in pairs if pair.outcome == "inconsistent")),
        "excluded": list(dict.fromkeys(pair.name for pair in pairs if pair.score is None)),
        "only_in_responses": matched.only_ours,
        "only_in_baseline": matched.only_theirs,
        "answered_under_another_constitution": matched.other_constitution,
    }


def _by_order(pairs: Sequence[JudgedPair]) -> list[list[float]]:
    return [[pair.score_in(response_first=first) for pair in pairs] for first in (True, False)]


def _position_bias(pairs: Sequence[JudgedPair]) -> dict[str, Any] | None:
    found = position_bias(*_by_order(pairs))
    return found._asdict() if found else None


def _corrected(correct: Any, scores: Sequence[float], extra: Sequence[float]) -> dict[str, Any]:
    found: Corrected = correct(scores, extra) if scores else Corrected(None, "no query has a score")
    return {**_interval(found.estimate), "undefined": found.undefined or None}


def _interval(estimate: Estimate | None) -> dict[str, float | None]:
    names = ("mean", "low", "high")
    return {name: getattr(estimate, name) if estimate else None for name in names}


def _plain(value: Estimate | Interval | None) -> dict[str, Any] | None:
    return value._asdict() if value else None
