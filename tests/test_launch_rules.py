"""What all launchers share: quoting, and which exit code of a run is followed by another start."""

import re
import shlex
import signal
import subprocess
import time

import pytest

from launch_stubs import HOSTILE, ROOT, bash


def starts_until_the_end(tmp_path, codes: list[int], most: int = 20) -> tuple[int, list[int]]:
    """After how many ends no start follows, and the pauses: of a run that ends with these codes, the last for ever."""
    script = """
    for code in "${@:3}"; do
        after_exit "$code" "$1" "$2"
        echo "$pause"
        [[ -n "$pause" ]] || break
    done
    """
    file = tmp_path / "codes"
    file.unlink(missing_ok=True)
    ends = codes + codes[-1:] * 50
    done = bash(script, str(file), str(most), *map(str, ends))
    assert done.returncode == 0, done.stderr
    pauses = done.stdout.split("\n")[:-1]
    assert file.read_text().split() == [str(code) for code in ends[: len(pauses)]]
    return len(pauses), [int(pause) for pause in pauses if pause]


@pytest.mark.parametrize(
    "code, starts, pauses",
    [
        *[(code, 1, set()) for code in (0, 64, 65, 73, 78, 130, 126, 127)],
        (70, 2, {10}),
        (74, 4, {60}),
        (69, 7, {600}),
        *[(code, 6, {10}) for code in (75, 134, 137, 139, 143, 255, 1)],
    ],
)
def test_a_run_starts_again_by_its_exit_code(tmp_path, code, starts, pauses):
    ends, seen = starts_until_the_end(tmp_path, [code], most=5 if starts == 6 else 20)
    assert (ends, set(seen)) == (starts, pauses)


def test_what_may_happen_once_may_happen_among_others(tmp_path):
    assert starts_until_the_end(tmp_path, [75, 70, 75, 134, 74, 70])[0] == 6  # the second 70
    assert starts_until_the_end(tmp_path, [74, 70, 75, 65])[0] == 4
    assert starts_until_the_end(tmp_path, [75, 70, 74, 137], most=3)[0] == 4  # all of them are counted


@pytest.mark.parametrize(
    "codes, decides",
    [
        ("134 65 75", 65),
        ("0 0 75", 75),
        ("137 70 74", 70),
        ("74 69", 74),
        ("143 78 64", 64),
        ("0 0", 0),
        ("134 75", 134),
    ],
)
def test_the_worst_code_of_several_processes_decides(codes, decides):
    assert bash(f"worst {codes}").stdout == str(decides)


def test_quoted_arguments_are_read_back_by_any_shell():
    line = bash('quoted "$@"', *HOSTILE).stdout
    assert shlex.split(line) == HOSTILE
    for shell in ("sh", "bash"):
        show = [shell, "-c", f"printf '%s\\0' {line}"]
        assert subprocess.run(show, capture_output=True, text=True).stdout.split("\0")[:-1] == HOSTILE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_supervised_command_gets_the_signal_and_its_own_code_comes_back(tmp_path, number):
    trapped = f"trap 'sleep 0.3; exit 75' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    script = f'source launch/restarts.sh; supervise bash -c "{trapped}"; exit $code'
    process = subprocess.Popen(["bash", "-c", script], cwd=ROOT, start_new_session=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)  # comes again while the command still saves
    assert process.wait(20) == 75


def test_a_supervised_command_that_is_killed_gives_its_signal():
    assert bash("supervise bash -c 'kill -KILL $$'; echo $code").stdout == "137\n"
    assert bash("supervise true; echo $code").stdout == "0\n"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "sami run needs --workdir=DIR"),
        (["--workdir=/a", "--distributed=auto"], "--distributed=auto is what this script is for"),
        (["--workdir="], "sami run needs --workdir=DIR"),
    ],
)
def test_arguments_of_sami_run_that_a_launcher_cannot_take(arguments, sentence):
    done = bash('read_workdir "$@"', *arguments)
    assert (done.returncode, sentence in done.stderr) == (64, True), done.stderr


def test_a_workdir_in_two_words():
    assert bash('read_workdir "$@"; echo "$workdir"', "--workdir", "/a b", "--x").stdout == "/a b\n"


@pytest.mark.parametrize(
    "given, placed",
    [
        (["--workdir=runs/a"], ["--workdir=/disk/runs/a"]),
        (["--workdir", "runs/a"], ["--workdir", "/disk/runs/a"]),
        (["--workdir=/disk/runs/a"], ["--workdir=/disk/runs/a"]),
    ],
)
def test_a_relative_workdir_is_one_on_the_disk(given, placed):
    script = 'arguments=("$@"); read_workdir "$@"; place_workdir /disk/; printf "%s\\0" "$workdir" "${arguments[@]}"'
    done = bash(script, "a b", *given, "--c=")
    assert done.stdout.split("\0")[:-1] == ["/disk/runs/a", "a b", *placed, "--c="], done.stderr


def commands_of_the_page() -> list[str]:
    page = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = page.split("```bash\n")[1:]
    return [line for block in blocks for line in block.partition("```")[0].splitlines() if line.startswith("launch/")]


@pytest.mark.parametrize("command", commands_of_the_page())
def test_the_commands_of_the_page_are_taken(command, tmp_path):
    (tmp_path / "keys.env").touch(0o600)
    dry = command.replace(" --run", "").replace("$HOME", str(tmp_path))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", dry], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^(gcloud|sbatch|kubectl) ", done.stdout, re.MULTILINE)


def test_the_page_shows_all_launchers():
    scripts = {command.split()[0] for command in commands_of_the_page()}
    assert scripts == {"launch/tpu_vm.sh", "launch/slurm.sh", "launch/gke/jobset.sh"}
