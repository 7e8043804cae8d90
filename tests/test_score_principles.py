"""Principles scored under a base model: the 2 x 2 matrix of each query, sorted, with a warning for what is not read."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from sami_jax.cli.main import main
from sami_jax.config.fields import to_dict
from sami_jax.config.run import RunConfig
from sami_jax.data.pairs import Pair, write_pairs
from sami_jax.data.tokenizer import load_tokenizer
from sami_jax.errors import StoppedError
from sami_jax.evaluation.statistics import Estimate
from sami_jax.files import read_jsonl
from sami_jax.stages.score_principles import ScorePrinciples, is_readable, scores_table
from sami_jax.stages.stage import complete_file, file_source, model_source
from talking_model import write_talking_model
from tiny_run import tiny_run_config

PRINCIPLES = [  # the less readable first
    {"name": "kind", "definition": "Say it kindly.", "antithesis": "Say it rudely.", "held_out": True},
    {"name": "brief", "definition": "Be brief.", "antithesis": "Do not be brief."},
    {"name": "please", "definition": "Be kind, please.", "antithesis": "Be rude, please."},  # often answered by nothing
]
UNSCORED = {"kind": 0, "brief": 0, "please": 4}
COUNT = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("files")
    config = tiny_run_config(folder)
    (folder / "principles.json").write_text(json.dumps(PRINCIPLES))
    queries = dataclasses.replace(config.queries, evaluation=config.queries.train, train="", evaluation_count=COUNT)
    sampling = dataclasses.replace(config.sampling, max_new_tokens=8, shard_queries=4)
    return dataclasses.replace(config, queries=queries, sampling=sampling)


@pytest.fixture(scope="module")
def config_file(config, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    return path


@pytest.fixture(scope="module")
def scored(config_file, tmp_path_factory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("scored") / "scores.jsonl"
    assert main(["principles", "--score", f"--config={config_file}", f"--out={out}"]) == 0
    return read_jsonl(out)


def stage_of(config: RunConfig, **changes: Any) -> ScorePrinciples:
    principles, queries = config.constitutions.principles, config.queries.evaluation
    stage = ScorePrinciples.of(
        config,
        model=model_source(pathlib.Path(config.model)),
        principles=file_source(pathlib.Path(principles)),
        queries=file_source(pathlib.Path(queries)),
    )
    return dataclasses.replace(stage, **changes)


def test_each_line_has_the_principle_and_its_score(scored):
    lines = {line["name"]: line for line in scored}
    for principle in PRINCIPLES:
        line = lines[principle["name"]]
        assert {name: line[name] for name in principle} == principle
        unscored = UNSCORED[principle["name"]]
        assert (line["n_queries"], line["n_unscored"], line["normalize"]) == (COUNT, unscored, "mean")
        assert line["mi_nats"]["n"] == COUNT - unscored and line["mi_nats"]["low"] < line["mi_nats"]["mean"] < math.log(
            2
        )
        assert line["readable"] == (line["mi_nats"]["low"] > 0)
    assert [line["name"] for line in scored if line["held_out"]] == ["kind"]
    means = [line["mi_nats"]["mean"] for line in scored]
    assert means == sorted(means, reverse=True) and [line["name"] for line in scored] == ["brief", "please", "kind"]


@pytest.mark.parametrize("name", ["kind", "please"])
def test_it_is_what_generate_and_score_give_for_the_same_prompts(config, config_file, scored, tmp_path, name):
    """Responses and their matrices by the other commands; the mean and its 1.96 standard errors by hand."""
    [principle] = [principle for principle in PRINCIPLES if principle["name"] == name]
    sides = [f"1. {principle[side]}" for side in ("definition", "antithesis")]
    queries = read_jsonl(pathlib.Path(config.queries.evaluation))[:COUNT]
    asked = [{"constitution": side, "question": query["text"]} for query in queries for side in sides]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    common = [f"--config={config_file}", f"--model={config.model}"]
    files = [f"--prompts={tmp_path / 'prompts.jsonl'}", f"--out={tmp_path / 'responses.jsonl'}"]
    assert main(["generate", *common, *files, "--rows=8"]) == 0
    responses = read_jsonl(tmp_path / "responses.jsonl")
    tokenizer = load_tokenizer(pathlib.Path(config.model))
    pairs = []
    for number, query in enumerate(queries):
        both = responses[2 * number : 2 * number + 2]
        prompts = [f"{side}\n{query['text']}:" for side in sides]
        prompt_ids = tuple(tuple(tokenizer.prompt_ids(prompt)) for prompt in prompts)
        if not all(response["response_ids"] for response in both):
            continue
        texts, ids = tuple(r["response"] for r in both), tuple(tuple(r["response_ids"]) for r in both)
        pairs.append(Pair(query["example_id"], tuple(prompts), texts, prompt_ids, ids))
    write_pairs(tmp_path / "pairs.json", pairs)
    out = tmp_path / "scores.jsonl"
    assert main(["score", *common, f"--pairs={tmp_path / 'pairs.json'}", f"--out={out}"]) == 0
    mi_nats = np.array([line["mi_nats"] for line in read_jsonl(out)])
    half = 1.96 * mi_nats.std(ddof=1) / math.sqrt(len(mi_nats))
    [line] = [line for line in scored if line["name"] == name]
    found = [line["mi_nats"][key] for key in ("mean", "low", "high")]
    # Batches of another size round otherwise, in the last bits of float32.
    assert found == pytest.approx([mi_nats.mean(), mi_nats.mean() - half, mi_nats.mean() + half], abs=1e-6)
    differ = [responses[2 * i]["response"] != responses[2 * i + 1]["response"] for i in range(COUNT)]
    assert line["distinct"] == pytest.approx(np.mean(differ)) and 0 < line["distinct"]


@pytest.mark.parametrize(
    ("mi_nats", "readable"),
    [
        (Estimate(0.2, 0.1, 0.3, 9), True),
        (Estimate(0.2, -0.1, 0.5, 9), False),
        (Estimate(0.2, 0.0, 0.4, 9), False),
        (Estimate(-0.2, -0.3, -0.1, 9), False),
        (Estimate(0.2, None, None, 1), False),
        (None, False),
    ],
)
def test_a_principle_is_readable_where_its_interval_lies_above_0(mi_nats, readable):
    assert is_readable(mi_nats) == readable


def test_a_base_that_pays_no_heed_reads_nothing(config, tmp_path, capsys):
    folder = write_talking_model(tmp_path / "model", ["Always the same."])
    out = tmp_path / "scores.jsonl"
    principles, queries = config.constitutions.principles, config.queries.evaluation
    flags = [f"--principles={principles}", f"--queries={queries}", f"--model={folder}", f"--out={out}"]
    settings = ["--config.queries.evaluation_count=3", "--config.sampling.max_new_tokens=8"]
    assert main(["principles", "--score", *flags, *settings]) == 0
    for line in read_jsonl(out):
        # Its log-probs are the same under both constitutions: each softmax is even, and the bound is 0.
        assert line["mi_nats"]["mean"] == pytest.approx(0.0, abs=1e-6) and line["distinct"] == 0.0
        assert not line["readable"]
    printed = capsys.readouterr().err
    assert (
        "warning: the base cannot tell definition from antithesis of kind, brief, please: the interval reaches 0"
        in printed
    )
    assert "SAMI amplifies a reading, it does not create one" in printed


def test_empty_responses_are_counted_and_come_last(config, tmp_path):
    folder = write_talking_model(tmp_path / "model", [" "])
    lines = complete_file(stage_of(config, model=model_source(folder), query_count=3), None, safe_point=lambda: None)
    assert [(line["mi_nats"], line["readable"], line["n_unscored"]) for line in lines] == [(None, False, 3)] * 3
    good = {**lines[1], "name": "good", "mi_nats": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}, "readable": True}
    one = {**good, "name": "one", "mi_nats": {"mean": 0.5, "low": None, "high": None, "n": 1}, "n_unscored": 2}
    table = scores_table([good, {**one, "readable": False}, {**lines[0], "held_out": True}]).splitlines()
    assert table[1].split() == ["good", "0.5", "[0.4,", "0.6]", "0%", "0"]
    assert table[2].split() == ["one", "0.5", "[-,", "-]", "0%", "1"]
    assert table[3].split() == [lines[0]["name"], "-", "[-,", "-]", "0%", "0", "held", "out"]
    none = (
        f"warning: one, {lines[0]['name']} has no interval: fewer than two queries have responses that are not empty."
    )
    assert table[4:] == [none]
    assert "warning" not in scores_table([good])


def test_a_stopped_one_goes_on_to_the_same_bytes(config, tmp_path):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    complete_file(stage_of(config), whole, safe_point=lambda: None)
    points = 0

    def stop() -> None:
        nonlocal points
        points += 1
        if points in (1, 4):  # inside the first principle, and inside the second
            raise StoppedError("stop")

    for _ in range(2):
        with pytest.raises(StoppedError):
            complete_file(stage_of(config), stopped, safe_point=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stopped.jsonl.parts").rglob("*.jsonl")}
    assert len(kept) >= 3
    complete_file(stage_of(config), stopped, safe_point=stop)
    assert stopped.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("flags", "code", "says_so"),
    [
        (["--score"], 78, "There is nothing to score: give --model"),
        (["--score", "--model=m"], 78, "There is nothing to score: give --principles"),
        (["--score", "--model=m", "--principles=none.json"], 65, "none.json does not exist"),
        (["--score", "--about=x", "--count=3"], 78, "--about, --count is for principles that are written alone"),
        (["--principles=p.json", "--about=x"], 78, "--principles is for principles that are scored, by --score, alone"),
        (["--score", "--config.constitutions.writer.count=3"], 78, "does not read config.constitutions.writer.count"),
        (["--score", "--config.constitutions.count=3"], 78, "does not read config.constitutions.count"),
        (["--config.queries.evaluation_count=3"], 78, "does not read config.queries.evaluation_count"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, flags, code, says_so):
    monkeypatch.chdir(tmp_path)
    assert main(["principles", *flags, "--out=scores.jsonl"]) == code
    assert says_so in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_queries_that_do_not_fit_are_refused_before_the_weights_are_read(config_file, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"example_id": "long", "text": "w\u00f3rd " * 200}))
    flags = [f"--config={config_file}", f"--queries={tmp_path / 'long.jsonl'}", f"--out={tmp_path / 'scores.jsonl'}"]
    assert main(["principles", "--score", *flags]) == 65
    assert "the generation prompt of query 'long' has" in capsys.readouterr().err
    assert not (tmp_path / "scores.jsonl.parts").exists()
