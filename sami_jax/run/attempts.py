"""The record of every start of a run: what was called, with which versions, and how it ended."""

import contextlib
import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sami_jax.clock import time_now
from sami_jax.errors import BadConfigError, BadDataError, ExitCode, SamiError, exit_code
from sami_jax.files import content_hash, file_hash, write_json
from sami_jax.process_group import explained, told_of_the_end
from sami_jax.processes import is_writer, process_count
from sami_jax.stage_folder import DONE

QUERIES = "queries"  # the folder of a run that keeps its queries
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


@contextlib.contextmanager
def attempt(workdir: Path) -> Iterator[None]:
    """Keeps a record of this start."""
    folder = workdir / "attempts"
    number = 1 + max((int(path.stem) for path in _records(folder)), default=0)
    record = {
        "argv": sys.argv,
        **code_version(),
        "processes": process_count(),
        "started": time_now(),
        "ended": None,
        "exit_code": None,
        "reason": None,
    }
    path = folder / f"{number:04d}.json"
    write_json(path, record)
    code, reason = int(ExitCode.DONE), "done"

    def ended(code: int, reason: str) -> None:
        write_json(path, {**record, "ended": time_now(), "exit_code": code, "reason": reason})

    try:
        with told_of_the_end(ended):
            yield
    except SamiError as error:
        code, reason = exit_code(error), str(error)
        raise
    except BaseException as raised:
        cause = explained(raised)
        code, reason = exit_code(cause), f"{type(cause).__name__}: {cause}"
        raise
    finally:
        ended(code, reason)


def code_version() -> dict[str, Any]:
    """Python, libraries and this package's text, to compare processes and attempts by."""
    package = Path(__file__).parents[1]
    sources = [(str(path.relative_to(package)), file_hash(path)) for path in sorted(package.rglob("*.py"))]
    return {
        "python": sys.version.split()[0],
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "sami_jax": content_hash(sources)[:16],
    }


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
            drop_queries(workdir / QUERIES)
            if attempts.is_dir() and not any(attempts.iterdir()):
                attempts.rmdir()
        raise


def drop_queries(folder: Path) -> None:
    """Deletes the queries that a run has copied; a folder that is none of a run's stays."""
    if is_writer() and (folder / DONE).is_file():
        shutil.rmtree(folder, ignore_errors=True)


def has_begun(workdir: Path) -> bool:
    """Whether a stage of the run was begun."""
    return any(workdir.glob("iter_*"))


def _records(attempts: Path) -> list[Path]:
    return [path for path in attempts.glob("[0-9]*.json") if path.stem.isdigit()]
