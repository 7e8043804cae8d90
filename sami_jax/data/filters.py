"""Which sampled queries are worth training on; every drop has a reason, and all responses pass the same tests."""

from collections.abc import Sequence
from typing import Protocol

from sami_jax.config.data import FiltersConfig


class Sampled(Protocol):
    """A sampled response, as far as the filters look at it."""

    @property
    def text(self) -> str: ...

    @property
    def finished(self) -> bool: ...


REASONS = ("too_long", "no_answer", "empty", "placeholder", "evasive", "unfinished", "identical")


def cut_reasoning(text: str, marker: str) -> str | None:
    """The answer of a response that reasons first: what stands behind the first marker; None where there is none."""
    _, found, answer = text.partition(marker)
    return answer.strip() if found else None


def drop_reason(responses: Sequence[Sampled | None], filters: FiltersConfig) -> str | None:
    """Why a sampled query is dropped, the first of REASONS that holds for any of its responses, or None to keep it.

    too_long is none of them: such a query is never sampled. no_answer: the reasoning came to none (`cut_reasoning`);
    empty: no text; placeholder: a piece of the format's example was copied; evasive: it begins as an evasion does;
    unfinished: the sampler ran out of tokens, or the text does not end as a sentence; identical: two responses are the
    same, so nothing tells them apart. The authors test some of these on the first response only.
    """
    there = [response for response in responses if response is not None]
    if len(there) < len(responses):
        return "no_answer"
    texts = [response.text for response in there]
    if any(not text for text in texts):
        return "empty"
    if any(placeholder in text for text in texts for placeholder in filters.placeholders):
        return "placeholder"
    if filters.evasive_beginnings and any(text.startswith(tuple(filters.evasive_beginnings)) for text in texts):
        return "evasive"
    if any(not response.finished or not response.text.endswith(tuple(filters.sentence_ends)) for response in there):
        return "unfinished"
    if len(set(texts)) < len(texts):
        return "identical"
    return None


def cannot_pass(beginning: str, filters: FiltersConfig) -> bool:
    """Whether `drop_reason` drops every response that begins so, whatever follows."""
    return any(placeholder in beginning for placeholder in filters.placeholders) or (
        bool(filters.evasive_beginnings) and beginning.startswith(tuple(filters.evasive_beginnings))
    )
