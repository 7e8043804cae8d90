"""A signal asks to stop, and a stage stops where nothing is lost."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from sami_jax.errors import StoppedError
from sami_jax.processes import heard, process_count, told

SafePoint = Callable[[], None]  # called where a stage may stop; raises StoppedError when someone asked for it


@contextlib.contextmanager
def stop_on_signal() -> Iterator[SafePoint]:
    """Yields the safe point: it raises StoppedError once SIGTERM or Ctrl-C came. A second Ctrl-C ends at once.

    Of several processes every one calls the safe point, as often as the others; they hear of a signal that any of them
    got, and all stop at the same one. Call this after `jax.distributed.initialize`, which has a handler of its own.
    """
    asked: list[str] = []
    ignored: set[int] = set()

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
        asked_of = heard(asked[0] if asked else "")
        if asked_of:
            process, name = min(asked_of.items())
            where = ""
            if process_count() > 1:  # the first to end has the others told again, which must not kill them on the way
                where = f" at process {process}"
                ignored.add(signal.SIGTERM)
            raise told(StoppedError(f"Stopped by {name}{where}; the same command goes on from here."))

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield safe_point
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if number in ignored else handler)
