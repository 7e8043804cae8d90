"""launch/tpu_vm.sh against a cloud that is played: gcloud is tests/stubs/gcloud.py, whose workers are folders here."""

import json
import pathlib
import shlex
import shutil
import subprocess

import pytest

from launch_stubs import HOSTILE, LIMIT_S, ROOT, clean_environment, launch, lines_of, put, python_stub, wait_for

NODE = ["--name=sami", "--zone=us-west4-a", "--type=v5litepod-16"]


class Cloud:
    """A folder with the stubs, and what they played there."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.bin = folder / "cloud", folder / "bin"
        self.folder.mkdir()
        self.mount = folder / "shared disk"
        put(self.bin, "gcloud", python_stub("gcloud.py"))
        put(self.bin, "curl", "#!/bin/sh\nexit 7\n")  # no metadata here
        put(self.bin, "mountpoint", "#!/bin/sh\nexit 0\n")
        self.python = put(self.bin, "its python", python_stub("run.py", skipped=2))  # -m sami_jax
        self.environment = {
            "CLOUD": str(self.folder),
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def plays(self, outcomes=(0,), **script) -> "Cloud":
        (self.folder / "outcomes.json").write_text(json.dumps(list(outcomes)))
        (self.folder / "script.json").write_text(json.dumps(script))
        return self

    def command(self, verb: str, *flags: str, arguments=(), node=NODE) -> list[str]:
        storage = [f"--mount={self.mount}", "--storage=10.0.0.2:/share", f"--python={self.python}", "--poll=0"]
        run = ["--", f"--workdir={self.mount}/runs/a", *arguments] if verb in ("up", "setup", "run") else []
        return [verb, *node, *storage, *flags, *run]

    def do(self, verb: str, *flags: str, arguments=(), node=NODE) -> subprocess.CompletedProcess:
        command = self.command(verb, "--run", *flags, arguments=arguments, node=node)
        return launch("tpu_vm.sh", *command, environment=self.environment)

    @property
    def calls(self) -> list[list[str]]:
        return lines_of(self.folder / "calls.jsonl")

    @property
    def verbs(self) -> list[str]:
        """What was called that changes something, without what only looks."""
        changing = ("create", "delete", "start", "scp")
        return [" ".join(call[2:4]) for call in self.calls if call[3] in changing]

    @property
    def runs(self) -> list[dict]:
        return lines_of(self.folder / "runs.jsonl")

    def starts(self, worker: int) -> int:
        return sum(run["worker"] == worker for run in self.runs)

    def log(self, worker: int) -> str:
        return (self.mount / "runs" / "a.logs" / f"worker-{worker}.log").read_text()


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path).plays()


def test_up_does_everything_and_arguments_arrive_as_they_are(cloud):
    done = cloud.do("up", arguments=HOSTILE)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["tpu-vm create", "tpu-vm scp"]
    expected = ["run", "--distributed=auto", f"--workdir={cloud.mount}/runs/a", *HOSTILE]
    assert sorted((run["worker"], run["arguments"]) for run in cloud.runs) == [(0, expected), (1, expected)]
    assert {run["environment"]["JAX_PLATFORMS"] for run in cloud.runs} == {"tpu,cpu"}  # no silent CPU
    assert {run["environment"]["HF_HOME"] for run in cloud.runs} == {f"{cloud.mount}/.sami/huggingface"}
    assert "run 0 of worker 0" in cloud.log(0) and "run 0 of worker 1" in cloud.log(1)
    assert "delete --name=sami --zone=us-west4-a --run" in done.stderr  # it still costs
    assert not list(cloud.folder.rglob("hacked"))
    # Once more: the node is there, nothing is created.
    assert cloud.do("up", arguments=HOSTILE).returncode == 0
    assert cloud.verbs == ["tpu-vm create", "tpu-vm scp", "tpu-vm scp"]


def test_the_workers_get_the_checkout_as_it_is_and_nothing_of_it_stays_here(cloud):
    new = ROOT / "configs" / "not_committed_yet.py"
    before = sorted(path.name for path in (ROOT / ".git").glob("*"))
    assert cloud.do("create").returncode == 0
    try:
        new.write_text("x = 1\n")
        done = cloud.do("setup")
    finally:
        new.unlink()
    assert done.returncode == 0, done.stderr
    for worker in range(2):
        (code,) = (cloud.folder / "node-1" / f"worker-{worker}" / "sami" / "sami").glob("code-*")
        assert (code / "configs" / "not_committed_yet.py").read_text() == "x = 1\n"
        assert (code / "sami_jax" / "losses.py").read_bytes() == (ROOT / "sami_jax" / "losses.py").read_bytes()
        assert not (code / ".venv").exists()
    assert sorted(path.name for path in (ROOT / ".git").glob("*")) == before
    assert not cloud.runs  # set up, not started


def test_a_dry_run_prints_all_of_it_and_calls_nothing(cloud):
    secret = put(cloud.folder, "keys.env", "OTHER=hush\n")
    secret.chmod(0o600)
    flags = [
        "--queued",
        "--spot",
        f"--env-file={secret}",
        "--secret=HF_TOKEN=hf-token",
        "--create-flag=--network=my net",
    ]
    done = launch("tpu_vm.sh", *cloud.command("up", *flags, arguments=HOSTILE), environment=cloud.environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert not cloud.calls and not (cloud.folder.parent / "cache").exists()
    commands = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    assert {tuple(command[:3]) for command in commands} == {("gcloud", "compute", "tpus")}
    assert [" ".join(command[3:5]) for command in commands] == [
        "queued-resources describe",
        "queued-resources create",
        "queued-resources describe",
        "tpu-vm describe",
        *["tpu-vm ssh", "tpu-vm scp", "tpu-vm scp", "tpu-vm ssh"],  # set up
        *["tpu-vm ssh", "tpu-vm ssh"],  # started, and looked at
    ]
    create = commands[1]
    assert {"--spot", "--node-id=sami", "--accelerator-type=v5litepod-16", "--network=my net"} < set(create)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    assert "hush" not in done.stdout
    # The arguments of the run stand there, as bash reads them.
    settings = "\n".join(line.removeprefix("#   ") for line in done.stdout.splitlines() if line.startswith("#   "))
    show = f'{settings}\nprintf "%s\\0" "${{arguments[@]}}"'
    shown = subprocess.run(["bash", "-c", show], capture_output=True, text=True).stdout.split("\0")[:-1]
    assert shown[1:] == HOSTILE
    # What it prints is what it does.
    assert cloud.do("up", *flags, arguments=HOSTILE).returncode == 0
    called = [call for call in cloud.calls if call[0] == "compute"]
    while called[-1] == called[-2]:
        called.pop()  # it looked more than once
    assert [command[1:] for command in commands] == called


def test_a_run_without_a_shared_disk_is_warned_about(cloud):
    warning = "without --storage a run is lost with its node"
    done = launch("tpu_vm.sh", "up", *NODE, "--", "--workdir=runs/a", environment=cloud.environment)
    assert (done.returncode, f"# {warning}" in done.stdout) == (0, True)
    done = launch("tpu_vm.sh", "up", *NODE, "--run", "--wait=0", "--", "--workdir=/a", environment=cloud.environment)
    assert warning in done.stderr
    assert warning not in cloud.do("setup").stderr


def test_secrets_come_by_file_or_secret_manager_and_stand_in_no_command(cloud):
    file = put(cloud.folder, "keys.env", "OTHER='hush hush'\n")
    file.chmod(0o640)
    done = cloud.do("up", f"--env-file={file}")
    assert (done.returncode, "chmod 600" in done.stderr, cloud.calls) == (64, True, [])
    file.chmod(0o600)
    done = cloud.do("up", f"--env-file={file}", "--secret=HF_TOKEN=hf-token")
    assert done.returncode == 0, done.stderr
    for run in cloud.runs:
        assert run["environment"]["OTHER"] == "hush hush"
        assert run["environment"]["HF_TOKEN"] == "value of hf-token"
    said = done.stdout + done.stderr + json.dumps(cloud.calls) + cloud.log(0) + cloud.log(1)
    assert "hush" not in said and "value of hf-token" not in said
    for copy in [*cloud.folder.parent.rglob("secrets.env")]:
        assert copy.stat().st_mode & 0o077 == 0, copy
    # One of each worker, and none here or on the shared disk.
    assert len(list(cloud.folder.parent.rglob("secrets.env"))) == 2


@pytest.mark.parametrize("flags", [[], ["--queued", "--spot"]])
def test_a_preempted_node_is_made_again_and_goes_on_by_itself(cloud, flags):
    cloud.plays([["preempt", "wait"], "wait"])
    command = cloud.command("up", "--run", *flags)
    with launched(cloud, command) as process:
        wait_for(lambda: cloud.starts(1) == 2 and cloud.starts(0) == 2)
        wait_for(lambda: sum('sh" start sami' in call[-3] for call in cloud.calls) == 2)  # up has found it, too
        settings = {file.read_text() for file in cloud.folder.glob("node-*/worker-*/sami/sami/launch.sh")}
        assert len(settings) == 1  # one name, one command, one code
        # The new node has started it before anybody came by ssh: its disks are new, its code is from the shared disk.
        boots = [json.loads((cloud.folder / f"boot-{made}.json").read_text()) for made in (1, 2)]
        assert boots == [["", ""], ["sami-worker 0 2 running 0\n", "sami-worker 1 2 running 0\n"]]
        assert (
            launch("tpu_vm.sh", *cloud.command("stop", "--run", *flags), environment=cloud.environment).returncode == 0
        )
        output = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 75, output
    assert "stopped; the same command goes on" in output
    group = "queued-resources" if flags else "tpu-vm"
    changing = [verb for verb in cloud.verbs if not verb.endswith("scp")]
    assert changing == [f"{group} create", f"{group} delete", f"{group} create"]
    assert (cloud.starts(0), cloud.starts(1)) == (2, 2)  # neither of them twice on the new node


def launched(cloud: Cloud, command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "tpu_vm.sh"), *command],
        env=clean_environment() | cloud.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_how_a_run_ended_that_the_new_node_started_by_itself_counts(cloud):
    done = cloud.plays([["preempt", 137], 70, 70, 0]).do("up")
    assert (done.returncode, cloud.starts(0), cloud.starts(1)) == (70, 3, 3), done.stderr


def test_a_node_that_reboots_goes_on_with_the_settings_it_was_given_last(cloud):
    cloud.plays([0, 75])
    assert cloud.do("up").returncode == 0
    assert cloud.do("run", arguments=["--config.seed=2"]).returncode == 75  # of a later command
    worker = cloud.folder / "node-1" / "worker-0"
    state = worker / "sami" / "sami"
    boot = ["bash", str(cloud.folder / "startup-1.sh")]
    environment = (
        clean_environment()
        | cloud.environment
        | {"HOME": str(worker), "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "a,b"}
    )
    # It had ended: whether it starts again is decided elsewhere.
    assert subprocess.run(boot, env=environment, capture_output=True).returncode == 0
    assert cloud.starts(0) == 2
    # It had not when the node went down.
    (state / "code").unlink()
    done = subprocess.run(boot, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "sami-worker 0 2 running 0\n"), done.stderr
    wait_for(lambda: cloud.starts(0) == 3)
    assert cloud.runs[-1]["arguments"][-1] == "--config.seed=2"


def test_what_ends_a_run_is_not_tried_again(cloud):
    done = cloud.plays([[134, 65], 0]).do("up")  # a crash may be the answer to what ended the other
    assert (done.returncode, cloud.starts(0), cloud.starts(1)) == (65, 1, 1)
    assert "65: bad data, model or checkpoint: the same command would end so again" in done.stderr


def test_what_may_pass_is_tried_again_within_the_budget(cloud):
    done = cloud.plays([75, [137, 75], 70, 0]).do("up")
    assert (done.returncode, cloud.starts(0), cloud.starts(1)) == (0, 4, 4), done.stderr
    assert cloud.verbs.count("tpu-vm create") == 1
    done = cloud.plays([143]).do("up", "--max-restarts=2")
    assert (done.returncode, cloud.starts(0)) == (143, 4 + 3)
    assert "the 2 restarts are used up" in done.stderr


def test_one_worker_that_ended_alone_ends_the_others(cloud):
    done = cloud.plays([[137, "wait"], 0]).do("up")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 workers still run after another has ended" in done.stderr
    assert (cloud.starts(0), cloud.starts(1)) == (2, 2)


def test_a_lost_connection_leaves_run_and_node_alone(cloud):
    lost = "!ssh: connect to host 10.1.2.3 port 22: Connection timed out"
    looks = [None, None, None]  # two of the set-up, and the start
    done = cloud.plays([0], ssh=looks + [lost] * 5).do("up")
    assert (done.returncode, cloud.starts(0)) == (0, 1), done.stderr
    assert cloud.verbs.count("tpu-vm create") == 1 and "starts again" not in done.stderr
    # Longer than that, it is one of the budget, and the run is found where it was.
    cloud.plays([0], ssh=looks + [lost] * 40)
    done = cloud.do("up", "--max-restarts=1")
    assert (done.returncode, cloud.verbs.count("tpu-vm create")) == (75, 1)
    assert "the 1 restarts are used up" in done.stderr and "Connection timed out" in done.stderr


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "PREEMPTED", "TERMINATED"])
def test_a_node_of_no_use_is_deleted_before_one_is_created(cloud, state):
    done = cloud.plays(describe=[state, "DELETING"]).do("create")
    assert (done.returncode, cloud.verbs) == (0, ["tpu-vm delete", "tpu-vm create"]), done.stderr


def test_a_node_on_its_way_is_waited_for_and_one_that_was_stopped_is_started(cloud):
    queue = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    assert cloud.plays(queue=["ABSENT", *queue], describe=["CREATING", None]).do("create", "--queued").returncode == 0
    assert cloud.verbs == ["queued-resources create"]
    assert cloud.plays(describe=["REPAIRING", "STOPPED", "STARTING", None]).do("create").returncode == 0
    assert cloud.verbs == ["queued-resources create", "tpu-vm start"]


def test_the_wait_for_a_node_has_an_end(cloud):
    done = cloud.plays(describe=["CREATING"] * 100).do("create", "--wait=0")
    assert (done.returncode, cloud.verbs) == (75, []) and "still not ready after 0 s" in done.stderr


def test_a_node_that_always_fails_is_not_created_for_ever(cloud):
    done = cloud.plays(describe=["ABSENT", "FAILED"] * 20).do("up", "--max-restarts=2")
    assert (done.returncode, cloud.verbs.count("tpu-vm create")) == (75, 3), done.stderr


def test_no_capacity_is_waited_out_and_a_refusal_is_not(cloud):
    full = "!RESOURCE_EXHAUSTED: There is no more capacity in the zone"
    done = cloud.plays(create=[full, full]).do("create")
    assert (done.returncode, cloud.verbs) == (0, ["tpu-vm create"] * 3)
    assert "no more capacity" in done.stderr
    assert cloud.do("delete").returncode == 0
    for refusal in ("INVALID_ARGUMENT: Unknown accelerator type", "PERMISSION_DENIED: tpu.nodes.create"):
        before = len(cloud.calls)
        done = cloud.plays(create=[f"!{refusal}"]).do("create")
        assert (done.returncode, len(cloud.calls) - before) == (78, 2) and refusal in done.stderr


def test_nothing_is_created_where_nobody_can_say_what_there_is(cloud):
    done = cloud.plays(describe=["!PERMISSION_DENIED: Permission 'tpu.nodes.get' denied"]).do("up")
    assert (done.returncode, cloud.verbs) == (78, []) and "tpu.nodes.get" in done.stderr
    nobody = "You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login\n\nto obtain"
    done = cloud.plays(describe=[f"!{nobody}"]).do("up")
    assert (done.returncode, cloud.verbs) == (78, []) and "have an active account" in done.stderr
    done = cloud.plays(describe=["!UNAVAILABLE: try again later"] * 100).do("up", "--wait=0")
    assert (done.returncode, cloud.verbs) == (75, [])
    done = cloud.plays(describe=["!UNAVAILABLE: try again later", None]).do("create")
    assert (done.returncode, cloud.verbs) == (0, ["tpu-vm create"])


def test_a_set_up_that_fails_says_why_and_is_tried_a_few_times(cloud):
    put(cloud.bin, "mountpoint", "#!/bin/sh\nexit 1\n")
    put(cloud.bin, "mount.nfs", "#!/bin/sh\n")
    put(cloud.bin, "mount", '#!/bin/sh\necho "mount: access denied: $*" >&2; exit 32\n')
    done = cloud.do("up")
    assert done.returncode == 74 and not cloud.runs
    assert done.stderr.count("worker 1: cannot mount 10.0.0.2:/share at ") == 4  # three times again
    assert "access denied: -t nfs -o vers=3,nolock,hard 10.0.0.2:/share" in done.stderr


def test_a_set_up_that_cannot_begin_ends_by_what_ssh_says(cloud):
    wrong = "!unrecognized arguments: --fast"
    done = cloud.plays(ssh=[wrong]).do("up", "--ssh-flag=--fast")
    assert (done.returncode, "gcloud does not reach the workers of sami" in done.stderr) == (78, True), done.stderr
    assert "unrecognized arguments: --fast" in done.stderr
    assert cloud.plays(ssh=["!banner exchange: Connection reset", None, "!Connection reset"]).do("up").returncode == 0


def test_a_bucket_is_mounted_and_sami_jax_installed(cloud):
    put(cloud.bin, "mountpoint", "#!/bin/sh\nexit 1\n")
    put(cloud.bin, "gcsfuse", f'#!/bin/sh\nprintf "%s\\n" "$*" >>{cloud.folder}/mounts\n')
    # What `curl https://astral.sh/uv/install.sh` brings: a uv whose environments have the interpreter of the stubs.
    uv = put(
        cloud.folder,
        "uv",
        f"""#!/bin/sh
printf '%s\n' "$*" >>{cloud.folder}/uv.log
[ "$1" != venv ] || {{ mkdir -p "$4/bin" && cp "{cloud.python}" "$4/bin/python"; }}
""",
    )
    install = put(
        cloud.folder, "install.sh", f'mkdir -p "$UV_UNMANAGED_INSTALL" && cp {uv} "$UV_UNMANAGED_INSTALL/uv"\n'
    )
    put(
        cloud.bin,
        "curl",
        f"""#!/bin/sh
[ "$2" = -o ] && [ "$4" = https://astral.sh/uv/install.sh ] || exit 7
cp {install} "$3"
""",
    )
    done = cloud.do("up", "--storage=gs://bucket/a/b", "--python=")
    assert done.returncode == 0, done.stderr
    options = "--implicit-dirs --rename-dir-limit=100000 -o allow_other --only-dir a/b bucket"
    assert set((cloud.folder / "mounts").read_text().splitlines()) == {f"{options} {cloud.mount}"}
    installed = (cloud.folder / "uv.log").read_text().splitlines()
    assert sum(line.startswith("venv --python 3.12") for line in installed) == 2  # once on each worker
    assert all("constraints.txt -e code-" in line for line in installed if line.startswith("pip install"))
    assert (cloud.starts(0), cloud.starts(1)) == (1, 1)
    (create,) = [call for call in cloud.calls if call[3] == "create"]
    assert "--scopes=https://www.googleapis.com/auth/cloud-platform" in create  # else the bucket is read only


def test_status_and_logs_show_every_worker(cloud):
    assert "node sami: ABSENT" in cloud.do("status").stdout
    assert cloud.plays([[65, 75]]).do("run").returncode == 78  # no node yet
    assert cloud.do("create").returncode == 0
    done = cloud.do("run")
    assert (done.returncode, cloud.starts(0)) == (65, 1)  # once
    shown = cloud.do("status").stdout
    assert shown.splitlines() == [
        "node sami: READY",
        "worker 0: ended 65",
        "worker 1: ended 75",
        "worker 0 says: launch: ended with 65",
    ]
    done = cloud.do("logs", "--worker=1", "--lines=2")
    assert (done.returncode, done.stdout) == (0, "run 0 of worker 1\nlaunch: ended with 75\n")


def test_another_run_on_the_node_is_not_disturbed(cloud):
    cloud.plays(["wait", 0])
    with launched(cloud, cloud.command("up", "--run")) as process:
        wait_for(lambda: cloud.starts(0) and cloud.starts(1))
        done = cloud.do("run", arguments=["--config.seed=2"])
        assert done.returncode == 73 and "another run goes on" in done.stderr
        assert cloud.do("stop").returncode == 0
        output = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 75, output
    assert (cloud.starts(0), cloud.starts(1)) == (1, 1)
    assert cloud.do("up").returncode == 0  # goes on
    assert (cloud.starts(0), cloud.starts(1)) == (2, 2)


def test_delete_after_deletes_the_node_whatever_the_end(cloud):
    assert cloud.plays([65]).do("up", "--delete-after").returncode == 65
    assert cloud.verbs == ["tpu-vm create", "tpu-vm scp", "tpu-vm delete"]
    assert cloud.do("delete").returncode == 0  # there is none any more
    assert len(cloud.verbs) == 3


@pytest.mark.parametrize(
    "command, sentence",
    [
        ([], "a verb is missing"),
        (["launch", *NODE], "unknown verb launch"),
        (["up", *NODE, "--colour=red"], "unknown argument --colour=red"),
        (["up", "--zone=us-west4-a", "--type=v5litepod-16", "--", "--workdir=/a"], "--name= is no name of a node"),
        (["create", "--name=Sami; rm -rf /", *NODE[1:]], "--name=Sami; rm -rf / is no name"),
        (["create", f"--name={'a' * 64}", *NODE[1:]], "is no name of a node"),
        (["create", "--name=a-", *NODE[1:]], "--name=a- is no name"),
        (["create", NODE[0], "--zone=here", NODE[2]], "--zone=here is no zone"),
        (["create", *NODE[:2]], "--type= is no type of TPU"),
        (["create", *NODE[:2], "--type=v9-8"], "which image has a v9-8? give --runtime=VERSION"),
        (["up", *NODE], "the arguments of sami run are missing"),
        (["up", *NODE, "--", "--config=a"], "sami run needs --workdir=DIR"),
        (["up", *NODE, "--", "--workdir=runs/../../a"], "/mnt/sami/runs/../../a is not on the shared disk"),
        (["up", *NODE, "--storage=h:/s", "--", "--workdir=/tmp/a"], "not on the shared disk at /mnt/sami"),
        (
            ["up", *NODE, "--storage=disk", "--", "--workdir=/mnt/sami/a"],
            "--storage=disk is neither HOST:/SHARE nor gs://BUCKET",
        ),
        (["up", *NODE, "--", "--workdir=/a", "--distributed=auto"], "leave it out"),
        (["up", *NODE, "--secret=HF_TOKEN", "--", "--workdir=/a"], "is no VARIABLE=NAME"),
        (["up", *NODE, "--env-file=/nowhere", "--", "--workdir=/a"], "is no file that can be read"),
        (["up", *NODE, "--max-restarts=-1", "--", "--workdir=/a"], "--max-restarts=-1 is no number"),
        (["up", *NODE, "--poll=1.5", "--", "--workdir=/a"], "--poll=1.5 is no number from 0 to 3600"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_call(cloud, command, sentence):
    done = launch(
        "tpu_vm.sh", *command[:1], *(["--run"] if command else []), *command[1:], environment=cloud.environment
    )
    assert (done.returncode, cloud.calls) == (64, []), done.stderr
    assert sentence in done.stderr.splitlines()[0]


def test_a_node_that_is_not_deleted_is_no_success(cloud):
    assert cloud.do("create").returncode == 0
    busy = "!ABORTED: another operation is in progress"
    done = cloud.plays(delete=[busy]).do("delete")
    assert done.returncode == 75 and "not deleted yet: ERROR" in done.stderr
    done = cloud.plays(delete=[busy]).do("up", "--delete-after")
    assert done.returncode == 0 and "may still be there, and be paid for" in done.stderr


def test_without_gcloud_there_is_one_sentence(cloud):
    (cloud.bin / "gcloud").unlink()
    for tool in ("bash", "dirname", "mktemp", "rm", "git", "find", "grep", "cut", "mkdir", "cp", "cat"):
        (cloud.bin / tool).symlink_to(shutil.which(tool))
    cloud.environment["PATH"] = str(cloud.bin)
    done = cloud.do("up")
    assert (done.returncode, done.stderr.count("\n")) == (64, 1)
    assert "there is no gcloud here" in done.stderr
