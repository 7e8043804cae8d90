"""`sami run` in two processes of two devices each, by launch/local.sh: what a pod does, killed and stopped as there."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import pytest

from launch_stubs import put, python_stub, wait_for
from sami_jax.files import read_json, read_log
from test_run_directory import losses, seals

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch" / "local.sh"
RUN_LIMIT_S, END_S = 300, 60
pytestmark = pytest.mark.slow

COMPILED = tempfile.TemporaryDirectory(prefix="sami_jax-compiled-")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "SAMI_"))} | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "PYTHONPATH": str(ROOT),
}

# A twin of the command that is broken in one way: what it goes on from has lost the optimizer's state. It
# tells, too, which process asks the judge.
TWIN = """
import dataclasses, os, pathlib, sys
import jax
from sami_jax import checkpoints
from sami_jax.cli.main import main
from sami_jax.evaluation.judge_by_name import JUDGES
from sami_jax.evaluation.miniature_judge import MINIATURE
from sami_jax.processes import process_index

restored = checkpoints.Checkpoints.restore_latest

def without_optimizer(self, target):
    checkpoints.Checkpoints.restore_latest = restored
    state = restored(self, target)
    return state._replace(opt_state=jax.tree.map(lambda leaf: leaf * 0, state.opt_state))

checkpoints.Checkpoints.restore_latest = without_optimizer
judge_one = MINIATURE.judge

def judge(*what):
    pathlib.Path(os.environ["JUDGED"], str(process_index())).touch()
    return judge_one(*what)

JUDGES["miniature"] = dataclasses.replace(MINIATURE, judge=judge)
sys.exit(main())
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'miniature.py'}:smoke",
        f"--config.pretraining.cache_dir={tmp_path_factory.mktemp('pretrained')}",
        "--config.iterations=1",
        "--config.train.steps=(3,)",
        "--config.train.checkpoint_every=1",
        "--config.train.passes=2",
        "--config.mesh.fsdp=4",
        "--config.train.rows_per_device=2",
        # What makes it shorter: a base that knows little, and whose answers are taken as they are; few of them judged.
        "--config.pretraining.steps=100",
        "--config.filters.sentence_ends=abcdefghijklmnopqrstuvwxyz.",
        "--config.queries.evaluation_count=4",
        "--config.evaluation.held_out=false",
    ]


def launch(*flags: str, processes: int = 2, python: str = sys.executable) -> subprocess.Popen[str]:
    words = ["bash", str(LAUNCH), f"--processes={processes}", f"--devices={4 // processes}", "--", *flags]
    environment = ENVIRONMENT | {"PYTHON": python}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(launched: subprocess.Popen[str], limit_s: float = RUN_LIMIT_S) -> str:
    try:
        said = launched.communicate(timeout=limit_s)[0]
    finally:
        launched.terminate()
    assert launched.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A run that nothing interrupted, base included, and what it said."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, finished(launch(*flags, f"--workdir={workdir}"))


def processes_of(workdir: pathlib.Path) -> list[int]:
    """The processes of a run, in the order of their numbers."""
    rows = [line for line in listed("pid=,args=") if " -m sami_jax run " in line and f"--workdir={workdir}" in line]
    return sorted(int(line.split()[0]) for line in rows)


def interrupted(number: int, process: int, moment: Callable[[], bool], *flags: str) -> tuple[int, str, float]:
    """Signals one process of a launch once `moment` holds. Returns exit code, what was said, seconds to the end."""
    workdir = pathlib.Path(flags[-1].partition("=")[2])
    launched = launch(*flags)
    deadline = time.monotonic() + RUN_LIMIT_S
    while not moment() and launched.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert launched.poll() is None, "it ended before the moment to interrupt it"
    os.kill(processes_of(workdir)[process], number)
    started = time.monotonic()
    said = launched.communicate(timeout=RUN_LIMIT_S)[0]
    assert processes_of(workdir) == []
    return launched.returncode, said, time.monotonic() - started


def test_a_run_of_two_processes_leaves_one_run(whole_run):
    workdir, said = whole_run
    assert seals(workdir).keys() == {
        f"iter_00{name}" for name in ("0/eval", "1/sample", "1/train", "1/export", "1/eval")
    }
    assert "<html" in (workdir / "report/index.html").read_text()
    attempt = read_json(workdir / "attempts/0001.json")
    assert attempt["exit_code"] == 0 and attempt["processes"] == 2
    assert not list((workdir / "attempts").glob("0002*"))
    for process in range(2):
        assert f"[{process}] process {process} of 2, 2 of 4 devices, cpu, mesh data=1 fsdp=4 expert=1 tensor=1" in said
    assert "training 3/3 steps" in said and not re.search(r"\[1\] .*training", said)  # one of them reports
    logs = [(workdir.parent / "whole.logs" / f"process-{process}.log").read_text() for process in range(2)]
    assert f"Report: {workdir}/report/index.html" in logs[0] and "Report" not in logs[1]
    assert [record["step"] for record in read_log(workdir / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--processes=2", "--devices=2"], "the arguments of sami run are missing"),
        (["--processes=0", "--devices=2", "--", "--workdir=x"], "--processes=0 is no number from 1"),
        (["--processes=2", "--devices=two", "--", "--workdir=x"], "--devices=two is no number"),
        (["--processes=2", "--devices=2", "--fast", "--", "--workdir=x"], "unknown argument --fast"),
        (["--processes=2", "--devices=2", "--", "--config=x"], "needs --workdir"),
        (["--processes=2", "--devices=2", "--", "--workdir=x", "--distributed=auto"], "leave it out"),
    ],
)
def test_bad_flags_of_the_script(words, says, tmp_path):
    done = subprocess.run(["bash", str(LAUNCH), *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 64 and says in done.stderr and "usage: launch/local.sh" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_script_says_what_its_processes_refuse(tmp_path):
    launched = launch(f"--config={ROOT}/configs/miniature.py:nothing", f"--workdir={tmp_path / 'run'}")
    said = launched.communicate(timeout=END_S)[0]
    assert launched.returncode == 78, said
    for process in range(2):
        assert f"[{process}] sami run: {ROOT}/configs/miniature.py: get_config failed" in said
    assert not (tmp_path / "run").exists()


def test_a_killed_script_leaves_no_process_behind(flags, tmp_path):
    workdir = tmp_path / "run"
    launched = launch(*flags, f"--config.pretraining.cache_dir={tmp_path / 'base'}", f"--workdir={workdir}")
    deadline = time.monotonic() + END_S
    while not (children := makers_of_bases(processes_of(workdir))) and time.monotonic() < deadline:
        time.sleep(0.05)
    launched.kill()
    while processes_of(workdir) + alive(children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert launched.wait() == -signal.SIGKILL
    assert len(children) == 1 and processes_of(workdir) + alive(children) == []


def makers_of_bases(parents: list[int]) -> list[int]:
    rows = [line.split(maxsplit=2) for line in listed("pid=,ppid=,args=")]
    return [int(pid) for pid, parent, words in rows if int(parent) in parents and "spawn_main" in words]


def alive(processes: list[int]) -> list[int]:
    return [pid for pid in map(int, listed("pid=")) if pid in processes]


def listed(columns: str) -> list[str]:
    """A line for each process that runs; one that ended and was not waited for is left out."""
    done = subprocess.run(["ps", "-eww", "-o", f"stat=,{columns}"], capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    return [rest for state, rest in rows if not state.startswith("Z")]


def test_processes_of_different_settings_are_all_refused_and_told_which(flags, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]},2"
    workdir = tmp_path / "run"
    environment = ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "sami_jax", "run", *flags, f"--workdir={workdir}", f"--config.seed={process}"]
            + [f"--distributed={place},{process}"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=END_S)[1] for process in processes]
    assert [process.returncode for process in processes] == [78, 78], said
    sentence = "config.seed is 0 in process 0, 1 in process 1. Install the same on all hosts, and start all"
    assert f"sami run: process 1: {sentence}" in said[0] and f"sami run: {sentence}" in said[1]
    assert not workdir.exists()


def test_one_process_with_four_devices_does_the_same(whole_run, flags, tmp_path):
    workdir, _ = whole_run
    finished(launch(*flags, f"--workdir={tmp_path / 'one'}", processes=1))
    for name in ("sample/pairs.json", "sample/rejects.jsonl", "train/data.json"):
        assert read_text(tmp_path / "one", name) == read_text(workdir, name), name
    one, two = losses(tmp_path / "one"), losses(workdir)
    assert one[1] == pytest.approx(two[1], rel=1e-6)  # the promise D1
    assert one == pytest.approx(two, rel=1e-4)  # the same bits were seen; room for sums in another order


def test_as_a_slurm_job_that_is_preempted_it_ends_bitwise_equal(whole_run, flags, tmp_path):
    for name in ("sbatch", "srun", "scontrol"):
        put(tmp_path / "bin", name, python_stub(f"{name}.py"))
    (tmp_path / "state").write_text("PREEMPTED")
    workdir = tmp_path / "run"
    words = ["--run", "--nodes=2", "--gpus=0", f"--python={sys.executable}", "--", *flags, f"--workdir={workdir}"]
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "JOB": str(tmp_path)}
    environment |= {"JAX_NUM_CPU_DEVICES": "2"}
    with subprocess.Popen(["bash", str(ROOT / "launch" / "slurm.sh"), *words], env=environment) as job:
        wait_for((workdir / "iter_001/sample/chunks/00000.jsonl").exists)
        for name in ("batch", "srun"):
            os.kill(int((tmp_path / f"{name}.pid").read_text()), signal.SIGTERM)
        code = job.wait(RUN_LIMIT_S)
    said = (tmp_path / "batch.log").read_text()
    assert code == 0 and said.count("75: stopped safely") == 1, said
    logs = [(tmp_path / "run.logs" / f"process-{process}.log").read_text() for process in range(2)]
    for process in range(2):  # found by JAX from SLURM's variables
        assert logs[process].count(f"process {process} of 2, 2 of 4 devices, cpu") == 2
    assert seals(workdir) == seals(whole_run[0])
    assert losses(workdir) == losses(whole_run[0])


def read_text(workdir: pathlib.Path, name: str) -> str:
    return (workdir / "iter_001" / name).read_text()


def test_stopped_and_killed_it_ends_bitwise_equal_and_a_broken_twin_does_not(whole_run, flags, tmp_path):
    workdir = tmp_path / "run"
    run = [*flags, f"--workdir={workdir}"]
    moment = (workdir / "iter_001/sample/chunks/00000.jsonl").exists
    code, said, _ = interrupted(signal.SIGTERM, 1, moment, *run)
    assert code == 75, said
    for process in range(2):
        assert f"[{process}] sami run: Stopped by SIGTERM at process 1; the same command goes on from here." in said
    attempt = read_json(workdir / "attempts/0001.json")
    assert attempt["exit_code"] == 75 and "SIGTERM at process 1" in attempt["reason"]

    moment = (workdir / "iter_001/train/checkpoints/step_00000001").exists
    code, said, seconds = interrupted(signal.SIGKILL, 1, moment, *run)
    assert code == 128 + signal.SIGKILL and "process 1 ended with 137" in said
    assert seconds < END_S, said
    assert not (workdir / "iter_001/export").exists()

    twin = tmp_path / "twin"
    shutil.copytree(workdir, twin)
    finished(launch(*run))
    expected = whole_run[0]
    assert seals(workdir) == seals(expected)
    assert losses(workdir) == losses(expected)

    judged = tmp_path / "judged"
    judged.mkdir()
    (tmp_path / "twin.py").write_text(TWIN)
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
export JUDGED={judged}
[ "$1" = -m ] && shift 2 && exec {sys.executable} {tmp_path}/twin.py "$@"
exec {sys.executable} "$@"
""")
    python.chmod(0o755)
    finished(launch(*flags, f"--workdir={twin}", python=str(python)))
    assert [path.name for path in judged.iterdir()] == ["0"]
    assert losses(twin)[3] != pytest.approx(losses(expected)[3], rel=1e-6)
    assert seals(twin)["iter_001/export"] != seals(expected)["iter_001/export"]
