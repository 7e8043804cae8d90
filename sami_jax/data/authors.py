"""The authors' files: folders of contrasting constitutions, and responses for their judge."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sami_jax.data.constitutions import Constitution, read_statements
from sami_jax.data.principles import Statement
from sami_jax.errors import BadDataError
from sami_jax.files import building, json_text, read_json, write_json

SIGNS = {"pos": True, "neg": False}


def constitution_files(folder: Path) -> list[Path]:
    """The files of a folder of constitutions, `0.json`, `1.json`, ..., in order of their numbers.

    Raises:
      BadDataError: there is none, one has no number, or two have the same.
    """
    if not folder.is_dir():
        raise BadDataError(f"{folder} is no folder of constitutions.")
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*.json")):
        if not re.fullmatch(r"[0-9]{1,9}", path.stem):
            raise BadDataError(f"{path}: the files of a folder of constitutions are called 0.json, 1.json, ....")
        if (number := int(path.stem)) in found:
            raise BadDataError(f"{folder} has both {found[number].name} and {path.name}; remove or rename one.")
        found[number] = path
    if not found:
        raise BadDataError(f"{folder} holds no constitutions (0.json, 1.json, ...).")
    return [found[number] for number in sorted(found)]


def read_constitutions(folder: Path) -> list[tuple[Constitution, Constitution]]:
    """The pairs of a folder, each a file `{"positive": "1. ...", "negative": "1. ...", "identifiers"?: {...}}`.

    An identifier, `pos concise` or `neg concise`, names a statement's principle and its sign. Without identifiers, a
    statement is called by its number, and the negative ones that differ from the positive are the antitheses.

    Raises:
      BadDataError: the file, and what is wrong with it.
    """
    pairs = []
    for path in constitution_files(folder):
        content = read_json(path)
        sides = ("positive", "negative")
        if not isinstance(content, dict) or not all(isinstance(content.get(side), str) for side in sides):
            raise BadDataError(f"{path}: expected an object with the texts positive and negative.")
        texts = {side: read_statements(content[side]) for side in sides}
        if empty := [side for side in sides if not texts[side]]:
            raise BadDataError(f"{path}: {empty[0]} has no statements.")
        if texts["positive"] == texts["negative"]:
            raise BadDataError(f"{path}: positive and negative are the same; nothing contrasts.")
        identifiers = content.get("identifiers") or {}
        positive, negative = (
            _named(path, side, texts[side], identifiers.get(side) if isinstance(identifiers, dict) else identifiers)
            if identifiers
            else _numbered(texts[side], texts["positive"])
            for side in sides
        )
        pairs.append((positive, negative))
    return pairs


def write_constitutions(folder: Path, pairs: Iterable[tuple[Constitution, Constitution]]) -> None:
    """Writes a folder of pairs as `read_constitutions` reads them.

    Raises:
      BadDataError: the folder holds files.
      SaveFailedError: it cannot be written.
    """
    with building(folder) as temporary:
        _write_pairs(temporary, pairs)


def _write_pairs(folder: Path, pairs: Iterable[tuple[Constitution, Constitution]]) -> None:
    for number, pair in enumerate(pairs):
        sides = dict(zip(("positive", "negative"), pair, strict=True))
        identifiers = {
            side: [f"{'pos' if s.asked else 'neg'} {s.principle}" for s in constitution.statements]
            for side, constitution in sides.items()
        }
        texts = {side: constitution.text for side, constitution in sides.items()}
        write_json(folder / f"{number}.json", {**texts, "identifiers": identifiers}, sort_keys=False)


class AnsweredQuestion(NamedTuple):
    """A row of the authors' response files.

    Attributes:
      constitution: that is asked for.
      question: the post, or whatever is answered.
      response: the answer.
    """

    constitution: str
    question: str
    response: str


def read_responses(path: Path) -> list[AnsweredQuestion]:
    """Reads `{"constitution": {"0": ...}, "question": {"0": ...}, "response": {"0": ...}}`, in order of the numbers.

    Raises:
      BadDataError: the file, the row, and what is wrong with it.
    """
    columns = read_json(path)
    names = AnsweredQuestion._fields
    if not isinstance(columns, dict) or not all(isinstance(columns.get(name), dict) for name in names):
        raise BadDataError(f"{path}: expected an object with {', '.join(names)}, each an object of numbered texts.")
    rows = columns[names[0]].keys()
    if not rows:
        raise BadDataError(f"{path} holds no responses.")
    for name in names:
        if columns[name].keys() != rows:
            raise BadDataError(f"{path}: {name} has not the same rows as {names[0]}.")
        for row, text in columns[name].items():
            if not re.fullmatch("[0-9]{1,9}", row) or not isinstance(text, str):
                raise BadDataError(f"{path}: {name} {row!r} must be a number, and its value text.")
    return [AnsweredQuestion(*(columns[name][row] for name in names)) for row in sorted(rows, key=int)]


def responses_text(rows: Sequence[AnsweredQuestion]) -> str:
    """The text of a file that `read_responses` reads."""
    columns = {
        name: {str(number): getattr(row, name) for number, row in enumerate(rows)} for name in AnsweredQuestion._fields
    }
    return json_text(columns, sort_keys=False)


def _named(path: Path, side: str, texts: Sequence[str], identifiers: Any) -> Constitution:
    where = f"{path}: identifiers of {side}"
    if not isinstance(identifiers, list) or len(identifiers) != len(texts):
        raise BadDataError(f"{where} must be a list with one for each of its {len(texts)} statements.")
    statements = []
    for identifier, text in zip(identifiers, texts, strict=True):
        sign, _, name = identifier.partition(" ") if isinstance(identifier, str) else ("", "", "")
        if sign not in SIGNS or not name.strip():
            raise BadDataError(f"{where}: {identifier!r} must be `pos NAME` or `neg NAME`.")
        statements.append(Statement(name.strip(), SIGNS[sign], text))
    if len({statement.principle for statement in statements}) < len(statements):
        raise BadDataError(f"{where} name a principle twice.")
    return Constitution(tuple(statements))


def _numbered(texts: Sequence[str], positive: Sequence[str]) -> Constitution:
    return Constitution(
        tuple(
            Statement(str(number), number <= len(positive) and text == positive[number - 1], text)
            for number, text in enumerate(texts, start=1)
        )
    )
