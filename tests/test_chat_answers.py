"""Each question is paid once: the log keeps its answer through kills, the budget is kept, a log can be replayed."""

import itertools
import json
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from chat_server import KEY, ChatServer, chatting, drops, echoes, fails, says
from sami_jax.chat.answer_log import open_log, read_log
from sami_jax.chat.answers import Answers, error_of
from sami_jax.chat.client import Server, Waits
from sami_jax.chat.costs import Budget, Prices
from sami_jax.chat.questions import Answer, Failure, Question, Spent
from sami_jax.chat.replay import Replay
from sami_jax.config.chat import ChatConfig
from sami_jax.errors import (
    BadConfigError,
    BadDataError,
    RunInUseError,
    SaveFailedError,
    StoppedError,
    UnavailableError,
)

HERE = pathlib.Path(__file__).parent
QUICK = Waits(first=0.01, longest=0.05, longest_asked=2.0)
QUESTIONS = [Question(f"question {number:02d}", system="Answer.") for number in range(6)]
TEXTS = [question.user[::-1] for question in QUESTIONS]
PRICED = {"usd_per_million_input_tokens": 2.0, "usd_per_million_output_tokens": 10.0, "max_tokens": 100}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def asker(
    url: str, log: Any, *, safe_point: Callable[[], None] = lambda: None, say: Any = print, **settings: Any
) -> Answers:
    config = ChatConfig(base_url=url, chat_model="big", **{"concurrency": 2} | settings)
    chat = Server(config, waits=QUICK, say=say)
    prices = Prices.of(config)
    return Answers(chat, log, prices=prices, max_cost_usd=config.max_cost_usd, safe_point=safe_point, say=say)


def ask(path: pathlib.Path, url: str, questions: list[Question] = QUESTIONS, **settings: Any) -> list[str]:
    with open_log(path) as log:
        replies = asker(url, log, **settings).ask(questions)
    assert all(isinstance(reply, Answer) for reply in replies), replies
    return [reply.text for reply in replies if isinstance(reply, Answer)]


def asked_texts(chat: ChatServer) -> list[str]:
    return [request["messages"][-1]["content"] for request in chat.requests]


@pytest.fixture
def recorded(tmp_path) -> Iterator[tuple[pathlib.Path, str]]:
    """A log of all questions, and the server that answered."""
    with chatting(echoes) as chat:
        assert ask(tmp_path / "log.jsonl", chat.url) == TEXTS
        chat.requests.clear()
        yield tmp_path / "log.jsonl", chat.url
        assert asked_texts(chat) == []


class TestOnce:
    def test_what_was_answered_is_not_asked_again(self, recorded):
        log, url = recorded
        before = log.read_bytes()
        assert ask(log, url) == TEXTS and log.read_bytes() == before

    def test_a_question_that_stands_twice_is_asked_once(self, tmp_path):
        with chatting(echoes) as chat:
            assert ask(tmp_path / "log.jsonl", chat.url, [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]]) == [
                TEXTS[0],
                TEXTS[1],
                TEXTS[0],
            ]
        assert sorted(asked_texts(chat)) == ["question 00", "question 01"]

    @pytest.mark.parametrize("change", [{"max_tokens": 9}, {"temperature": 0.5}])
    def test_other_settings_are_another_question(self, tmp_path, change):
        with chatting(echoes) as chat:
            for settings in ({}, change, {"concurrency": 5, "timeout_s": 9.0}):  # the last ones change no answer
                ask(tmp_path / "log.jsonl", chat.url, QUESTIONS[:1], **settings)
        assert len(chat.requests) == 2

    def test_another_model_system_turn_or_server_is_another_question(self, tmp_path):
        with chatting(echoes) as chat, chatting(echoes) as other:
            with open_log(tmp_path / "log.jsonl") as log:
                for url, model in ((chat.url, "big"), (chat.url, "small"), (other.url, "big")):
                    config = ChatConfig(base_url=url, chat_model=model)
                    answers = Answers(
                        Server(config), log, prices=Prices.of(config), max_cost_usd=0.0, safe_point=lambda: None
                    )
                    answers.ask([Question("Hi"), Question("Hi", system="Be brief.")])
        assert len(chat.requests) == 4 and len(other.requests) == 2

    def test_a_line_has_what_an_auditor_wants_and_no_key(self, recorded):
        log, url = recorded
        line = json.loads(log.read_text().splitlines()[0])
        assert line["messages"] == QUESTIONS[0].messages or line["messages"] == QUESTIONS[1].messages
        assert line["settings"] == {"model": "big", "base_url": url, "max_tokens": 2048, "temperature": 0.0}
        assert line["reply"]["answer"]["text"] in TEXTS[:2] and line["reply"]["answer"]["model"] == "served"
        assert KEY not in log.read_text()

    def test_failures_come_back_in_their_places_and_are_asked_again(self, tmp_path):
        def act(handler: Any, asked: dict[str, Any]) -> None:
            refused = asked["messages"][-1]["content"] == "question 01" and len(chat.requests) <= 3
            (says(None, refusal="I cannot.") if refused else echoes)(handler, asked)

        with chatting(act) as chat:
            with open_log(tmp_path / "log.jsonl") as log:
                replies = asker(chat.url, log).ask(QUESTIONS[:3])
            assert [isinstance(reply, Answer) for reply in replies] == [True, False, True]
            assert isinstance(replies[1], Failure) and replies[1].kind == "refused"
            kinds = [type(record.reply) for record in read_log(tmp_path / "log.jsonl")]
            assert sorted(kinds, key=str) == [Answer, Answer, Failure]  # it was paid: the log keeps its cost
            assert ask(tmp_path / "log.jsonl", chat.url, QUESTIONS[:3]) == TEXTS[:3]
        assert len(chat.requests) == 4


class TestLog:
    def test_a_torn_last_line_is_dropped_wherever_it_is_torn(self, recorded, tmp_path):
        log, url = recorded
        whole = log.read_bytes()
        lines = whole.splitlines(keepends=True)
        torn = tmp_path / "torn.jsonl"
        for length in random.Random(0).sample(range(1, len(lines[-1]) - 1), 25):
            torn.write_bytes(b"".join(lines[:-1]) + lines[-1][:length])
            with open_log(torn) as opened:
                assert sum(opened.find(record.key) is not None for record in read_log(log)) == 5
            assert torn.read_bytes() == b"".join(lines[:-1])
        torn.write_bytes(b"".join(lines[:-1]) + b"\0" * 300)  # a crash of the machine
        with open_log(torn):
            assert torn.read_bytes() == b"".join(lines[:-1])
        torn.write_bytes(whole[:-1])  # only the newline is missing: the answer is whole
        with open_log(torn):
            assert torn.read_bytes() == whole
        assert ask(torn, url) == TEXTS

    @pytest.mark.parametrize("line", [0, 3, 5])
    def test_a_changed_line_is_refused(self, recorded, line):
        log, _ = recorded
        lines = log.read_text().splitlines(keepends=True)
        lines[line] = lines[line].replace("noitseuq", "noitseuQ")
        log.write_text("".join(lines))
        with pytest.raises(BadDataError, match=rf"log.jsonl, line {line + 1}: this is no answer as it was recorded"):
            with open_log(log):
                pass
        assert log.read_text() == "".join(lines)
        log.write_text("".join(lines[:line] + lines[line + 1 :]))  # which the sentence offers
        with open_log(log):
            assert len(read_log(log)) == 5

    def test_two_processes_do_not_share_it(self, tmp_path):
        with open_log(tmp_path / "log.jsonl"), pytest.raises(RunInUseError, match="in use by another process"):
            with open_log(tmp_path / "log.jsonl"):
                pass

    def test_a_place_that_cannot_be_written_is_a_sentence(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SaveFailedError, match="could not be written"), open_log(tmp_path / "file" / "log.jsonl"):
            pass

    @pytest.mark.slow
    def test_killed_at_random_moments_nothing_is_paid_twice(self, tmp_path):
        """The worker asks 40 questions and is killed over and over; what was in the log is never asked again."""

        def act(handler: Any, asked: dict[str, Any]) -> None:
            time.sleep(0.02)
            echoes(handler, asked)

        log, draws = tmp_path / "log.jsonl", random.Random(7)
        with chatting(act) as chat:
            worker = [sys.executable, str(HERE / "chat_worker.py"), chat.url, str(log), "40"]
            kept: set[str] = set()
            for attempt in itertools.count():
                seen = len(chat.requests)
                with subprocess.Popen(worker, stdout=subprocess.PIPE, text=True) as process:
                    assert process.stdout is not None and process.stdout.readline() == "asking\n"
                    if attempt < 4:
                        some = seen + draws.randrange(1, 12)
                        while len(chat.requests) < some:
                            time.sleep(0.001)
                        time.sleep(draws.uniform(0.0, 0.02))
                        process.send_signal(signal.SIGKILL)
                    done = process.wait(60) == 0
                assert not kept & set(asked_texts(chat)[seen:])
                found = {record.question.user for record in read_log(log)} if log.exists() else set()
                assert kept <= found
                kept = found
                if done:
                    break
        assert kept == {f"question {number:02d}" for number in range(40)}
        assert [record.question.user for record in read_log(log)].count("question 00") == 1
        assert 40 < len(chat.requests) <= 40 + 4 * 4  # kills did hit what was on its way, and nothing else
        assert attempt == 4


class TestBudget:
    def test_what_is_on_its_way_is_set_aside_at_its_most(self):
        budget = Budget(1.0, spent_usd=0.2)
        assert budget.reserve(0, 0.4) and budget.reserve(1, 0.4) and not budget.reserve(2, 0.1)
        assert budget.allows(0.1)  # once those have come to cost less
        budget.settle(0, 0.05)
        assert budget.reserve(2, 0.3) and budget.reserve(2, 0.04) and not budget.reserve(3, 0.02)
        budget.settle(2, 0.1)
        budget.settle(1, 0.4)
        assert budget.spent_usd == pytest.approx(0.75) and not budget.allows(0.26)

    def test_prices_are_of_tokens_and_the_most_is_more_than_any_answer_costs(self):
        prices = Prices.of(ChatConfig(chat_model="big", **PRICED))
        question = Question("Wie hei\u00dft du?", system="Be kind.")
        assert prices.spent_usd(question, Spent(1_000_000, 100_000)) == pytest.approx(3.0)
        most = (len("Wie hei\u00dft du?".encode()) + 64 + len("Be kind.") + 64) * 2e-6 + 100 * 1e-5
        assert prices.most_usd(question) == pytest.approx(most)
        assert prices.spent_usd(question, Spent(0, 0, 2)) == pytest.approx(2 * most)

    def test_it_is_kept_and_what_was_answered_stays(self, tmp_path):
        """Each answer costs 5 * 10 + 10 * 2 = 70 millionths; the most of one is about 1300."""
        log = tmp_path / "log.jsonl"
        with chatting(echoes) as chat:
            with pytest.raises(
                BadConfigError, match=r"budget of \$0.0015 is spent: \$0.0002 so far.*raise max_cost_usd"
            ):
                ask(log, chat.url, max_cost_usd=0.0015, **PRICED)
            answered = len(read_log(log))
            # The first of the six is asked while 0.0015 - 0.0013 is left, the fourth is not.
            assert len(chat.requests) == answered == 3
            assert sum(record.cost_usd for record in read_log(log)) == pytest.approx(answered * 70e-6)
            assert ask(log, chat.url, max_cost_usd=0.002, **PRICED) == TEXTS
        assert len(chat.requests) == 6

    def test_it_goes_on_where_another_process_has_left_it(self, tmp_path):
        log = tmp_path / "log.jsonl"
        with chatting(echoes) as chat:
            ask(log, chat.url, QUESTIONS[:3], **PRICED)
            with pytest.raises(BadConfigError, match="is spent"):
                ask(log, chat.url, max_cost_usd=0.0014, **PRICED)
        assert len(chat.requests) == 3

    def test_tries_that_a_server_may_have_billed_count_at_their_most(self, tmp_path):
        log = tmp_path / "log.jsonl"
        with chatting(drops) as chat, pytest.raises(BadConfigError, match="is spent"):
            ask(log, chat.url, QUESTIONS[:1], max_cost_usd=0.003, **PRICED)
        assert len(chat.requests) == 2  # a third might have exceeded it
        [record] = read_log(log)
        assert isinstance(record.reply, Failure) and 0.002 < record.cost_usd <= 0.003

    def test_a_try_that_only_the_others_leave_no_room_for_ends_that_question_alone(self, tmp_path):
        def act(handler: Any, asked: dict[str, Any]) -> None:
            if asked["messages"][-1]["content"] == "question 00":
                drops(handler, asked)
            else:
                time.sleep(0.5)
                echoes(handler, asked)

        with chatting(act) as chat, open_log(tmp_path / "log.jsonl") as log:
            dropped, answered = asker(chat.url, log, max_cost_usd=0.003, **PRICED).ask(QUESTIONS[:2])
        assert isinstance(dropped, Failure) and "the budget has no room for another try" in dropped.reason
        assert isinstance(answered, Answer) and len(chat.requests) == 2

    def test_what_is_asked_and_what_it_may_cost_is_said_before(self, recorded):
        log, url = recorded
        said: list[str] = []
        with open_log(log) as opened:
            answers = asker(url, opened, say=said.append, max_cost_usd=5.0, **PRICED | {"max_tokens": 2048})
            answers.announce([*QUESTIONS, Question("new")])
        most = (3 + 64) * 2e-6 + 2048 * 1e-5
        assert said == [
            f"asking big at {url} 1 question (6 answered before, in {log}): at most ${most:.4f} where no try fails, "
            "of a budget of $5"
        ]


class TestEnds:
    def test_a_server_that_is_down_is_not_asked_hundreds_of_times(self, tmp_path):
        many = [Question(f"question {number}") for number in range(50)]
        with chatting(fails(503, "down")) as chat, pytest.raises(UnavailableError, match=r"503 .*, 6 times") as raised:
            ask(tmp_path / "log.jsonl", chat.url, many)
        assert len(chat.requests) <= 6 * 5 and "run the same command later" in str(raised.value)

    def test_one_bad_spell_does_not_end_the_others(self, tmp_path):
        def act(handler: Any, asked: dict[str, Any]) -> None:
            bad = asked["messages"][-1]["content"] in ("question 01", "question 03", "question 05")
            (fails(503, "down") if bad else echoes)(handler, asked)

        with chatting(act) as chat, open_log(tmp_path / "log.jsonl") as log:
            replies = asker(chat.url, log, concurrency=1).ask(QUESTIONS)
        assert [isinstance(reply, Answer) for reply in replies] == [True, False] * 3

    def test_a_wrong_key_ends_at_once_with_its_sentence(self, tmp_path):
        many = [Question(f"question {number}") for number in range(50)]
        with chatting(fails(401, "no")) as chat, pytest.raises(BadConfigError, match="does not accept the key"):
            ask(tmp_path / "log.jsonl", chat.url, many)
        assert len(chat.requests) == 2  # those that were on their way

    def test_what_is_on_its_way_is_kept_when_someone_asks_to_stop(self, tmp_path):
        def slow(handler: Any, asked: dict[str, Any]) -> None:
            time.sleep(0.4)
            echoes(handler, asked)

        def stop() -> None:
            if chat.requests:
                raise StoppedError("stop")

        with chatting(slow) as chat, pytest.raises(StoppedError):
            ask(tmp_path / "log.jsonl", chat.url, safe_point=stop)
        assert len(chat.requests) == len(read_log(tmp_path / "log.jsonl")) == 2

    def test_whoever_heeds_the_replies_can_end_the_asking_and_nothing_paid_is_lost(self, tmp_path):
        def act(handler: Any, asked: dict[str, Any]) -> None:
            time.sleep(0.4 * (asked["messages"][-1]["content"] == "question 01"))
            echoes(handler, asked)

        heard: list[str] = []

        def heed(reply: Any) -> None:
            heard.append(reply.text)
            if len(heard) == 1:
                raise BadDataError("enough")

        with chatting(act) as chat, open_log(tmp_path / "log.jsonl") as log:
            with pytest.raises(BadDataError, match="enough"):
                asker(chat.url, log).ask(QUESTIONS, heed=heed)
            assert heard == TEXTS[:2] and len(chat.requests) == len(read_log(tmp_path / "log.jsonl")) == 2
            again: list[str] = []
            asker(chat.url, log).ask(QUESTIONS[:3], heed=lambda reply: again.append(reply.text))
            assert again == TEXTS[:3] and len(chat.requests) == 3  # what was recorded comes first

    def test_whoever_heeds_the_replies_decides_how_many_may_be_missing(self, tmp_path):
        with chatting(drops) as chat, open_log(tmp_path / "log.jsonl") as log:
            replies = asker(chat.url, log).ask(QUESTIONS, heed=lambda reply: None)
        assert [reply.kind for reply in replies] == ["no_connection"] * 6

    def test_what_waits_for_its_next_try_gives_up(self, tmp_path):
        def stop() -> None:
            if chat.requests:
                raise StoppedError("stop")

        started = time.monotonic()
        with chatting(fails(429, Retry_After="2")) as chat, pytest.raises(StoppedError):
            ask(tmp_path / "log.jsonl", chat.url, safe_point=stop)
        assert time.monotonic() - started < 2

    def test_a_single_question_without_an_answer_has_the_code_of_its_kind(self):
        with chatting(echoes) as chat:
            server = Server(ChatConfig(base_url=chat.url, chat_model="big"))
        assert isinstance(error_of(server, Failure("timed_out", "is silent")), UnavailableError)
        assert isinstance(error_of(server, Failure("stopped", "was stopped")), StoppedError)
        assert isinstance(error_of(server, Failure("refused", "refuses")), BadDataError)
        error = BadConfigError("wrong key")
        assert error_of(server, Failure("rejected", "no", ends=error)) is error


class TestReplay:
    def play(self, log: pathlib.Path, into: pathlib.Path, questions: list[Question]) -> list[Any]:
        with open_log(into) as opened:
            answers = Answers(
                Replay(log), opened, prices=Prices(1.0, 1.0, 1), max_cost_usd=1e-9, safe_point=lambda: None
            )
            return answers.ask(questions)

    def test_recorded_answers_come_back_as_they_were_and_cost_nothing(self, tmp_path):
        log, into = tmp_path / "log.jsonl", tmp_path / "into.jsonl"
        with chatting(echoes) as chat:
            ask(log, chat.url, temperature=0.7)
        config = ChatConfig(model=f"replay:{log}")
        with open_log(into) as opened:
            answers = Answers(Replay(log), opened, prices=Prices.of(config), max_cost_usd=0.0, safe_point=lambda: None)
            played = answers.ask(QUESTIONS[::-1])
        assert [reply.text for reply in played if isinstance(reply, Answer)] == TEXTS[::-1]
        times = {record.question: record.reply.time for record in read_log(log) if isinstance(record.reply, Answer)}
        assert [reply.time for reply in played if isinstance(reply, Answer)] == [times[q] for q in QUESTIONS[::-1]]
        assert {record.cost_usd for record in read_log(into)} == {0.0} and len(chat.requests) == 6

    def test_a_question_that_was_not_recorded_is_refused(self, recorded, tmp_path):
        with pytest.raises(BadDataError, match=r"has no answer to the question 'new'\.\.\.; ask the model"):
            with open_log(tmp_path / "into.jsonl") as opened:
                Answers(
                    Replay(recorded[0]), opened, prices=Prices(0, 0, 1), max_cost_usd=0.0, safe_point=lambda: None
                ).ask([QUESTIONS[0], Question("new")])

    def test_two_models_in_one_file_are_refused(self, tmp_path):
        with chatting(echoes) as chat:
            for settings in ({}, {"temperature": 1.0}):
                ask(tmp_path / "log.jsonl", chat.url, QUESTIONS[:1], **settings)
        with pytest.raises(BadDataError, match="answers of two models, or by two settings, to one question"):
            Replay(tmp_path / "log.jsonl")

    @pytest.mark.parametrize(("content", "says_so"), [(None, "does not exist"), ("", "holds no recorded answers")])
    def test_a_file_of_something_else_is_refused(self, tmp_path, content, says_so):
        if content is not None:
            (tmp_path / "log.jsonl").write_text(content)
        with pytest.raises(BadDataError, match=says_so):
            Replay(tmp_path / "log.jsonl")
        (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
        with pytest.raises(BadDataError, match="line 1: this is no answer"):
            Replay(tmp_path / "log.jsonl")


# What is wrong with a config, and what the sentence says.
BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model": "m", "chat_model": "big"}, "model and a server .* are both given"),
    ({"base_url": "http://localhost:8000/v1"}, "chat_model names no model of it"),
    ({"base_url": "localhost:8000", "chat_model": "big"}, "it must be a URL such as http://localhost:8000/v1"),
    ({"base_url": "ftp://host/v1", "chat_model": "big"}, "it must be a URL"),
    ({"base_url": "http://host:99999/v1", "chat_model": "big"}, "it must be a URL"),
    ({"base_url": "https://me:secret@host/v1", "chat_model": "big"}, "more than a server and a path, perhaps a key"),
    ({"base_url": "https://host/v1?key=secret", "chat_model": "big"}, "more than a server and a path, perhaps a key"),
    ({"chat_model": "big", "max_cost_usd": 1.0}, "a price is missing"),
    (
        {"chat_model": "big", "max_cost_usd": 1.0, "usd_per_million_input_tokens": 1.0},
        "give the server's usd_per_million_input_tokens and usd_per_million_output_tokens",
    ),
    ({"model": "m", "temperature": 0.5}, "a model on these devices is greedy"),
    ({"chat_model": "big", "temperature": -0.5}, "at least 0, or -1"),
    ({"chat_model": "big", "api_key_env": ""}, "name the environment variable"),
    ({"chat_model": "big", "api_key_env": "sk-secret"}, "api_key_env is no name"),  # the key itself
]


@pytest.mark.parametrize(("settings", "says_so"), BAD_CONFIGS)
def test_a_config_that_cannot_be_used_is_refused_without_its_secrets(settings, says_so):
    with pytest.raises(BadConfigError, match=says_so) as raised:
        ChatConfig(**settings)
    assert "secret" not in str(raised.value)
