"""The progress line in logs and on terminals, at times that the test sets."""

import io
import re
import sys

import pytest

from sami_jax import progress
from sami_jax.progress import Progress


class Clock:
    """Stands for the module `time`: seconds that pass only when told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_has_the_rate_from_this_attempt_only(clock, capsys):
    shown = Progress("training", 100, unit="steps", done=40)  # 40 were done before this attempt
    clock.now += 30
    shown.update(50, "loss 0.5")  # 10 in 30 s, so the other 50 take 150 s
    assert capsys.readouterr().err == "training 50/100 steps, loss 0.5, ETA 2 min 30 s\n"
    clock.now += 150
    shown.update(100)
    assert capsys.readouterr().err == "training 100/100 steps, took 3 min 00 s\n"


def test_nothing_done_yet_has_no_eta(clock, capsys):
    Progress("sampling", 10, done=4).update(4)
    assert capsys.readouterr().err == "sampling 4/10, ETA unknown\n"


def test_a_log_gets_a_line_every_few_seconds_and_the_last_one(clock, capsys):
    shown = Progress("x", 100, log_every_s=10.0)
    for done in range(1, 101):
        clock.now += 1
        shown.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.match(r"x (\d+)/100", line)[1]) for line in lines] == [*range(1, 100, 10), 100]


def test_a_terminal_line_is_written_over_and_ends_once(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress("x", 3)
    for done in (1, 2, 3):
        clock.now += 1
        shown.update(done)
    first, second, third = terminal.getvalue().split("\r\x1b[K")[1:]
    assert (first, second, third) == ("x 1/3, ETA 2 s", "x 2/3, ETA 1 s", "x 3/3, took 3 s\n")


def test_a_terminal_is_not_flooded(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress("x", 1000)
    for done in range(1, 1000):
        clock.now += 0.01
        shown.update(done)
    assert 40 < terminal.getvalue().count("\r") <= 50  # ten seconds, five a second


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3605, "60 min 05 s")]
)
def test_durations(clock, capsys, seconds, text):
    shown = Progress("x", 1)
    clock.now += seconds
    shown.update(1)
    assert capsys.readouterr().err == f"x 1/1, took {text}\n"


def test_what_was_done_before_takes_no_time_and_counts_for_no_eta(clock, capsys):
    shown = Progress("judging", 0, unit="questions")
    shown.begin(100, done=90)
    clock.now += 20
    shown.update(92)  # ten seconds each
    assert capsys.readouterr().err == "judging 92/100 questions, ETA 1 min 20 s\n"
