"""A signal asks to stop, and a stage stops where nothing is lost."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from sami_jax.errors import StoppedError

SafePoint = Callable[[], None]  # called where a stage may stop; raises StoppedError when someone asked for it


@contextlib.contextmanager
def stop_on_signal() -> Iterator[SafePoint]:
    """Yields the safe point: it raises StoppedError once SIGTERM or Ctrl-C came. A second Ctrl-C ends at once."""
    asked: list[str] = []

    def ask(number: int, _: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
        print(
            f"\n{asked[0]}: stopping at the next safe point (Ctrl-C again to stop at once).",
            file=sys.stderr,
            flush=True,
        )

    def safe_point() -> None:
        if asked:
            raise StoppedError(f"Stopped by {asked[0]}; the same command goes on from here.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield safe_point
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
