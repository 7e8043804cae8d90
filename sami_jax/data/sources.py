"""Sources of queries: data sets by name, files, functions; what cannot be used is dropped and counted."""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sami_jax.data.hub_rows import DATASETS, hub_rows
from sami_jax.data.queries import Query, read_queries
from sami_jax.data.rows import Row, find_files, parquet_rows, read_rows
from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.files import canonical_json, iterate_jsonl

REASONS = ("null", "nan", "empty", "no_human_turn", "no_id", "too_long", "duplicate")


class SourceName(NamedTuple):
    """What a config calls a source of queries.

    Attributes:
      kind: one of KINDS, "function", or "file" for one in the project's own format.
      place: file, folder, or module:function; "" for a data set of the Hub.
    """

    kind: str
    place: str

    def __str__(self) -> str:
        """As a config has it."""
        return self.place if self.kind in ("file", "function") else ":".join(filter(None, self))

    def same(self, other: "SourceName") -> bool:
        """Whether both give the same queries."""
        here, there = (
            os.path.realpath(name.place) if name.kind != "function" else name.place for name in (self, other)
        )
        return self.kind == other.kind and here == there


class _Raw(NamedTuple):
    """A row's values as they stand there, None where it has none; or the one of REASONS for which it has no text."""

    example_id: Any
    text: Any
    facts: Any = None
    reason: str | None = None


class _Kind(NamedTuple):
    """How the rows of a kind of source become queries."""

    columns: tuple[str, ...]  # that the rows have to have, a dot for a column inside one
    others: tuple[str, ...]  # that they may have
    raw: Callable[[Any], _Raw]
    subfolder: str = ""  # of a copy of the whole repository


def _own(row: Any) -> _Raw:
    return _Raw(row.get("example_id"), row.get("text"), row.get("facts"))


def _tldr(row: Any) -> _Raw:
    post = _cell(row, "info.post")
    facts = {name: _cell(row, f"info.{name}") for name in ("title", "subreddit")}
    facts = {name: value for name, value in facts.items() if isinstance(value, str)}
    return _Raw(_cell(row, "info.id"), post.strip() if isinstance(post, str) else post, facts)


def _hh(row: Any) -> _Raw:
    if not isinstance(row.get("chosen"), str):
        return _Raw("", row.get("chosen"))
    turn = first_human_turn(row["chosen"])
    if turn is None:
        return _Raw("", None, reason="no_human_turn")
    text = turn.strip()
    return _Raw(hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16], text)  # the rows have no ids


KINDS = {
    "tldr": _Kind(("info.id", "info.post"), ("info.title", "info.subreddit"), _tldr, "comparisons"),
    "hh_helpful": _Kind(("chosen",), (), _hh, "helpful-base"),
    "hh_harmless": _Kind(("chosen",), (), _hh, "harmless-base"),
    "jsonl": _Kind(("example_id", "text"), ("facts",), _own),
    "parquet": _Kind(("example_id", "text"), ("facts",), _own),
}


def source_name(text: str, *, setting: str) -> SourceName:
    """Reads the name of a source.

    Args:
      text: tldr, hh_helpful or hh_harmless; one of these, jsonl or parquet, with ":PATH"; "module:function"; or a path.
      setting: that holds it, for messages.

    Raises:
      BadConfigError: it names nothing that is there.
    """
    kind, colon, place = text.partition(":")
    if text in DATASETS:
        return SourceName(text, "")
    if colon and kind in KINDS:
        if not (Path(place).exists() if kind in DATASETS else Path(place).is_file()):
            raise BadConfigError(f"{setting} is {text!r}, but there is no file {place}; name one that is there.")
        return SourceName(kind, place)
    if Path(text).is_file():
        compressed = {".parquet": "parquet", ".gz": "jsonl"}
        return SourceName(compressed.get(Path(text).suffix, "file"), text)
    known = f"known are {', '.join(DATASETS)} (also with :PATH), jsonl:FILE, parquet:FILE, module:function and paths"
    near = difflib.get_close_matches(kind, KINDS, n=1)
    hint = f"; did you mean {near[0]}{colon}{place}?" if near else f"; {known}."
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        if _find_module(kind):
            return SourceName("function", text)
        raise BadConfigError(f"{setting} is {text!r}, but there is no module {kind}{hint}")
    if colon or not re.search(r"[/.]", text):
        raise BadConfigError(f"{setting} is {text!r}, which is neither a file nor the name of a data set{hint}")
    raise BadConfigError(f"{setting} is {text!r}, which is not a file; name one.")


@dataclasses.dataclass
class Tally:
    """What has become of the rows of a source, counted while they are read.

    Attributes:
      rows: read.
      dropped: reason -> rows, for each of REASONS.
    """

    rows: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(REASONS, 0))


class OpenSource(NamedTuple):
    """A source whose queries can be read, once.

    Attributes:
      queries: read one after the other; raises BadDataError naming the place that cannot be read.
      revision: the commit on the Hub; "" for what is not from there.
      tally: of the rows read so far.
    """

    queries: Iterator[Query]
    revision: str
    tally: Tally


def open_source(name: SourceName, *, max_characters: int) -> OpenSource:
    """The queries of a source, unique by example_id, the first of a name kept.

    Args:
      name: of the source.
      max_characters: a longer text is dropped. This and the other REASONS do not hold for a file in the project's own
        format, of which every line has to be a query.

    Raises:
      BadConfigError: there is no such function.
      BadDataError: there are no such files.
      FetchFailedError: the Hub cannot be reached.
    """
    tally, revision = Tally(), ""
    if name.kind == "file":
        return OpenSource(_counted(read_queries(Path(name.place)), tally), revision, tally)
    if name.kind == "function":
        kind, rows = KINDS["jsonl"], _function_rows(name.place)
    else:
        kind = KINDS[name.kind]
        if name.place:
            rows = _file_rows(name, kind)
        else:
            rows, revision = hub_rows(name.kind, {column.partition(".")[0] for column in kind.columns})
    return OpenSource(_cleaned(rows, kind, str(name), max_characters, tally), revision, tally)


def first_human_turn(dialogue: str) -> str | None:
    """What the human says first in a dialogue of HH-RLHF, or None where it does not begin with a human."""
    begins = re.match(r"\s*Human:", dialogue)
    return re.split(r"\n\n(?:Human|Assistant):", dialogue[begins.end() :], maxsplit=1)[0] if begins else None


def _file_rows(name: SourceName, kind: _Kind) -> Iterator[Row]:
    columns = [*kind.columns, *kind.others]
    if name.kind == "parquet":
        return parquet_rows(Path(name.place), columns)
    if name.kind == "jsonl":
        path = Path(name.place)
        return ((f"{path}, line {line.number}", line.value) for line in iterate_jsonl(path, nan=True))
    files = find_files(Path(name.place), kind.subfolder)
    return (row for file in files for row in read_rows(file, columns))


def _function_rows(place: str) -> Iterator[Row]:
    module, _, function = place.partition(":")
    with _current_folder_importable():
        try:
            found = importlib.import_module(module)
        except Exception as error:  # the user's code may raise anything
            raise BadDataError(f"{place}: {module} cannot be imported ({type(error).__name__}: {error}).") from error
        if not callable(call := getattr(found, function, None)):
            near = difflib.get_close_matches(function, dir(found), n=1)
            hint = f"; did you mean {module}:{near[0]}?" if near else "."
            raise BadConfigError(f"{place}: {module} has no function {function}{hint}")
        try:
            for number, row in enumerate(call(), start=1):
                yield f"{place}, row {number}", dataclasses.asdict(row) if isinstance(row, Query) else row
        except Exception as error:
            raise BadDataError(f"{place} failed ({type(error).__name__}: {error}).") from error


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Lets modules in the current folder be imported, as `python` does and a console script does not."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _find_module(name: str) -> bool:
    with _current_folder_importable(), contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(name) is not None
    return False


def _counted(queries: Iterable[Query], tally: Tally) -> Iterator[Query]:
    for query in queries:
        tally.rows += 1
        yield query


def _cleaned(rows: Iterable[Row], kind: _Kind, label: str, max_characters: int, tally: Tally) -> Iterator[Query]:
    seen: set[str] = set()
    missing, there = set(kind.columns), dict[str, None]()
    for where, row in rows:
        if not isinstance(row, dict):
            raise BadDataError(f"{where}: expected an object with {', '.join(kind.columns)}.")
        if missing:
            missing -= {column for column in missing if _has(row, column)}
            there.update(dict.fromkeys(row))
        tally.rows += 1
        raw = kind.raw(row)
        reason = raw.reason or _reason(raw, where, max_characters)
        if reason is None and str(raw.example_id) in seen:
            reason = "duplicate"
        if reason is not None:
            tally.dropped[reason] += 1
            continue
        seen.add(str(raw.example_id))
        yield _query(raw, where)
    if tally.rows and missing:
        raise BadDataError(f"{label} has no column {', '.join(sorted(missing))}; its columns are {', '.join(there)}.")
    if not seen:
        raise BadDataError(f"{label} has no usable query in {tally.rows} rows ({dropped_text(tally.dropped)}).")


def dropped_text(dropped: dict[str, int]) -> str:
    """ "dropped: 3 empty, 1 duplicate", of those reasons that occurred; "none dropped" where there were none."""
    listed = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    return f"dropped: {listed}" if listed else "none dropped"


def _reason(raw: _Raw, where: str, max_characters: int) -> str | None:
    """Why a row is dropped, or None to keep it."""
    text, name = raw.text, raw.example_id
    if text is None:
        return "null"
    if isinstance(text, float) and math.isnan(text):
        return "nan"
    if not isinstance(text, str):
        raise BadDataError(f"{where}: the text is {text!r}; it must be text.")
    if not text.strip():
        return "empty"
    if name is None or name == "" or (isinstance(name, float) and math.isnan(name)):
        return "no_id"
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise BadDataError(f"{where}: the example_id is {name!r}; it must be a text or a whole number.")
    return "too_long" if len(text) > max_characters else None


def _query(raw: _Raw, where: str) -> Query:
    """The query of a row that is kept. Raises BadDataError where it holds what no file and no tokenizer takes."""
    facts = raw.facts or {}
    try:
        if not isinstance(facts, dict):
            raise TypeError("facts must be an object")
        query = Query(str(raw.example_id), raw.text, facts)
        canonical_json([query.example_id, query.text, facts]).encode()
    except (TypeError, ValueError) as error:
        raise BadDataError(f"{where}: it cannot be written as JSON ({error}).") from error
    return query


def _cell(row: dict[str, Any], column: str) -> Any:
    """What stands in a column, `info.id` being a column of its own or one inside `info`; None where nothing does."""
    outer, _, inner = column.partition(".")
    if inner and isinstance(row.get(outer), dict):
        return row[outer].get(inner)
    return row.get(column)


def _has(row: dict[str, Any], column: str) -> bool:
    outer, _, inner = column.partition(".")
    return column in row or (isinstance(row.get(outer), dict) and inner in row[outer])
