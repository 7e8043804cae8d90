"""What a person who watches is told: sentences, and a progress line with ETA, for terminals and log files alike."""

import sys
import time

from sami_jax.processes import is_writer


def say(sentence: str) -> None:
    """Prints a sentence on standard error; of several processes, one does."""
    if is_writer():
        print(sentence, file=sys.stderr, flush=True)


class Progress:
    """Prints `title done/total, note, ETA`: in place on a terminal, a line every few seconds in a log.

    Of several processes, which all make the same progress, one prints.

    Attributes:
      started: seconds of `time.monotonic` when the work began.
    """

    def __init__(self, title: str, total: int, *, unit: str = "", done: int = 0, log_every_s: float = 10.0):
        self.title, self.total, self.unit = title, total, unit
        self.started = time.monotonic()
        self._first, self._last_print, self._log_every_s = done, -1e9, log_every_s

    def begin(self, total: int, *, done: int) -> None:
        """Begins anew, with a total that is known by now, of which `done` units were done before."""
        self.total, self._first, self.started = total, done, time.monotonic()

    def update(self, done: int, note: str = "", ahead: float = 0.0) -> None:
        """Says that `done` of `total` units are done, and about `ahead` more as good as done, which tells the ETA."""
        now = time.monotonic()
        last, terminal = done >= self.total, sys.stderr.isatty()
        if not is_writer():
            return
        if not last and now - self._last_print < (0.2 if terminal else self._log_every_s):
            return
        self._last_print = now
        worked, elapsed = done + ahead - self._first, now - self.started
        if last:
            when = f"took {_duration(elapsed)}"
        else:
            when = (
                f"ETA {_duration(elapsed / worked * max(0, self.total - done - ahead))}"
                if worked > 0
                else "ETA unknown"
            )
        parts = [f"{self.title} {done}/{self.total} {self.unit}".rstrip(), note, when]
        line = ", ".join(part for part in parts if part)
        sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if last else "") if terminal else line + "\n")
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
