"""Compiled programs outlive a command, in the user's own folder or where JAX was told, and nowhere else."""

import os
import pathlib
import subprocess
import sys

import pytest

from sami_jax.files import read_jsonl
from tiny_run import tiny_run_config

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def test_what_one_command_compiled_another_finds(tmp_path):
    config = tiny_run_config(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "My sister"}\n')

    def generate(name: str, **environment: str) -> list[dict]:
        plain = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
        words = [f"--model={config.model}", f"--prompts={tmp_path / 'prompts.jsonl'}", f"--out={tmp_path / name}"]
        subprocess.run(
            [sys.executable, "-m", "sami_jax", "generate", *words, "--config.sampling.max_new_tokens=8"],
            env=plain | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment},
            check=True,
        )
        return read_jsonl(tmp_path / name)

    def kept(folder: pathlib.Path) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*-cache")}

    everything = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    own = tmp_path / "cache"
    first = generate("first.jsonl", XDG_CACHE_HOME=str(own), **everything)
    programs = kept(own / "sami_jax" / "compiled")
    assert len(programs) > 2 and kept(own) == programs
    assert generate("second.jsonl", XDG_CACHE_HOME=str(own), **everything) == first
    assert kept(own) == programs  # nothing was compiled anew
    told = {"XDG_CACHE_HOME": str(own), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "told")}
    assert generate("third.jsonl", **told, **everything) == first
    assert len(kept(tmp_path / "told")) == len(programs) and kept(own) == programs
