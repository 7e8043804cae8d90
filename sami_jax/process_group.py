"""A group of processes that come together, and end together: none waits for one that failed."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax

from sami_jax.errors import BadConfigError, SamiError, exit_code
from sami_jax.processes import as_error, heard, is_told, is_writer, lost_process, process_count, process_index, store
from sami_jax.roll_call import call_roll, is_loopback

JOIN_S = 300  # for all processes to come
_HEARTBEAT_S = 30  # a process that is silent for so long is dead, and JAX ends the others
_LOOK_S = 1.0  # between two looks for a failure
_GRACE_S = 5.0  # for a process to end by itself, once another has failed
_LAST_S = 50.0  # for process 0 to come to its end
_FAREWELL_S = 10.0  # for the others to read that it has
_FAILED, _OVER, _LEFT = "sami/failed/", "sami/over/", "sami/left/"
_VARIABLES = ("SAMI_COORDINATOR", "SAMI_NUM_PROCESSES", "SAMI_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a group meets, and who this process is.

    Attributes:
      address: HOST:PORT of process 0.
      processes: how many there are.
      process: the number of this one.
      local_device_ids: of the GPUs it takes; None for all it finds.
    """

    address: str
    processes: int
    process: int
    local_device_ids: tuple[int, ...] | None = None


def read_place(text: str) -> Place:
    """`HOST:PORT,N,I`: process I of N, whose process 0 is at HOST:PORT. Raises ValueError with what is wrong."""
    parts = text.split(",")
    missing = [variable for part, variable in zip(parts, _VARIABLES, strict=False) if not part]
    if len(parts) == 3 and missing:
        raise ValueError(f"{text!r} is not all of HOST:PORT,N,I ({', '.join(missing)} would be the rest)")
    if len(parts) != 3 or not re.fullmatch(r"\S+:\d{1,5}", parts[0]) or not all(p.isdecimal() for p in parts[1:]):
        raise ValueError(f"{text!r} is neither `auto` nor HOST:PORT,N,I, such as 10.0.0.1:8476,4,0")
    address, processes, process = parts[0], int(parts[1]), int(parts[2])
    if not 0 < int(address.rpartition(":")[2]) < 65536:
        raise ValueError(f"{text!r} names no port from 1 to 65535")
    if process >= processes:
        raise ValueError(f"{text!r}: process {process} of {processes} is none; they count from 0 to {processes - 1}")
    return Place(address, processes, process)


def place_in_environment(environment: Mapping[str, str]) -> str | None:
    """What SAMI_COORDINATOR, SAMI_NUM_PROCESSES and SAMI_PROCESS_ID say, for `read_place`; None where none is set."""
    values = [environment.get(name, "") for name in _VARIABLES]
    return ",".join(values) if any(values) else None


def find_place(timeout_s: int) -> Place:
    """The place that JAX finds by itself, on TPU VMs, GKE, SLURM and with Open MPI.

    JAX_COORDINATOR_ADDRESS, JAX_COORDINATOR_PORT and JAX_LOCAL_DEVICE_IDS count before what the cluster says.

    Args:
      timeout_s: seconds for process 0 to become known.

    Raises:
      BadConfigError: it finds none.
    """
    from jax._src.clusters import ClusterEnv

    named = os.environ.get("JAX_COORDINATOR_ADDRESS")
    mine = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    ids = [int(number) for number in mine.split(",")] if mine else None
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(named, None, None, ids, None, timeout_s)
    except Exception as error:  # of any kind, by what the cluster's metadata lack
        raise BadConfigError(
            f"--distributed=auto: JAX could not ask the cluster ({type(error).__name__}: {error}); give "
            "--distributed=HOST:PORT,N,I."
        ) from error
    address, processes, process, devices = found
    if address is None or processes is None or process is None:
        raise BadConfigError(
            "--distributed=auto: JAX finds no cluster here (TPU VM, GKE, SLURM under srun, Open MPI); give "
            "--distributed=HOST:PORT,N,I, or leave it out for one process."
        )
    return Place(address, processes, process, None if devices is None else tuple(devices))


@contextlib.contextmanager
def joined(place: Place | None, *, timeout_s: float = JOIN_S) -> Iterator[None]:
    """Makes this process one of a group; every one leaves the block at the same time. None: it stays alone.

    Whoever fails inside must call `leave`.

    Raises:
      SamiError: as `roll_call.call_roll`.
    """
    if place is None:
        yield
        return
    host, _, port = place.address.rpartition(":")
    host = host.strip("[]")
    who = {"processes": place.processes, "process": place.process}
    call_roll(host, int(port), **who, timeout_s=timeout_s)
    # On CPUs (gloo) two programs with sums over all processes lock each other where they run at once.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(
        place.address,
        place.processes,
        place.process,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        coordinator_bind_address=place.address if is_loopback(host) else None,
        heartbeat_timeout_seconds=_HEARTBEAT_S,
    )
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's own handler would swallow it
    watch = _Watch()
    watch.start()
    yield
    heard("")
    watch.end()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # all is done
        jax.distributed.shutdown()


_watching: list["_Watch"] = []  # the one of this process, inside `joined`
_at_the_end: list[Callable[[int, str], None]] = []


class _Watch(threading.Thread):
    """Ends this process when another has failed, for which the main thread may wait for ever."""

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        _watching.append(self)
        self._over = threading.Event()

    def end(self) -> None:
        """Stops watching."""
        _watching.remove(self)
        self._over.set()
        self.join()

    def leaving(self) -> None:
        """Leaves the end to the main thread, which has come to it."""
        self._over.set()

    def run(self) -> None:
        while not self._over.wait(_LOOK_S):
            failure = _failure()
            if failure is None:
                continue
            if self._over.wait(_GRACE_S):  # all may have failed alike
                return
            code, sentence = failure
            for tell in list(_at_the_end):
                with contextlib.suppress(SamiError, OSError):  # nothing keeps this process from its end
                    tell(code, sentence)
            print(f"sami: {sentence}", file=sys.stderr, flush=True)
            _exit(code)


@contextlib.contextmanager
def told_of_the_end(tell: Callable[[int, str], None]) -> Iterator[None]:
    """Calls `tell` with exit code and sentence where the failure of another process ends this one inside the block."""
    _at_the_end.append(tell)
    try:
        yield
    finally:
        _at_the_end.remove(tell)


def leave(error: BaseException, sentence: str) -> None:
    """Ends this process and, with the same code and sentence, its group. Returns where it is in none.

    Python's own end would wait for the others, which wait for this one.
    """
    if not _watching:
        return
    code = exit_code(error)
    _watching[0].leaving()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store may be gone
        if not is_told(error):
            store().key_value_set(f"{_FAILED}{process_index()}", json.dumps([code, sentence]))
    _exit(code)


def explained(error: BaseException) -> BaseException:
    """The failure that an error is about: another process', where it is a connection that broke."""
    broken = isinstance(error, jax.errors.JaxRuntimeError) and re.search(
        r"Gloo|Connection (closed|reset)|coordination|heartbeat|UNAVAILABLE|NCCL", str(error)
    )
    if not (_watching and broken):
        return error
    failure = _failure()  # said before the connection broke
    return as_error(*failure) if failure else lost_process(error)


def _failure() -> tuple[int, str] | None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # without the store, JAX ends this process
        for key, value in store().key_value_dir_get(_FAILED):
            code, sentence = json.loads(value)
            return code, f"process {key.removeprefix(_FAILED)}: {sentence}"
    return None


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if is_writer():  # last: the store goes with it, and then JAX ends the others
            store().key_value_set(f"{_OVER}0", "", allow_overwrite=True)  # the watching thread may have come here, too
            _wait_for(_LEFT, process_count() - 1, _FAREWELL_S)
        else:  # not before process 0, which may have something to save, and which JAX would end without this one
            _wait_for(_OVER, 1, _LAST_S)
            store().key_value_set(f"{_LEFT}{process_index()}", "", allow_overwrite=True)
    os._exit(code)


def _wait_for(place: str, count: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while len(store().key_value_dir_get(place)) < count and time.monotonic() < deadline:
        time.sleep(0.1)
