"""Where results go: checked before the work, and replaced only where it is an ordinary file."""

import os
import stat
import sys
import tempfile
from pathlib import Path

from sami_jax.errors import BadDataError, SaveFailedError


def check_file(path: Path) -> None:
    """Refuses a path that no file can be written to. Called before the work; the trial leaves nothing.

    Raises:
      BadDataError: it is a folder, a socket or a disk.
      SaveFailedError: it cannot be written.
    """
    if path.is_dir():
        raise BadDataError(f"{path} is a folder; name a file.")
    stream = is_stream(path)
    if stream:
        mode = path.stat().st_mode
        if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
            raise BadDataError(f"{path} is a {'socket' if stat.S_ISSOCK(mode) else 'disk'}; name a file.")
    if path.exists() and not os.access(path, os.W_OK):
        raise could_not_be_written(path, "it is write-protected")
    if not stream:
        _try(path)


def check_folder(path: Path) -> Path:
    """Returns the folder behind any links. It is missing or empty, and a finished one can replace it.

    Raises:
      BadDataError: it is a file, or holds files.
      SaveFailedError: it cannot be written.
    """
    folder = Path(os.path.realpath(path))
    refuse_file(folder)
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise BadDataError(f"{path} already holds files; choose another folder, or delete it yourself.")
    except OSError as error:
        raise could_not_be_written(path, error) from error
    if folder.is_mount():
        raise BadDataError(f"{path} is a mount point, which no finished folder can be moved to; name one inside it.")
    _try(folder)
    return folder


def refuse_file(path: Path) -> None:
    """Raises BadDataError where a folder is wanted and a file, or something else, is there."""
    if path.exists() and not path.is_dir():
        raise BadDataError(f"{path} is a file; name a folder.")


def is_stream(path: Path) -> bool:
    """Whether a path leads to a device, a pipe, or a descriptor of a process such as /dev/stdout."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or _is_descriptor(path)


def write_stream(path: Path, source: Path) -> None:
    """Appends a file's bytes to what a stream has already got."""
    content = source.read_bytes()
    if os.path.samestat(path.stat(), os.fstat(1)):
        sys.stdout.flush()
        descriptor = os.dup(1)  # its offset in a file is shared with whoever else prints there
    else:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)


def could_not_be_written(path: Path, reason: object) -> SaveFailedError:
    """Returns the error for a path that could not be written."""
    return SaveFailedError(f"{path} could not be written ({reason}); free some space or choose another place.")


def _is_descriptor(path: Path) -> bool:
    """Whether the path leads through a link in /proc to something that a process has open."""
    step = Path(os.path.abspath(path))
    for _ in range(40):  # as many links as Linux follows
        step = Path(os.path.realpath(step.parent), step.name)
        if step.is_relative_to("/proc"):
            return True
        if not step.is_symlink():
            return False
        step = step.parent / step.readlink()
    return False


def _try(path: Path) -> None:
    """Raises SaveFailedError where no file can be made beside a path. Missing folders are made, and removed again."""
    path = Path(os.path.realpath(path))
    missing = [folder for folder in path.parents if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise could_not_be_written(path, error) from error
    finally:
        for folder in reversed(made):
            folder.rmdir()
