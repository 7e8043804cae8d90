"""A model folder as a chat, and the chat that a config names."""

import pathlib
from typing import Any

import pytest

from chat_server import chatting, echoes
from sami_jax.chat.answer_log import read_log
from sami_jax.chat.local import LocalModel
from sami_jax.chat.opening import make_chat, open_answers
from sami_jax.chat.questions import Answer, Failure, Question
from sami_jax.config.chat import ChatConfig
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.chat_template import ChatTemplate
from sami_jax.data.prompts import Prompt
from sami_jax.errors import BadConfigError, BadDataError, StoppedError
from sami_jax.huggingface.opened import load_model
from sami_jax.responding import respond
from talking_model import CHAT, write_talking_model
from tiny_run import tiny_run_config

LINES = ["Principle: short\n", "Definition: Be short.\n", "Antithesis: Be long."]
QUESTIONS = [Question("Hi", system="Be kind."), Question("How are you?"), Question("And you?")]


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> pathlib.Path:
    return write_talking_model(tmp_path_factory.mktemp("talking") / "model", LINES)


def chat_of(config: ChatConfig, given: pathlib.Path | None) -> Any:
    return make_chat(config, given, mesh=MeshConfig(), compute_dtype="float32", say=print)


def ask(folder: pathlib.Path | None, log: pathlib.Path, questions: list[Question], **settings: Any) -> list[Any]:
    given: dict[str, Any] = {"model": str(folder)} if folder else {}
    config = ChatConfig(**{"max_tokens": 20} | given | settings)
    with open_answers(config, chat_of(config, folder), log, safe_point=lambda: None, say=print) as answers:
        return answers.ask(questions)


def test_a_model_answers_as_it_was_made_to(talking, tmp_path):
    replies = ask(talking, tmp_path / "log.jsonl", QUESTIONS, concurrency=2)
    text = "".join(LINES).strip()
    assert [(reply.text, reply.finished, reply.model) for reply in replies] == [(text, True, "model")] * 3
    assert [reply.spent.output_tokens for reply in replies] == [3, 3, 3] and replies[0].spent.input_tokens > 10


def test_a_random_model_gets_its_chat_template_and_its_tokens_are_counted(tmp_path):
    """What is compared with is the sampler on the template's own spans."""
    folder = pathlib.Path(tiny_run_config(tmp_path).model)
    (folder / "chat_template.jinja").write_text(CHAT)
    replies = ask(folder, tmp_path / "log.jsonl", QUESTIONS, concurrency=2)
    loaded = load_model(folder, MeshConfig(), "float32")
    template = ChatTemplate(loaded.tokenizer)
    spans = [template.spans(question.system, question.user) for question in QUESTIONS]
    prompts = [Prompt("".join(s.text for s in span), tuple(loaded.tokenizer.chat_ids(span))) for span in spans]
    expected = respond(loaded, prompts, SamplingConfig(max_new_tokens=20, stop=()))
    assert [reply.text for reply in replies] == [response.text for response in expected]
    assert len({reply.text for reply in replies}) == 3
    assert [reply.spent.input_tokens for reply in replies] == [len(prompt.ids) for prompt in prompts]
    assert [reply.spent.output_tokens for reply in replies] == [len(response.ids) for response in expected]


def test_answers_are_kept_under_the_models_contents(talking, tmp_path):
    log = tmp_path / "log.jsonl"
    ask(talking, log, QUESTIONS)
    before = log.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(talking)
    ask(elsewhere, log, QUESTIONS, concurrency=3)
    assert log.read_bytes() == before
    ask(talking, log, QUESTIONS[:1], max_tokens=21)
    assert len(read_log(log)) == 4


def test_what_does_not_fit_is_a_failure_of_that_question_alone(talking, tmp_path):
    long, short = ask(talking, tmp_path / "log.jsonl", [Question("word " * 3000), QUESTIONS[0]])
    assert isinstance(long, Failure) and long.kind == "too_long" and isinstance(short, Answer)
    assert "exceeds the model's 4096 positions. Shorten it, or lower max_tokens" in long.reason


def test_a_model_that_says_nothing_fails_by_name(tmp_path):
    folder = write_talking_model(tmp_path / "model", [" "])
    [reply] = ask(folder, tmp_path / "log.jsonl", QUESTIONS[:1])
    assert isinstance(reply, Failure) and reply.kind == "no_text"


def test_it_stops_between_batches_and_keeps_what_was_answered(talking, tmp_path):
    calls: list[None] = []

    def stop_at_second() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise StoppedError("stop")

    config = ChatConfig(model=str(talking), max_tokens=20, concurrency=1)
    chat, log = chat_of(config, talking), tmp_path / "log.jsonl"
    with pytest.raises(StoppedError), open_answers(config, chat, log, safe_point=stop_at_second, say=print) as answers:
        answers.ask(QUESTIONS)
    assert len(read_log(tmp_path / "log.jsonl")) == 1


def test_a_base_model_without_a_chat_template_is_refused(tmp_path):
    folder = write_talking_model(tmp_path / "model", LINES, template="")
    with pytest.raises(
        BadDataError, match="cannot chat: the tokenizer's chat template cannot be used. Take an instruction-tuned"
    ):
        LocalModel(folder, ChatConfig(model=str(folder)), mesh=MeshConfig(), compute_dtype="float32")


def test_nobody_to_ask_is_a_sentence(tmp_path):
    with pytest.raises(BadConfigError, match="Nobody is named who answers: give model, or base_url and chat_model"):
        ask(None, tmp_path / "log.jsonl", QUESTIONS)
    assert not (tmp_path / "log.jsonl").exists()


def test_recorded_answers_of_a_server_are_given_by_their_file(tmp_path):
    with chatting(echoes) as chat:
        ask(None, tmp_path / "log.jsonl", QUESTIONS, base_url=chat.url, chat_model="big")
    log = tmp_path / "log.jsonl"
    replies = ask(log, tmp_path / "into.jsonl", QUESTIONS, model=f"replay:{log}")
    assert [reply.text for reply in replies] == [question.user[::-1] for question in QUESTIONS]


def test_the_log_is_written_before_an_answer_is_used(talking, tmp_path):
    config = ChatConfig(model=str(talking), max_tokens=20)
    chat, log = chat_of(config, talking), tmp_path / "log.jsonl"
    with open_answers(config, chat, log, safe_point=lambda: None, say=print) as answers:
        [answer] = answers.ask(QUESTIONS[:1])
        [record] = read_log(tmp_path / "log.jsonl")  # while it is still open
        assert record.reply == answer
