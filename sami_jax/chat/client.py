"""An OpenAI-compatible server as a chat: one loop of tries, and a name for everything that can go wrong."""

import dataclasses
import datetime
import email.utils
import functools
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sami_jax.chat.questions import Answer, Failure, FailureKind, Question, Reply, Spent, Take, quoted
from sami_jax.clock import time_now
from sami_jax.config.chat import OPENAI_URL, ChatConfig
from sami_jax.errors import BadConfigError
from sami_jax.json_text import UnusableJsonError, parse_json

TRIES = 6
_LONGEST_BODY = 64 * 2**20  # bytes; an answer has thousands
_UNKNOWN = Spent(unknown_tries=1)
_JITTER = secrets.SystemRandom()  # no result depends on it


class Waits(NamedTuple):
    """Seconds between tries.

    Attributes:
      first: after the first try; doubled after each further one.
      longest: that it is doubled up to.
      longest_asked: that a server may ask for by Retry-After; one that asks for more is not waited for.
    """

    first: float = 1.0
    longest: float = 60.0
    longest_asked: float = 600.0


WAITS = Waits()


class _Failed(Exception):
    """A try that failed.

    Attributes:
      failure: how.
      again: whether another try may do better.
      wait_s: that the server asks for.
    """

    def __init__(self, failure: Failure, *, again: bool, wait_s: float | None = None):
        super().__init__(failure.reason)
        self.failure, self.again, self.wait_s = failure, again, wait_s


class Server:
    """Answers by a server's chat completions.

    Attributes:
      name: for people.
      settings: model, URL and settings of the requests.
    """

    on_devices = False

    def __init__(self, config: ChatConfig, *, waits: Waits | None = None, say: Callable[[str], None] = print):
        """Prepares; nothing is sent yet.

        Args:
          config: server, model and settings.
          waits: between tries; left out: WAITS.
          say: takes sentences about long waits.

        Raises:
          BadConfigError: the openai package or the key is missing.
        """
        try:
            import openai
        except ImportError as error:
            raise BadConfigError(
                "A chat with a server needs the package openai: pip install 'sami-jax[chat]'."
            ) from error
        self._openai, self._config, self._waits, self._say = openai, config, waits or WAITS, say
        self._url = config.base_url or OPENAI_URL
        self._key = os.environ.get(config.api_key_env, "").strip()
        if not self._key and not config.base_url:
            raise BadConfigError(f"The environment variable {config.api_key_env} holds no key for {self._url}; set it.")
        if not (self._key.isascii() and self._key.isprintable()):
            raise BadConfigError(f"The environment variable {config.api_key_env} holds no key: that is plain ASCII.")
        # The client's own time-out is between bytes; the whole answer has a deadline in `_body`.
        client = openai.OpenAI(base_url=self._url, api_key=self._key or "none", max_retries=0, timeout=config.timeout_s)
        self._create = client.chat.completions.with_streaming_response.create  # which imports what a request needs
        self.name = f"{config.chat_model} at {self._url}"
        self.settings = {
            "model": config.chat_model,
            "base_url": self._url,
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
        }

    def replies(
        self, take: Take, *, may_try_again: Callable[[int], bool], stopping: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        """See `Chat.replies`. At most `config.concurrency` questions are on their way at once."""
        asked: queue.SimpleQueue[tuple[int, Question] | None] = queue.SimpleQueue()
        replied: queue.SimpleQueue[tuple[int, Reply | BaseException]] = queue.SimpleQueue()
        hurry = threading.Event()

        def work() -> None:
            while (item := asked.get()) is not None:
                number, question = item
                try:
                    replied.put((number, self._reply(question, hurry, functools.partial(may_try_again, number))))
                except BaseException as error:  # raised where it is heard
                    replied.put((number, error))

        # Daemons: a second Ctrl-C need not wait for a server.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(self._config.concurrency)]
        for thread in threads:
            thread.start()
        on_their_way = 0
        try:
            while True:
                while on_their_way < len(threads) and (item := take()):
                    asked.put(item)
                    on_their_way += 1
                if not on_their_way:
                    return
                try:
                    number, reply = replied.get(timeout=0.2)
                except queue.Empty:
                    pass
                else:
                    on_their_way -= 1
                    if isinstance(reply, BaseException):
                        raise reply
                    yield number, reply
                if stopping():
                    hurry.set()
        finally:
            hurry.set()
            for _ in threads:
                asked.put(None)

    def _reply(self, question: Question, hurry: threading.Event, may_try_again: Callable[[], bool]) -> Reply:
        """Asks, up to six times; between tries it waits, unless there is a hurry."""
        spent = Spent()
        for number in range(1, TRIES + 1):
            try:
                answer = self._try(question)
                return dataclasses.replace(answer, spent=spent + answer.spent)
            except _Failed as failed:
                failure, again, asked_s = failed.failure, failed.again, failed.wait_s
            spent += failure.spent
            wait_s, reason = self._wait_s(number, asked_s), failure.reason
            if again and wait_s is None:
                again, reason = False, f"{reason}, and asks to wait {asked_s:.0f} s"
            elif again and number == TRIES:
                again, reason = False, f"{reason}, {TRIES} times"
            elif again and failure.spent != Spent() and not may_try_again():
                again, reason = False, f"{reason}, and the budget has no room for another try"
            if not again or wait_s is None:
                return dataclasses.replace(failure, reason=reason, spent=spent)
            if wait_s > 5:
                self._say(f"{self.name} {reason}; try {number + 1} of {TRIES} in {wait_s:.0f} s")
            if hurry.wait(wait_s):
                return Failure("stopped", "was stopped while it waited", spent)
        raise AssertionError("the last try returns")

    def _wait_s(self, number: int, asked_s: float | None) -> float | None:
        """Seconds to wait after try `number`, different each time, so that many who failed at once do not come back at
        once; None where the server asks for more than is waited for."""
        if asked_s is not None and asked_s > self._waits.longest_asked:
            return None
        own_s = min(self._waits.first * 2 ** (number - 1), self._waits.longest) * _JITTER.uniform(0.5, 1.0)
        return own_s if asked_s is None else asked_s + own_s / 10

    def _try(self, question: Question) -> Answer:
        """Raises _Failed where there is no answer."""
        config = self._config
        # OpenAI's own models take the newer name alone, and many servers the older one.
        limit = "max_completion_tokens" if self._url == OPENAI_URL else "max_tokens"
        settings: dict[str, Any] = {limit: config.max_tokens}
        if config.temperature >= 0:
            settings["temperature"] = config.temperature
        messages: Any = question.messages
        deadline = time.monotonic() + config.timeout_s
        openai = self._openai
        try:
            with self._create(model=config.chat_model, messages=messages, **settings) as response:
                text = self._body(response, deadline)
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APITimeoutError:
            raise self._timed_out() from None
        except openai.APIConnectionError as error:
            begun = type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")
            raise self._no_connection(error.__cause__ or error, sent=begun) from None
        except Exception as error:
            # While a body is read nothing wraps the transport's errors; httpx is openai's, not ours to import.
            if not type(error).__module__.startswith("httpx"):
                raise
            if "Timeout" in type(error).__name__:
                raise self._timed_out() from None
            raise self._no_connection(error, sent=True) from None
        return self._answer(text)

    def _body(self, response: Any, deadline: float) -> str:
        """The text of a response, which is there before the deadline."""
        body = b""
        for chunk in response.iter_bytes():
            body += chunk
            if time.monotonic() > deadline:
                raise self._timed_out()
            if len(body) > _LONGEST_BODY:
                raise _Failed(Failure("malformed", f"sends more than {_LONGEST_BODY} bytes", _UNKNOWN), again=True)
        return self._scrubbed(body.decode(errors="replace"))

    def _answer(self, text: str) -> Answer:
        """The answer in a response's text. Raises _Failed with the name of what it is instead."""
        try:
            found = parse_json(text)
        except UnusableJsonError as error:
            raise _Failed(_no_json(text, error.reason), again=True) from None
        usage = _dict(_dict(found).get("usage"))
        prompt_tokens, answer_tokens = (_count(usage.get(f"{name}_tokens")) for name in ("prompt", "completion"))
        spent = _UNKNOWN if prompt_tokens is None or answer_tokens is None else Spent(prompt_tokens, answer_tokens)

        def failed(kind: FailureKind, reason: str, *, again: bool) -> _Failed:
            return _Failed(Failure(kind, reason, spent), again=again)

        if not isinstance(choices := _dict(found).get("choices"), list):
            raise failed("malformed", f"sends {quoted(text)}, which holds no choices", again=True)
        if not choices:
            raise failed("no_choices", "sends an empty list of choices", again=True)
        choice = _dict(choices[0])
        message, ended = _dict(choice.get("message")), choice.get("finish_reason")
        content = message.get("content")
        if refusal := message.get("refusal"):
            raise failed("refused", f"refuses: {quoted(str(refusal))}", again=False)
        if ended == "content_filter":
            raise failed("refused", "refuses by its content filter", again=False)
        if content is not None and not isinstance(content, str):
            raise failed("malformed", f"sends {quoted(text)}, whose content is no text", again=True)
        if not content or not content.strip():
            after = f" in {answer_tokens} tokens; a higher max_tokens may help" if ended == "length" else ""
            raise failed("no_text", f"answers without any text{after}", again=False)
        model = _dict(found).get("model")
        return Answer(
            text=content.strip(),
            finished=ended != "length",
            model=model if isinstance(model, str) and model else self._config.chat_model,
            time=time_now(),
            spent=spent,
        )

    def _refused(self, error: Any) -> _Failed:
        """What an HTTP status other than 200 means."""
        status, headers = error.status_code, error.response.headers
        body = _dict(error.body)
        said = quoted(self._scrubbed(str(body.get("message") or error.response.text)))
        code = str(body.get("code") or "")
        if status == 429 and code != "insufficient_quota":
            wait_s = _retry_after_s(headers)
            return _Failed(Failure("rate_limited", f"takes no more requests now ({said})"), again=True, wait_s=wait_s)
        if status in (408, 409, 425) or status >= 500:
            reason = f"fails with status {status} ({said})"
            return _Failed(Failure("server_error", reason), again=True, wait_s=_retry_after_s(headers))
        if code == "content_filter":
            return _Failed(Failure("refused", f"refuses by its content filter ({said})"), again=False)
        if status == 413 or code == "context_length_exceeded" or "maximum context length" in said:
            return _Failed(Failure("too_long", f"finds the question too long ({said})"), again=False)
        where, variable = f"{self._url} answers with status {status} ({said})", self._config.api_key_env
        if status in (401, 403) and self._key:
            sentence = f"{where}: it does not accept the key in {variable}. Mend it, or name another by api_key_env."
        elif status in (401, 403):
            sentence = f"{where}: it wants a key. Put it into {variable}, or name another variable by api_key_env."
        elif status in (402, 429):
            sentence = f"{where}: the account has no credit left."
        elif status == 404:
            sentence = (
                f"{where}: it has no model {self._config.chat_model!r}, or is no OpenAI-compatible server. Set "
                "chat_model to one of its models; many servers want base_url to end in /v1."
            )
        else:
            sentence = f"{where}: it does not take such requests. Change the settings that it names."
        return _Failed(Failure("rejected", sentence, ends=BadConfigError(sentence)), again=False)

    def _timed_out(self) -> _Failed:
        reason = f"gives no answer within {self._config.timeout_s:g} s"
        return _Failed(Failure("timed_out", reason, _UNKNOWN), again=True)

    def _no_connection(self, error: BaseException, *, sent: bool) -> _Failed:
        said = quoted(self._scrubbed(str(error) or type(error).__name__))
        reason = f"drops the connection ({said})" if sent else f"cannot be reached ({said})"
        return _Failed(Failure("no_connection", reason, Spent(unknown_tries=int(sent))), again=True)

    def _scrubbed(self, text: str) -> str:
        """The text without the key, which a server may echo."""
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text


def _no_json(text: str, reason: str) -> Failure:
    """What a text is that cannot be used as JSON."""
    if not text.lstrip().startswith("{"):
        return Failure("no_json", f"sends {quoted(text)} instead of JSON")
    if not text.rstrip().endswith("}") or text.count("{") > text.count("}"):
        return Failure("truncated", "sends JSON that ends too early", _UNKNOWN)
    return Failure("malformed", f"sends JSON that cannot be used: {reason}", _UNKNOWN)


def _retry_after_s(headers: Any) -> float | None:
    """Seconds that a server asks to wait: a number of them, or a date; None where it asks for nothing usable."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value)) if float(value) < float("inf") else None
    except ValueError:
        pass
    try:
        at = email.utils.parsedate_to_datetime(value)
        return max(0.0, (at - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
