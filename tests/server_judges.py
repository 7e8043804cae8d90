"""Judges that a server plays: they read the question as it is written, and answer by a rule."""

import re
from collections.abc import Callable
from typing import Any

from chat_server import Act, completion


def parts(asked: dict[str, Any]) -> dict[str, str]:
    text = asked["messages"][-1]["content"]
    mark = re.search(r"<<<QUERY (\w{16})>>>", text)[1]
    return {
        name: re.search(rf"<<<{name} {mark}>>>\n(.*)\n<<<END OF {name} {mark}>>>", text, re.DOTALL)[1]
        for name in ("PRINCIPLES", "QUERY", "RESPONSE A", "RESPONSE B")
    }


def judging(verdict: Callable[[dict[str, str]], str]) -> Act:
    return lambda handler, asked: handler.send(200, completion(verdict(parts(asked))))


def shorter(asked: dict[str, str]) -> str:
    a, b = len(asked["RESPONSE A"]), len(asked["RESPONSE B"])
    return f"One is shorter.\nVerdict: {'tie' if a == b else 'A' if a < b else 'B'}"
