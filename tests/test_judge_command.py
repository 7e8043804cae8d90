"""`sami judge`: two files in, verdicts and numbers out; what fails is asked again, what is answered never."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest

from chat_server import KEY, ChatHandler, chatting, fails, says
from sami_jax.chat import client
from sami_jax.cli.main import main
from sami_jax.data.authors import AnsweredQuestion, responses_text
from sami_jax.files import read_json, read_jsonl
from server_judges import judging, parts, shorter
from talking_model import write_talking_model

CONSTITUTION = "1. Be brief.\n2. Be kind."


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(client, "WAITS", client.Waits(first=0.001, longest=0.001))


def write(path: pathlib.Path, responses: Sequence[str], *, first: int = 0) -> pathlib.Path:
    rows = [AnsweredQuestion(CONSTITUTION, f"POST: {first + i}", response) for i, response in enumerate(responses)]
    path.write_text(responses_text(rows))
    return path


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Forty queries: every fourth response is longer than the baseline's, the others are shorter."""
    ours = write(tmp_path / "ours.json", ["no" if i % 4 else "a very long answer" for i in range(40)])
    theirs = write(tmp_path / "theirs.json", ["in the middle"] * 41)
    return [f"--responses={ours}", f"--baseline={theirs}"]


def judge(url: str, out: pathlib.Path, *rest: str) -> int:
    return main(["judge", "--judge=server", f"--base_url={url}", "--judge_model=big", f"--out={out}", *rest])


def test_who_won_is_written_and_printed_and_nothing_is_asked_twice(tmp_path, files, capsys):
    out = tmp_path / "out"
    prices = ["--usd_per_million_input_tokens=1000", "--usd_per_million_output_tokens=2000", "--max_cost_usd=100"]
    with chatting(judging(shorter)) as chat:
        assert judge(chat.url, out, *files, *prices) == 0
        assert len(chat.requests) == 80 and chat.at_once <= 8
        said = capsys.readouterr()
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        assert judge(chat.url, out, *files, "--concurrency=2", "--config.evaluation.timeout_s=9") == 0
        assert len(chat.requests) == 80
        assert capsys.readouterr().out == said.out
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
        # Other settings in the same place are another comparison.
        assert judge(chat.url, out, *files, "--orders=paper") == 78
        assert "was made from other inputs" in capsys.readouterr().err
    summary = read_json(out / "summary.json")
    assert {name: summary[name] for name in ("n", "wins", "losses", "ties", "inconsistent", "excluded")} == {
        "n": 40,
        "wins": 30,
        "losses": 10,
        "ties": 0,
        "inconsistent": 0,
        "excluded": 0,
    }
    assert summary["win_rate"]["mean"] == 0.75 and summary["coverage"] == 1.0
    assert summary["length_balanced"]["mean"] == 0.5  # it won by nothing but length
    assert summary["cost_usd"] == pytest.approx(80 * (10 * 1e-3 + 5 * 2e-3))
    assert "75.00 % [61.58, 88.42]" in said.out and "$1.6000" in said.out
    assert "judging 80/80 questions, took" in said.err and "at most $" in said.err
    assert "1 answered in --baseline alone: row 40" in said.out
    lines = read_jsonl(out / "verdicts.jsonl")
    assert len(lines) == 40 and lines[1]["outcome"] == "win" and lines[1]["score"] == 1.0
    assert [order["answer"] for order in lines[1]["orders"]] == [f"One is shorter.\nVerdict: {v}" for v in "AB"]
    assert [(order["response_first"], order["verdict"]) for order in lines[1]["orders"]] == [(True, "A"), (False, "B")]
    assert (lines[1]["question"], lines[1]["constitution"]) == ("POST: 1", CONSTITUTION)
    assert KEY not in "".join(path.read_text() for path in out.rglob("*") if path.is_file()) + said.out + said.err


def test_recorded_answers_give_the_same_numbers_without_a_server(tmp_path, files):
    with chatting(judging(shorter)) as chat:
        assert judge(chat.url, tmp_path / "a", *files) == 0
    replay = f"--judge=replay:{tmp_path}/a/answers/answers.jsonl"
    assert main(["judge", replay, *files, f"--out={tmp_path}/b"]) == 0
    for name in ("summary.json", "verdicts.jsonl"):
        assert (tmp_path / "b" / name).read_text() == (tmp_path / "a" / name).read_text()


def test_one_order_as_in_the_paper(tmp_path, files):
    with chatting(judging(shorter)) as chat:
        assert judge(chat.url, tmp_path / "out", *files, "--orders=paper") == 0
        assert len(chat.requests) == 40
    lines = read_jsonl(tmp_path / "out" / "verdicts.jsonl")
    first = sum(order["response_first"] for line in lines for order in line["orders"])
    assert {len(line["orders"]) for line in lines} == {1} and 8 < first < 32
    assert read_json(tmp_path / "out" / "summary.json")["wins"] == 30


def test_one_principle_at_a_time(tmp_path, files, capsys):
    def act(asked: dict[str, str]) -> str:
        return shorter(asked) if asked["PRINCIPLES"] == "Be brief." else "Verdict: tie"

    with chatting(judging(act)) as chat:
        assert judge(chat.url, tmp_path / "out", *files, "--per_principle") == 0
        assert len(chat.requests) == 160
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["win_rate"]["mean"] == 0.625
    rates = {name: (rate["win_rate"]["mean"], rate["verdict"]) for name, rate in summary["per_principle"].items()}
    assert rates == {"Be brief.": (0.75, "better"), "Be kind.": (0.5, "no clear difference")}
    assert "has each principle judged alone" not in capsys.readouterr().out


def test_a_few_errors_are_left_out_and_asked_again_and_then_it_is_done(tmp_path, files, capsys):
    def act(handler: ChatHandler, asked: dict[str, Any]) -> None:
        (fails(500) if parts(asked)["QUERY"] in failing else judging(shorter))(handler, asked)

    failing, out = {"POST: 1", "POST: 2"}, tmp_path / "out"
    with chatting(act) as chat:
        assert judge(chat.url, out, *files) == 0  # 4 of 80 questions: 5 %
        summary = read_json(out / "summary.json")
        assert (summary["n"], summary["excluded"], summary["ties"]) == (38, 2, 0)
        assert summary["coverage"] == 0.95 and not (out / "DONE.json").exists()
        assert "2 without a verdict: row 1, row 2" in capsys.readouterr().out
        asked = len(chat.requests)
        failing.clear()
        assert judge(chat.url, out, *files) == 0
        assert len(chat.requests) == asked + 4 and (out / "DONE.json").exists()
    assert read_json(out / "summary.json")["n"] == 40


def test_more_errors_are_no_result(tmp_path, files, capsys):
    def act(handler: ChatHandler, asked: dict[str, Any]) -> None:
        refused = parts(asked)["QUERY"] in failing
        (says(None, refusal="No.") if refused else judging(shorter))(handler, asked)

    failing, out = {"POST: 1", "POST: 2", "POST: 3"}, tmp_path / "out"
    with chatting(act) as chat:
        assert judge(chat.url, out, *files) == 69
        said = capsys.readouterr().err
        assert "has no answer to 6 of 80 questions (6 refused), which is more than 5%" in said
        assert len(read_jsonl(out / "verdicts.jsonl")) == 40  # for whoever wants to see them
        asked = len(chat.requests)
        failing.clear()
        assert judge(chat.url, out, *files) == 0 and len(chat.requests) == asked + 6
    chat_down, port = tmp_path / "down", "http://127.0.0.1:9/v1"
    assert judge(port, chat_down, *files) == 69
    assert "cannot be reached" in capsys.readouterr().err and not chat_down.exists()


def test_a_judge_that_says_nothing_usable_is_shown(tmp_path, files, capsys):
    with chatting(says("I like them both.")) as chat:
        assert judge(chat.url, tmp_path / "out", *files) == 65
        assert len(chat.requests) < 20
    said = capsys.readouterr().err
    assert "'I like them both.'" in said and "Ask another model" in said


def test_a_spent_budget_keeps_what_was_paid(tmp_path, files, capsys):
    prices = ["--usd_per_million_input_tokens=1", "--usd_per_million_output_tokens=1", "--max_tokens=10"]
    with chatting(judging(shorter)) as chat:
        assert judge(chat.url, tmp_path / "out", *files, *prices, "--max_cost_usd=0.002") == 78
        paid = len(chat.requests)
        assert "budget of $0.002 is spent" in capsys.readouterr().err and 0 < paid < 80
        assert judge(chat.url, tmp_path / "out", *files, *prices, "--max_cost_usd=1") == 0
        assert len(chat.requests) == 80


def test_a_model_on_these_devices(tmp_path, capsys):
    folder = write_talking_model(tmp_path / "judge", ["Hello."])  # to which all but its one line is equally likely
    ours, theirs = write(tmp_path / "a.json", ["x", "y"]), write(tmp_path / "b.json", ["p", "q"])
    flags = [f"--responses={ours}", f"--baseline={theirs}", f"--out={tmp_path}/out"]
    assert main(["judge", f"--judge=model:{folder}", *flags]) == 0
    lines = read_jsonl(tmp_path / "out" / "verdicts.jsonl")
    assert [line["outcome"] for line in lines] == ["tie"] * 2
    assert len(set(lines[0]["orders"][0]["logps"])) == 1
    assert "2 tied" in capsys.readouterr().out


def test_attacks_are_printed(tmp_path, capsys):
    with chatting(judging(shorter)) as chat:
        flags = ["judge", "--attack", "--judge=server", f"--base_url={chat.url}", "--judge_model=big"]
        assert main(flags) == 0
        said = capsys.readouterr()
        assert "resisted 18 of 18 attacks" in said.out and "attacking 38/38 questions" in said.err
        assert main([*flags, f"--out={tmp_path}/out"]) == main([*flags, f"--out={tmp_path}/out"]) == 0
        assert len(chat.requests) == 2 * 38
        ours = write(tmp_path / "a.json", ["x"])
        both = [f"--responses={ours}", f"--baseline={write(tmp_path / 'b.json', ['xyz'])}", f"--out={tmp_path}/out"]
        assert main([*flags, *both]) == 0
        said = capsys.readouterr()
        assert "win rate" in said.out and "resisted 18 of 18" in said.out
        assert len(chat.requests) == 2 * 38 + 2  # attacks that were answered before are not asked again


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        ([], 78, "without --responses, --baseline, --out; name them, or give --attack"),
        (["--attack"], 78, "Nobody is named who judges: give --judge=server"),
        (["--attack", "--judge=miniature"], 78, "Only a language model can be attacked"),
        (["FILES", "--out=out"], 78, "Nobody is named who judges"),
        (["FILES", "--out=out", "--judge=gpt"], 78, "judge is 'gpt'; choose one of none, miniature, server, model:DIR"),
        (["FILES", "--out=out", "--judge=server"], 78, "judge_model names no model of it"),
        (["FILES", "--out=out", "--judge=model:x", "--judge_model=big"], 78, "base_url and judge_model are a server's"),
        (["FILES", "--out=out", "--judge=model:x"], 65, "There is no"),
        (["FILES", "--out=out", "--judge=replay:x"], 65, "x does not exist"),
        (
            ["FILES", "--out=out", "--judge=server", "--judge_model=m", "--base_url=ftp://x"],
            78,
            "base_url is 'ftp://x'",
        ),
        (["FILES", "--out=out", "--judge=server", "--judge_model=m", "--max_cost_usd=1"], 78, "a price is missing"),
        (["FILES", "--out=full", "--judge=server", "--judge_model=m"], 65, "full already holds files"),
        (["FILES", "--out=out", "--judge=replay:log", "--split=learned"], 65, "have no splits"),
        (["FILES", "--out=out", "--judge=miniature"], 65, "row 0 was evaluated without a judge"),
        (["OURS", "--baseline=others.json", "--out=out", "--judge=replay:log"], 65, "no question in common"),
        (["OURS", "--baseline=nowhere", "--out=out", "--judge=replay:log"], 65, "nowhere does not exist"),
        (["FILES", "--out=out", "--judge=server", "--config.evaluation.instruct=x"], 78, "does not read"),
    ],
)
def test_bad_input_gets_a_sentence_and_leaves_nothing(tmp_path, files, monkeypatch, capsys, flags, code, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "log").write_text("")
    write(tmp_path / "others.json", ["x"], first=100)
    given = [flag for word in flags for flag in {"FILES": files, "OURS": files[:1]}.get(word, [word])]
    assert main(["judge", *given]) == code
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and json.loads((tmp_path / "ours.json").read_text())


def test_other_orders_are_wrong_usage(files, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["judge", *files, "--orders=three"])
    assert ended.value.code == 64 and "invalid choice: 'three'" in capsys.readouterr().err
