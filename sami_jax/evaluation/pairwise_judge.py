"""A language model as a judge of pairs: which of two responses follows a constitution better (paper, section 4)."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sami_jax.chat.answers import Answers
from sami_jax.chat.questions import UNAVAILABLE, Answer, Failure, Question, Reply, quoted
from sami_jax.errors import BadDataError, UnavailableError
from sami_jax.files import content_hash, read_text
from sami_jax.progress import Progress
from sami_jax.seeds import number
from sami_jax.types import Orders

TEMPLATE = Path(__file__).parents[1] / "templates" / "judge.txt"
MOST_ERRORS = 0.05  # share of the questions without an answer, beyond which there is no result
_UNUSABLE = 10  # answers without a verdict, at the very beginning, after which nobody is asked any more
_MARK_DIGITS = 16
_CHOICES = ("Verdict: A", "Verdict: B")  # that a model on these devices chooses between

Verdict = Literal["A", "B", "tie", "invalid", "error"]  # A: the response that stands first
Outcome = Literal["win", "loss", "tie", "inconsistent", "invalid", "error"]  # of the response, against the baseline

_VERDICT = r"[\[(*_`\"']*(?P<verdict>A|B|[Tt]ie|TIE)[\])*_`\"'.]*"
_LINE = re.compile(rf"[*_`#\s]*(?:Final )?(?:Verdict|Response|Answer)[*_`]*:[*_`]*\s*{_VERDICT}\s*", re.IGNORECASE)
_ALONE = re.compile(_VERDICT)


def prompt_hash() -> str:
    """SHA-256 of the prompt's template."""
    return content_hash(_template())


@functools.cache
def _template() -> str:
    return read_text(TEMPLATE)


@dataclasses.dataclass(frozen=True)
class Contest:
    """Two responses to one query, and what is asked of both.

    Attributes:
      query: that both answer.
      constitution: that both are measured by: all of it, or one principle.
      response: the policy's.
      baseline: the other.
    """

    query: str
    constitution: str
    response: str
    baseline: str

    def question(self, *, response_first: bool) -> Question:
        """What a judge is asked, with the response as A or as B.

        Texts stand word for word between lines with a mark that is a hash of them: equal texts give equal questions,
        so that an answer can be found again, and no text can hold its own mark.
        """
        a, b = (self.response, self.baseline) if response_first else (self.baseline, self.response)
        texts = {"constitution": self.constitution, "query": self.query, "a": a, "b": b}
        mark = _mark(list(texts.values()))
        fields = {**texts, "mark": mark}
        text = re.sub(r"\{(\w+)\}", lambda field: fields[field[1]], _template().strip())
        return Question(text, choices=_CHOICES)

    def orders(self, orders: Orders, seed: int) -> tuple[bool, ...]:
        """Whether the response stands first, in each order that is asked; "paper" tosses a coin for each contest."""
        if orders == "both":
            return (True, False)
        return (number(seed, "judge", self.query, self.constitution, self.response, self.baseline) % 2 == 0,)


def _mark(texts: Sequence[str]) -> str:
    """Digits that none of the texts holds. A second round needs a text that was made for it."""
    rounds = (hashlib.sha256(json.dumps([tried, *texts]).encode()).hexdigest() for tried in itertools.count())
    marks = (digest[:_MARK_DIGITS] for digest in rounds)
    return next(mark for mark in marks if not any(mark in text for text in texts))


def read_verdict(text: str) -> Verdict:
    """The verdict in an answer: one line that holds it and nothing else, or a letter that is all of the answer.

    "invalid" where there is no such line, or where two of them disagree. A letter or a verdict inside a sentence is
    none.
    """
    if alone := _ALONE.fullmatch(text.strip()):
        return _named(alone["verdict"])
    found = {_named(line["verdict"]) for line in map(_LINE.fullmatch, text.splitlines()) if line}
    return found.pop() if len(found) == 1 else "invalid"


def _named(text: str) -> Verdict:
    return {"A": "A", "B": "B"}.get(text.upper(), "tie")  # type: ignore[return-value]


def verdict_of(reply: Reply) -> Verdict:
    """What a reply comes to: of log-probs the greater, equal ones are a tie; an answer that was cut off is invalid."""
    if isinstance(reply, Failure):
        return "error"
    if reply.logps is not None:
        first, second = reply.logps
        return "tie" if first == second else "A" if first > second else "B"
    return read_verdict(reply.text) if reply.finished else "invalid"


@dataclasses.dataclass(frozen=True)
class Hearing:
    """A contest in one order.

    Attributes:
      response_first: the response was A.
      reply: the judge's.
    """

    response_first: bool
    reply: Reply

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.reply)

    @property
    def score(self) -> float | None:
        """The response's: 1 won, 0.5 tied, 0 lost; None where there is no verdict."""
        of_the_first = {"A": 1.0, "tie": 0.5, "B": 0.0}.get(self.verdict)
        return of_the_first if of_the_first is None or self.response_first else 1.0 - of_the_first


@dataclasses.dataclass(frozen=True)
class Judged:
    """A contest and its hearings, one for each order that was asked."""

    contest: Contest
    hearings: tuple[Hearing, ...]

    @property
    def score(self) -> float | None:
        """Mean over the orders; None where one of them has no verdict, which is never a tie."""
        scores = [hearing.score for hearing in self.hearings]
        known = [score for score in scores if score is not None]
        return sum(known) / len(known) if len(known) == len(scores) else None

    @property
    def outcome(self) -> Outcome:
        """ "inconsistent": the two orders name different winners."""
        score = self.score
        if score is None:
            return "error" if any(hearing.verdict == "error" for hearing in self.hearings) else "invalid"
        if len({hearing.score for hearing in self.hearings} & {0.0, 1.0}) == 2:
            return "inconsistent"
        return "win" if score > 0.5 else "loss" if score < 0.5 else "tie"

    def score_in(self, *, response_first: bool) -> float | None:
        """The score in one of the orders; None where it was not asked, or has no verdict."""
        return next((h.score for h in self.hearings if h.response_first == response_first), None)


def judge_contests(
    answers: Answers,
    contests: Sequence[Contest],
    *,
    orders: Orders,
    seed: int,
    progress: Progress,
) -> list[Judged]:
    """The contests with the judge's replies, whatever they are.

    Args:
      answers: asks the judge.
      contests: to be judged.
      orders: "both": each is asked twice, with either response first; "paper": once, in a drawn order.
      seed: of that order.
      progress: is told of each answer.

    Raises:
      SamiError: as `ask_judge`.
    """
    replies = iter(ask_judge(answers, questions_of(contests, orders=orders, seed=seed), progress))
    return [
        Judged(contest, tuple(Hearing(first, next(replies)) for first in contest.orders(orders, seed)))
        for contest in contests
    ]


def questions_of(contests: Sequence[Contest], *, orders: Orders, seed: int) -> list[Question]:
    """What a judge is asked about contests; see `judge_contests`."""
    return [contest.question(response_first=first) for contest in contests for first in contest.orders(orders, seed)]


def ask_judge(answers: Answers, questions: Sequence[Question], progress: Progress) -> list[Reply]:
    """A judge's replies, whatever they are, as long as they lead anywhere.

    Args:
      answers: asks the judge.
      questions: of `Contest.question`.
      progress: is told of each answer.

    Raises:
      BadDataError: the judge answers, but with nothing that could be used.
      UnavailableError: too many questions have no answer for there to be a result.
      SamiError: what `answers.ask` raises.
    """
    watch = _Watch(answers.chat.name, len(set(questions)), progress, recorded=answers.announce(questions))
    replies = answers.ask(questions, heed=watch.heed)
    watch.check_usable(replies)
    return replies


class _Watch:
    """Follows replies as they come, and ends the asking where it leads nowhere."""

    def __init__(self, judge: str, total: int, progress: Progress, *, recorded: int):
        self._judge, self._total, self._progress, self._recorded = judge, total, progress, recorded
        progress.begin(total, done=recorded)
        self._done = self._usable = self._unusable = self._unavailable = self._errors = 0

    def heed(self, reply: Reply) -> None:
        """Raises BadDataError or UnavailableError, as `judge_contests` does."""
        self._done += 1
        if isinstance(reply, Failure):
            self._errors += 1
            self._unavailable += reply.kind in UNAVAILABLE
            if self._unavailable > max(MOST_ERRORS * self._total, 2):
                raise UnavailableError(
                    f"{self._judge} {reply.reason}, and so on for {self._unavailable} of {self._total} questions. What "
                    "was answered is kept; run the same command later."
                )
        elif verdict_of(reply) == "invalid":
            self._unusable += 1
            if not self._usable and self._unusable >= _UNUSABLE:
                raise self._nothing_usable(reply)
        else:
            self._usable += 1
        notes = {"without an answer": self._errors, "without a verdict": self._unusable}
        note = ", ".join(f"{count} {what}" for what, count in notes.items() if count)
        if self._done > self._recorded or self._done == self._total:
            self._progress.update(self._done, note)

    def check_usable(self, replies: Sequence[Reply]) -> None:
        """Raises BadDataError where there are answers, and no verdict in any."""
        said = [reply for reply in replies if isinstance(reply, Answer)]
        if said and all(verdict_of(reply) == "invalid" for reply in said):
            raise self._nothing_usable(said[-1])

    def _nothing_usable(self, last: Answer) -> BadDataError:
        cut = "" if last.finished else ", and was cut off there; a higher max_tokens may help"
        return BadDataError(
            f"{self._judge} answers, but none of its first answers holds a verdict (a line such as `Verdict: A`). The "
            f"last said {quoted(last.text[-200:])}{cut}. Ask another model."
        )


def too_many_errors(judge: str, judged: Sequence[Judged]) -> UnavailableError | None:
    """What is raised where more than 5 % of the questions have no answer; None where they are fewer."""
    hearings = [hearing for one in judged for hearing in one.hearings]
    failures = [hearing.reply for hearing in hearings if isinstance(hearing.reply, Failure)]
    if len(failures) <= MOST_ERRORS * len(hearings):
        return None
    kinds = collections.Counter(failure.kind.replace("_", " ") for failure in failures)
    named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return UnavailableError(
        f"{judge} has no answer to {len(failures)} of {len(hearings)} questions ({named}), which is more than "
        f"{MOST_ERRORS:.0%}: there is no result. The last one {failures[-1].reason}. What was answered is kept; run "
        "the same command later to have the others asked again."
    )
