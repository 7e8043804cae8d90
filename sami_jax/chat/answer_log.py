"""The log of answers: a line each, written before it is used and never changed, so that nothing is paid twice."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sami_jax.chat.questions import Answer, Chat, Question, Reply, reply_from_json, reply_to_json
from sami_jax.errors import BadDataError, RunInUseError
from sami_jax.files import canonical_json, content_hash
from sami_jax.json_text import UnusableJsonError, parse_json
from sami_jax.outputs import could_not_be_written


def answer_key(chat: Chat, question: Question) -> str:
    """The hash of model, messages and settings, under which an answer is kept; of choices where they are known."""
    choices = {"choices": question.choices} if question.choices and chat.on_devices else {}
    return content_hash({"messages": question.messages, "settings": chat.settings, **choices})


@dataclasses.dataclass(frozen=True)
class Record:
    """A line of the log.

    Attributes:
      key: see `answer_key`.
      question: that was asked.
      settings: of the chat.
      reply: an answer; or a failure that cost something, which is asked again.
      cost_usd: by the prices of that time.
    """

    key: str
    question: Question
    settings: dict[str, Any]
    reply: Reply
    cost_usd: float


class AnswerLog:
    """An open log; see `open_log`."""

    def __init__(self, path: Path, file: int, records: list[Record]):
        """Takes the file's descriptor, and what it holds."""
        self.path, self._file = path, file
        self._answers: dict[str, Answer] = {}
        self.costs_usd: dict[str, float] = {}  # by key
        self.is_empty = True
        for record in records:
            self._keep(record)

    def find(self, key: str) -> Answer | None:
        """The answer that was recorded under a key, the first of them."""
        return self._answers.get(key)

    def append(self, record: Record) -> None:
        """Writes a record to the disk. Raises SaveFailedError where that fails."""
        try:
            line = _line(record)
            if os.write(self._file, line) != len(line):
                raise OSError("no space left")
            os.fsync(self._file)
        except OSError as error:
            raise could_not_be_written(self.path, error) from error
        self._keep(record)

    def _keep(self, record: Record) -> None:
        self.costs_usd[record.key] = self.costs_usd.get(record.key, 0.0) + record.cost_usd
        self.is_empty = False
        if isinstance(record.reply, Answer):
            self._answers.setdefault(record.key, record.reply)


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[AnswerLog]:
    """A log, made if missing, that no other process has open meanwhile. A line that a kill tore is cut off.

    Raises:
      BadDataError: a line is not as it was written.
      RunInUseError: another process has it open.
      SaveFailedError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise could_not_be_written(path, error) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunInUseError(f"{path} is in use by another process; wait for it to end.") from None
        records, whole, ended = _read(path)
        os.ftruncate(file, whole)
        if not ended:  # the kill came between a line and its newline
            os.write(file, b"\n")
        yield AnswerLog(path, file, records)
    finally:
        os.close(file)  # which drops the lock


def read_log(path: Path) -> list[Record]:
    """The records of a log that somebody else has written, a torn last line left out.

    Raises:
      BadDataError: it does not exist, or a line is not as it was written.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Record], int, bool]:
    """The records; the bytes that they take, all but a torn line at the end; whether those end in a newline."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise BadDataError(f"{path} cannot be read ({error.strerror}); name a file of recorded answers.") from error
    records, whole = [], 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line:
            record = _record(line)
            if record is None and number < len(lines):  # its newline is there, so that no kill tore it
                raise BadDataError(
                    f"{path}, line {number}: this is no answer as it was recorded; bring the file back from a copy, or "
                    "delete that line to have its question asked again."
                )
            if record is None:
                break
            records.append(record)
        whole += len(line) + 1
    whole = min(whole, len(content))
    return records, whole, not whole or content[whole - 1 : whole] == b"\n"


def _line(record: Record) -> bytes:
    plain = {
        "key": record.key,
        "messages": record.question.messages,
        "settings": record.settings,
        "reply": reply_to_json(record.reply),
        "cost_usd": record.cost_usd,
    }
    return canonical_json({**plain, "sha256": content_hash(plain)}).encode() + b"\n"


def _record(line: bytes) -> Record | None:
    """The record of a line; None where it is not what was written."""
    try:
        found = parse_json(line.decode())
        checksum = found.pop("sha256")
        if checksum != content_hash(found):
            return None
        texts = {message["role"]: message["content"] for message in found["messages"]}
        reply = reply_from_json(found["reply"])
        return Record(found["key"], Question(**texts), found["settings"], reply, found["cost_usd"])
    except (UnusableJsonError, AttributeError, KeyError, TypeError, ValueError):  # not UTF-8 is a ValueError
        return None
