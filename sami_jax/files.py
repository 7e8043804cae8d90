"""JSON, text and folders on disk, written whole or not at all, and their hashes."""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sami_jax.errors import BadDataError
from sami_jax.json_text import UnusableJsonError, parse_json
from sami_jax.outputs import check_folder, could_not_be_written, is_stream, write_stream


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no NaN. Raises ValueError where NaN or infinity would have to be written."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def content_hash(value: Any) -> str:
    """SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises BadDataError where it is no readable file."""
    with _readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what a wrong path raises into a BadDataError; a failing disk stays an OSError, which may be tried again."""
    try:
        yield
    except FileNotFoundError:
        raise BadDataError(f"{path} does not exist.") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise BadDataError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path} is not UTF-8 text: {error}.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadDataError(f"{path} cannot be unpacked ({error}); it is damaged or cut off.") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well, and vanishes when it does not.

    A link stays, and what it leads to is replaced. A device or a pipe is written to.

    Raises:
      SaveFailedError: the disk is full or not writable.
    """
    temporary, stream = None, is_stream(path)
    target = Path(os.path.realpath(path))
    try:
        if not stream:
            target.parent.mkdir(parents=True, exist_ok=True)
        folder = None if stream else target.parent
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        if stream:
            write_stream(path, temporary)
            return
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise could_not_be_written(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that replaces it, flushed to disk, when the block ends well, and vanishes if not.

    What a killed process left of it is removed first.

    Raises:
      BadDataError: `folder` is a file, or holds files already.
      SaveFailedError: the disk is full or not writable.
    """
    folder = check_folder(folder)
    temporary = folder.parent / f".{folder.name}.building"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors' are its owner's alone
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise could_not_be_written(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Writes one JSON value a person can read, atomically; `sort_keys=False` where the keys' order means something."""
    write_text(path, json_text(value, sort_keys=sort_keys))


def json_text(value: Any, *, sort_keys: bool = True) -> str:
    """The text of a file with one JSON value a person can read."""
    return json.dumps(value, indent=1, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Writes one JSON value a line, atomically; they are taken one after the other."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(jsonl([record]) for record in records)


def jsonl(records: Iterable[Any]) -> str:
    """The text of a file with one JSON value a line."""
    return "".join(canonical_json(record) + "\n" for record in records)


def append_jsonl(path: Path, record: Any) -> None:
    """Appends one line to a log; a torn last line (a kill while writing) is ended first, so that it stays alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + canonical_json(record).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Reads one JSON value, with or without a byte-order mark in front.

    Raises:
      BadDataError: the file, the line, and what cannot be used there (see `json_text.parse_json`).
    """
    try:
        return parse_json(read_text(path))
    except UnusableJsonError as error:
        where = path if error.line is None else f"{path}, line {error.line}"
        raise BadDataError(f"{where}: {error.reason}.") from error


def is_json_object(path: Path) -> bool:
    """Whether a file is one JSON object, written over several lines, and not JSON lines."""
    first = next((line for _, _, line in _lines(path)), "")
    return first.lstrip().startswith("{") and not first.rstrip().endswith("}")


def read_text(path: Path) -> str:
    """A file's text, without a byte-order mark in front. Raises BadDataError where it is no file of UTF-8 text."""
    with _readable(path):
        return path.read_text(encoding="utf-8-sig")  # Windows' editors put a byte-order mark in front


def read_jsonl(path: Path) -> list[Any]:
    """Reads one JSON value a line; empty lines are skipped. Raises BadDataError as `read_json`, naming the line."""
    return [line.value for line in iterate_jsonl(path)]


class JsonLine(NamedTuple):
    """A line of a file of JSON lines.

    Attributes:
      number: from 1 on.
      offset: bytes in front of it, unpacked.
      value: that it holds.
    """

    number: int
    offset: int
    value: Any


def iterate_jsonl(path: Path, *, nan: bool = False) -> Iterator[JsonLine]:
    """The lines of a file of JSON lines, also a gzipped one, read one after the other; empty lines are skipped.

    Args:
      path: the file; one that ends in ".gz" is unpacked.
      nan: let NaN and infinities through, as floats.

    Raises:
      BadDataError: as `read_json`, naming the line.
    """
    for number, offset, text in _lines(path):
        try:
            yield JsonLine(number, offset, parse_json(text, nan=nan))
        except UnusableJsonError as error:
            raise BadDataError(f"{path}, line {number}: {error.reason}.") from error


def _lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """(number, offset, text) of the lines that hold something."""
    offset = 0
    with _readable(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BadDataError(f"{path} is not UTF-8 text in line {number}: {error}.") from error
            if text.strip():
                yield number, offset, text
            offset += len(line)


def read_log(path: Path) -> list[Any]:
    """Reads an append-only log; a torn line (a kill while writing) is left out. A missing log is empty."""
    records = []
    # A kill may tear a character, too; the line it stands in is no JSON then, whatever replaces the character.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with contextlib.suppress(UnusableJsonError):
            if line.strip():
                records.append(parse_json(line))
    return records
