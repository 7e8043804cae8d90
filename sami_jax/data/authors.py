"""The authors' files: folders of contrasting constitutions, and responses for their judge."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sami_jax.data.constitutions import Constitution, read_statements
from sami_jax.data.principles import Statement
from sami_jax.errors import BadDataError
from sami_jax.files import read_json, write_json

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


def write_constitutions(folder: Path, pairs: Sequence[tuple[Constitution, Constitution]]) -> None:
    """Writes pairs as `read_constitutions` reads them."""
    for number, pair in enumerate(pairs):
        sides = dict(zip(("positive", "negative"), pair, strict=True))
        identifiers = {
            side: [f"{'pos' if s.asked else 'neg'} {s.principle}" for s in constitution.statements]
            for side, constitution in sides.items()
        }
        texts = {side: constitution.text for side, constitution in sides.items()}
        write_json(folder / f"{number}.json", {**texts, "identifiers": identifiers}, sort_keys=False)


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
