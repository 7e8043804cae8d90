"""What questions cost, what they may cost at most, and the budget that they are kept in."""

import dataclasses
import threading

from sami_jax.chat.questions import Question, Spent
from sami_jax.config.chat import ChatConfig

# A token has at least a byte; the other ones are a chat template's, of which known ones have a dozen a turn.
_TEMPLATE_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Prices:
    """A server's prices in US dollars, and how long an answer can be.

    Attributes:
      input_usd: of a token of the question.
      output_usd: of a token of the answer.
      max_tokens: of an answer.
    """

    input_usd: float
    output_usd: float
    max_tokens: int

    @classmethod
    def of(cls, config: ChatConfig) -> "Prices":
        """Those of a config; all are 0 where none are given, and for models on these devices."""
        if not config.chat_model:
            return cls(0.0, 0.0, config.max_tokens)
        per_million = config.usd_per_million_input_tokens, config.usd_per_million_output_tokens
        return cls(per_million[0] / 1e6, per_million[1] / 1e6, config.max_tokens)

    def most_usd(self, question: Question) -> float:
        """What one try of a question cannot exceed."""
        tokens = sum(len(message["content"].encode()) + _TEMPLATE_TOKENS for message in question.messages)
        return tokens * self.input_usd + self.max_tokens * self.output_usd

    def spent_usd(self, question: Question, spent: Spent) -> float:
        """What a reply cost; a try of unknown cost counts as the most it can have been."""
        known = spent.input_tokens * self.input_usd + spent.output_tokens * self.output_usd
        return known + spent.unknown_tries * self.most_usd(question)


class Budget:
    """Dollars that may be spent: what is on its way is reserved at its most, so that the limit is never exceeded.

    Threads share it.
    """

    def __init__(self, max_cost_usd: float, *, spent_usd: float):
        """Takes the limit, 0 for none, and what was spent of it before."""
        self.max_cost_usd, self.spent_usd = max_cost_usd, spent_usd
        self._reserved_usd: dict[int, float] = {}
        self._lock = threading.Lock()

    def allows(self, most_usd: float) -> bool:
        """Whether a question of this cost at most can be asked once nothing is on its way."""
        return not self.max_cost_usd or self.spent_usd + most_usd <= self.max_cost_usd

    def reserve(self, number: int, most_usd: float) -> bool:
        """Whether a try of this cost at most can be made now; if so, its cost is set aside for question `number`."""
        with self._lock:
            reserved = sum(self._reserved_usd.values())
            if not self.allows(reserved + most_usd):
                return False
            self._reserved_usd[number] = self._reserved_usd.get(number, 0.0) + most_usd
            return True

    def allows_again(self, number: int, most_usd: float) -> bool:
        """Whether another try of question `number`, of this cost at most, could be paid if nothing else were asked."""
        with self._lock:
            return self.allows(self._reserved_usd.get(number, 0.0) + most_usd)

    def settle(self, number: int, spent_usd: float) -> None:
        """The tries of question `number` have come to cost so much."""
        with self._lock:
            self._reserved_usd.pop(number, None)
            self.spent_usd += spent_usd
