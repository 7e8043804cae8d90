"""A run whose responses a language model compares, with the base's and an instruction-tuned model's."""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from chat_server import KEY, ChatServer, chatting, drops, says
from sami_jax.chat import client
from sami_jax.chat.answer_log import read_log
from sami_jax.chat.questions import Answer
from sami_jax.cli.main import main
from sami_jax.config.fields import to_dict
from sami_jax.config.run import RunConfig, from_dict
from sami_jax.errors import BadConfigError, BadDataError, UnavailableError
from sami_jax.evaluation.results import read_results
from sami_jax.files import read_json, read_jsonl, write_json
from sami_jax.report.reading import read_run
from sami_jax.report.tables import summary_table
from sami_jax.run.loop import run
from server_judges import judging, parts, shorter
from talking_model import CHAT
from tiny_run import tiny_run_config

MARKER = "9"  # of the base's plain text, which means nothing in a chat: the instruction-tuned model writes it


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        patch.setattr(client, "WAITS", client.Waits(first=0.001, longest=0.001))
        yield


def config_of(folder: pathlib.Path, url: str) -> RunConfig:
    config = to_dict(tiny_run_config(folder))
    instruct = folder / "instruct"
    shutil.copytree(config["model"], instruct)
    (instruct / "chat_template.jinja").write_text(CHAT)
    config["evaluation"] |= {"judge": "server", "base_url": url, "judge_model": "big", "instruct": str(instruct)}
    config["iterations"], config["train"]["steps"] = 1, [1]
    config["sampling"]["stop"] = [MARKER]
    return from_dict(config)


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory) -> Iterator[tuple[RunConfig, pathlib.Path, ChatServer, str]]:
    """A run whose judge was down when it came to be asked, and up when the run was started again."""
    folder = tmp_path_factory.mktemp("judged")
    with chatting(drops) as chat:
        config = config_of(folder, chat.url)
        with pytest.raises(UnavailableError) as error:
            run(config, folder / "run")
        assert (folder / "run" / "report" / "index.html").exists()  # of all that was measured
        stages = [line["stage"] for line in read_jsonl(folder / "run" / "events.jsonl")]
        chat.requests.clear()
        chat.act = judging(shorter)
        run(None, folder / "run")
        assert [line["stage"] for line in read_jsonl(folder / "run" / "events.jsonl")][: len(stages)] == stages
        yield config, folder / "run", chat, str(error.value)


def test_a_judge_that_is_down_stops_no_training(judged_run):
    _, workdir, _, said = judged_run
    assert "and so on for 3 of" in said and "run the same command later" in said
    stages = [line["stage"] for line in read_jsonl(workdir / "events.jsonl")]
    assert stages == [
        "eval",
        "instruct",
        "sample",
        "train",
        "export",
        "eval",
        "judge/instruct/learned",
        "judge/base/learned",
        "judge/instruct/learned",
    ]


def test_each_comparison_has_its_folder_and_all_share_one_log(judged_run):
    _, workdir, chat, _ = judged_run
    places = [f"iter_{i:03d}/judge/{name}/learned" for i, name in ((0, "instruct"), (1, "base"), (1, "instruct"))]
    assert sorted(str(p.parent.relative_to(workdir)) for p in workdir.glob("iter_*/judge/*/*/DONE.json")) == sorted(
        places
    )
    asked = [request["messages"][-1]["content"] for request in chat.requests]
    replies = [record.reply for record in read_log(workdir / "judge" / "answers.jsonl")]
    assert len(set(asked)) == len(asked) == sum(isinstance(reply, Answer) for reply in replies) > 16
    results, base = (read_results(workdir / f"iter_{i:03d}" / "eval" / "results.jsonl") for i in (1, 0))
    lines = read_jsonl(workdir / places[1] / "verdicts.jsonl")
    assert [(line["response"], line["baseline"]) for line in lines] == [
        pair for a, b in zip(results, base, strict=True) for pair in zip(a.responses, b.responses, strict=True)
    ]
    assert [line["constitution"] for line in lines[:2]] == list(results[0].constitutions)
    summary = read_json(workdir / places[1] / "summary.json")
    assert summary["n"] == 4 and summary["cost_usd"] == 0.0


def test_the_instruction_tuned_model_answers_through_its_chat_template(judged_run):
    """What is compared with is `sami generate` in the style of chats, without markers."""
    config, workdir, _, _ = judged_run
    found = read_results(workdir / "iter_000" / "instruct" / "results.jsonl")
    base = read_results(workdir / "iter_000" / "eval" / "results.jsonl")
    assert [(r.example_id, r.constitutions) for r in found] == [(r.example_id, r.constitutions) for r in base]
    prompts = workdir / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"constitution": c, "question": r.query}) + "\n" for r in found for c in r.constitutions)
    )
    flags = [
        f"--model={config.evaluation.instruct}",
        f"--prompts={prompts}",
        f"--out={workdir}/generated.jsonl",
        "--config.prompts.style=chat",
        f"--config.prompts.generation={config.prompts.generation}",
        f"--config.prompts.training={config.prompts.training}",
        "--config.sampling.max_new_tokens=24",
        "--config.sampling.stop=()",
    ]
    assert main(["generate", *flags]) == 0
    expected = [line["response"] for line in read_jsonl(workdir / "generated.jsonl")]
    assert any(MARKER in text for text in expected)
    assert [text for result in found for text in result.responses] == expected
    assert expected != [text for result in base for text in result.responses]


def test_the_report_has_the_rates_side_by_side(judged_run):
    _, workdir, _, _ = judged_run
    page = (workdir / "report" / "index.html").read_text()
    for opponent in ("base", "instruction-tuned model"):
        table = page[page.index(f"Compared with the {opponent}: learned principles") :].split("</table>")[0]
        labels = re.findall(r'<tr><th scope="row">(.*?)</th>', table)
        assert labels[:3] == ["Win rate, raw", "Win rate, length-balanced", "Win rate, length-corrected"]
        assert "Win rate on: Be brief." in labels and "Response shown first wins" in labels
        assert "Judge: big at http" in table
    found = read_run(workdir)
    summary = read_json(workdir / "iter_001" / "judge" / "base" / "learned" / "summary.json")
    split = found.last.splits["learned"]
    assert split.estimates["win_rate"].mean == summary["win_rate"]["mean"] and split.judge.startswith("big at")
    assert split.wins + split.ties + split.losses == summary["n"] == 4
    base = found.base.splits["learned"]  # which is compared with the other opponent alone
    assert "win_rate" not in base.estimates and base.judge is None
    assert "After 1 iteration, " in page and "there was no judge" not in page
    assert f"{100 * summary['win_rate']['mean']:.1f}" in summary_table(workdir)
    outcomes = {line["outcome"] for line in read_jsonl(workdir / "iter_001/judge/base/learned/verdicts.jsonl")}
    words = {"win": "won against the base", "loss": "lost against the base", "tie": "tied with the base"}
    assert outcomes <= set(words) and all(f">{words[outcome]}</li>" in page for outcome in outcomes)


def test_a_finished_run_asks_nobody(judged_run):
    _, workdir, chat, _ = judged_run
    asked, page = len(chat.requests), (workdir / "report" / "index.html").read_bytes()
    said: list[str] = []
    run(None, workdir, say=said.append)
    assert len(chat.requests) == asked and "nothing to do" in said[-1]
    assert (workdir / "report" / "index.html").read_bytes() == page


def test_evaluate_does_the_same(judged_run, tmp_path, capsys):
    config, workdir, chat, _ = judged_run
    write_json(tmp_path / "config.json", to_dict(config))
    flags = [f"--config={tmp_path}/config.json", f"--model={workdir}/iter_001/export", f"--out={tmp_path}/out"]
    before = len(chat.requests)
    assert main(["evaluate", *flags, f"--baseline={workdir}/iter_000/eval"]) == 0
    assert (tmp_path / "out" / "instruct" / "results.jsonl").read_bytes() == (
        workdir / "iter_000" / "instruct" / "results.jsonl"
    ).read_bytes()
    for opponent in ("base", "instruct"):
        for name in ("summary.json", "verdicts.jsonl"):
            of_run, alone = (
                [without_times(line) for line in read_jsonl(folder / "judge" / opponent / "learned" / name)]
                if name.endswith("l")
                else read_json(folder / "judge" / opponent / "learned" / name)
                for folder in (workdir / "iter_001", tmp_path / "out")
            )
            assert of_run == alone
    assert len(chat.requests) > before and "win rate" in capsys.readouterr().err


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "orders": [{k: v for k, v in order.items() if k != "time"} for order in line["orders"]]}


def test_some_errors_are_asked_again_when_the_run_is_started_again(judged_run, tmp_path):
    _, workdir, chat, _ = judged_run
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    # As if one of 40 questions had failed: the stage is open, and one answer is missing.
    place = copy / "iter_001" / "judge" / "base" / "learned"
    (place / "DONE.json").unlink()
    log = copy / "judge" / "answers.jsonl"
    asked = read_jsonl(place / "verdicts.jsonl")[0]
    lines = log.read_text().splitlines(keepends=True)
    kept = [line for line in lines if asked["response"] not in parts(json.loads(line)).values()]
    log.write_text("".join(kept))
    before = len(chat.requests)
    run(None, copy)
    assert 0 < len(chat.requests) - before <= len(lines) - len(kept) and (place / "DONE.json").exists()
    assert read_json(place / "summary.json") == read_json(workdir / "iter_001/judge/base/learned/summary.json")


def unjudged(workdir: pathlib.Path, copy: pathlib.Path) -> pathlib.Path:
    """A copy of a run in which everything but judging is done."""
    shutil.copytree(workdir, copy)
    for path in (*copy.glob("**/judge"), copy / "report"):
        shutil.rmtree(path, ignore_errors=True)
    return copy


def test_a_budget_is_that_of_all_comparisons_and_may_be_raised(judged_run, tmp_path):
    config, workdir, chat, _ = judged_run
    copy = unjudged(workdir, tmp_path / "run")

    def with_budget(usd: float) -> RunConfig:
        prices = {"usd_per_million_input_tokens": 1.0, "usd_per_million_output_tokens": 1.0}
        return dataclasses.replace(
            config, evaluation=dataclasses.replace(config.evaluation, max_tokens=2048, max_cost_usd=usd, **prices)
        )

    before = len(chat.requests)
    with pytest.raises(BadConfigError, match=r"budget of \$0.0036 is spent.*raise max_cost_usd to go on"):
        run(with_budget(0.0036), copy)
    paid = len(chat.requests) - before
    assert 0 < paid < 48 and (copy / "report" / "index.html").exists()
    run(with_budget(1.0), copy)
    assert len(chat.requests) - before == 48
    costs = [read_json(path)["cost_usd"] for path in copy.glob("iter_*/judge/*/*/summary.json")]
    assert len(costs) == 3 and sum(costs) == pytest.approx(48 * 15e-6)
    with pytest.raises(BadConfigError, match="started with other settings .*evaluation.orders"):
        run(dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, orders="paper")), copy)


def test_a_judge_that_says_nothing_usable_leaves_a_report_and_is_shown(judged_run, tmp_path):
    _, workdir, chat, _ = judged_run
    copy, act = unjudged(workdir, tmp_path / "run"), chat.act
    chat.act = says("Lovely, both.")
    try:
        with pytest.raises(BadDataError, match="'Lovely, both.'"):
            run(None, copy)
    finally:
        chat.act = act
    assert "there was no judge" in (copy / "report" / "index.html").read_text()


def test_what_cannot_judge_or_chat_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    config = to_dict(config_of(tmp_path, "http://127.0.0.1:9/v1"))
    shape = tmp_path / "instruct" / "config.json"
    short = read_json(shape) | {"max_position_embeddings": 64}
    whole = shape.read_text()
    shape.write_text(json.dumps(short))
    with pytest.raises(BadDataError, match="for config.evaluation.instruct: the generation prompt of query 'q0' has"):
        run(from_dict(config), tmp_path / "run")
    shape.write_text(whole)
    (tmp_path / "instruct" / "chat_template.jinja").unlink()
    with pytest.raises(BadDataError, match=r"instruct cannot chat: .*Take an instruction-tuned model"):
        run(from_dict(config), tmp_path / "run")
    judge = {"judge": f"model:{tmp_path}/nowhere", "instruct": "", "judge_model": "", "base_url": ""}
    with pytest.raises(BadDataError, match="no model folder .*nowhere"):
        run(from_dict(config | {"evaluation": config["evaluation"] | judge}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
