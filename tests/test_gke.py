"""launch/gke/ against a cluster that is played: tests/stubs/kubectl.py reads the manifest and runs its pods here."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess

import pytest
import yaml

from launch_stubs import HOSTILE, LIMIT_S, ROOT, clean_environment, launch, lines_of, put, python_stub, wait_for

SLICE = ["--image=there/sami:1", "--accelerator=tpu-v5-lite-podslice", "--topology=2x4", "--claim=disk"]


class Cluster:
    """A folder with the stubs, and what they played there."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.bin = folder / "cluster", folder / "bin"
        self.folder.mkdir()
        put(self.bin, "kubectl", python_stub("kubectl.py").replace(" -IS ", " "))  # needs yaml
        put(self.bin, "sleep", f'#!/bin/sh\ncase "$1" in 0.*) ;; *) echo "$1" >>{self.folder}/pauses ;; esac\n')
        self.mount = folder / "shared $(HOME) $$disk"
        self.environment = {
            "CLUSTER": str(self.folder),
            "CLOUD": str(self.folder),
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "PYTHON": str(put(self.bin, "its python", python_stub("run.py", skipped=2))),
        }

    def plays(self, outcomes=(0,)) -> "Cluster":
        (self.folder / "outcomes.json").write_text(json.dumps(list(outcomes)))
        return self

    def command(self, verb: str, *flags: str, arguments=()) -> list[str]:
        run = ["--", f"--workdir={self.mount}/runs/a", *arguments] if verb in ("apply", "manifest") else []
        return [verb, "--name=sami", *SLICE, f"--mount={self.mount}", *flags, *run]

    def do(self, verb: str, *flags: str, arguments=()) -> subprocess.CompletedProcess:
        return launch("gke/jobset.sh", *self.command(verb, *flags, arguments=arguments), environment=self.environment)

    def applied(self, *flags: str, arguments=()) -> dict:
        """Submits it, and returns how it ended."""
        (self.folder / "jobset.yaml").unlink(missing_ok=True)
        done = self.do("apply", "--run", *flags, arguments=arguments)
        assert done.returncode == 0, done.stderr
        return json.loads((self.folder / "jobset.json").read_text())

    @property
    def calls(self) -> list[list[str]]:
        return lines_of(self.folder / "kubectl.jsonl")

    @property
    def runs(self) -> list[dict]:
        return lines_of(self.folder / "runs.jsonl")

    def log(self, process: int) -> str:
        return (self.mount / "runs" / "a.logs" / f"process-{process}.log").read_text()


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path).plays()


def pod_of(manifest: str) -> dict:
    (job,) = yaml.safe_load(manifest)["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


def test_every_pod_gets_the_arguments_as_they_are(cluster):
    arguments = [*HOSTILE, "$(PATH)$$(PATH)", "\x01\x7f\u2028\u0085é", "a: b # c", "- 1"]
    ended = cluster.applied("--secret=HF_TOKEN=hf/token", arguments=arguments)
    assert ended == {"outcome": "Completed", "restarts": 0, "codes": [0, 0]}
    expected = ["run", "--distributed=auto", f"--workdir={cluster.mount}/runs/a", *arguments]
    assert sorted((run["worker"], run["arguments"]) for run in cluster.runs) == [(0, expected), (1, expected)]
    for run in cluster.runs:
        assert run["environment"]["JAX_PLATFORMS"] == "tpu,cpu"  # no silent CPU
        assert run["environment"]["HF_HOME"] == f"{cluster.mount}/.sami/huggingface"
        assert run["environment"]["HF_TOKEN"] == "value of hf/token"
    assert "value of" not in (cluster.folder / "jobset.yaml").read_text()
    for process in range(2):
        said = cluster.log(process)
        assert f"run 0 of worker {process}" in said and "0: done" in said
        assert said.endswith((cluster.folder / f"pod-{process}.log").read_text())  # in both places, to the end
    assert not list(cluster.folder.parent.rglob("hacked")) and not (ROOT / "hacked").exists()


def test_the_manifest_says_where_and_how_it_runs(cluster):
    flags = ["--spot", "--memory=100Gi", "--service-account=runner", "--grace=600", "--max-restarts=7", "--chips=1"]
    manifest = cluster.do("manifest", *flags).stdout
    jobset = yaml.safe_load(manifest)
    (job,) = jobset["spec"]["replicatedJobs"]
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "sami")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    spec = job["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (8, 8, "Indexed")
    pod = pod_of(manifest)
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 600)
    assert pod["serviceAccountName"] == "runner"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "2x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 1, "memory": "100Gi"}}
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": str(cluster.mount)}]
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "disk"}}]
    plain = pod_of(cluster.do("manifest").stdout)
    assert plain.keys() == pod.keys() - {"serviceAccountName"}
    assert plain["nodeSelector"].keys() == pod["nodeSelector"].keys() - {"cloud.google.com/gke-spot"}
    assert (
        yaml.safe_load(cluster.do("manifest").stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"]
        == 2
    )


def test_a_dry_run_prints_what_is_submitted(cluster):
    done = cluster.do("apply", arguments=HOSTILE)
    assert (done.returncode, done.stderr, cluster.calls) == (0, "", [])
    first, *manifest, last = done.stdout.splitlines()
    assert (shlex.split(first), last) == (["kubectl", "create", "-f", "-", "<<MANIFEST"], "MANIFEST")
    cluster.applied(arguments=HOSTILE)
    assert (cluster.folder / "jobset.yaml").read_text().splitlines() == manifest
    assert cluster.calls == [["create", "-f", "-"]]


def test_what_may_pass_restarts_the_job_set(cluster):
    ended = cluster.plays([75, [137, 75], 70, 74, 0]).applied()
    assert ended == {"outcome": "Completed", "restarts": 4, "codes": [0, 0]}
    assert cluster.log(0).count("--- process 0, start ") == 5


@pytest.mark.parametrize("code", [64, 65, 73, 78, 130])
def test_what_ends_a_run_fails_the_job_set(cluster, code):
    assert cluster.plays([code]).applied() == {"outcome": "Failed", "restarts": 0, "codes": [code, code]}


def test_what_may_happen_once_fails_it_the_second_time_and_a_new_one_counts_anew(cluster):
    for _ in range(2):
        (cluster.folder / "runs.jsonl").unlink(missing_ok=True)
        assert cluster.plays([75, 70, 70]).applied() == {"outcome": "Failed", "restarts": 2, "codes": [70, 70]}
    # Ended from outside after the first 70, its count does not pass on to the next JobSet of the name.
    (cluster.folder / "runs.jsonl").unlink()
    (cluster.mount / "runs" / "a.logs" / "process-0.codes").write_text("70\n")
    assert cluster.plays([70, 0]).applied() == {"outcome": "Completed", "restarts": 1, "codes": [0, 0]}


def test_the_restarts_have_an_end(cluster):
    assert cluster.plays([134]).applied("--max-restarts=2")["restarts"] == 2
    assert len(cluster.runs) == 2 * 3


def test_a_service_that_is_away_is_waited_for(cluster):
    assert cluster.plays([69, 0]).applied()["outcome"] == "Completed"
    assert (cluster.folder / "pauses").read_text().split() == ["600", "600"]


def test_a_pod_that_is_taken_away_saves_and_comes_again(cluster):
    cluster.plays(["wait", 0])
    command = ["bash", str(ROOT / "launch" / "gke" / "jobset.sh"), *cluster.command("apply", "--run")]
    with subprocess.Popen(command, env=clean_environment() | cluster.environment) as process:
        wait_for(lambda: len(cluster.runs) == 2)
        for pid in json.loads((cluster.folder / "pods.json").read_text()):
            os.kill(pid, signal.SIGTERM)  # process 1 of each pod gets it
        assert process.wait(LIMIT_S) == 0
    assert json.loads((cluster.folder / "jobset.json").read_text())["restarts"] == 1
    assert "75: stopped safely" in cluster.log(0) and "75: stopped safely" in cluster.log(1)


def test_a_run_of_the_same_name_is_not_disturbed(cluster):
    cluster.applied()
    done = cluster.do("apply", "--run")
    assert done.returncode == 78 and "the cluster does not take the JobSet sami" in done.stderr
    assert len(cluster.runs) == 2


@pytest.mark.parametrize(
    "verb, called",
    [
        ("status", [["get", "jobset", "sami"], ["get", "pods"]]),
        ("logs", [["logs", "--follow"]]),
        ("delete", [["delete", "jobset", "sami"]]),
    ],
)
def test_the_other_verbs(cluster, verb, called):
    dry = cluster.do(verb, "--namespace=team")
    assert (dry.returncode, cluster.calls) == (0, [])
    assert cluster.do(verb, "--namespace=team", "--run").returncode == 0
    assert [shlex.split(line)[1:] for line in dry.stdout.splitlines()] == cluster.calls
    assert [call[1 : 1 + len(words)] for call, words in zip(cluster.calls, called, strict=True)] == called
    assert {call[0] for call in cluster.calls} == {"--namespace=team"}


@pytest.mark.parametrize(
    "command, sentence",
    [
        ([], "a verb is missing"),
        (["start"], "unknown verb start"),
        (["apply", "--name=Sami", *SLICE, "--", "--workdir=/mnt/sami/a"], "--name=Sami is no name"),
        (["apply", f"--name={'a' * 41}", *SLICE, "--", "--workdir=/mnt/sami/a"], "is no name of a JobSet"),
        (["apply", "--name=a", *SLICE, "--what", "--", "--workdir=/mnt/sami/a"], "unknown argument --what"),
        (["apply", "--name=a", *SLICE], "the arguments of sami run are missing"),
        (["apply", "--name=a", *SLICE[1:], "--", "--workdir=/mnt/sami/a"], "--image= is no image"),
        (["apply", "--name=a", *SLICE, "--topology=4", "--", "--workdir=/mnt/sami/a"], "--topology=4 is no topology"),
        (["apply", "--name=a", *SLICE, "--topology=3x3", "--", "--workdir=/mnt/sami/a"], "--topology=3x3 has 9 chips"),
        (["apply", "--name=a", *SLICE[:3], "--", "--workdir=/mnt/sami/a"], "--claim= is no name"),
        (["apply", "--name=a", *SLICE, "--", "--workdir=/tmp/a"], "is not on the shared disk at /mnt/sami"),
        (["apply", "--name=a", *SLICE, "--secret=A=b", "--", "--workdir=/mnt/sami/a"], "is no VARIABLE=NAME/KEY"),
        (["apply", "--name=a", *SLICE, "--grace=5", "--", "--workdir=/mnt/sami/a"], "--grace=5 is no number from 30"),
        (["apply", "--name=a", *SLICE, "--memory=big", "--", "--workdir=/mnt/sami/a"], "--memory=big is no size"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_call(cluster, command, sentence):
    flags = [*command[:1], "--run", *command[1:]] if command else []
    done = launch("gke/jobset.sh", *flags, environment=cluster.environment)
    assert (done.returncode, cluster.calls) == (64, []), done.stderr
    assert sentence in done.stderr.splitlines()[0]


def test_without_kubectl_there_is_one_sentence(cluster):
    (cluster.bin / "kubectl").unlink()
    for tool in ("bash", "dirname"):
        (cluster.bin / tool).symlink_to(shutil.which(tool))
    cluster.environment["PATH"] = str(cluster.bin)
    done = cluster.do("apply", "--run")
    assert (done.returncode, done.stderr.count("\n")) == (64, 1) and "there is no kubectl here" in done.stderr
