"""The commands behind `make` are the ones the documentation promises."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PYTEST = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# An outer `make test WORKERS=4` hands its flags and variables down, and they would change what is printed here.
INHERITED = [
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
    "MAKEOVERRIDES",
    "EXTRAS",
    "PIP_FLAGS",
    "PYTEST_FLAGS",
    "PYTHON",
    "WORKERS",
]


def make_output(*arguments: str) -> list[str]:
    """The lines `make` prints, given these arguments."""
    env = {name: value for name, value in os.environ.items() if name not in INHERITED}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", ".venv/bin/sami run --config=configs/miniature.py --workdir=runs/miniature"),
        ("test", f".venv/bin/python {PYTEST} tests --ignore=tests/parity --ignore=tests/tpu "),
        ("lint", ".venv/bin/ruff format --check ."),
        ("lint", ".venv/bin/mypy"),
        ("parity", f".venv-parity/bin/python {PYTEST} tests/parity "),
        ("fit", '.venv-parity/bin/python -m pytest tests/tpu -m "not minutes" '),
        ("fit-all", ".venv-parity/bin/python -m pytest tests/tpu "),
    ],
)
def test_target_runs_the_promised_command(target: str, command: str):
    assert command in make_output("-n", target)


def test_clean_keeps_the_runs():
    removed = [word for line in make_output("-n", "clean") if line.startswith("rm ") for word in line.split()]
    assert ".venv" in removed
    assert not any(word.startswith("runs") for word in removed)


def test_help_lists_every_target():
    targets = ["help", "demo", "test", "lint", "parity", "fit", "fit-all", "clean"]
    assert [line.split()[1] for line in make_output()] == targets
