"""Asks each question once: what was answered before is read from the log, the rest is asked within the budget."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sami_jax.chat.answer_log import AnswerLog, Record, answer_key
from sami_jax.chat.costs import Budget, Prices
from sami_jax.chat.questions import (
    UNAVAILABLE,
    Answer,
    Chat,
    Failure,
    Question,
    Reply,
    Spent,
    reply_from_json,
    reply_to_json,
)
from sami_jax.errors import BadConfigError, BadDataError, SamiError, StoppedError, UnavailableError
from sami_jax.processes import from_writer, process_count
from sami_jax.safe_point import SafePoint

# So many questions in a row that a server had no answer for, each tried several times: it is down.
_MOST_UNAVAILABLE = 3


class Answers:
    """A chat, and the log of what it has answered."""

    def __init__(
        self,
        chat: Chat,
        log: AnswerLog | None,
        *,
        prices: Prices,
        max_cost_usd: float,
        safe_point: SafePoint,
        say: Callable[[str], None] | None = None,
    ):
        """Prepares.

        Args:
          chat: who answers.
          log: of its answers, and of those before; None in a process that does not write.
          prices: of a server; zeros for none.
          max_cost_usd: the budget, of which the log's costs are spent; 0 for none.
          safe_point: asked now and then while questions are on their way.
          say: takes sentences for the person who watches; left out: standard error.
        """
        self.chat, self._log, self._prices, self._safe_point = chat, log, prices, safe_point
        self._budget = Budget(max_cost_usd, spent_usd=sum(log.costs_usd.values()) if log else 0.0)
        self._say = say or (lambda sentence: print(sentence, file=sys.stderr, flush=True))

    @property
    def spent_usd(self) -> float:
        """What all questions of the log have cost, by the prices of their time."""
        return self._budget.spent_usd

    def cost_usd(self, questions: Sequence[Question]) -> float:
        """What these questions have cost, by the log; 0 in a process that has none."""
        costs_usd = self._log.costs_usd if self._log else {}
        return math.fsum(costs_usd.get(key, 0.0) for key in {answer_key(self.chat, question) for question in questions})

    @property
    def log_is_empty(self) -> bool:
        """Whether this process has a log, and nothing is in it: no answer, and nothing that cost anything."""
        return self._log is not None and self._log.is_empty

    def announce(self, questions: Sequence[Question], *, and_more: bool = False) -> int:
        """Says what will be asked, and what it may cost.

        Args:
          questions: those that are known.
          and_more: others follow, which depend on the answers.

        Returns:
          How many different ones were answered before, as far as this process has the log.
        """
        recorded = self._recorded([answer_key(self.chat, question) for question in questions])
        missing = [question for question in questions if answer_key(self.chat, question) not in recorded]
        sentence = f"asking {self.chat.name} {len(missing)} question{'s' * (len(missing) != 1)}{' or more' * and_more}"
        if self._log and recorded:
            sentence += f" ({len(questions) - len(missing)} answered before, in {self._log.path})"
        if self._prices.input_usd or self._prices.output_usd:
            most_usd = [self._prices.most_usd(question) for question in missing or questions]
            cost = f"${max(most_usd):.4f} each" if and_more else f"${sum(most_usd) if missing else 0:.4f}"
            budget = f", of a budget of ${self._budget.max_cost_usd:g}" if self._budget.max_cost_usd else ""
            spent = f"; ${self._budget.spent_usd:.4f} are spent already" if self._budget.spent_usd else ""
            sentence += f": at most {cost} where no try fails{budget}{spent}"
        self._say(sentence)
        return len(recorded)

    def ask(self, questions: Sequence[Question], *, heed: Callable[[Reply], None] | None = None) -> list[Reply]:
        """The reply to each question; one that was answered before is not asked.

        Every answer is in the log before this ends, however it ends. A question that stands twice is asked once.

        Args:
          questions: to be asked.
          heed: called with each reply as it comes, those that were recorded first. A SamiError that it raises ends the
            asking, once what is on its way has come. Left out: three questions in a row that a server does not answer
            end it.

        Raises:
          BadConfigError: the budget is spent, or the server accepts no question at all.
          BadDataError: recorded answers lack one.
          StoppedError: someone asked to stop.
          UnavailableError: the server does not answer any more.
        """
        keys = [answer_key(self.chat, question) for question in questions]
        found = _from_json(from_writer(lambda: _to_json(self._recorded(keys))))
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in found}
        for reply in found.values():
            if heed:
                heed(reply)
        if missing and self.chat.on_devices:
            found |= self._asked(missing, heed)
        elif missing:
            found |= _from_json(from_writer(lambda: _to_json(self._asked(missing, heed))))
        return [found[key] for key in keys]

    def _recorded(self, keys: Sequence[str]) -> dict[str, Reply]:
        log = self._log
        return {key: answer for key in keys if log is not None and (answer := log.find(key)) is not None}

    def _asked(self, missing: dict[str, Question], heed: Callable[[Reply], None] | None) -> dict[str, Reply]:
        found: dict[str, Reply] = {}
        keys, questions = list(missing), list(missing.values())
        ended: list[SamiError] = []  # why no further question is asked
        taken = in_a_row = 0

        def take() -> tuple[int, Question] | None:
            nonlocal taken
            if ended or taken == len(questions):
                return None
            most_usd = self._prices.most_usd(questions[taken])
            if not self._budget.allows(most_usd):
                ended.append(self._budget_is_spent())
                return None
            if not self._budget.reserve(taken, most_usd):  # what is on its way will cost less than is set aside
                return None
            taken += 1
            return taken - 1, questions[taken - 1]

        def may_try_again(number: int) -> bool:
            most_usd = self._prices.most_usd(questions[number])
            allowed = self._budget.reserve(number, most_usd)
            if not allowed and not self._budget.allows_again(number, most_usd):
                ended.append(self._budget_is_spent())
            return allowed

        def stopping() -> bool:
            if not self.chat.on_devices and process_count() > 1:
                return bool(ended)  # the others cannot come to this safe point: they wait for what is asked here
            try:
                self._safe_point()
            except StoppedError as error:
                ended.insert(0, error)
            return bool(ended)

        for number, reply in self.chat.replies(take, may_try_again=may_try_again, stopping=stopping):
            self._record(number, keys[number], questions[number], reply)
            found[keys[number]] = reply
            if isinstance(reply, Failure) and reply.ends:
                ended.append(reply.ends)
            if heed:
                try:
                    heed(reply)
                except SamiError as error:
                    ended.append(error)
                continue
            in_a_row = in_a_row + (reply.kind in UNAVAILABLE) if isinstance(reply, Failure) else 0
            if isinstance(reply, Failure) and in_a_row == _MOST_UNAVAILABLE:
                ended.append(error_of(self.chat, reply))
        if ended:
            raise ended[0]
        return found

    def _record(self, number: int, key: str, question: Question, reply: Reply) -> None:
        cost_usd = self._prices.spent_usd(question, reply.spent)
        if self._log and (isinstance(reply, Answer) or reply.spent != Spent()):
            self._log.append(Record(key, question, self.chat.settings, reply, cost_usd))
        self._budget.settle(number, cost_usd)

    def _budget_is_spent(self) -> BadConfigError:
        budget, where = self._budget, f" in {self._log.path}" if self._log else ""
        return BadConfigError(
            f"The budget of ${budget.max_cost_usd:g} is spent: ${budget.spent_usd:.4f} so far, and the next question "
            f"might exceed it. What was answered is kept{where}; raise max_cost_usd to go on."
        )


def _to_json(replies: dict[str, Reply]) -> dict[str, Any]:
    return {key: reply_to_json(reply) for key, reply in replies.items()}


def _from_json(plain: dict[str, Any]) -> dict[str, Reply]:
    return {key: reply_from_json(reply) for key, reply in plain.items()}


def error_of(chat: Chat, failure: Failure) -> SamiError:
    """The error of a question that a command cannot do without: 69 where later may help."""
    if failure.ends:
        return failure.ends
    sentence = f"{chat.name} {failure.reason}."
    if failure.kind == "stopped":
        return StoppedError(f"{sentence} The same command goes on from here.")
    if failure.kind in ("refused", "no_text", "too_long"):
        return BadDataError(f"{sentence} Ask another model, or ask otherwise.")
    return UnavailableError(f"{sentence} What was answered is kept; run the same command later.")
