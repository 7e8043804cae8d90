"""The principle writer: parsed strictly, asked again, no doubles, with provenance; alone and as a run's first stage."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest

from chat_server import KEY, Act, ChatServer, chatting, completion, fails, in_turn, keeps_silent, says
from sami_jax.chat import client
from sami_jax.chat.principle_writer import (
    AT_ONCE,
    DROPPED,
    FRUITLESS,
    MalformedError,
    new_principles,
    question_for,
    read_answer,
)
from sami_jax.cli.main import main
from sami_jax.config.fields import to_dict
from sami_jax.config.run import RunConfig, from_dict
from sami_jax.data.principles import Principle, read_principles
from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.files import read_json, read_jsonl
from sami_jax.run.loop import run
from sami_jax.run.principles import with_principles
from talking_model import write_talking_model
from tiny_run import tiny_run_config

SHORT = Principle("short", "Summaries should be short.", "Summaries should be long.")
FUNNY = Principle("funny", "Summaries should be funny, all through.", "Summaries should be serious, all through.")


def block(principle: Principle) -> str:
    return f"Principle: {principle.name}\nDefinition: {principle.definition}\nAntithesis: {principle.antithesis}\n"


def made(number: int) -> Principle:
    return Principle(f"quality_{number}", f"Texts should have trait {number}.", f"Texts should lack trait {number}.")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


class TestReadAnswer:
    def test_blocks_become_principles(self):
        assert read_answer(f"{block(SHORT)}\n{block(FUNNY)}") == [SHORT, FUNNY]
        assert read_answer(f"\n  {block(SHORT)}{block(FUNNY)}\n\n") == [SHORT, FUNNY]  # empty lines say nothing

    def test_a_name_becomes_one_word(self):
        text = block(dataclasses.replace(SHORT, name="Easy-to Read  ones"))
        assert read_answer(text)[0].name == "easy-to_read_ones"

    def test_sentences_may_have_colons_and_quotes(self):
        text = block(dataclasses.replace(SHORT, definition="Keep this rule: say \u201cno more.\u201d"))
        assert read_answer(text)[0].definition == "Keep this rule: say \u201cno more.\u201d"

    @pytest.mark.parametrize(
        ("text", "says_so"),
        [
            ("", "it holds no principle"),
            ("I cannot do that.", "line 1 is 'I cannot do that.', but must begin with Principle:"),
            (
                f"Sure! Here they are:\n\n{block(SHORT)}",
                "line 1 is 'Sure! Here they are:', but must begin with Principle:",
            ),
            (f"{block(SHORT)}\nI hope this helps!", "line 5 is 'I hope this helps!', but must begin with Principle:"),
            (f"```\n{block(SHORT)}```", "line 1 is '```', but must begin with Principle:"),
            (block(SHORT).replace("Principle", "1. Principle"), "must begin with Principle:"),
            (block(SHORT).replace("Definition", "**Definition**"), "line 2 is .* must begin with Definition:"),
            (block(SHORT).replace("Definition", "definition"), "must begin with Definition:"),
            (block(SHORT).replace("Antithesis: ", "Antithesis "), "must begin with Antithesis:"),
            ("Principle: short\nAntithesis: Be very long.\nDefinition: Be very short.", "must begin with Definition:"),
            ("Principle: short\nDefinition: Be very short.", "the last principle has no Antithesis:"),
            ("Principle: short", "the last principle has no Definition:"),
            (block(dataclasses.replace(SHORT, name="")), "line 1 names a principle '', but a name has one to four"),
            (block(dataclasses.replace(SHORT, name="to be as short as can be")), "but a name has one to four words"),
            (block(dataclasses.replace(SHORT, name="<name>")), "but a name has one to four words"),
            (
                block(dataclasses.replace(SHORT, definition="Be brief")),
                "line 2 has 'Be brief', which is not one",
            ),
            (block(dataclasses.replace(SHORT, definition="Brief.")), "which is not one sentence"),
            (block(dataclasses.replace(SHORT, antithesis="Be long and")), "line 3 has .* ends in a full stop"),
            (block(dataclasses.replace(SHORT, definition="w " * 300 + ".")), "which is not one sentence"),
            (block(dataclasses.replace(SHORT, definition="Be <one sentence> short.")), "placeholder '<one sentence>'"),
            (block(dataclasses.replace(SHORT, definition="Be as [quality] asks.")), r"placeholder '\[quality\]'"),
        ],
    )
    def test_anything_else_is_malformed_and_the_line_is_named(self, text, says_so):
        with pytest.raises(MalformedError, match=says_so):
            read_answer(text)


class TestNewPrinciples:
    def kept(self, *found: Principle, there: tuple[Principle, ...] = ()) -> tuple[list[str], dict[str, int]]:
        dropped = dict.fromkeys(DROPPED, 0)
        kept = new_principles(found, there, dropped)
        return [principle.name for principle in kept], {name: count for name, count in dropped.items() if count}

    def test_what_says_something_new_is_kept_in_order(self):
        assert self.kept(FUNNY, SHORT, there=(made(1),)) == (["funny", "short"], {})

    @pytest.mark.parametrize(
        "other",
        [
            dataclasses.replace(FUNNY, name="short"),
            dataclasses.replace(SHORT, name="brief"),
            Principle("brief", "summaries should be SHORT!", "Summaries should be a mile long."),
            Principle("brief", "Summaries should be of few words.", "The summaries should be long"),
            Principle("long", "Summaries should be long.", "Summaries should be of few words."),  # turned around
        ],
    )
    def test_what_another_says_already_is_dropped(self, other):
        assert self.kept(SHORT, other, FUNNY) == (["short", "funny"], {"same_as_another": 1})
        assert self.kept(other, there=(SHORT,)) == ([], {"same_as_another": 1})

    def test_a_pair_that_says_the_same_is_dropped(self):
        same = Principle("short", "Summaries should be short.", "the summaries should be short")
        assert self.kept(same, FUNNY) == (["funny"], {"same_as_its_antithesis": 1})

    def test_words_in_another_order_may_say_another_thing(self):
        turned = Principle("polite", "Be rude to nobody, kind to all.", "Be kind to nobody, rude to all.")
        assert self.kept(turned) == (["polite"], {})

    def test_the_examples_of_the_prompt_are_no_principles(self):
        question = question_for("cooking recipes", 2).user
        example = read_answer(question[question.index("Principle: beginner") :])
        assert len(example) == 2 and self.kept(*example, SHORT) == (["short"], {"example": 2})


def test_the_question_says_what_is_wanted_what_is_there_and_what_was_wrong():
    first = question_for("summaries", 5).user
    assert first.startswith("Write 5 principles for summaries.\n") and "already" not in first and "{" not in first
    again = question_for("summaries", 3, there=[SHORT, FUNNY], problem="line 1 is 'Sure!'", number=2).user
    assert "These principles are there already; write 3 others: short, funny." in again
    assert again.endswith("An answer before could not be used: line 1 is 'Sure!'. Keep to the format. This is try 2.")


def writes(answer: Callable[[int, str], str]) -> Act:
    """A server that answers by the number of the request, from 0 on, and the question."""
    asked_before: list[None] = []

    def act(handler: Any, asked: dict[str, Any]) -> None:
        asked_before.append(None)
        handler.send(200, completion(answer(len(asked_before) - 1, asked["messages"][-1]["content"])))

    return act


def wanted(question: str) -> int:
    found = re.search(r"^Write (\d+) principles for summaries of posts\.", question)
    assert found
    return int(found[1])


def as_asked(number: int, question: str) -> str:
    """As many as are asked for, each other than those of other answers."""
    return "\n".join(block(made(100 * number + i)) for i in range(wanted(question)))


def write(chat: ChatServer | None, out: pathlib.Path, *flags: str) -> int:
    server = [f"--base_url={chat.url}", "--chat_model=big"] if chat else []
    return main(["principles", *server, "--about=summaries of posts", f"--out={out}", *flags])


class TestCommand:
    def test_principles_and_provenance_are_written(self, tmp_path, capsys):
        out = tmp_path / "principles.json"
        with chatting(writes(as_asked)) as chat:
            assert write(chat, out, "--count=12", "--held_out=2") == 0
        expected = [
            *(made(i) for i in range(AT_ONCE)),
            *(dataclasses.replace(made(100 + i), held_out=True) for i in (0, 1)),
        ]
        assert read_principles(out) == expected
        assert "held_out" not in read_json(out)[0]
        provenance = read_json(tmp_path / "principles.provenance.json")
        assert re.fullmatch(r"[0-9a-f]{64}", provenance.pop("prompt_sha256"))
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", provenance.pop("date"))
        assert provenance == {
            "about": "summaries of posts",
            "writer": f"big at {chat.url}",
            "model": "served",
            "settings": {"model": "big", "base_url": chat.url, "max_tokens": 2048, "temperature": 0.0},
            "answers": 2,
            "malformed": 0,
            "dropped": dict.fromkeys(DROPPED, 0),
            "input_tokens": 20,
            "output_tokens": 10,
            "cost_usd": 0.0,
        }
        printed = capsys.readouterr()
        assert "quality_101 (held out)\n  + Texts should have trait 101.\n  - Texts should lack" in printed.out
        assert f"12 principles by served in {out} (2 answers, 0 malformed)" in printed.err
        assert "asking big at" in printed.err and "1 question or more" in printed.err

    def test_a_finished_one_is_not_written_again(self, tmp_path):
        out = tmp_path / "principles.json"
        with chatting(writes(as_asked)) as chat:
            assert write(chat, out, "--count=3") == 0
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            assert write(chat, out, "--count=3") == 0
        assert len(chat.requests) == 1
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        out.unlink()
        assert write(chat, out, "--count=3") == 0  # the server is gone
        assert out.read_bytes() == before[out]

    def test_a_malformed_answer_is_asked_again_with_what_was_wrong(self, tmp_path):
        def answer(number: int, question: str) -> str:
            return "Sure!" if number == 0 else block(SHORT) if number == 1 else block(FUNNY)

        with chatting(writes(answer)) as chat:
            assert write(chat, tmp_path / "p.json", "--count=2") == 0
        questions = [request["messages"][-1]["content"] for request in chat.requests]
        assert "line 1 is 'Sure!', but must begin with Principle:. Keep to the format. This is try 2." in questions[1]
        assert "try" not in questions[2] and "write 1 others: short." in questions[2]
        provenance = read_json(tmp_path / "p.provenance.json")
        assert (provenance["answers"], provenance["malformed"]) == (3, 1)

    def test_an_answer_that_was_cut_off_is_asked_again_for_fewer(self, tmp_path):
        def act(handler: Any, asked: dict[str, Any]) -> None:
            question = asked["messages"][-1]["content"]
            ended = "length" if wanted(question) > 5 else "stop"
            handler.send(200, completion(as_asked(len(chat.requests), question), ended=ended))

        with chatting(act) as chat:
            assert write(chat, tmp_path / "p.json", "--count=10") == 0
        assert [wanted(request["messages"][-1]["content"]) for request in chat.requests] == [10, 5, 5]

    def test_doubles_are_dropped_and_more_are_asked_for(self, tmp_path):
        def answer(number: int, question: str) -> str:
            return block(SHORT) + block(dataclasses.replace(SHORT, name="brief")) if number < 2 else block(FUNNY)

        with chatting(writes(answer)) as chat:
            assert write(chat, tmp_path / "p.json", "--count=2") == 0
        assert read_principles(tmp_path / "p.json") == [SHORT, FUNNY] and len(chat.requests) == 3
        assert "nothing but principles that are there already" in chat.requests[2]["messages"][-1]["content"]
        assert read_json(tmp_path / "p.provenance.json")["dropped"]["same_as_another"] == 3

    def test_a_writer_may_err_often_as_long_as_it_goes_on(self, tmp_path):
        def answer(number: int, question: str) -> str:
            return block(made(number)) if number % 3 == 2 else "Sure!"

        with chatting(writes(answer)) as chat:
            assert write(chat, tmp_path / "p.json", "--count=4") == 0
        assert len(chat.requests) == 12 and read_json(tmp_path / "p.provenance.json")["malformed"] == 8

    def test_no_more_are_taken_than_were_asked_for(self, tmp_path):
        with chatting(says("\n".join(block(made(i)) for i in range(9)))) as chat:
            assert write(chat, tmp_path / "p.json", "--count=2") == 0
        assert read_principles(tmp_path / "p.json") == [made(0), made(1)]

    @pytest.mark.parametrize(
        ("act", "says_so"),
        [
            (says("Sure! What about them?"), "line 1 is 'Sure! What about them?'"),
            (says(None, refusal="I cannot."), "it refuses: 'I cannot.'"),
            (says(block(SHORT)), "nothing but principles that are there already"),
        ],
    )
    def test_a_writer_that_brings_nothing_new_ends_with_what_came(self, tmp_path, capsys, act, says_so):
        with chatting(act) as chat:
            assert write(chat, tmp_path / "p.json", "--count=2") == 65
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"brought nothing new in {FRUITLESS} answers in a row" in error and says_so in error
        assert len(chat.requests) == FRUITLESS + ("nothing but" in says_so)
        assert not (tmp_path / "p.json").exists()

    def test_a_killed_or_refused_one_goes_on_without_paying_twice(self, tmp_path, capsys):
        good = writes(as_asked)

        def act(handler: Any, asked: dict[str, Any]) -> None:
            (fails(401, "no") if len(chat.requests) == 2 else good)(handler, asked)

        with chatting(act) as chat:
            assert write(chat, tmp_path / "p.json", "--count=12") == 78
            assert "does not accept the key" in capsys.readouterr().err
            assert write(chat, tmp_path / "p.json", "--count=12") == 0
        assert len(chat.requests) == 3 and len(read_principles(tmp_path / "p.json")) == 12

    def test_a_model_folder_writes_and_its_answers_can_be_replayed(self, tmp_path):
        lines = f"{block(SHORT)}\n{block(FUNNY)}".strip().splitlines(keepends=True)
        folder = write_talking_model(tmp_path / "model", [line for line in lines if line.strip()])
        assert write(None, tmp_path / "p.json", f"--model={folder}", "--count=2", "--max_tokens=60") == 0
        assert read_principles(tmp_path / "p.json") == [SHORT, FUNNY]
        first = read_json(tmp_path / "p.provenance.json")
        assert first["model"] == "model" and first["output_tokens"] > 0
        log = tmp_path / "p.json.writer" / "answers" / "answers.jsonl"
        assert write(None, tmp_path / "again.json", f"--model=replay:{log}", "--count=2") == 0
        assert read_principles(tmp_path / "again.json") == [SHORT, FUNNY]
        again = read_json(tmp_path / "again.provenance.json")
        assert again["date"] == first["date"] and again["model"] == "model"
        assert write(None, tmp_path / "more.json", f"--model=replay:{log}", "--count=3") == 65  # asked otherwise

    @pytest.mark.parametrize(
        ("act", "flags", "code", "says_so"),
        [
            (fails(401, "no"), [], 78, "does not accept the key in OPENAI_API_KEY"),
            (fails(404, "no model big"), [], 78, "it has no model 'big', or is no OpenAI-compatible server"),
            (
                keeps_silent(0.5),
                ["--timeout_s=0.05"],
                69,
                "no answer within 0.05 s, 6 times. What was answered is",
            ),
            (fails(429, "wait", Retry_After="9999"), [], 69, "asks to wait 9999 s. What was answered is kept"),
            (says("x"), ["--max_cost_usd=1"], 78, "a price is missing"),
            (says("x"), ["--max_cost_usd=x"], 78, "max_cost_usd is 'x'; it must be a number"),
            (says("x"), ["--count=0"], 78, "count is 0; it must be at least 1"),
            (says("x"), ["--held_out=20"], 78, "held_out is 20 of a count of 20"),
            (says("x"), ["--about= "], 78, "about is empty"),
            (says("x"), ["--model=m"], 78, "are both given"),
            (says("x"), ["--config.sampling.max_new_tokens=9"], 78, "does not read config.sampling.max_new_tokens"),
            (
                says("x"),
                [
                    "--max_cost_usd=0.0001",
                    "--usd_per_million_input_tokens=1",
                    "--usd_per_million_output_tokens=1",
                ],
                78,
                "The budget of $0.0001 is spent",
            ),
        ],
    )
    def test_bad_input_is_one_sentence_and_nothing_is_written(
        self, tmp_path, capsys, monkeypatch, act, flags, code, says_so
    ):
        monkeypatch.setattr(client, "WAITS", client.Waits(first=0.01))
        with chatting(act) as chat:
            assert write(chat, tmp_path / "p.json", *flags) == code
        error = capsys.readouterr().err
        assert says_so in error.splitlines()[-1] and "Traceback" not in error and KEY not in error
        # What may have cost something is remembered.
        assert [path.name for path in tmp_path.iterdir()] == (
            ["p.json.writer"] if "no answer within" in says_so else []
        )

    def test_nobody_to_ask_or_nothing_to_write_about_is_a_sentence(self, tmp_path, capsys):
        assert main(["principles", f"--out={tmp_path / 'p.json'}"]) == 78
        assert "give --model=DIR, or --base_url=" in capsys.readouterr().err
        assert main(["principles", "--model=m", f"--out={tmp_path / 'p.json'}"]) == 78
        assert "about is empty" in capsys.readouterr().err
        assert main(["principles", f"--model={tmp_path}", "--about=x", f"--out={tmp_path / 'p.json'}"]) == 65
        assert "has no config.json" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["p.json", "p.provenance.json"])
    def test_a_file_of_somebodys_is_kept(self, tmp_path, capsys, name):
        (tmp_path / name).write_text("mine")
        with chatting(writes(as_asked)) as chat:
            assert write(chat, tmp_path / "p.json", "--count=2") == 65
            assert "already exists, and no such command made it" in capsys.readouterr().err
            (tmp_path / name).unlink()
            assert write(chat, tmp_path / "p.json", "--count=2") == 0
            (tmp_path / name).write_text("[]")
            assert write(chat, tmp_path / "p.json", "--count=2") == 65
            assert "was changed after it was made" in capsys.readouterr().err
            assert (tmp_path / name).read_text() == "[]"
            assert write(chat, tmp_path / "p.json", "--count=3") == 78
        assert "was made from other inputs" in capsys.readouterr().err

    def test_a_pipe_is_refused(self, tmp_path, capsys):
        assert main(["principles", "--model=m", "--about=x", "--out=/dev/stdout"]) == 65
        assert "is no file; name one, beside which the writer's answers are kept" in capsys.readouterr().err


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> RunConfig:
    return tiny_run_config(tmp_path_factory.mktemp("files"))


class TestInARun:
    def config(self, files: RunConfig, **writer: Any) -> RunConfig:
        plain = to_dict(files)
        plain["iterations"] = 1
        plain["sampling"]["max_new_tokens"] = 8
        about = {"about": "summaries of posts", "count": 4, "held_out": 2}
        plain["constitutions"] |= {"principles": "", "writer": about | writer}
        return from_dict(plain)

    @pytest.mark.slow
    def test_principles_are_written_first_and_used(self, files, tmp_path):
        said: list[str] = []
        with chatting(writes(as_asked)) as chat:
            config = self.config(files, base_url=chat.url, chat_model="big")
            run(config, tmp_path / "run", say=said.append)
        written = tmp_path / "run" / "principles"
        assert [p.held_out for p in read_principles(written / "principles.json")] == [False, False, True, True]
        assert read_json(written / "provenance.json")["answers"] == len(chat.requests) == 1
        texts = {
            text
            for result in read_jsonl(tmp_path / "run/iter_001/eval/results.jsonl")
            for text in result["constitutions"]
        }
        assert any("trait 0." in text for text in texts) and any("trait 3." in text for text in texts)
        assert f"principles: {written / 'principles.json'}" in said
        # The server is gone, and the run's principles stand.
        run(None, tmp_path / "run", say=said.append)
        assert "This run is finished" in said[-1]

    def test_what_was_written_is_kept_where_the_run_is_refused_afterwards(self, files, tmp_path):
        long = "w\u00f3rd " * 90

        def answer(number: int, question: str) -> str:
            return "\n".join(
                block(Principle(f"q{i}", f"Have {i} {long}.", f"Lack {i} {long}.")) for i in range(wanted(question))
            )

        with chatting(writes(answer)) as chat:
            config = self.config(files, base_url=chat.url, chat_model="big")
            with pytest.raises(BadDataError, match=r"prompt of query .* exceeds the model's 256 positions"):
                run(config, tmp_path / "run")
            assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["LOCK", "principles"]
            with pytest.raises(BadDataError, match="exceeds the model's"):
                run(config, tmp_path / "run")
            assert len(chat.requests) == 1
            other = self.config(files, base_url=chat.url, chat_model="big", count=5)
            with pytest.raises(BadConfigError, match="principles was made from other inputs"):
                run(other, tmp_path / "run")

    def test_a_run_whose_writer_could_not_be_asked_can_be_mended_in_the_same_place(self, files, tmp_path):
        with chatting(in_turn(fails(404, "no such model"), says(block(SHORT) + block(FUNNY)))) as chat:
            about = {"base_url": chat.url, "count": 2, "held_out": 0}
            with pytest.raises(BadConfigError, match="it has no model 'wrong'"):
                run(self.config(files, chat_model="wrong", **about), tmp_path / "run")
            assert not (tmp_path / "run").exists()
            config = self.config(files, chat_model="big", **about)
            given: dict[str, Any] = {"begun": False, "safe_point": lambda: None, "say": print}
            with_principles(config, tmp_path / "run" / "principles", **given)
        assert read_principles(tmp_path / "run" / "principles" / "principles.json") == [SHORT, FUNNY]

    def test_principles_that_are_given_leave_the_writer_nothing_to_do(self, files, tmp_path):
        config = self.config(files, base_url="http://127.0.0.1:9/v1", chat_model="big")
        given = dataclasses.replace(config.constitutions, principles=files.constitutions.principles)
        config = dataclasses.replace(config, constitutions=given)
        said: list[str] = []
        about: dict[str, Any] = {"begun": False, "safe_point": lambda: None, "say": said.append}
        assert with_principles(config, tmp_path / "principles", **about) == config
        assert said == [f"principles are those of {given.place}: config.constitutions.writer has nothing to write"]
        assert not (tmp_path / "principles").exists()

    def test_what_can_be_refused_is_refused_before_anybody_is_asked(self, files, tmp_path, monkeypatch):
        with chatting(writes(as_asked)) as chat:
            config = self.config(files, base_url=chat.url, chat_model="big")
            few = dataclasses.replace(config, train=dataclasses.replace(config.train, queries_per_step=1000))
            with pytest.raises(BadDataError, match="needs? 1000"):
                run(few, tmp_path / "run")
        assert chat.requests == []
        monkeypatch.delenv("OPENAI_API_KEY")
        keyless = dataclasses.replace(self.config(files, chat_model="big"), model="owner/a-download-of-hours")
        with pytest.raises(BadConfigError, match="holds no key for https://api.openai.com/v1"):
            run(keyless, tmp_path / "run")
        with pytest.raises(BadDataError, match="There is no model folder|does not exist"):
            run(self.config(files, model=str(tmp_path / "none")), tmp_path / "run")
        with pytest.raises(BadConfigError, match="writes 1 principles to train on, but each constitution has 2"):
            self.config(files, chat_model="big", count=3)
        assert not (tmp_path / "run").exists()

    def test_a_command_that_writes_none_says_which_to_name(self, files, tmp_path, capsys):
        config = self.config(files, chat_model="big")
        (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
        flags = [f"--config={tmp_path / 'config.json'}"]
        assert main(["data", *flags]) == 78
        assert "name those that it has written" in capsys.readouterr().err
        assert main(["evaluate", *flags, f"--model={files.model}", f"--out={tmp_path / 'out'}"]) == 78
        assert "name those that it has written" in capsys.readouterr().err
