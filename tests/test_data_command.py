"""`sami data` shows what the model will see, and writes nothing."""

import json
import pathlib

import numpy as np
import pytest

from sami_jax.cli.main import main
from sami_jax.config.fields import to_dict
from sami_jax.config.run import from_dict
from sami_jax.data.authors import read_constitutions
from sami_jax.data.pools import read_pools
from sami_jax.data.tokenizer import load_tokenizer
from sami_jax.files import read_json
from test_sources import OWN, post, write
from tiny_run import tiny_run_config

ROOT = pathlib.Path(__file__).parents[1]
POSTS = [post(f"t3_{i}", f"Post {i}") for i in range(9)] + [post("t3_0", "Again"), post("t3_x", None)]


@pytest.fixture
def settings(tmp_path) -> dict:
    settings = to_dict(tiny_run_config(tmp_path))
    source = f"tldr:{write(tmp_path / 'posts.parquet', POSTS)}"
    settings["queries"] = {"train": source, "evaluation": source, "evaluation_count": 2}
    settings["train"] |= {"steps": [1, 1, 1], "queries_per_step": 3}
    return settings


def shown(settings, tmp_path, capsys, *flags: str) -> tuple[int, str, str]:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    before = sorted(tmp_path.rglob("*"))
    code = main(["data", f"--config={path}", *flags])
    assert sorted(tmp_path.rglob("*")) == before
    return code, *capsys.readouterr()


def test_json_is_one_object_and_nothing_else(settings, tmp_path, capsys):
    code, out, err = shown(settings, tmp_path, capsys, "--json", "--limit=2")
    assert code == 0 and "warning" not in err
    found = json.loads(out)
    assert list(found) == ["splits", "dropped", "examples"] and out.count("\n") == 1
    train, evaluation = found["splits"]["train"], found["splits"]["evaluation"]
    assert (train["rows"], train["kept"], train["queries"], train["halves"], train["held_out"]) == (11, 9, 7, [4, 3], 2)
    assert evaluation["queries"] == 2 and evaluation["rows"] == 11 and train["revision"] is None
    reasons = {"null": 1, "duplicate": 1}  # once, though it is the source of both
    assert found["dropped"] == dict.fromkeys(found["dropped"], 0) | reasons
    assert [set(example) for example in found["examples"]] == [{"example_id", "constitutions", "prompts"}] * 2
    for example in found["examples"]:
        query = f"Post {example['example_id'].removeprefix('t3_')}"
        assert example["prompts"] == [f"{text}\n{query}:" for text in example["constitutions"]]
        assert len(set(example["constitutions"])) == 2
    tokenizer = load_tokenizer(pathlib.Path(settings["model"]))
    assert train["measured"] == 7 and set(train["query_tokens"]) == {"min", "p50", "p90", "p99", "max"}
    assert train["query_tokens"]["max"] == len(tokenizer.plain_ids("Post 0"))
    longest = train["prompt_tokens"]["max"]
    assert longest >= max(len(tokenizer.prompt_ids(p)) for e in found["examples"] for p in e["prompts"]) > 20


def test_the_examples_are_what_iteration_1_asks_first(settings, tmp_path, capsys):
    settings |= {"filters": {}, "iterations": 1}
    settings["sampling"] |= {"max_new_tokens": 2, "shard_queries": 4}
    _, out, _ = shown(settings, tmp_path, capsys, "--json", "--limit=4")
    examples = json.loads(out)["examples"]
    assert main(["run", f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'run'}"]) == 65
    assert "kept 0 pairs of 4 queries" in capsys.readouterr().err
    lines = (tmp_path / "run/iter_001/sample/chunks/00000.jsonl").read_text().splitlines()
    asked = [(line["example_id"], line["constitutions"]) for line in map(json.loads, lines)]
    assert asked == [(example["example_id"], example["constitutions"]) for example in examples]
    sources = read_json(tmp_path / "run/queries/sources.json")
    assert (sources["train"]["queries"], sources["train"]["dropped"]["null"]) == (7, 1)


def test_text_says_the_same_and_the_training_prompt_where_it_differs(settings, tmp_path, capsys):
    settings["prompts"] |= {"training": "{query}\n{constitution}:", "response_prefix": "The post"}
    code, out, err = shown(settings, tmp_path, capsys, "--limit=1", "--config.train.queries_per_step=4")
    assert code == 0 and "train: 7 queries, 4 for odd and 3 for even iterations" in out
    assert "11 rows, 9 kept, dropped: 1 duplicate, 1 null; 2 held out for evaluation" in out
    assert "prompt tokens of 7 queries: min " in out and out.count("=====") == 1
    assert out.count("prompt that is trained on:\nPost ") == 2 and out.count(": The post") == 4
    assert "warning: tldr:" in err and "iteration 2 samples from 3 queries" in err and "need 4" in err


def test_without_a_tokenizer_no_tokens_are_counted(settings, tmp_path, capsys):
    for model, says in (("", "config.model names no model"), ("acme/none", "HF_HUB_OFFLINE")):
        settings["model"] = model
        code, out, err = shown(settings, tmp_path, capsys, "--json", "--limit=0")
        assert code == 0 and says in err and json.loads(out)["examples"] == []
        assert json.loads(out)["splits"]["train"]["query_tokens"] is None
    settings |= {"model": "", "prompts": {"style": "chat"}}
    assert shown(settings, tmp_path, capsys, "--json")[0] == 65


def test_an_experiment_of_the_paper_on_a_copy_of_its_data(settings, tmp_path, capsys):
    source = settings["queries"]["train"]
    flags = [f"--config.queries.{name}={source}" for name in ("train", "evaluation")] + ["--config.model="]
    flags += ["--config.queries.evaluation_count=2", "--json", "--limit=1"]
    for variant in ("mistral_7b.py:summaries", "llama3_70b.py:diverse_reasoning"):
        assert main(["data", f"--config={ROOT / 'configs' / variant}", *flags]) == 0
        out, err = capsys.readouterr()
        [example] = json.loads(out)["examples"]
        assert "iteration 1 samples from 4 queries" in err and len(example["prompts"]) == 2
        for prompt, constitution in zip(example["prompts"], example["constitutions"], strict=True):
            assert f"Constitution:\n{constitution}\n\nPOST: Post " in prompt
            assert prompt.endswith("\n\nSummary: The post" if "summaries" in variant else "\n\nReasoning:")


def test_evaluation_queries_that_are_trained_on_are_warned_of(settings, tmp_path, capsys):
    rows = [row for row in OWN if isinstance(row["text"], str) and row["text"]]
    settings["queries"] = {"train": f"jsonl:{write(tmp_path / 'a.jsonl', rows)}"}
    settings["queries"]["evaluation"] = f"jsonl:{write(tmp_path / 'b.jsonl', rows[:2])}"
    code, _, err = shown(settings, tmp_path, capsys)
    assert code == 0 and "warning: 2 evaluation queries are training queries, too" in err


def test_constitutions_are_written_as_a_folder_of_the_authors(settings, tmp_path, capsys):
    config, out = tmp_path / "config.json", tmp_path / "constitutions"
    settings["constitutions"] |= {"pairing": "authors"}
    config.write_text(json.dumps(settings))
    assert main(["data", f"--config={config}", "--limit=0", f"--constitutions={out}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"{number}.json" for number in range(6)]
    pairs = read_constitutions(out)
    pools = read_pools(tmp_path / "principles.json", from_dict(settings).constitutions)
    drawn = {pools["learned"].draw(np.random.default_rng(seed)) for seed in range(200)}
    assert set(pairs) == drawn and all(all(positive.asked.values()) for positive, _ in pairs)
    settings["constitutions"] = {"folder": str(out)}
    config.write_text(json.dumps(settings))
    again = tmp_path / "again"
    assert main(["data", f"--config={config}", "--limit=0", f"--constitutions={again}"]) == 0
    assert read_constitutions(again) == pairs
    assert main(["data", f"--config={config}", "--limit=0", f"--constitutions={out}"]) == 65
    assert "already holds files" in capsys.readouterr().err
    assert (
        main(["data", f"--config={config}", f"--constitutions={tmp_path / 'c'}", "--config.constitutions.count=3"])
        == 78
    )
    settings["constitutions"] = {"principles": str(tmp_path / "principles.json"), "count": 3}
    config.write_text(json.dumps(settings))
    assert main(["data", f"--config={config}", f"--constitutions={tmp_path / 'c'}"]) == 78
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("name", "code", "says"), [("tlrd", 78, "did you mean tldr"), ("tldr", 65, "tldr:PATH")])
def test_mistakes_are_one_sentence(settings, tmp_path, capsys, name, code, says):
    settings["queries"]["train"] = name
    found, out, err = shown(settings, tmp_path, capsys, "--json")
    assert (found, out) == (code, "") and says in err and err.count("\n") == 1
