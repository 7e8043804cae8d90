"""JSON texts from anywhere: what is read here can be computed with and written again."""

import collections
import itertools
import json
import math
import re
from typing import Any

DEEPEST = 100  # lists and objects inside one another; Python's own limit is lower when writing than when reading

_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_NO_BRACKETS = re.compile(rf'{_STRING}|[^"\[\]{{}}]+', re.DOTALL)
# Tokens that may be unusable although their syntax is right. Strings match whole, so that nothing inside them counts.
_SUSPECTS = re.compile(rf"{_STRING}|[\[\]{{}}]|-?(?:NaN|Infinity|\d[\d.]*+(?:[eE][-+]?\d+)?)", re.DOTALL)
# A high surrogate without a low one behind it, or the other way round; a backslash in front may make it none.
_LONE_SURROGATE = re.compile(
    r"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F])", re.DOTALL
)


class UnusableJsonError(Exception):
    """A text is no JSON, or holds something that cannot be used or written.

    Attributes:
      line: where, from 1 on; None where it is not known.
      reason: what, without a full stop, and the remedy.
    """

    def __init__(self, line: int | None, reason: str):
        super().__init__(reason)
        self.line, self.reason = line, reason


def parse_json(text: str, *, nan: bool = False) -> Any:
    """The value of a JSON text.

    Args:
      text: the JSON.
      nan: let NaN and infinities through, as floats.

    Raises:
      UnusableJsonError: it is no JSON; an object has a key twice, of which json would keep the last; a number is NaN,
        infinite or beyond a 64-bit float; a string holds half of a surrogate pair, which no tokenizer and no file
        takes; or it is nested deeper than DEEPEST.
    """
    constant = float if nan else _finite
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_whole, parse_float=_finite, parse_constant=constant
        )
    except json.JSONDecodeError as error:
        raise UnusableJsonError(error.lineno, f"not valid JSON ({error.msg})") from error
    except (RecursionError, ValueError):  # nested too deep; `_whole`, `_finite`
        _refuse_unusable(text)
        raise
    if _LONE_SURROGATE.search(text) or _depth(text) > DEEPEST:
        _refuse_unusable(text)
    return value


def _whole(token: str) -> int:
    if len(token) > 300:  # about as long as a float's can be
        _finite(token)
    return int(token)


def _finite(token: str) -> float:
    if not math.isfinite(value := float(token)):
        raise ValueError(token)
    return value


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(items)
    if len(value) < len(items):
        [(twice, _)] = collections.Counter(key for key, _ in items).most_common(1)
        raise UnusableJsonError(None, f"the key {twice!r} stands twice in one object; remove or rename one of the two")
    return value


def _depth(text: str) -> int:
    """Depth of a JSON text: how many lists and objects lie inside one another."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return 0
    steps = (1 if bracket in "[{" else -1 for bracket in _NO_BRACKETS.sub("", text))
    return max(itertools.accumulate(steps))


def _refuse_unusable(text: str) -> None:
    """Refuses the first part of a JSON text that cannot be used, if there is one; slow."""
    depth = 0
    for match in _SUSPECTS.finditer(text):
        token, reason = match[0], ""
        if token[0] == '"':
            reason = _lone_surrogate(token)
        elif token in "[{":
            depth += 1
            reason = f"more than {DEEPEST} lists and objects inside one another" if depth > DEEPEST else ""
        elif token in "]}":
            depth -= 1
        elif not math.isfinite(float(token)):
            shown = token if len(token) < 30 else f"a number of {len(token)} characters"
            reason = f"{shown} is no finite number of 64 bits; write null, or a text"
        if reason:
            raise UnusableJsonError(text.count("\n", 0, match.start()) + 1, reason)


def _lone_surrogate(token: str) -> str:
    """What is wrong with a JSON string that holds half of a surrogate pair, or "" where none does."""
    try:
        if _LONE_SURROGATE.search(token):
            json.loads(token).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        return f"a text holds {half}, half of a surrogate pair, which is no character; write \\ufffd instead"
    return ""
