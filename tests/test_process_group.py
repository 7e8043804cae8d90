"""Processes that come and end together: who is late is named, who fails ends all with its code and sentence."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sami_jax.errors import BadConfigError, RunInUseError, SamiError, StoppedError
from sami_jax.process_group import find_place, place_in_environment, read_place
from sami_jax.roll_call import call_roll

TESTS = pathlib.Path(__file__).parent
LIMIT_S = 60  # the promise: whoever is left ends within it


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class TestRollCall:
    def together(self, *calls: tuple[int, int], timeout_s: float = 20.0) -> list[SamiError | None]:
        """What each of some (processes, process) raises, when all call at once."""
        port, found = free_port(), [None] * len(calls)

        def call(index: int, processes: int, process: int) -> None:
            try:
                call_roll("127.0.0.1", port, processes=processes, process=process, timeout_s=timeout_s)
            except SamiError as error:
                found[index] = error

        threads = [threading.Thread(target=call, args=(i, *who)) for i, who in enumerate(calls)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout_s + 10)
            assert not thread.is_alive()
        return found

    def test_all_come(self):
        assert self.together((3, 2), (3, 0), (3, 1)) == [None] * 3

    def test_one_alone_waits_for_nobody(self):
        assert self.together((1, 0)) == [None]

    def test_who_is_missing_is_named_to_all_who_came(self):
        writer, other = self.together((4, 0), (4, 2), timeout_s=1.0)
        assert isinstance(writer, StoppedError) and isinstance(other, StoppedError)
        assert str(writer).startswith("2 of 4 processes came within 1 s, not 1, 3; look at their logs")
        assert str(other) == f"process 0: {writer}"

    def test_process_0_missing(self):
        (error,) = self.together((2, 1), timeout_s=0.5)
        assert isinstance(error, StoppedError) and "waited 0.5 s for process 0 at 127.0.0.1:" in str(error)
        assert "Connection refused" in str(error)

    def test_two_with_one_number(self):
        found = self.together((3, 0), (3, 1), (3, 1), timeout_s=2.0)
        assert isinstance(found[0], BadConfigError) and "Two processes have the number 1" in str(found[0])
        assert [str(error) for error in found[1:]] == [f"process 0: {found[0]}"] * 2

    @pytest.mark.parametrize("who", [(3, 1), (2, 2)])
    def test_another_number_of_processes(self, who):
        for error in self.together((2, 0), who):
            assert isinstance(error, BadConfigError)
            assert f"expects 2 processes, but process {who[1]} of {who[0]} came" in str(error)

    def test_a_taken_port_is_refused_and_its_owner_left_alone(self):
        with (
            socket.create_server(("127.0.0.1", 0)) as owner,
            pytest.raises(RunInUseError, match="already in use"),
        ):
            call_roll("127.0.0.1", owner.getsockname()[1], processes=2, process=0, timeout_s=0.5)

    def test_a_port_that_becomes_free_is_waited_for(self):
        owner = socket.create_server(("127.0.0.1", 0))
        port = owner.getsockname()[1]
        threading.Timer(0.5, owner.close).start()
        call_roll("127.0.0.1", port, processes=1, process=0, timeout_s=20)

    def test_someone_else_at_the_port_is_no_process_0(self):
        with speaking(b"\x00\x00\x12\x04\x00\n") as port, pytest.raises(StoppedError, match="no answer"):
            call_roll("127.0.0.1", port, processes=2, process=1, timeout_s=1)

    @pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"[2]\n", b'{"a": 1}\n', b""])
    def test_a_stranger_is_not_counted(self, words):
        port, found = free_port(), []

        def call(process: int) -> None:
            call_roll("127.0.0.1", port, processes=2, process=process, timeout_s=20)
            found.append(process)

        threads = [threading.Thread(target=call, args=(0,), daemon=True)]
        threads[0].start()
        stranger = connected(port)
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        threads.append(threading.Thread(target=call, args=(1,), daemon=True))
        threads[1].start()
        for thread in threads:
            thread.join(30)
        stranger.close()
        assert sorted(found) == [0, 1]


def connected(port: int) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@contextlib.contextmanager
def speaking(words: bytes) -> Iterator[int]:
    """A server that says the same to everyone."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(words)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


class TestPlace:
    def test_is_read(self):
        place = read_place("10.0.0.1:8476,4,3")
        assert (place.address, place.processes, place.process) == ("10.0.0.1:8476", 4, 3)
        assert read_place("[::1]:80,1,0").address == "[::1]:80"

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "neither `auto` nor HOST:PORT,N,I"),
            ("host,2,0", "neither"),
            ("host:1,2", "neither"),
            ("host:1,2,x", "neither"),
            ("host:1,2,-1", "neither"),
            ("host:0,2,0", "no port"),
            ("host:65536,2,0", "no port"),
            ("host:1,2,2", "count from 0 to 1"),
            ("host:1,0,0", "process 0 of 0"),
            ("host:1,,1", "SAMI_NUM_PROCESSES would be the rest"),
            (",2,", "SAMI_COORDINATOR, SAMI_PROCESS_ID would be"),
        ],
    )
    def test_what_is_none_is_refused(self, text, says):
        with pytest.raises(ValueError, match=says):
            read_place(text)

    def test_in_the_environment(self):
        names = {"SAMI_COORDINATOR": "host:1", "SAMI_NUM_PROCESSES": "2", "SAMI_PROCESS_ID": "1"}
        assert place_in_environment({}) is None
        assert read_place(place_in_environment(names)) == read_place("host:1,2,1")
        assert place_in_environment({"SAMI_PROCESS_ID": "1"}) == ",,1"

    def test_of_slurm_by_jax_itself(self, monkeypatch):
        named = {"JOB_ID": "7", "STEP_NODELIST": "tpu[03-05]", "NTASKS": "3", "PROCID": "2", "LOCALID": "1"}
        for name, value in named.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        place = find_place(1)
        assert (place.address, place.processes, place.process) == ("tpu03:61447", 3, 2)  # 61440 + the job's number
        assert place.local_device_ids == (1,)
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "tpu03:1234")
        monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
        place = find_place(1)
        assert (place.address, place.processes, place.local_device_ids) == ("tpu03:1234", 3, (0, 1))

    def test_of_no_cluster(self):
        with pytest.raises(BadConfigError, match="JAX finds no cluster here .* give --distributed=HOST:PORT,N,I"):
            find_place(1)


def group(what: str, folder: pathlib.Path) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, str(TESTS / "group_worker.py"), f"127.0.0.1:{port},2,{process}", what, str(folder)],
            env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and last line of each."""
    try:
        said = [process.communicate(timeout=LIMIT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text.strip().split("\n")[-1]) for process, text in zip(processes, said, strict=True)]


@pytest.fixture(scope="module", autouse=True)
def killed(tmp_path_factory) -> Iterator[list[subprocess.Popen[str]]]:
    """A group of which one is killed; it takes half a minute to be missed, in which the other tests run."""
    processes = group("killed", tmp_path_factory.mktemp("killed"))
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def seen(folder: pathlib.Path) -> list[str]:
    return [path.read_text() if path.exists() else "" for path in (folder / "process-0", folder / "process-1")]


def wait_until(moment: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not moment():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
class TestProcesses:
    def test_come_and_go_together(self, tmp_path):
        assert [code for code, _ in ended(group("nothing", tmp_path))] == [0, 0]
        assert seen(tmp_path) == ["done 2", "done 2"]

    def test_one_that_fails_ends_the_other_with_its_code_and_sentence(self, tmp_path):
        writer, other = ended(group("fails", tmp_path))
        assert writer == (65, "sami: process 1: the data of one process is bad.")
        assert other == (65, "the data of one process is bad.")
        assert seen(tmp_path) == ["65 process 1: the data of one process is bad.", ""]

    def test_one_that_is_killed_is_missed(self, killed):
        (writer, _), (other, _) = ended(killed)
        assert other == -signal.SIGKILL
        assert writer in (75, -signal.SIGABRT)  # by whoever notices: this code, or JAX's

    def test_sigterm_outside_a_stage_ends_a_process_at_once(self, tmp_path):
        processes = group("terminated", tmp_path)
        wait_until(lambda: seen(tmp_path) == ["waiting"] * 2)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [code for code, _ in ended(processes)] == [-signal.SIGTERM] * 2
