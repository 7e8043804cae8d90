"""A server as a chat: every way in which it may fail has a name, and is tried again where that may help."""

import datetime
import email.utils
import re
import socket
import time
from typing import Any

import pytest

from chat_server import (
    KEY,
    Act,
    chatting,
    completion,
    drips,
    drops,
    drops_in_the_body,
    echoes,
    fails,
    in_turn,
    keeps_silent,
    says,
    sends,
)
from sami_jax.chat.client import TRIES, Server, Waits
from sami_jax.chat.questions import Answer, Failure, Question, Reply, Spent
from sami_jax.config.chat import ChatConfig
from sami_jax.errors import BadConfigError

QUICK = Waits(first=0.01, longest=0.05, longest_asked=2.0)
HTML = b"<!DOCTYPE html><html><body>Bad gateway</body></html>"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def make_server(url: str, *, waits: Waits = QUICK, say: Any = print, **settings: Any) -> Server:
    return Server(ChatConfig(base_url=url, chat_model="big", **{"timeout_s": 5.0} | settings), waits=waits, say=say)


def replies(server: Server, questions: list[Question], may_try_again: Any = lambda number: True) -> list[Reply]:
    taken = iter(enumerate(questions))
    found = dict(server.replies(lambda: next(taken, None), may_try_again=may_try_again, stopping=lambda: False))
    return [found[number] for number in range(len(questions))]


def reply_to(act: Act, **settings: Any) -> tuple[Reply, list[dict[str, Any]]]:
    """The reply to one question, and the requests that it took."""
    with chatting(act) as chat:
        [reply] = replies(make_server(chat.url, **settings), [Question("Hi", system="Be kind.")])
    return reply, chat.requests


class TestAnswers:
    def test_what_is_sent_and_what_comes_back(self):
        with chatting(says("  Hello. \n", usage=(12, 3))) as chat:
            server = make_server(chat.url, max_tokens=77)
            [reply] = replies(server, [Question("Hi", system="Be kind.")])
        assert isinstance(reply, Answer)
        assert (reply.text, reply.finished, reply.model, reply.spent) == ("Hello.", True, "served", Spent(12, 3))
        assert abs(datetime.datetime.fromisoformat(reply.time).timestamp() - time.time()) < 60
        assert chat.requests == [
            {
                "path": "/v1/chat/completions",
                "model": "big",
                "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
                "max_tokens": 77,
                "temperature": 0.0,
            }
        ]
        assert chat.headers[0]["authorization"] == f"Bearer {KEY}"
        assert server.settings == {"model": "big", "base_url": chat.url, "max_tokens": 77, "temperature": 0.0}

    def test_no_temperature_is_sent_where_a_model_takes_none(self):
        _, [request] = reply_to(says("Hello."), temperature=-1.0)
        assert "temperature" not in request

    def test_an_answer_that_ran_out_of_tokens_is_not_finished(self):
        reply, _ = reply_to(says("Hello, I", ended="length"))
        assert isinstance(reply, Answer) and not reply.finished

    def test_a_server_that_counts_no_tokens_leaves_the_cost_unknown(self):
        reply, _ = reply_to(says("Hello.", usage=None))
        assert reply.spent == Spent(unknown_tries=1)

    def test_several_are_asked_at_once_but_no_more_than_that(self):
        def act(handler: Any, asked: dict[str, Any]) -> None:
            time.sleep(0.1)
            echoes(handler, asked)

        texts = [f"question {i}" for i in range(12)]
        with chatting(act) as chat:
            found = replies(make_server(chat.url, concurrency=3), [Question(text) for text in texts])
        assert [reply.text for reply in found if isinstance(reply, Answer)] == [text[::-1] for text in texts]
        assert chat.at_once == 3


# name -> (what the server does, the failure's kind, what it says, what it may have cost, whether it is tried again)
FAILURES: dict[str, tuple[Act, str, str, Spent, bool]] = {
    "429": (fails(429, "slow down"), "rate_limited", "takes no more requests now .'slow down'.", Spent(), True),
    "500": (fails(500, "oops"), "server_error", "fails with status 500 .'oops'.", Spent(), True),
    "503 html": (
        lambda handler, asked: handler.send(503, HTML, "text/html"),
        "server_error",
        "fails with status 503 .'<!DOCTYPE html>",
        Spent(),
        True,
    ),
    "silence": (keeps_silent(2.0), "timed_out", "gives no answer within 0.5 s", Spent(0, 0, 1), True),
    "drips": (drips(2.0), "timed_out", "gives no answer within 0.5 s", Spent(0, 0, 1), True),
    "dropped": (drops, "no_connection", "drops the connection", Spent(0, 0, 1), True),
    "dropped in the body": (drops_in_the_body, "no_connection", "drops the connection", Spent(0, 0, 1), True),
    "html": (sends(HTML, "text/html"), "no_json", "sends '<!DOCTYPE html>.*' instead of JSON", Spent(), True),
    "html as json": (sends(HTML), "no_json", "instead of JSON", Spent(), True),
    "empty": (sends(b""), "no_json", "sends '' instead of JSON", Spent(), True),
    "truncated": (sends(completion("Hello.")[:-30]), "truncated", "JSON that ends too early", Spent(0, 0, 1), True),
    "half a character": (
        sends(completion("Hello.").replace(b"Hello.", b"\\ud83d")),
        "malformed",
        "JSON that cannot be used: .*surrogate",
        Spent(0, 0, 1),
        True,
    ),
    "no number": (
        sends(completion("Hello.").replace(b"10", b"NaN")),
        "malformed",
        "JSON that cannot be used",
        Spent(0, 0, 1),
        True,
    ),
    "deep": (sends(b"[" * 100_000), "no_json", "instead of JSON", Spent(), True),
    "no choices": (
        sends(b'{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 0}}'),
        "no_choices",
        "an empty list of choices",
        Spent(7, 0),
        True,
    ),
    "other json": (sends(b'{"answer": 42}'), "malformed", "which holds no choices", Spent(0, 0, 1), True),
    "a list": (sends(b"[1]"), "malformed", "which holds no choices", Spent(0, 0, 1), True),
    "parts": (says([{"type": "text"}]), "malformed", "whose content is no text", Spent(10, 5), True),  # type: ignore
    "refusal": (says(None, refusal="I cannot."), "refused", "refuses: 'I cannot.'", Spent(10, 5), False),
    "filtered": (says("", ended="content_filter"), "refused", "refuses by its content filter", Spent(10, 5), False),
    "filtered by status": (fails(400, "no", "content_filter"), "refused", "content filter", Spent(), False),
    "only reasoning": (says(None, ended="length"), "no_text", "in 5 tokens; a higher max_tokens", Spent(10, 5), False),
    "white space": (says(" \n"), "no_text", "answers without any text", Spent(10, 5), False),
    "too long": (fails(400, "This model's maximum context length is 8"), "too_long", "too long", Spent(), False),
    "too long by code": (fails(400, "no", "context_length_exceeded"), "too_long", "too long", Spent(), False),
}

BRIEF = dict.fromkeys(("silence", "drips"), {"timeout_s": 0.5})


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_has_a_name_and_a_reason(name):
    act, kind, says_so, spent, again = FAILURES[name]
    reply, requests = reply_to(act, **BRIEF.get(name, {}))
    assert isinstance(reply, Failure) and reply.kind == kind and reply.ends is None
    assert re.search(says_so, reply.reason), reply.reason
    tries = TRIES if again else 1
    assert len(requests) == tries
    assert reply.reason.endswith(f", {TRIES} times") == again
    assert reply.spent == Spent(spent.input_tokens * tries, spent.output_tokens * tries, spent.unknown_tries * tries)


@pytest.mark.parametrize("name", [name for name, (*_, again) in FAILURES.items() if again])
def test_what_may_pass_is_tried_again_and_what_it_cost_is_counted(name):
    act, *_, spent, _ = FAILURES[name]
    reply, requests = reply_to(in_turn(act, act, says("Hello.")), **BRIEF.get(name, {}))
    assert isinstance(reply, Answer) and reply.text == "Hello." and len(requests) == 3
    assert reply.spent == spent + spent + Spent(10, 5)


def test_without_a_server_nothing_is_billed():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        [reply] = replies(make_server(f"http://127.0.0.1:{unused.getsockname()[1]}/v1"), [Question("Hi")])
    assert isinstance(reply, Failure) and reply.kind == "no_connection" and reply.spent == Spent()
    assert "cannot be reached" in reply.reason


class TestWaits:
    def test_they_double_up_to_the_longest_and_differ(self):
        server = make_server("http://127.0.0.1:1/v1", waits=Waits(first=1.0, longest=6.0))
        drawn = [[server._wait_s(number, None) for _ in range(50)] for number in range(1, 6)]
        for waits, most in zip(drawn, (1.0, 2.0, 4.0, 6.0, 6.0), strict=True):
            assert most / 2 <= min(waits) < max(waits) <= most and len(set(waits)) > 10

    @pytest.mark.parametrize("as_date", [False, True])
    def test_a_server_that_asks_for_a_wait_gets_it(self, as_date):
        wait = "1"
        if as_date:  # to the second: two from now are more than one
            at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
            wait = email.utils.format_datetime(at, usegmt=True)
        started = time.monotonic()
        reply, requests = reply_to(in_turn(fails(429, Retry_After=wait), says("Hello.")))
        assert isinstance(reply, Answer) and len(requests) == 2
        assert time.monotonic() - started > 0.95

    def test_one_that_asks_for_too_much_is_not_waited_for(self):
        reply, requests = reply_to(fails(429, Retry_After="3600"))
        assert isinstance(reply, Failure) and reply.kind == "rate_limited" and len(requests) == 1
        assert reply.reason.endswith("and asks to wait 3600 s")

    @pytest.mark.parametrize("wait", ["soon", "", "inf", "nan", "-5", "Sun, 06 Nov 1994 08:49:37 GMT"])
    def test_one_that_asks_for_nonsense_is_tried_again_soon(self, wait):
        started = time.monotonic()
        reply, requests = reply_to(in_turn(fails(503, Retry_After=wait), says("Hello.")))
        assert isinstance(reply, Answer) and len(requests) == 2 and time.monotonic() - started < 10

    def test_long_ones_are_said(self):
        said: list[str] = []
        with chatting(fails(429, "slow down", Retry_After="30")) as chat:
            server = make_server(chat.url, waits=Waits(first=0.01), say=said.append)
            taken = iter([(0, Question("Hi"))])
            started = time.monotonic()
            [(_, reply)] = server.replies(
                lambda: next(taken, None),
                may_try_again=lambda number: True,
                stopping=lambda: bool(said),
            )
        # Whoever is asked to stop does not wait.
        assert isinstance(reply, Failure) and reply.kind == "stopped" and time.monotonic() - started < 10
        assert said == [f"big at {chat.url} takes no more requests now ('slow down'); try 2 of 6 in 30 s"]


def test_a_try_that_cannot_be_paid_is_not_made():
    with chatting(drops) as chat:
        asked: list[int] = []
        [reply] = replies(make_server(chat.url), [Question("Hi")], may_try_again=lambda n: bool(asked.append(n)))
    assert isinstance(reply, Failure) and reply.spent == Spent(unknown_tries=1) and len(chat.requests) == 1
    assert asked == [0] and reply.reason.endswith("the budget has no room for another try")


# name -> (what the server does, what the sentence says)
REJECTIONS: dict[str, tuple[Act, str]] = {
    "wrong key": (fails(401, f"wrong key {KEY}"), "does not accept the key in OPENAI_API_KEY. Mend it"),
    "forbidden": (fails(403, "no"), "does not accept the key in OPENAI_API_KEY"),
    "unknown model": (fails(404, "no such model"), "('no such model'): it has no model 'big', or is no OpenAI"),
    "no credit": (fails(429, "quota", "insufficient_quota"), "the account has no credit left"),
    "payment required": (fails(402, "pay"), "the account has no credit left"),
    "bad settings": (fails(400, "temperature must be 1"), "('temperature must be 1'): it does not take such requests"),
}


@pytest.mark.parametrize("name", REJECTIONS)
def test_what_no_later_try_mends_ends_everything(name):
    act, says_so = REJECTIONS[name]
    reply, requests = reply_to(act)
    assert isinstance(reply, Failure) and reply.kind == "rejected" and len(requests) == 1
    assert isinstance(reply.ends, BadConfigError) and says_so in str(reply.ends)


class TestKey:
    def test_a_local_server_needs_none(self, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY")
        with chatting(says("Hello.")) as chat:
            assert isinstance(replies(make_server(chat.url), [Question("Hi")])[0], Answer)

    def test_a_server_that_wants_one_is_told_of(self, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY")
        reply, _ = reply_to(fails(401, "no key"))
        assert isinstance(reply, Failure) and "it wants a key. Put it into OPENAI_API_KEY" in str(reply.ends)

    def test_openai_wants_one_before_anything_is_sent(self, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(BadConfigError, match="OPENAI_API_KEY holds no key for https://api.openai.com/v1; set it"):
            Server(ChatConfig(chat_model="big"))

    def test_it_is_taken_from_the_variable_that_the_config_names(self, monkeypatch):
        monkeypatch.setenv("MINE", "another-key")
        with chatting(says("Hello.")) as chat:
            replies(make_server(chat.url, api_key_env="MINE"), [Question("Hi")])
        assert chat.headers[0]["authorization"] == "Bearer another-key"

    @pytest.mark.parametrize("value", ["sk-\u20ac-euro", "two\nlines"])
    def test_one_that_is_none_is_refused_and_not_shown(self, monkeypatch, value):
        monkeypatch.setenv("OPENAI_API_KEY", value)
        with pytest.raises(BadConfigError, match="holds no key: that is plain ASCII") as raised:
            make_server("http://127.0.0.1:1/v1")
        assert value not in str(raised.value)

    @pytest.mark.parametrize(
        "act",
        [
            fails(401, f"Incorrect API key provided: {KEY}"),
            fails(500, f"Bearer {KEY}"),
            lambda handler, asked: handler.send(502, f"<html>{KEY}".encode(), "text/html"),
            sends(f"<html>{KEY}".encode(), "text/html"),
            says(f"Your key is {KEY}."),
            says(None, refusal=f"Not with {KEY}."),
        ],
    )
    def test_what_a_server_echoes_is_cut_out(self, act):
        reply, _ = reply_to(act)
        assert KEY not in f"{reply!r} {getattr(reply, 'ends', '')}"
        assert "[key]" in f"{reply!r} {getattr(reply, 'ends', '')}"
