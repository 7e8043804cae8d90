"""Failures that a person can act on: one clear sentence, one exit code each (the contract launchers retry by)."""

import contextlib
import enum
import re
from collections.abc import Iterator


class ExitCode(enum.IntEnum):
    """The codes that commands end with; docs/run_directory.md says what a supervisor may do after each."""

    DONE = 0
    USAGE = 64
    BAD_DATA = 65  # a data file or a checkpoint is unusable: stop
    UNAVAILABLE = 69  # a server that answers questions does not: run it again later
    NON_FINITE = 70  # NaN or infinity, no memory, or an internal error: retry once
    IN_USE = 73  # another process holds the run directory: stop
    IO_FAILED = 74  # disk full, save or download failed: retry a few times
    STOPPED = 75  # stopped at a safe point: run the same command again
    BAD_CONFIG = 78  # unknown, mistyped or changed configuration: stop
    INTERRUPTED = 130  # Ctrl-C at once


class SamiError(Exception):
    """A failure whose message names the file, field or example, what is wrong, and the remedy."""

    exit_code = ExitCode.NON_FINITE


class BadConfigError(SamiError):
    """A config key is unknown, mistyped, out of range, or differs from the one a run was started with."""

    exit_code = ExitCode.BAD_CONFIG


class BadDataError(SamiError):
    """A data file, a model folder or a checkpoint cannot be used as it is."""

    exit_code = ExitCode.BAD_DATA


class NonFiniteError(SamiError):
    """A loss or a gradient became NaN or infinite."""

    exit_code = ExitCode.NON_FINITE


class OutOfMemoryError(SamiError):
    """The memory of a device or of the host ran out."""

    exit_code = ExitCode.NON_FINITE


class RunInUseError(SamiError):
    """Another process holds the run directory's lock."""

    exit_code = ExitCode.IN_USE


class SaveFailedError(SamiError):
    """A file or checkpoint could not be written."""

    exit_code = ExitCode.IO_FAILED


class FetchFailedError(SamiError):
    """A model could not be downloaded now."""

    exit_code = ExitCode.IO_FAILED


class UnavailableError(SamiError):
    """A server that answers questions does not answer now."""

    exit_code = ExitCode.UNAVAILABLE


class StoppedError(SamiError):
    """Someone asked the run to stop, and it did so at a safe point."""

    exit_code = ExitCode.STOPPED


def exit_code(error: BaseException) -> ExitCode:
    """Returns the exit code of a command that failed with `error`."""
    if isinstance(error, SamiError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    return ExitCode.IO_FAILED if isinstance(error, OSError) else ExitCode.NON_FINITE


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: the host's (Python, numpy) or a device's (XLA)."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def enough_memory(work: str, *remedies: str) -> Iterator[None]:
    """Turns running out of memory inside the block into a sentence that says what helps.

    Args:
      work: what the block does, as in "sampling 128 rows".
      *remedies: what a person can do; an empty one is left out.

    Raises:
      OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        helpful = "; ".join(filter(None, remedies))
        raise OutOfMemoryError(f"out of memory {work}{_how_much(error)}: {helpful}.") from error


def _how_much(error: BaseException) -> str:
    """Returns how much memory was missing, as far as XLA (on TPU; on CPU and GPU) or numpy says it, else ""."""
    text = str(error)
    if used := re.search(r"Used (\S+) of (\S+) hbm", text):
        return f" (it takes {used[1]} of a device's {used[2]})"
    if found := re.search(r"allocat\w+ (\d+) bytes", text):
        return f" ({int(found[1]) / 1e9:.1f} GB more at once)"
    found = re.search(r"allocate ([\d.]+ \w+)", text)
    return f" ({found[1]} more at once)" if found else ""
