"""Steps that several processes take as one: where one of them fails, all do."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from sami_jax.errors import SamiError, exit_code


def is_writer() -> bool:
    """Whether this process is the one that writes what all share."""
    return jax.process_index() == 0


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Waits at the end of the block for every process; an error that one of them raised inside, all raise.

    No process may wait for another inside the block: the one that failed would not come.

    Raises:
      SamiError: with the exit code of another process' error, where this process had none.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    codes = multihost_utils.process_allgather(np.int32(exit_code(failure) if failure else 0))
    if failure:
        raise failure
    if codes.any():
        first = int(np.flatnonzero(codes)[0])
        kinds = {kind.exit_code: kind for kind in reversed(SamiError.__subclasses__())}  # the first of a code
        raise kinds[codes[first]](f"Process {first} failed; its own message says why.")
