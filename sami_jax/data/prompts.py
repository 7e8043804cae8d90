"""Prompts: a template, a constitution and a query become the text a model goes on with."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model is given, as text and as tokens.

    Attributes:
      text: as a person reads it, without the words that every response begins with.
      ids: its tokens, and behind them those of these words.
      prefix_ids: how many of `ids` are theirs: the last so many.
    """

    text: str
    ids: tuple[int, ...]
    prefix_ids: int = 0


def render(template: str, *, constitution: str, query: str) -> str:
    """The template's text; braces inside the constitution or the query stay as they are."""
    texts = {"constitution": constitution, "query": query}
    return re.sub(r"\{(constitution|query)\}", lambda field: texts[field[1]], template)
