"""One of two processes that meet, and of which one then fails, or is killed; test_process_group starts both.

`python group_worker.py HOST:PORT,N,I WHAT FOLDER`: I is also who fails where WHAT is "fails" (1), "killed" (1).
"""

import os
import signal
import sys
import time
from pathlib import Path

from sami_jax.errors import BadDataError
from sami_jax.process_group import explained, joined, leave, read_place, told_of_the_end
from sami_jax.processes import heard, is_writer, process_count, process_index


def part(what: str, folder: Path) -> None:
    mine = folder / f"process-{process_index()}"

    def note(code: int, sentence: str) -> None:
        mine.write_text(f"{code} {sentence}")

    with told_of_the_end(note):
        heard("")
        if what == "fails" and not is_writer():
            raise BadDataError("the data of one process is bad.")
        if what == "killed" and not is_writer():
            os.kill(os.getpid(), signal.SIGKILL)
        if what in ("fails", "killed"):
            heard("")  # for ever: the other does not come
        if what == "terminated":
            mine.write_text("waiting")
            time.sleep(60)
    mine.write_text(f"done {process_count()}")


if __name__ == "__main__":
    try:
        with joined(read_place(sys.argv[1]), timeout_s=30):
            part(sys.argv[2], Path(sys.argv[3]))
    except Exception as raised:
        error = explained(raised)
        print(error, file=sys.stderr, flush=True)
        leave(error, str(error))
        raise
