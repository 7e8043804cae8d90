"""The authors' response files, read and written; their questions answered by `sami generate`."""

import json
import pathlib

import pytest

from sami_jax.cli.main import main
from sami_jax.data.authors import AnsweredQuestion, read_responses, responses_text
from sami_jax.data.tokenizer import load_tokenizer
from sami_jax.errors import BadDataError
from sami_jax.files import read_jsonl
from tiny_run import tiny_run_config

ROWS = [AnsweredQuestion(f"1. Be {i}.", f"POST: é {i}", f"The post {i}.") for i in range(12)]


def columns(**changed) -> dict:
    return {
        name: {str(i): getattr(row, name) for i, row in enumerate(ROWS)} for name in AnsweredQuestion._fields
    } | changed


class TestFile:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "responses.json"
        path.write_text(responses_text(ROWS))
        assert read_responses(path) == ROWS
        assert json.loads(path.read_text()) == columns()
        assert list(json.loads(path.read_text())) == ["constitution", "question", "response"]

    def test_rows_come_in_order_of_their_numbers(self, tmp_path):
        shuffled = {name: dict(sorted(rows.items())) for name, rows in columns().items()}  # "10" before "2"
        (tmp_path / "responses.json").write_text(json.dumps(shuffled))
        assert read_responses(tmp_path / "responses.json") == ROWS

    @pytest.mark.parametrize(
        ("value", "says"),
        [
            ([], "expected an object with constitution, question, response"),
            ({"constitution": {}, "question": {}}, "expected an object with constitution"),
            ({"constitution": {}, "question": {}, "response": {}}, "holds no responses"),
            (columns(question={"0": "a"}), "question has not the same rows as constitution"),
            (columns(response={str(i): None for i in range(12)}), "response '0' must be a number, and its value text"),
            ({name: {"a": "b"} for name in AnsweredQuestion._fields}, "constitution 'a' must be a number"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, value, says):
        (tmp_path / "responses.json").write_text(json.dumps(value))
        with pytest.raises(BadDataError, match=rf"responses.json.*{says}"):
            read_responses(tmp_path / "responses.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    return pathlib.Path(tiny_run_config(tmp_path_factory.mktemp("files")).model)


TEMPLATE = "{constitution}\n{query}:"
FLAGS = [f"--config.prompts.{name}={TEMPLATE}" for name in ("generation", "training")] + ["--config.sampling.stop=()"]


def generate(model, prompts, out, *flags: str) -> int:
    words = [f"--model={model}", f"--prompts={prompts}", f"--out={out}", "--config.sampling.max_new_tokens=6", *flags]
    return main(["generate", *words, *FLAGS])


class TestGenerate:
    def test_questions_are_answered_in_the_authors_format_and_read_again(self, model, tmp_path):
        prompts, out, again = (tmp_path / name for name in ("prompts.jsonl", "responses.json", "again.json"))
        lines = [{"constitution": row.constitution, "question": row.question, "n": 1} for row in ROWS]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert generate(model, prompts, out, "--format=authors", "--rows=5") == 0
        written = read_responses(out)
        assert [row[:2] for row in written] == [row[:2] for row in ROWS] and len({row.response for row in written}) > 3
        assert generate(model, out, again, "--format=authors") == 0  # a file of responses is one of questions, too
        assert again.read_bytes() == out.read_bytes()
        one_line = tmp_path / "one_line.json"
        one_line.write_text(json.dumps(columns()))
        assert generate(model, one_line, tmp_path / "lines.jsonl") == 0
        lines = read_jsonl(tmp_path / "lines.jsonl")
        assert [line["response"] for line in lines] == [row.response for row in written]
        assert generate(model, prompts, out, "--format=authors", "--rows=5") == 0  # it stands

    def test_a_prompt_that_is_given_is_not_rendered(self, model, tmp_path):
        tokenizer = load_tokenizer(model)
        rendered = {"constitution": "1. Be brief.", "question": "Post"}
        given = {**rendered, "prompt": "1. Be brief.\nPost:"}
        (tmp_path / "prompts.jsonl").write_text(json.dumps(rendered) + "\n" + json.dumps(given) + "\n")
        assert generate(model, tmp_path / "prompts.jsonl", tmp_path / "out.jsonl") == 0
        first, second = read_jsonl(tmp_path / "out.jsonl")
        assert first["response_ids"] == second["response_ids"] and "response_prefix" not in first
        flags = ["--config.prompts.response_prefix=The post"]
        assert generate(model, tmp_path / "prompts.jsonl", tmp_path / "prefixed.jsonl", *flags) == 0
        prefixed, plain = read_jsonl(tmp_path / "prefixed.jsonl")
        assert plain == second and prefixed["response_prefix"] == "The post"
        assert prefixed["response"] == "" or prefixed["response"].startswith("The post")
        begun = tokenizer.response_ids("The post", prompt="1. Be brief.\nPost:")
        assert tokenizer.decode([*begun, *prefixed["response_ids"]]).strip() == prefixed["response"]

    @pytest.mark.parametrize(
        ("content", "flags", "says"),
        [
            ('{"prompt": "a"}\n', ["--format=authors"], "entry 1: --format=authors needs a non-empty constitution"),
            ('{"constitution": "a"}\n', [], "entry 1: expected an object with a non-empty prompt, or constitution and"),
            ('{"constitution": "a", "question": ""}\n', [], "entry 1: expected an object"),
            ('{"prompt": "", "constitution": "a", "question": "b"}\n', [], "entry 1: expected an object"),
            ('{\n"constitution": {"0": "a"}}\n', [], "expected an object with constitution, question, response"),
            ("", [], "holds no prompts"),
        ],
    )
    def test_mistakes_are_named(self, model, tmp_path, capsys, content, flags, says):
        (tmp_path / "prompts.json").write_text(content)
        assert generate(model, tmp_path / "prompts.json", tmp_path / "out", *flags) == 65
        assert f"{tmp_path / 'prompts.json'}" in (err := capsys.readouterr().err) and says in err
        assert not (tmp_path / "out").exists()
