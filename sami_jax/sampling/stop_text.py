"""Where a response ends: at an end token, or at the first of some texts, wherever tokens part them."""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from sami_jax.data.tokenizer import Tokenizer

_PIECES = 3  # tokens that may have to follow a piece of a character, which has up to four bytes


class Stops(NamedTuple):
    """What ends a response.

    Attributes:
      end_ids: tokens that end a text; none of them is part of it.
      markers: texts that end a response, wherever they stand in it; what follows is cut. A special token counts as the
        text of its name.
    """

    end_ids: frozenset[int]
    markers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Response:
    """A sampled continuation, cut at the first stop marker.

    Attributes:
      text: what the tokenizer decodes `ids` to, behind the prompt's prefix, without white space around it; "" where
        there are none.
      ids: its tokens, those of the prefix left out.
      finished: a stop token or marker ended it, not the token limit.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool


def cut_response(ids: Sequence[int], tokenizer: Tokenizer, stops: Stops, *, prefix: Sequence[int] = ()) -> Response:
    """The response in tokens: up to an end token or the first marker, white space at its end removed.

    Where the cut falls inside a token, the piece that stays is tokenised anew, or dropped in the rare case that no ids
    spell it.

    Args:
      ids: that were sampled; what stands behind the end does not matter.
      tokenizer: turns ids to text.
      stops: what ends a response.
      prefix: the prompt's last ids, of the words that every response begins with.
    """
    count = next((place for place, token in enumerate(ids) if token in stops.end_ids), len(ids))
    ended, ids, given = count < len(ids), [*prefix, *ids[:count]], len(prefix)
    text, begin = tokenizer.spell(ids), len(tokenizer.spell(prefix)) if prefix else 0
    end = min((text.index(marker, begin) for marker in stops.markers if marker in text[begin:]), default=len(text))
    kept = text[:end].rstrip()
    if kept != text:
        count = _tokens_inside(ids, kept, tokenizer)
        rest = kept[len(tokenizer.spell(ids[:count])) :]
        ids = ids[:count] + (tokenizer.continuation_ids(rest, behind=ids[:count]) or [])
    shown = tokenizer.decode(ids).strip() if tokenizer.decode(ids[given:]).strip() else ""
    return Response(shown, tuple(ids[given:]) if shown else (), ended or end < len(text))


def has_stopped(
    ids: Sequence[int], tokenizer: Tokenizer, stops: Stops, *, new: int, prefix: Sequence[int] = ()
) -> bool:
    """Whether an end token or a marker is among tokens, of which all but the last `new` were looked at before.

    Only the last of them are turned to text, unless a marker seems to be there. It is then looked for in the whole, so
    that what this says is what `cut_response` finds.
    """
    if not stops.end_ids.isdisjoint(ids[len(ids) - new :]):
        return True
    if not stops.markers:
        return False
    whole = [*prefix, *ids]
    reach = new + (_PIECES + 1) * max(map(len, stops.markers))  # a character takes up to four tokens
    text = tokenizer.spell(whole[-reach:])
    if not any(marker in text for marker in stops.markers):
        return False
    return cut_response(ids, tokenizer, stops, prefix=prefix).finished


def settled_text(ids: Sequence[int], tokenizer: Tokenizer, stops: Stops, *, prefix: Sequence[int] = ()) -> str:
    """What the text of a response that goes on will begin with, whatever follows.

    Its end is left out, as far as a marker, white space or a character of several tokens may still take it away.
    """
    text = tokenizer.decode([*prefix, *ids]).rstrip("\ufffd")
    return text[: len(text) - max(map(len, stops.markers), default=0)].strip()


def _tokens_inside(ids: list[int], kept: str, tokenizer: Tokenizer) -> int:
    """Number of leading ids whose text is a beginning of the kept text."""

    def length(count: int) -> int:
        """Characters up to the end of the one that token `count` is a piece of: unlike others, it never falls."""
        text = ""
        for end in range(count, min(count + _PIECES, len(ids)) + 1):
            text = tokenizer.spell(ids[:end])
            if not text.endswith("\ufffd"):
                break
        return len(text)

    count = bisect.bisect_right(range(len(ids) + 1), len(kept), key=length) - 1
    count = min(count + _PIECES, len(ids))  # pieces that never become a character are U+FFFD in the text as well
    while not kept.startswith(tokenizer.spell(ids[:count])):
        count -= 1
    return count
