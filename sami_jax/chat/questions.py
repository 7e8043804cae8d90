"""What a chat takes and gives: questions, answers, and failures by their names."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

from sami_jax.errors import SamiError

_QUOTED = 200  # characters of what came, in a sentence


def quoted(text: str) -> str:
    """What came, as a sentence has it: in one line, in quotes, cut off where it is long."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _QUOTED else f"{line[:_QUOTED]}...")


class Question(NamedTuple):
    """What is asked, without any conversation before it.

    Attributes:
      user: the user's turn.
      system: the system turn in front of it; "" for none.
      choices: answers of which a model on these devices gives the most likely one; () where it may say anything.
        Whoever else answers knows of them by the question's text alone.
    """

    user: str
    system: str = ""
    choices: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat templates and servers take them."""
        turns = [("system", self.system)] if self.system else []
        return [{"role": role, "content": text} for role, text in [*turns, ("user", self.user)]]


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a reply took, in all its tries.

    Attributes:
      input_tokens: of the question.
      output_tokens: of the answer, reasoning included.
      unknown_tries: tries that a server may have billed without saying how many tokens.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    unknown_tries: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.unknown_tries + other.unknown_tries,
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
      text: without white space around it.
      finished: the model ended it, not the token limit.
      model: that answered, by its own name; a server may have taken another one than was asked for.
      time: when, in UTC.
      spent: for it.
      logps: of a question's choices, in nats, where a model on these devices chose.
    """

    text: str
    finished: bool
    model: str
    time: str
    spent: Spent
    logps: list[float] | None = None


FailureKind = Literal[
    "rate_limited",  # 429
    "server_error",  # 5xx, and what a server calls a conflict or a time-out of its own
    "timed_out",
    "no_connection",  # refused, or dropped before the answer was there
    "no_json",  # a page of HTML with status 200, for instance
    "truncated",  # JSON that ends too early
    "malformed",  # JSON of another shape
    "no_choices",
    "no_text",  # the tokens went into reasoning, or into the call of a tool
    "refused",  # by the model, or by a server's content filter
    "too_long",  # for the model
    "rejected",  # key, model or settings: no question would be answered
    "not_recorded",  # by replay:FILE
    "stopped",  # while it waited for its next try
]
# Those that another server, or a later hour, would not have: the question itself is not at fault.
UNAVAILABLE: frozenset[FailureKind] = frozenset({"rate_limited", "server_error", "timed_out", "no_connection"})


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no answer.

    Attributes:
      kind: by name.
      reason: the end of a sentence, for people.
      spent: all the same.
      ends: raised once the questions that are on their way are answered, since no other would be.
    """

    kind: FailureKind
    reason: str
    spent: Spent = Spent()
    ends: SamiError | None = None


Reply = Answer | Failure


def reply_to_json(reply: Reply) -> dict[str, Any]:
    """JSON value of a reply; an error that ends the asking is left out."""
    plain = dataclasses.asdict(dataclasses.replace(reply, ends=None) if isinstance(reply, Failure) else reply)
    plain.pop("ends", None)
    return {"answer" if isinstance(reply, Answer) else "failure": plain}


def reply_from_json(plain: dict[str, Any]) -> Reply:
    """The reply of `reply_to_json`. Raises KeyError or TypeError where it is none."""
    [(kind, fields)] = plain.items()
    return {"answer": Answer, "failure": Failure}[kind](**{**fields, "spent": Spent(**fields["spent"])})


# Gives the next question and its number; None where there is none, or none before another reply has come.
Take = Callable[[], tuple[int, Question] | None]


class Chat(Protocol):
    """Whoever answers questions: a server, a model on these devices, recorded answers.

    Attributes:
      name: for people.
      settings: JSON value of all that an answer depends on beside its question; the model is one of them.
      on_devices: of several processes, every one asks, since they share the model.
    """

    name: str
    settings: dict[str, Any]
    on_devices: bool

    def replies(
        self, take: Take, *, may_try_again: Callable[[int], bool], stopping: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        """(number of the question, reply), as they come, until nothing is on its way and nothing is to be taken.

        Args:
          take: gives a question with its number, when it can be asked, not before.
          may_try_again: asked with the number of a question whose last try may have cost something.
          stopping: asked now and then; once it is true, what waits for another try gives up.
        """
        ...
