"""Several processes as one: which of them writes, what all hear, and a failure of one that all raise."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax._src import distributed  # JAX has no public name for its key-value store and barriers

from sami_jax.errors import BadConfigError, ExitCode, NonFiniteError, SamiError, StoppedError, exit_code

T = TypeVar("T")

# Whoever waits need not give up: a process that died is noticed by its heartbeat, one that failed says so.
_PATIENCE_MS = 7 * 24 * 3600 * 1000
_meetings = itertools.count()
_said_something: list[str] = []  # the places in the store that everyone has read


def process_index() -> int:
    """The number of this process, from 0 on. Unlike `jax.process_index`, it may be asked before devices are there."""
    return distributed.global_state.process_id


def process_count() -> int:
    """How many processes `jax.distributed` holds together; 1 without it."""
    return distributed.global_state.num_processes


def store() -> Any:
    """The client of the key-value store that all processes share. Raises ValueError in a process that is alone."""
    if distributed.global_state.client is None:
        raise ValueError("jax.distributed is not initialised.")
    return distributed.global_state.client


def is_writer() -> bool:
    """Whether this process is the one that writes what all share."""
    return process_index() == 0


def heard(text: str) -> dict[int, str]:
    """What the processes said, by number; one that said "" is left out. Every process calls this, and hears the same.

    Raises:
      SamiError: a process says, instead, that it failed; all raise it.
      StoppedError: a process was lost.
    """
    return _meet(text, None)


def from_writer(make: Callable[[], T]) -> T:
    """A JSON value that process 0 makes, in every process; an error that it raises, all raise. Every process calls it.

    What other hosts have just written is asked for in this way only: where a file was looked for too early, a network
    disk may hide it for a minute.
    """
    if process_count() == 1:
        return make()
    text, failure = "", None
    if is_writer():
        try:
            text = json.dumps(make())
        except Exception as error:
            failure = error
    return json.loads(_meet(text, failure)[0])


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Waits at the end of the block for every process; an error that one of them raised inside, all raise.

    Raises:
      SamiError: with exit code and sentence of another process' error, where this process had none.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if failure is not None and (is_told(failure) or process_count() == 1):
        raise failure
    _meet("", failure)


def enter_once(stack: contextlib.ExitStack, context: contextlib.AbstractContextManager) -> None:
    """Process 0 enters the context; where it cannot, all raise why."""
    with agreed():
        if is_writer():
            stack.enter_context(context)


def check_same(facts: dict[str, Any], *, remedy: str) -> None:
    """Raises BadConfigError in every process where one of them has other facts than process 0, naming which and who.

    Args:
      facts: JSON values by name, nested or not.
      remedy: what to do about it.
    """
    theirs = from_writer(lambda: facts)
    with agreed():
        if different := differences(theirs, facts):
            here = f"process {process_index()}"
            named = [f"{name} is {first!r} in process 0, {own!r} in {here}" for name, (first, own) in different.items()]
            raise BadConfigError(f"{'; '.join(named)}. {remedy}")


def differences(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Where two JSON values differ: dotted name -> what each has there."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return {"": (before, after)} if before != after else {}
    found = {}
    for key in sorted(before.keys() | after.keys()):
        for name, values in differences(before.get(key), after.get(key)).items():
            found[f"{key}.{name}".rstrip(".")] = values
    return found


def told(error: T) -> T:
    """Marks an error that every process raises, so that none of them waits to hear of it."""
    error.__dict__["told"] = True
    return error


def is_told(error: BaseException) -> bool:
    """Whether every process raises the error."""
    return bool(error.__dict__.get("told"))


def _meet(text: str, failure: Exception | None) -> dict[int, str]:
    """Waits for every process. Returns what each said; a failure that one brings, all raise.

    All meetings are of one kind, so that a process that fails is heard even where the others expect something else.
    """
    if process_count() == 1:
        if failure:
            raise failure
        return {0: text} if text else {}
    place, mine = f"sami/meeting/{next(_meetings)}/", str(process_index())
    try:
        if failure:
            store().key_value_set(place + mine, json.dumps(["failed", exit_code(failure), sentence_of(failure)]))
        elif text:
            store().key_value_set(place + mine, json.dumps(["said", text]))
        store().wait_at_barrier(place, _PATIENCE_MS)
        found = dict(store().key_value_dir_get(place))
        if is_writer() and _said_something:
            store().key_value_delete(_said_something.pop())  # all have read it, since they have come here
    except jax.errors.JaxRuntimeError as error:
        if failure:
            raise told(failure) from error
        raise told(lost_process(error)) from error
    if found and is_writer():
        _said_something.append(place)
    messages = {int(key.removeprefix(place)): json.loads(value) for key, value in sorted(found.items())}
    failures = {process: message[1:] for process, message in messages.items() if message[0] == "failed"}
    if failure:
        raise told(failure)
    if failures:
        process = min(failures)
        code, sentence = failures[process]
        raise told(as_error(code, f"process {process}: {sentence}"))
    return {process: message[1] for process, message in messages.items()}


def as_error(code: int, sentence: str) -> SamiError:
    """Returns the error of another process."""
    kinds = {kind.exit_code: kind for kind in reversed(SamiError.__subclasses__())}  # the first of a code
    return kinds.get(ExitCode(code), NonFiniteError)(sentence)


def lost_process(error: BaseException) -> StoppedError:
    """Returns the error that says what a broken connection means."""
    reason = str(error).partition("\n")[0]
    return StoppedError(f"another process was lost ({reason}); the same command goes on from here.")


def sentence_of(error: Exception) -> str:
    """What to tell another process of an error."""
    return str(error) if isinstance(error, SamiError) else f"{type(error).__name__}: {error}"
