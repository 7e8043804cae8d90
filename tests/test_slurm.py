"""launch/slurm.sh and launch/slurm.sbatch against a SLURM that is played by tests/stubs/: sbatch, srun and scontrol."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from launch_stubs import HOSTILE, LIMIT_S, ROOT, clean_environment, launch, lines_of, put, python_stub, wait_for


class Cluster:
    """A folder with the stubs, and what they played there."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.bin = folder / "job", folder / "bin"
        self.folder.mkdir()
        for name in ("sbatch", "srun", "scontrol"):
            put(self.bin, name, python_stub(f"{name}.py"))
        put(self.bin, "sleep", f'#!/bin/sh\n[ "$1" = 0.2 ] || exec echo "$1" >>{self.folder}/pauses\n')
        python = python_stub("run.py", skipped=2).replace("\n", f'\n[ "$1" != -c ] || exec {sys.executable} "$@"\n', 1)
        self.python = put(self.bin, "its python", python)
        self.workdir = folder / "shared 100%" / "a"
        self.logs = folder / "shared 100%" / "a.logs"
        self.environment = {
            "JOB": str(self.folder),
            "CLOUD": str(self.folder),
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "https_proxy": "http://proxy:3128",
            "no_proxy": "example.org",
        }

    def plays(self, outcomes=(0,)) -> "Cluster":
        (self.folder / "outcomes.json").write_text(json.dumps(list(outcomes)))
        return self

    def command(self, *flags: str, arguments=()) -> list[str]:
        flags = ("--nodes=2", "--gpus=0", f"--python={self.python}", *flags)
        return [*flags, "--", f"--workdir={self.workdir}", *arguments]

    def do(self, *flags: str, arguments=()) -> subprocess.CompletedProcess:
        command = self.command("--run", *flags, arguments=arguments)
        return launch("slurm.sh", *command, environment=self.environment)

    def calls(self, name: str) -> list[list[str]]:
        return lines_of(self.folder / f"{name}.jsonl")

    @property
    def requeued(self) -> int:
        return self.calls("scontrol").count(["requeue", "4097"])

    @property
    def runs(self) -> list[dict]:
        return lines_of(self.folder / "runs.jsonl")

    @property
    def said(self) -> str:
        return (self.folder / "batch.log").read_text()


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path).plays()


def test_arguments_and_environment_arrive_in_every_process(cluster):
    keys = put(cluster.folder, "keys.env", "HF_TOKEN=hush\n")
    keys.chmod(0o600)
    done = cluster.do(f"--env-file={keys}", arguments=HOSTILE)
    assert done.returncode == 0, done.stderr + cluster.said
    expected = ["run", "--distributed=auto", f"--workdir={cluster.workdir}", *HOSTILE]
    assert sorted((run["worker"], run["arguments"]) for run in cluster.runs) == [(0, expected), (1, expected)]
    for run in cluster.runs:
        assert run["environment"]["JAX_PLATFORMS"] == "cpu" and run["environment"]["HF_TOKEN"] == "hush"
        assert run["environment"]["no_proxy"] == "example.org,localhost,127.0.0.1,localhost"
    assert "hush" not in json.dumps([cluster.calls(name) for name in ("sbatch", "srun", "scontrol")]) + cluster.said
    assert [(cluster.logs / f"process-{i}.log").read_text() for i in range(2)] == [
        f"run 0 of worker {i}\n" for i in range(2)
    ]
    assert cluster.requeued == 0 and not list(cluster.logs.glob("*.codes"))
    (step,) = cluster.calls("srun")
    assert "--kill-on-bad-exit=1" in step
    assert not list(cluster.folder.parent.rglob("hacked"))


def test_a_dry_run_prints_what_is_called(cluster):
    flags = ["--time=12:00:00", "--sbatch-flag=--partition=my part", "--term-ahead=600"]
    dry = launch("slurm.sh", *cluster.command(*flags, arguments=HOSTILE), environment=cluster.environment)
    assert (dry.returncode, dry.stderr, cluster.calls("sbatch"), cluster.logs.exists()) == (0, "", [], False)
    printed = shlex.split(dry.stdout)
    assert printed[:4] == ["mkdir", "-p", str(cluster.logs), "sbatch"]
    assert cluster.do(*flags, arguments=HOSTILE).returncode == 0
    assert cluster.calls("sbatch") == [printed[4:]]
    assert {"--requeue", "--signal=TERM@600", "--open-mode=append", "--partition=my part"} < set(printed)
    assert printed[-len(HOSTILE) :] == HOSTILE
    log = str(cluster.logs).replace("%", "%%")  # in which SLURM fills in %j, the job
    assert f"--output={log}/slurm-%j.log" in printed


@pytest.mark.parametrize(
    "flags, tasks, ids", [(["--gpus=4"], 4, None), (["--gpus=4", "--per=node"], 1, "0,1,2,3"), (["--gpus=0"], 1, None)]
)
def test_one_process_for_a_gpu_or_for_a_node(cluster, flags, tasks, ids):
    assert cluster.do(*flags, "--nodes=1").returncode == 0, cluster.said
    (job,) = cluster.calls("sbatch")
    assert f"--ntasks-per-node={tasks}" in job and ("--gpus-per-node=4" in job) == (flags != ["--gpus=0"])
    assert len(cluster.runs) == tasks
    for run in cluster.runs:
        assert run["environment"].get("JAX_LOCAL_DEVICE_IDS") == ids
        assert run["environment"]["JAX_PLATFORMS"] == ("cpu" if flags == ["--gpus=0"] else "cuda,cpu")


def test_every_start_takes_a_port_that_is_free(cluster):
    assert cluster.plays([75, 75, 0]).do("--nodes=1").returncode == 0
    ports = {run["environment"]["JAX_COORDINATOR_PORT"] for run in cluster.runs}
    assert len(ports) == 3 and str(4097 % 4096 + 61440) not in ports  # the one that JAX would take


def test_what_may_pass_goes_back_into_the_queue(cluster):
    done = cluster.plays([75, [137, "wait"], 70, 74, 0]).do()
    assert done.returncode == 0, cluster.said
    assert (cluster.requeued, len(cluster.runs)) == (4, 10)
    assert (cluster.folder / "pauses").read_text().split() == ["10", "10", "10", "60"]
    assert "start 4, 2 processes" in cluster.said


@pytest.mark.parametrize("code", [64, 65, 73, 78, 130])
def test_what_ends_a_run_does_not(cluster, code):
    # The other process is ended by srun with the first; its code, the greater one, is not the run's.
    done = cluster.plays([[code, "wait" if code != 73 else 134]]).do()
    assert (done.returncode, cluster.requeued, len(cluster.runs)) == (code, 0, 2), cluster.said


def test_the_budget_is_that_of_the_job_over_all_starts(cluster):
    done = cluster.plays([134]).do("--max-restarts=2")
    assert (done.returncode, cluster.requeued) == (134, 2)
    assert "the 2 restarts are used up" in cluster.said
    assert cluster.plays([70]).do().returncode == 70  # a second one, of a new job: the count began anew
    assert cluster.requeued == 2 + 1


def test_a_job_that_was_cancelled_stays_so(cluster):
    (cluster.folder / "state").write_text("CANCELLED")
    done = cluster.plays([75]).do()
    assert (done.returncode, cluster.requeued) == (75, 0)
    assert "cancelled: not put into the queue again" in cluster.said


def test_a_preempted_job_saves_and_goes_back_at_once(cluster):
    cluster.plays(["wait", 0])
    (cluster.folder / "state").write_text("PREEMPTED")
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), *cluster.command("--run")]
    environment = clean_environment() | cluster.environment
    with subprocess.Popen(command, env=environment) as process:
        wait_for(lambda: len(cluster.runs) == 2)
        for name in ("srun", "batch"):  # both get it
            os.kill(int((cluster.folder / f"{name}.pid").read_text()), signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0, cluster.said
    assert (cluster.requeued, len(cluster.runs)) == (1, 4)
    assert not (cluster.folder / "pauses").exists()
    assert "75: stopped safely" in cluster.said, cluster.said


@pytest.mark.parametrize(
    "command, sentence",
    [
        ([], "the arguments of sami run are missing"),
        (["--nodes=2", "--gpus=8", "--colour", "--", "--workdir=a"], "unknown argument --colour"),
        (["--gpus=8", "--", "--workdir=a"], "--nodes= is no number"),
        (["--nodes=2", "--", "--workdir=a"], "--gpus= is no number"),
        (["--nodes=2", "--gpus=8", "--per=core", "--", "--workdir=a"], "--per=core is neither gpu nor node"),
        (["--nodes=2", "--gpus=8", "--time=soon", "--", "--workdir=a"], "--time=soon is no time limit"),
        (["--nodes=2", "--gpus=8", "--term-ahead=5", "--", "--workdir=a"], "--term-ahead=5 is no number from 60"),
        (["--nodes=2", "--gpus=8", "--env-file=x", "--", "--workdir=a"], "--env-file=x is no file"),
        (["--nodes=2", "--gpus=8", "--", "--config=a"], "sami run needs --workdir=DIR"),
        (["--nodes=2", "--gpus=8", "--", "--workdir=a", "--distributed=auto"], "leave it out"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_call(cluster, command, sentence):
    done = launch("slurm.sh", "--run", *command, environment=cluster.environment)
    assert (done.returncode, cluster.calls("sbatch")) == (64, []), done.stderr
    assert sentence in done.stderr.splitlines()[0]


def test_what_is_not_there_is_said_in_one_sentence(cluster, tmp_path):
    (cluster.bin / "sbatch").unlink()
    everything = cluster.environment["PATH"]
    for tool in ("bash", "dirname", "basename"):
        (cluster.bin / tool).symlink_to(shutil.which(tool))
    cluster.environment["PATH"] = str(cluster.bin)
    done = cluster.do()
    assert (done.returncode, done.stderr.count("\n")) == (64, 1) and "there is no sbatch here" in done.stderr
    cluster.environment["PATH"] = everything
    batch = cluster.command()[2:]
    done = launch("slurm.sbatch", f"--root={tmp_path}", *batch, environment=cluster.environment)
    assert done.returncode == 78 and "is no checkout of sami_jax" in done.stderr
    done = launch("slurm.sbatch", f"--root={ROOT}", *batch, environment=cluster.environment)
    assert done.returncode == 64 and "there is no job here" in done.stderr
    python = put(cluster.bin, "bare python", "#!/bin/sh\nexit 1\n")
    environment = cluster.environment | {"SLURM_JOB_ID": "1"}
    done = launch("slurm.sbatch", f"--root={ROOT}", f"--python={python}", *batch[1:], environment=environment)
    assert done.returncode == 78 and "bare python has no sami_jax" in done.stderr
