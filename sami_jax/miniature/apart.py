"""A miniature's base, made by a process of its own while a group waits: Orbax cannot save for one of several alone."""

import multiprocessing
import os
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import jax

from sami_jax.config.pretraining import PretrainingConfig
from sami_jax.errors import ExitCode, SamiError, exit_code
from sami_jax.miniature.pretraining import is_finished, pretrain
from sami_jax.processes import as_error, from_writer, is_writer, sentence_of
from sami_jax.safe_point import SafePoint, stop_on_signal

_LOOK_S = 0.5  # between two looks at the child, and two safe points


def pretrain_apart(config: PretrainingConfig, *, safe_point: SafePoint) -> Path:
    """`pretrain`, on the CPU of process 0's host. Every process calls this, and process 0 starts the child.

    Raises:
      SamiError: what the child raises.
      StoppedError: `safe_point` did; the child has saved what it had.
    """
    if not from_writer(lambda: is_finished(config)):
        child = _Child(config) if is_writer() else None
        try:
            while not from_writer(lambda: child is None or child.is_done()):
                safe_point()
                time.sleep(_LOOK_S)
        finally:
            if child:
                child.stop()
    return Path(from_writer(lambda: str(pretrain(config, safe_point=safe_point))))  # stands, and has its seal looked at


class _Child:
    """The process that makes a base."""

    def __init__(self, config: PretrainingConfig):
        context = multiprocessing.get_context("spawn")
        self._answer, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_make, args=(config, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def is_done(self) -> bool:
        """Whether the base is made. Raises the child's error."""
        if self._process.is_alive():
            return False
        killed = ExitCode.STOPPED, "The pretraining was killed; the same command goes on from here."
        code, sentence = self._answer.recv() if self._answer.poll() else killed
        if code != ExitCode.DONE:
            raise as_error(code, sentence)
        return True

    def stop(self) -> None:
        """Has it save and end, where it is still at work."""
        self._process.terminate()
        self._process.join()


def _make(config: PretrainingConfig, answer: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    jax.config.update("jax_platforms", "cpu")  # the group has the other devices
    try:
        with stop_on_signal() as safe_point:
            pretrain(config, safe_point=safe_point)
        answer.send((ExitCode.DONE, ""))
    except Exception as error:
        if not isinstance(error, SamiError):
            traceback.print_exc()
        answer.send((exit_code(error), sentence_of(error)))


def _end_with_parent() -> None:
    """Else a killed run would leave a child behind, which keeps the next one from the base."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(ExitCode.STOPPED)
