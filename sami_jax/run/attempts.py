"""The record of every start of a run: what was called, with which versions, and how it ended."""

import contextlib
import datetime
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

from sami_jax.errors import BadConfigError, BadDataError, ExitCode, SamiError, exit_code
from sami_jax.files import write_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


@contextlib.contextmanager
def attempt(workdir: Path) -> Iterator[None]:
    """Keeps a record of this start."""
    folder = workdir / "attempts"
    number = 1 + max((int(path.stem) for path in _records(folder)), default=0)
    record = {
        "argv": sys.argv,
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "started": time_now(),
        "ended": None,
        "exit_code": None,
        "reason": None,
    }
    path = folder / f"{number:04d}.json"
    write_json(path, record)
    code, reason = int(ExitCode.DONE), "done"
    try:
        yield
    except SamiError as error:
        code, reason = exit_code(error), str(error)
        raise
    except BaseException as error:
        code, reason = exit_code(error), f"{type(error).__name__}: {error}"
        raise
    finally:
        write_json(path, {**record, "ended": time_now(), "exit_code": code, "reason": reason})


@contextlib.contextmanager
def forgotten_if_refused(workdir: Path) -> Iterator[None]:
    """Deletes what a run wrote before it was refused, if no stage was begun: the mended command is another run."""
    try:
        yield
    except (BadConfigError, BadDataError):
        if not has_begun(workdir):
            attempts = workdir / "attempts"
            for path in (*_records(attempts), workdir / "RUN.json", workdir / "config.json"):
                path.unlink(missing_ok=True)
            if attempts.is_dir() and not any(attempts.iterdir()):
                attempts.rmdir()
        raise


def has_begun(workdir: Path) -> bool:
    """Whether a stage of the run was begun."""
    return any(workdir.glob("iter_*"))


def time_now() -> str:
    """The time in UTC, as records have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _records(attempts: Path) -> list[Path]:
    return [path for path in attempts.glob("[0-9]*.json") if path.stem.isdigit()]
