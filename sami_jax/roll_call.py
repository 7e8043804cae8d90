"""Processes come together at an address before JAX does: who is late is named, and nobody joins another run."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterable
from typing import NamedTuple

from sami_jax.errors import BadConfigError, ExitCode, RunInUseError, SamiError, StoppedError

_CALL_S, _RETRY_S = 2.0, 0.2  # to say one's number; between two tries to connect
_LAST_S = 60.0  # in which an earlier attempt at the same port has ended, its process 0 the last
_LINE_BYTES = 1 << 16


def call_roll(host: str, port: int, *, processes: int, process: int, timeout_s: float) -> None:
    """Returns once all processes are there. Process 0 listens, the others connect to it until it answers.

    `jax.distributed` cannot say who is missing, and joins whatever coordinator it finds. So this comes first, at the
    same address, which is free again afterwards.

    Args:
      host: of process 0.
      port: free there.
      processes: how many are to come.
      process: the number of this one, 0, 1, ....
      timeout_s: seconds to wait for all.

    Raises:
      BadConfigError: two processes have one number, or expect different numbers of processes.
      RunInUseError: process 0 cannot listen there.
      StoppedError: the time is over.
    """
    deadline = time.monotonic() + timeout_s
    if process:
        _answer(host, port, processes, process, deadline, timeout_s)
    else:
        _listen(host, port, processes, deadline, timeout_s)


def is_loopback(host: str) -> bool:
    """Whether a host can only be reached from its own machine."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _listen(host: str, port: int, processes: int, deadline: float, timeout_s: float) -> None:
    here: dict[int, socket.socket] = {}
    came: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listener(host, port, min(deadline, time.monotonic() + _LAST_S)))
        try:
            while len(here) < processes - 1:
                call = _next_call(listener, deadline)
                if call is None:
                    missing = sorted(set(range(1, processes)) - here.keys())
                    raise StoppedError(
                        f"{len(here) + 1} of {processes} processes came within {timeout_s:g} s, not {_names(missing)}; "
                        f"look at their logs, and whether they reach {host}:{port}. The same command tries again."
                    )
                came.append(stack.enter_context(call.connection))
                if call.processes != processes or not 0 < call.process < processes:
                    raise BadConfigError(
                        f"Process 0 expects {processes} processes, but process {call.process} of {call.processes} "
                        "came; give all of them the same number of processes, and each its own number."
                    )
                if call.process in here and _is_open(here[call.process]):
                    raise BadConfigError(f"Two processes have the number {call.process}; give each its own.")
                here[call.process] = call.connection
        except SamiError as error:
            _tell(came, [error.exit_code, str(error)])
            raise
        _tell(came, [ExitCode.DONE, ""])


def _listener(host: str, port: int, deadline: float) -> socket.socket:
    while True:
        try:
            return _bound(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise RunInUseError(
                    f"Process 0 cannot listen on {host}:{port} ({reason}); another run may use it: take a free port, "
                    "and an address of this machine."
                ) from error
        time.sleep(_RETRY_S)


def _bound(host: str, port: int) -> socket.socket:
    if is_loopback(host):
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


class _Call(NamedTuple):
    """What a process says: how many it expects, and its number."""

    connection: socket.socket
    processes: int
    process: int


def _next_call(listener: socket.socket, deadline: float) -> _Call | None:
    """The next process that comes; None where the time is over."""
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return None
        connection.settimeout(_CALL_S)
        said = _read(connection)
        if isinstance(said, list) and len(said) == 2 and all(type(number) is int for number in said):
            return _Call(connection, said[0], said[1])
        connection.close()  # somebody else's
    return None


def _answer(host: str, port: int, processes: int, process: int, deadline: float, timeout_s: float) -> None:
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(json.dumps([processes, process]).encode() + b"\n")
                connection.settimeout(left + 5)  # process 0 may have begun later
                answer = _read(connection)
        except OSError as error:
            answer, reason = None, error.strerror or str(error)
        if isinstance(answer, list) and len(answer) == 2:
            code, sentence = answer
            if code == ExitCode.DONE:
                return
            raise (BadConfigError if code == ExitCode.BAD_CONFIG else StoppedError)(f"process 0: {sentence}")
        time.sleep(_RETRY_S)
    raise StoppedError(
        f"Process {process} waited {timeout_s:g} s for process 0 at {host}:{port} ({reason}); look at its log, and "
        "whether that address is its. The same command tries again."
    )


def _read(connection: socket.socket) -> object:
    """The JSON line that comes; None where none does."""
    content = b""
    try:
        while not content.endswith(b"\n") and len(content) < _LINE_BYTES and (more := connection.recv(_LINE_BYTES)):
            content += more
        return json.loads(content)
    except (OSError, ValueError):
        return None


def _tell(connections: Iterable[socket.socket], answer: list[object]) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(answer).encode() + b"\n")


def _is_open(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _names(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
