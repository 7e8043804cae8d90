"""Recorded answers as a chat: a log that was written elsewhere answers, and nobody is asked."""

from collections.abc import Callable, Iterator
from pathlib import Path

from sami_jax.chat.answer_log import read_log
from sami_jax.chat.questions import Answer, Failure, Reply, Spent, Take
from sami_jax.errors import BadDataError
from sami_jax.files import content_hash, file_hash


class Replay:
    """Answers by the questions' texts alone, whichever model and settings they were recorded with.

    Attributes:
      name: for people.
      settings: the log's contents.
    """

    on_devices = False

    def __init__(self, log: Path):
        """Reads a log.

        Raises:
          BadDataError: it cannot be read, holds no answer, or has two of different models for one question.
        """
        self.name, self._log = f"the answers recorded in {log}", log
        self.settings = {"model": "replay", "sha256": file_hash(log)}
        self._answers: dict[str, Answer] = {}
        asked_of: dict[str, str] = {}
        for record in read_log(log):
            if not isinstance(record.reply, Answer):
                continue
            key = content_hash(record.question.messages)
            if asked_of.setdefault(key, record.key) != record.key:
                raise BadDataError(
                    f"{log} holds answers of two models, or by two settings, to one question "
                    f"({record.question.user[:60]!r}...); split it into one file each."
                )
            self._answers.setdefault(key, record.reply)
        if not self._answers:
            raise BadDataError(f"{log} holds no recorded answers.")

    def replies(
        self, take: Take, *, may_try_again: Callable[[int], bool], stopping: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        """See `Chat.replies`. What was recorded is paid: it costs nothing here."""
        while item := take():
            number, question = item
            if stopping():
                return
            found = self._answers.get(content_hash(question.messages))
            if found is None:
                reason = (
                    f"{self._log} has no answer to the question {question.user[:60]!r}...; ask the model that answered "
                    "the others, with the same log, first."
                )
                yield number, Failure("not_recorded", reason, ends=BadDataError(reason))
            else:
                yield number, Answer(found.text, found.finished, found.model, found.time, Spent())
