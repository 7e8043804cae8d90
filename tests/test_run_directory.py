"""The run directory's promises, on real runs: resumed bitwise equal, locked, refused, stopped at a safe point."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import pytest

from sami_jax.files import read_json, read_jsonl, read_log

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "miniature.py"
RUN_LIMIT_S = 240  # a smoke run takes about 30 s on two cores


def command(name: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "sami_jax", name, *flags]


# The runs of this file execute the same programs: each is compiled once, which halves a run's time.
COMPILED = tempfile.TemporaryDirectory(prefix="sami_jax-compiled-")
JAX_SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | JAX_SETTINGS


def finished(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *flags), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=RUN_LIMIT_S
    )


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A smoke run of one iteration whose base is pretrained once for this file."""
    cache = tmp_path_factory.mktemp("pretrained")
    return [
        f"--config={CONFIG}:smoke",
        f"--config.pretraining.cache_dir={cache}",
        "--config.iterations=1",
        "--config.train.steps=(3,)",
        "--config.train.checkpoint_every=1",
        "--config.train.passes=2",
    ]


def read_by(flags: list[str], *beginnings: str) -> list[str]:
    """Those of the flags that a command reads: the config file, and the settings with these beginnings."""
    return [flag for flag in flags if flag.startswith(("--config=", *(f"--config.{name}" for name in beginnings)))]


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory) -> pathlib.Path:
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = finished("run", *flags, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    place, disk = done.stdout.splitlines()[:2]
    assert re.fullmatch(r"process 0 of 1, (\d+) of \1 devices, cpu, mesh data=1 fsdp=1 expert=1 tensor=1", place)
    assert re.match(rf"{workdir} will need up to [1-9].* MB more .*; .* are free", disk)
    return workdir


def seals(workdir: pathlib.Path) -> dict[str, str]:
    """The fingerprint of every stage: of its inputs, its outputs' bytes and its counts."""
    return {
        str(path.parent.relative_to(workdir)): read_json(path)["fingerprint"]
        for path in workdir.glob("iter_*/*/DONE.json")
    }


def losses(workdir: pathlib.Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(workdir / "metrics.jsonl")}


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(whole_run):
    stages = {"iter_000/eval", "iter_001/sample", "iter_001/train", "iter_001/export", "iter_001/eval"}
    assert seals(whole_run).keys() == stages
    counts = read_json(whole_run / "iter_001/sample/DONE.json")["counts"]
    assert counts["sampled"] == counts["kept"] + sum(counts["dropped"].values())
    assert len(read_jsonl(whole_run / "iter_001/sample/rejects.jsonl")) == sum(counts["dropped"].values())
    assert sorted(losses(whole_run)) == [1, 2, 3]
    assert len(read_json(whole_run / "iter_001/train/data.json")) == 3
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"):
        assert (whole_run / "iter_001/export" / name).is_file()
    assert not (whole_run / "iter_001/train/checkpoints").exists()  # the export stands
    assert "<html" in (whole_run / "report/index.html").read_text()
    attempt = read_json(whole_run / "attempts/0001.json")
    assert attempt["exit_code"] == 0 and attempt["ended"]


@pytest.mark.slow
def test_no_training_query_is_evaluated_and_halves_alternate(whole_run):
    trained = {i for step in read_json(whole_run / "iter_001/train/data.json") for i in step}
    evaluated = {record["example_id"] for record in read_jsonl(whole_run / "iter_001/eval/results.jsonl")}
    assert trained and evaluated and not trained & evaluated
    assert all(int(i.rsplit("-")[-1]) % 2 == 0 for i in trained)  # iteration 1 draws from the even half


@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_nothing(whole_run, flags):
    before = {path: path.stat().st_mtime_ns for path in whole_run.glob("iter_*/**/*")}
    again = finished("run", *flags, f"--workdir={whole_run}")
    assert again.returncode == 0 and "finished; nothing to do" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in whole_run.glob("iter_*/**/*")}
    without_config = finished("run", f"--workdir={whole_run}")
    assert without_config.returncode == 0 and "finished; nothing to do" in without_config.stdout


def interrupted(number: int, moment: Callable[[], bool], name: str, *flags: str) -> int:
    """Starts a command, signals it once `moment` holds, and returns its exit code."""
    process = subprocess.Popen(command(name, *flags), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + RUN_LIMIT_S
    while not moment() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, "the command ended before the moment to interrupt it"
    process.send_signal(number)
    return process.wait(RUN_LIMIT_S)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["iter_001/sample/chunks/00000.jsonl", "iter_001/train/checkpoints/step_00000001"])
def test_killed_anywhere_the_same_command_ends_bitwise_equal(whole_run, flags, tmp_path, place):
    workdir = tmp_path / "run"
    run = ["run", *flags, f"--workdir={workdir}"]
    assert interrupted(signal.SIGKILL, (workdir / place).exists, *run) == -signal.SIGKILL
    assert not (workdir / "iter_001/export").exists()
    resumed = finished("run", *flags, f"--workdir={workdir}")
    assert resumed.returncode == 0, resumed.stderr
    assert seals(workdir) == seals(whole_run)
    assert losses(workdir) == losses(whole_run)


@pytest.mark.slow
def test_sigterm_stops_at_a_safe_point_with_75_and_the_run_goes_on(whole_run, flags, tmp_path):
    workdir = tmp_path / "run"
    moment = (workdir / "iter_000/eval/responses/learned/00000.jsonl").exists
    assert interrupted(signal.SIGTERM, moment, "run", *flags, f"--workdir={workdir}") == 75
    attempt = read_json(workdir / "attempts/0001.json")
    assert attempt["exit_code"] == 75 and "SIGTERM" in attempt["reason"]
    resumed = finished("run", f"--workdir={workdir}")
    assert resumed.returncode == 0, resumed.stderr
    assert seals(workdir) == seals(whole_run)


@pytest.mark.slow
def test_a_second_process_is_refused_with_73(whole_run, flags):
    import fcntl

    with (whole_run / "LOCK").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = finished("run", *flags, f"--workdir={whole_run}")
    assert refused.returncode == 73 and "in use" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.slow
def test_other_settings_are_refused_with_78_and_named(whole_run, flags):
    refused = finished("run", *flags, "--config.train.learning_rate=0.1", f"--workdir={whole_run}")
    assert refused.returncode == 78
    assert "train.learning_rate: 0.0005 -> 0.1" in refused.stderr


@pytest.mark.slow
def test_a_changed_output_is_noticed(whole_run, flags, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(whole_run, workdir)
    with (workdir / "iter_001/sample/pairs.json").open("a") as file:
        file.write(" ")
    refused = finished("run", *flags, f"--workdir={workdir}")
    assert refused.returncode == 65 and "pairs.json" in refused.stderr


@pytest.mark.slow
def test_a_missing_model_leaves_nothing_behind(tmp_path):
    workdir = tmp_path / "run"
    refused = finished("run", f"--config={CONFIG}:smoke", "--config.model=nowhere/at/all", f"--workdir={workdir}")
    assert refused.returncode == 65 and "nowhere/at/all" in refused.stderr
    assert not (workdir / "config.json").exists()


@pytest.mark.slow
def test_evaluate_and_export_give_what_the_run_gave(whole_run, flags, tmp_path):
    exported = tmp_path / "model"
    done = finished("export", f"--workdir={whole_run}", "--iteration=1", f"--out={exported}", "--verify")
    assert done.returncode == 0, done.stderr
    theirs, ours = (folder / "model.safetensors" for folder in (whole_run / "iter_001/export", exported))
    assert theirs.read_bytes() == ours.read_bytes()
    baseline, out = whole_run / "iter_000/eval", tmp_path / "evaluated"
    settings = read_by(flags, "pretraining.")
    done = finished("evaluate", *settings, f"--model={exported}", f"--baseline={baseline}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert read_json(out / "summary.json") == read_json(whole_run / "iter_001/eval/summary.json")


@pytest.mark.slow
def test_train_on_the_runs_own_pairs_gives_the_runs_own_weights(whole_run, flags, tmp_path):
    base = next(pathlib.Path(flags[1].partition("=")[2]).glob("*/model"))
    pairs, out = whole_run / "iter_001/sample/pairs.json", tmp_path / "trained"
    flags = read_by(flags, "train.")
    done = finished("train", *flags, f"--model={base}", f"--pairs={pairs}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == (whole_run / "iter_001/export/model.safetensors").read_bytes()
    assert len(read_log(tmp_path / "trained.training/metrics.jsonl")) == 3
    written = (out / "model.safetensors").stat().st_mtime_ns
    again = finished("train", *flags, f"--model={base}", f"--pairs={pairs}", f"--out={out}")
    assert again.returncode == 0 and (out / "model.safetensors").stat().st_mtime_ns == written
    other = finished("train", *flags, f"--model={base}", f"--pairs={pairs}", f"--out={whole_run}")
    assert other.returncode == 65 and "already holds files" in other.stderr
    assert not pathlib.Path(f"{whole_run}.training").exists()


@pytest.mark.slow
def test_generate_repeats_what_the_run_sampled(whole_run, flags, tmp_path):
    base = next(pathlib.Path(flags[1].partition("=")[2]).glob("*/model"))
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    records = read_jsonl(whole_run / "iter_000/eval/results.jsonl")[:3]
    template = read_json(whole_run / "config.json")["prompts"]["generation"]
    texts = [template.replace("{constitution}", r["constitutions"][0]).replace("{query}", r["query"]) for r in records]
    prompts.write_text("".join(json.dumps({"prompt": text, "note": i}) + "\n" for i, text in enumerate(20 * texts)))
    generate = ["generate", flags[0], f"--model={base}", f"--prompts={prompts}", "--rows=2"]
    part = tmp_path / "responses.jsonl.parts" / "00001.jsonl"
    assert interrupted(signal.SIGTERM, part.exists, *generate, f"--out={out}") == 75 and not out.exists()
    # What was done is not done again: a part that was changed comes out as it is.
    part.write_text(part.read_text().replace('"note": 9', '"note": "kept"'))
    done = finished(*generate, f"--out={out}")
    assert done.returncode == 0 and "60 responses in" in done.stderr, done.stderr
    lines = read_jsonl(out)
    assert [line["response"] for line in lines] == 20 * [record["responses"][0] for record in records]
    assert [line["note"] for line in lines] == [*range(9), "kept", *range(10, 60)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "prompts.jsonl",
        "responses.jsonl",
        "responses.jsonl.DONE.json",
    ]
    written = out.stat().st_mtime_ns
    again = finished(*generate, f"--out={out}", "--config.sampling.max_new_tokens=3")
    assert again.returncode == 78 and "responses.jsonl was made from other inputs" in again.stderr
    assert out.stat().st_mtime_ns == written
