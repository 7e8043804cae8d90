"""How long until something happens: from the start of a process to its first token, and to its first optimizer step.

    pip install -e ".[train,parity]"
    python benchmarks/cold_start.py            # cold, then warm; about three minutes on two cores

`sami generate` answers one prompt with one token; `sami train` makes a step of two queries. Both are commands in
processes of their own, with a model of 4 layers (D 512, V 32000) on a CPU: cold with an empty folder of compiled
programs, warm with the one that the cold run filled. What is timed is what a user waits for: until the answer is
written, and until the first line of metrics.jsonl.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported

from generate import plant, write_tokenizer

POLL_S = 0.02


def seconds_until(done: Callable[[], bool], words: list[str], environment: dict[str, str]) -> float:
    """Runs a command until something is there, and to its end. Raises SystemExit where it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen([sys.executable, "-m", "sami_jax", *words], stderr=said, env=environment) as process:
            while not done() and process.poll() is None:
                time.sleep(POLL_S)
            seconds = time.perf_counter() - started
            code = process.wait()
        said.seek(0)
        if code or not done():
            raise SystemExit(f"sami {words[0]} ended with {code}: {said.read().decode()[-2000:]}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", type=int, default=3, help="warm starts of each (default 3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer(folder / "model")
        plant(folder / "model", [[300]], [4])
        (folder / "prompts.jsonl").write_text('{"prompt": "A post about a trip to the sea. Summary:"}\n')
        entries = {
            str(i): [
                {"prompt": f"{said} POST: {i} went to the sea. Summary:", "response": answer, "example_id": i}
                for said, answer in (("Be brief.", "a trip."), ("Say all.", "they went to the sea, and came back."))
            ]
            for i in range(2)
        }
        (folder / "pairs.json").write_text(json.dumps(entries))
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        for what in ("first token", "first optimizer step"):
            times = []
            for number in range(1 + arguments.warm):
                out = folder / f"{what.split()[1]}-{number}"
                model = f"--model={folder / 'model'}"
                if what == "first token":
                    words = ["generate", model, f"--prompts={folder / 'prompts.jsonl'}", f"--out={out}"]
                    words += ["--config.sampling.max_new_tokens=1"]
                    there = out
                else:
                    words = ["train", model, f"--pairs={folder / 'pairs.json'}", f"--out={out}"]
                    words += ["--config.train.queries_per_step=2", "--config.train.steps=(1,)"]
                    there = pathlib.Path(f"{out}.training") / "metrics.jsonl"
                times.append(seconds_until(there.is_file, words, environment))
            print(f"{what}: cold {times[0]:.1f} s, warm {statistics.median(times[1:]):.1f} s")


if __name__ == "__main__":
    main()
