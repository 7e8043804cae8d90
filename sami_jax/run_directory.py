"""Files a run can trust: atomic writes, stages sealed by DONE.json, one lock per directory.

A stage reads files, writes files, and counts as done only when its DONE.json stands, holding the hash of its inputs and
the size and SHA-256 of its outputs. Stages are pure in (inputs, seed), so a kill between outputs and seal is harmless.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from sami_jax.errors import BadConfigError, BadDataError, RunInUseError
from sami_jax.json_text import UnusableJsonError, parse_json
from sami_jax.outputs import check_folder, could_not_be_written, is_stream, refuse_file, write_stream

DONE, PLAN, LOCK = "DONE.json", "PLAN.json", "LOCK"


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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

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
    """A folder beside `folder` that takes its place, flushed to disk, when the block ends well, and vanishes if not.

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
    write_text(path, json.dumps(value, indent=1, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Writes one JSON value a line, atomically."""
    write_text(path, "".join(canonical_json(record) + "\n" for record in records))


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
        return parse_json(_text(path))
    except UnusableJsonError as error:
        where = path if error.line is None else f"{path}, line {error.line}"
        raise BadDataError(f"{where}: {error.reason}.") from error


def _text(path: Path) -> str:
    with _readable(path):
        return path.read_text(encoding="utf-8-sig")  # Windows' editors put a byte-order mark in front


def read_jsonl(path: Path) -> list[Any]:
    """Reads one JSON value a line; empty lines are skipped. Raises BadDataError as `read_json`, naming the line."""
    records = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                records.append(parse_json(line))
            except UnusableJsonError as error:
                raise BadDataError(f"{path}, line {number}: {error.reason}.") from error
    return records


def read_log(path: Path) -> list[Any]:
    """Reads an append-only log; a torn line (a kill while writing) is left out. A missing log is empty."""
    records = []
    # A kill may tear a character, too; the line it stands in is no JSON then, whatever takes the character's place.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with contextlib.suppress(UnusableJsonError):
            if line.strip():
                records.append(parse_json(line))
    return records


def refuse_foreign(folder: Path) -> None:
    """Raises BadDataError where a folder holds files and is no stage's: they would become its outputs."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found - {LOCK} and not found & {PLAN, DONE} and not all(name.endswith(".tmp") for name in found - {LOCK}):
        raise BadDataError(f"{folder} already holds files; choose another folder, or delete it yourself.")


def begin(folder: Path, *, inputs: Any) -> None:
    """Opens a stage that is not complete: what an earlier attempt left is continued, if it had the same inputs.

    Raises:
      BadConfigError: the folder holds the beginnings of other inputs.
      BadDataError: it holds files that no stage began with.
    """
    plan = {"inputs_sha256": content_hash(inputs)}
    if not (folder / PLAN).exists():
        refuse_foreign(folder)
        write_json(folder / PLAN, plan)
    elif read_json(folder / PLAN) != plan:
        raise _other_inputs(folder)
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink()


def seal(folder: Path, *, inputs: Any, counts: Any, outside: str = "", made_of: str = "") -> str:
    """Declares a stage complete and returns its fingerprint, which the next stages take as input.

    Args:
      folder: everything in it is an output.
      inputs: JSON value of all the stage's outputs depend on.
      counts: JSON value for people, a pure function of the inputs.
      outside: name of a subfolder that is left out, since equal runs write it differently.
      made_of: name of the stage beside it that has to be made anew, too, before this one can be.
    """
    paths = sorted(
        p for p in folder.rglob("*") if p.is_file() and p.name not in (DONE, LOCK) and not p.name.endswith(".tmp")
    )
    paths = [p for p in paths if p.relative_to(folder).parts[0] != outside]
    outputs = [{"path": str(p.relative_to(folder)), "bytes": p.stat().st_size, "sha256": file_hash(p)} for p in paths]
    fingerprint = content_hash({"inputs": inputs, "outputs": outputs, "counts": counts})
    done = {"inputs_sha256": content_hash(inputs), "outputs": outputs, "counts": counts, "fingerprint": fingerprint}
    if made_of:
        done["made_of"] = made_of
    write_json(folder / DONE, done)
    return fingerprint


def sealed(folder: Path, *, inputs: Any) -> str | None:
    """The fingerprint of a complete stage, or None where it is still to be done.

    Raises:
      BadConfigError: the stage was sealed for other inputs.
      BadDataError: an output is missing, has another size, or was changed after the seal.
    """
    if not (folder / DONE).exists():
        return None
    done = read_done(folder)
    if done["inputs_sha256"] != content_hash(inputs):
        raise _other_inputs(folder)
    return done["fingerprint"]


def read_done(folder: Path) -> dict[str, Any]:
    """DONE.json of a complete stage.

    Raises:
      BadDataError: there is none, or an output is missing, cut, or was changed after the seal.
    """
    done = read_json(folder / DONE)
    if not _is_seal(done):
        raise BadDataError(f"{folder / DONE} is no seal; delete {folder} to have it made anew.")
    sealed_ns = (folder / DONE).stat().st_mtime_ns
    for output in done["outputs"]:
        _check_output(folder, done, output, unless_before_ns=sealed_ns)
    return done


def check_sealed(path: Path) -> None:
    """Refuses what a stage sealed and what has other bytes now; for whoever is about to use it.

    The bytes are hashed once in a process, and again only where a file's size or time has changed.

    Args:
      path: a file, or a folder with all that is in it; the seal is there or in the folder above. What has no seal is
        not looked at.

    Raises:
      BadDataError: the file, and the remedy.
    """
    path = path.absolute()
    for folder in (path, path.parent):
        done = read_json(folder / DONE) if (folder / DONE).is_file() else None
        if not _is_seal(done):
            continue
        for output in done["outputs"]:
            file = folder / output["path"]
            if path == file or path in file.parents:
                _check_output(folder, done, output, unless_before_ns=0)


def _is_seal(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and {"inputs_sha256", "outputs", "fingerprint"} <= value.keys()


def _check_output(folder: Path, done: dict[str, Any], output: dict[str, Any], *, unless_before_ns: int) -> None:
    """Refuses a sealed file that is not as it was; its bytes are not read where its time lies before another one."""
    path = folder / output["path"]
    also = f" and {folder.parent / done['made_of']}, which it is made of," if "made_of" in done else ""
    remedy = (
        f"Bring it back from a copy, or delete {folder}{also} to have it made anew; in a copy of your own that you "
        f"have changed, delete {DONE} alone."
    )
    if not path.is_file() or path.stat().st_size != output["bytes"]:
        raise BadDataError(f"{path} is missing or has changed its size since it was sealed. {remedy}")
    state = path.stat()
    if state.st_mtime_ns < unless_before_ns:
        return
    if _hash_in_state(path, state.st_size, state.st_mtime_ns) != output["sha256"]:
        raise BadDataError(f"{path} has other bytes than {folder / DONE} sealed. {remedy}")


@functools.lru_cache(maxsize=65536)
def _hash_in_state(path: Path, size: int, modified_ns: int) -> str:
    return file_hash(path)


def _other_inputs(folder: Path) -> BadConfigError:
    return BadConfigError(
        f"{folder} was made from other inputs (config, data, or an earlier stage changed); "
        "choose another folder for the new ones, or delete this one to have it made anew."
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's LOCK; the kernel drops it with the process, kill -9 included.

    Where the block fails before anything else is in the folder, nothing is left of it.

    Raises:
      BadDataError: it is a file.
      RunInUseError: another process holds it.
      SaveFailedError: it cannot be made.
    """
    refuse_file(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise could_not_be_written(folder, error) from error
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RunInUseError(
                f"{folder} is in use by process {holder}; wait for it to end, or choose another folder."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        except BaseException:
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
            raise
