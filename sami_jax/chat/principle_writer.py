"""The principle writer: a model that is asked for definitions and antitheses in a fixed format (paper, section 3.1)."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sami_jax.chat.answers import Answers, error_of
from sami_jax.chat.questions import Answer, Failure, Question, quoted
from sami_jax.data.principles import Principle
from sami_jax.errors import BadDataError
from sami_jax.files import content_hash, read_text

TEMPLATE = Path(__file__).parents[1] / "templates" / "write_principles.txt"
AT_ONCE = 10  # principles that one question asks for
FRUITLESS = 5  # answers in a row that bring nothing new, after which nobody is asked any more
DROPPED = ("same_as_another", "same_as_its_antithesis", "example")
_LABELS = ("Principle", "Definition", "Antithesis")
_LONGEST_NAME, _LONGEST_SENTENCE = 40, 500  # characters


class MalformedError(Exception):
    """An answer is not in the format; the message says where, and is shown to the writer."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What a writer wrote.

    Attributes:
      principles: that are kept.
      provenance: JSON value: who wrote them, asked by which prompt, when, and what was dropped.
    """

    principles: list[Principle]
    provenance: dict[str, Any]


def prompt_hash() -> str:
    """SHA-256 of the prompt's template."""
    return content_hash(read_text(TEMPLATE))


def question_for(
    about: str, count: int, *, there: Sequence[Principle] = (), problem: str = "", number: int = 1
) -> Question:
    """What a writer is asked.

    Args:
      about: what the principles are for, as in "summaries of forum posts".
      count: how many are wanted.
      there: those that it has written already.
      problem: why its last answer could not be used; "" where it could.
      number: of the answers that could not be used in a row, and this one.
    """
    parts = [read_text(TEMPLATE).strip().replace("{count}", str(count)).replace("{about}", about)]
    if there:
        names = ", ".join(principle.name for principle in there)
        parts.append(f"These principles are there already; write {count} others: {names}.")
    if problem:
        parts.append(f"An answer before could not be used: {problem}. Keep to the format. This is try {number}.")
    return Question("\n\n".join(parts))


def read_answer(text: str) -> list[Principle]:
    """The principles in an answer, which holds nothing else.

    Raises:
      MalformedError: the line that is not in the format, or a name or sentence that is none.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    principles, fields = [], []
    for place, (number, line) in enumerate(lines):
        label = _LABELS[place % len(_LABELS)]
        begun, colon, field = line.partition(":")
        if begun != label or not colon:
            raise MalformedError(f"line {number} is {quoted(line)}, but must begin with {label}:")
        fields.append(_name(field, number) if label == _LABELS[0] else _sentence(field, number))
        if len(fields) == len(_LABELS):
            principles.append(Principle(name=fields[0], definition=fields[1], antithesis=fields[2]))
            fields = []
    if fields:
        raise MalformedError(f"the last principle has no {_LABELS[len(fields)]}:")
    if not principles:
        raise MalformedError("it holds no principle")
    return principles


def _name(text: str, number: int) -> str:
    words = text.split()
    if not 1 <= len(words) <= 4 or len(text) > _LONGEST_NAME or not re.fullmatch(r"[\w-]+", "".join(words)):
        raise MalformedError(f"line {number} names a principle {quoted(text)}, but a name has one to four words")
    return "_".join(words).lower()


def _sentence(text: str, number: int) -> str:
    text = text.strip()
    if len(text.split()) < 3 or len(text) > _LONGEST_SENTENCE or not re.search(r"[.!?][\"')\u201d\u2019]?$", text):
        raise MalformedError(f"line {number} has {quoted(text)}, which is not one sentence that ends in a full stop")
    if found := re.search(r"[<\[{].*[>\]}]", text):
        raise MalformedError(f"line {number} has the placeholder {quoted(found[0])}")
    return text


def new_principles(found: Sequence[Principle], there: Sequence[Principle], dropped: dict[str, int]) -> list[Principle]:
    """Those that say something new, in order; the others are counted by reason.

    Sentences say the same where their words are the same, whatever their case, punctuation and articles. A principle
    is another one's where they share a name or a sentence, turned around or not.

    Args:
      found: in an answer.
      there: those before.
      dropped: counts by reason, of DROPPED, which are added to.
    """
    kept: list[Principle] = []
    examples = read_answer("\n".join(_example_lines()))
    for principle in found:
        if _said(principle.definition) == _said(principle.antithesis):
            dropped["same_as_its_antithesis"] += 1
        elif any(_alike(principle, example) for example in examples):
            dropped["example"] += 1
        elif any(_alike(principle, other) for other in [*there, *kept]):
            dropped["same_as_another"] += 1
        else:
            kept.append(principle)
    return kept


def _example_lines() -> list[str]:
    beginnings = tuple(f"{label}:" for label in _LABELS)
    return [line for line in read_text(TEMPLATE).splitlines() if line.startswith(beginnings)]


def _said(sentence: str) -> tuple[str, ...]:
    return tuple(word for word in re.findall(r"\w+", sentence.casefold()) if word not in ("a", "an", "the"))


def _alike(one: Principle, other: Principle) -> bool:
    sentences = ({_said(p.definition), _said(p.antithesis)} for p in (one, other))
    return one.name == other.name or not set.isdisjoint(*sentences)


def write_principles(
    answers: Answers, *, about: str, count: int, held_out: int, written: Callable[[int], None] = lambda count: None
) -> Written:
    """Asks until there are principles enough, one question after the other.

    Args:
      answers: who is asked.
      about: what the principles are for.
      count: how many are wanted.
      held_out: so many of them, the last, are for evaluation only.
      written: hears how many there are.

    Raises:
      BadDataError: the writer brings nothing new, FRUITLESS times in a row.
      SamiError: nobody answers.
    """
    there: list[Principle] = []
    used: list[Answer] = []
    dropped = dict.fromkeys(DROPPED, 0)
    malformed = fruitless = 0
    at_once, problem, last = AT_ONCE, "", ""
    answers.announce([question_for(about, min(count, at_once))], and_more=True)
    while len(there) < count:
        wanted = min(count - len(there), at_once)
        question = question_for(about, wanted, there=there, problem=problem, number=fruitless + 1)
        [reply] = answers.ask([question])
        if isinstance(reply, Failure) and reply.kind not in ("refused", "no_text"):
            raise error_of(answers.chat, reply)
        new: list[Principle] = []
        if isinstance(reply, Failure):
            problem, last = f"it {reply.reason}", ""
        else:
            used.append(reply)
            last = reply.text
            try:
                if not reply.finished:
                    at_once = max(1, at_once // 2)
                    raise MalformedError("it was cut off, being too long")
                new = new_principles(read_answer(reply.text), there, dropped)[:wanted]
                problem = "" if new else "it held nothing but principles that are there already"
            except MalformedError as error:
                malformed, problem = malformed + 1, str(error)
        there += new
        fruitless = 0 if new else fruitless + 1
        if fruitless == FRUITLESS:
            raise BadDataError(_gives_up(answers.chat.name, problem, last, there=len(there), count=count))
        written(len(there))
    principles = [dataclasses.replace(p, held_out=i >= count - held_out) for i, p in enumerate(there)]
    provenance = {
        "about": about,
        "writer": answers.chat.name,
        "model": ", ".join(sorted({answer.model for answer in used})),
        "settings": answers.chat.settings,
        "prompt_sha256": prompt_hash(),
        "date": max(answer.time for answer in used),
        "answers": len(used),
        "malformed": malformed,
        "dropped": dropped,
        "input_tokens": sum(answer.spent.input_tokens for answer in used),
        "output_tokens": sum(answer.spent.output_tokens for answer in used),
        "cost_usd": round(answers.spent_usd, 6),
    }
    return Written(principles, provenance)


def _gives_up(writer: str, problem: str, last: str, *, there: int, count: int) -> str:
    came = f" The last one: {quoted(last)}." if last else ""
    return (
        f"{writer} brought nothing new in {FRUITLESS} answers in a row: {problem}.{came} {there} of {count} principles "
        "are there; ask another model, for fewer, or say otherwise what they are about."
    )
