"""The folder of a stage: begun for its inputs, locked while it is worked on, sealed by DONE.json.

A stage reads files, writes files, and counts as done only when its DONE.json stands, holding the hash of its inputs and
the size and SHA-256 of its outputs. Stages are pure in (inputs, seed), so a kill between outputs and seal is harmless.
"""

import contextlib
import fcntl
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from sami_jax.errors import BadConfigError, BadDataError, RunInUseError
from sami_jax.files import content_hash, file_hash, read_json, write_json
from sami_jax.outputs import check_file, could_not_be_written, is_stream, refuse_file

DONE, PLAN, LOCK = "DONE.json", "PLAN.json", "LOCK"


def refuse_foreign(folder: Path, *, outside: str = "") -> None:
    """Raises BadDataError if a folder holds files that no stage wrote: they would become a stage's outputs.

    Args:
      folder: of a stage.
      outside: subfolder that holds none of them.
    """
    found = {path.name for path in folder.iterdir()} - {outside} if folder.is_dir() else set()
    if found - {LOCK} and not found & {PLAN, DONE} and not all(name.endswith(".tmp") for name in found - {LOCK}):
        raise BadDataError(f"{folder} already holds files; choose another folder, or delete it yourself.")


def begin(folder: Path, *, inputs: Any, outside: str = "") -> None:
    """Opens the folder of a stage that is not complete, and goes on with what an attempt of the same inputs left there.

    Args:
      folder: of the stage.
      inputs: JSON value of all the stage's outputs depend on.
      outside: as of `seal`; it may be there already.

    Raises:
      BadConfigError: the folder holds the beginnings of other inputs.
      BadDataError: it holds files that no stage began with.
    """
    plan = {"inputs_sha256": content_hash(inputs)}
    if not (folder / PLAN).exists():
        refuse_foreign(folder, outside=outside)
        write_json(folder / PLAN, plan)
    elif read_json(folder / PLAN) != plan:
        raise _other_inputs(folder)
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink()


def withdraw(folder: Path) -> None:
    """Removes what a stage that began in a folder has written there, and the folder if nothing else is in it."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


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
    done = _seal(inputs, counts, [_output(path, folder) for path in paths])
    if made_of:
        done["made_of"] = made_of
    write_json(folder / DONE, done)
    return done["fingerprint"]


def _output(path: Path, folder: Path) -> dict[str, Any]:
    return {"path": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": file_hash(path)}


def _seal(inputs: Any, counts: Any, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    fingerprint = content_hash({"inputs": inputs, "outputs": outputs, "counts": counts})
    return {"inputs_sha256": content_hash(inputs), "outputs": outputs, "counts": counts, "fingerprint": fingerprint}


def seal_of(folder: Path, *, inputs: Any) -> str | None:
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


def parts_folder(file: Path) -> Path:
    """Where the parts of a file lie until it stands."""
    return file.with_name(f"{file.name}.parts")


def check_stage_file(file: Path) -> None:
    """Refuses a path that a stage cannot write its lines to, before the work; see `outputs.check_file`.

    Raises:
      BadDataError: a file is there that no stage made, or began to make, or something that is no file.
      SaveFailedError: it, or its seal, cannot be written.
    """
    check_file(file)
    if not is_stream(file):
        check_file(_file_seal(file))
        _refuse_foreign_file(file)


def _refuse_foreign_file(file: Path) -> None:
    if file.is_file() and not _file_seal(file).is_file() and not (parts_folder(file) / PLAN).is_file():
        raise BadDataError(f"{file} already exists, and no such command made it; choose another, or delete it.")


def seal_file(file: Path, *, inputs: Any, counts: Any) -> None:
    """Writes down beside a file the hash of what it was made from, and its own."""
    write_json(_file_seal(file), _seal(inputs, counts, [_output(file, file.parent)]))


def file_stands(file: Path, *, inputs: Any) -> bool:
    """Whether a file is complete.

    Raises:
      BadConfigError: it was made from other inputs.
      BadDataError: no stage made it, or it was changed after its seal.
    """
    _refuse_foreign_file(file)
    if not file.exists() or (parts_folder(file) / PLAN).is_file():
        return False
    done = read_json(_file_seal(file))
    if not _is_seal(done):
        raise BadDataError(f"{_file_seal(file)} is no seal; delete it and {file} to have the file made anew.")
    if done["inputs_sha256"] != content_hash(inputs):
        raise _other_inputs(file)
    if [_output(file, file.parent)] != done["outputs"]:
        raise BadDataError(f"{file} was changed after it was made; choose another, or delete it to have it made anew.")
    return True


def _file_seal(file: Path) -> Path:
    return file.with_name(f"{file.name}.{DONE}")


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
    """Refuses a sealed file whose bytes have changed since. Called before it is used.

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
    """Refuses a sealed file that is not as it was. One that was modified before `unless_before_ns` is not read."""
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


def _other_inputs(path: Path) -> BadConfigError:
    return BadConfigError(
        f"{path} was made from other inputs (config, data, or an earlier stage changed); "
        "choose another one for the new, or delete this one to have it made anew."
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
