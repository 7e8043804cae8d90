"""Commands that stand for those of a cluster, first on PATH, and how the launchers are called with them."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
STUBS = ROOT / "tests" / "stubs"
LIMIT_S = 120

HOSTILE = [
    "--config=configs/my run.py:smoke",
    "--config.a=it's",
    '--config.b="quoted"',
    "--config.c=$(touch hacked) `touch hacked` $HOME ${HOME} $$(X) $$",
    "--config.d=two\nlines\tand a tab",
    "--config.e=;|&<>*?[a]{b,c}!#~\\",
    "--config.f=ä€😀",
    "",
    "-x",
]


def python_stub(script: str, skipped: int = 0) -> str:
    """The text of a command that runs a file of stubs/, quickly, without the first of its arguments."""
    shift = f"shift {skipped}\n" if skipped else ""
    return f'#!/bin/sh\n{shift}exec {shlex.quote(sys.executable)} -IS {shlex.quote(str(STUBS / script))} "$@"\n'


def put(folder: pathlib.Path, name: str, text: str) -> pathlib.Path:
    """Makes an executable file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def lines_of(file: pathlib.Path) -> list:
    """The records of a JSON-lines file; none where it is not there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def bash(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Runs a piece of bash with the launchers' functions at hand."""
    head = f'set -euo pipefail; program=test; usage() {{ echo usage; }}; cd "{ROOT}"; source launch/arguments.sh; '
    command = ["bash", "-c", head + "source launch/restarts.sh; " + script, "bash", *arguments]
    return subprocess.run(command, text=True, capture_output=True, timeout=LIMIT_S, **options)


def launch(script: str, *arguments: str, environment: dict[str, str], **options) -> subprocess.CompletedProcess:
    """Runs a launcher to its end."""
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    environment = clean_environment() | environment
    return subprocess.run(command, text=True, capture_output=True, timeout=LIMIT_S, env=environment, **options)


def clean_environment() -> dict[str, str]:
    """That of this process, without what has to do with JAX."""
    ours = ("JAX_", "XLA_", "SAMI_", "HF_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def wait_for(condition: Callable[[], bool]) -> None:
    """Returns when it holds."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
