"""Prefixes, reasoning and chats go through sampling, training data and evaluation as one."""

import dataclasses
import json
import pathlib

import pytest

from sami_jax.config.run import RunConfig
from sami_jax.data.pairs import read_pairs
from sami_jax.data.tokenizer import load_tokenizer
from sami_jax.errors import BadDataError
from sami_jax.files import read_json, read_jsonl
from sami_jax.stages.evaluate import Evaluate
from sami_jax.stages.sample import Sample
from sami_jax.stages.stage import complete, file_source, model_source
from tiny_run import tiny_run_config

CHAT = (
    "{{ bos_token }}{% for m in messages %}</s>{{ m.role }}:{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}</s>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    config = tiny_run_config(tmp_path_factory.mktemp("files"))
    (pathlib.Path(config.model) / "chat_template.jinja").write_text(CHAT)
    sampling = dataclasses.replace(config.sampling, max_new_tokens=12)
    return dataclasses.replace(config, sampling=sampling)


def sampled(config: RunConfig, out: pathlib.Path, **prompts) -> pathlib.Path:
    """Samples for a training under changed prompts. Returns the folder."""
    config = dataclasses.replace(config, prompts=dataclasses.replace(config.prompts, **prompts))
    files = (file_source(pathlib.Path(path)) for path in (config.queries.train, config.constitutions.principles))
    queries, principles = files
    stage = Sample.of(config, 1, model=model_source(pathlib.Path(config.model)), queries=queries, principles=principles)
    return complete(stage, out, safe_point=lambda: None).source.path


def pairs_of(config: RunConfig, folder: pathlib.Path):
    tokenizer = load_tokenizer(pathlib.Path(config.model))
    pairs = read_pairs(
        folder / "pairs.json", tokenizer, boundary="exact", max_positions=256, vocab_size=tokenizer.vocab_size
    )
    return tokenizer, pairs, read_json(folder / "pairs.json")


def test_a_prefix_is_given_and_never_trained(config, tmp_path):
    tokenizer, pairs, entries = pairs_of(config, sampled(config, tmp_path / "out", response_prefix="The post"))
    for pair, queries in zip(pairs, entries.values(), strict=True):
        assert pair.response_prefix == "The post"
        for entry, ids, response_ids in zip(queries, pair.prompt_ids, pair.response_ids, strict=True):
            assert entry["response_prefix"] == "The post" and entry["response"].startswith("The post")
            assert tokenizer.decode(ids) == entry["prompt"] + " The post"  # the tokens that the model was given
            assert tokenizer.decode([*ids, *response_ids]).rstrip() == f"{entry['prompt']} {entry['response']}"
    chunk = read_jsonl(tmp_path / "out/chunks/00000.jsonl")[0]
    assert chunk["response_prefix"] == "The post" and chunk["responses"][0]["text"].startswith("The post")
    # A file without ids, as a person writes it, has the same prompt.
    bare = {key: [{k: v for k, v in e.items() if not k.endswith("_ids")} for e in q] for key, q in entries.items()}
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "pairs.json").write_text(json.dumps(bare))
    for given, own in zip(pairs_of(config, tmp_path / "bare")[1], pairs, strict=True):
        assert given.prompt_ids == own.prompt_ids and given.response_prefix == "The post"
        texts = [tokenizer.decode([*p, *r]).rstrip() for p, r in zip(given.prompt_ids, given.response_ids, strict=True)]
        assert texts == [f"{p} {r}" for p, r in zip(own.prompts, own.responses, strict=True)]


def test_reasoning_is_cut_and_responses_without_an_answer_are_counted(config, tmp_path):
    raw = read_jsonl(sampled(config, tmp_path / "raw") / "chunks/00000.jsonl")
    texts = [response["text"] for record in raw for response in record["responses"]]
    # A character that most, and not all, of a random model's responses have.
    marker = min(map(chr, range(33, 127)), key=lambda c: abs(sum(c in text for text in texts) / len(texts) - 0.8))
    out = sampled(config, tmp_path / "out", chain_of_thought=True, answer_marker=marker)
    counts = read_json(out / "DONE.json")["counts"]
    assert counts["dropped"]["no_answer"] > 0 and counts["kept"] > 0
    tokenizer, pairs, _ = pairs_of(config, out)
    by_id = {record["example_id"]: record for part in sorted(out.glob("chunks/*")) for record in read_jsonl(part)}
    for pair in pairs:
        whole = [response["text"] for response in by_id[pair.example_id]["responses"]]
        assert list(pair.responses) == [text.partition(marker)[2].strip() for text in whole]
        for prompt, answer, ids in zip(pair.prompts, pair.responses, pair.response_ids, strict=True):
            assert list(ids) == tokenizer.response_ids(answer, prompt=prompt)
    assert {reject["reason"] for reject in read_jsonl(out / "rejects.jsonl")} >= {"no_answer"}
    with pytest.raises(BadDataError, match=r"kept 0 pairs of .*'no_answer': \d\d"):
        sampled(config, tmp_path / "none", chain_of_thought=True, answer_marker="no such marker")


def test_an_evaluated_response_without_an_answer_is_counted_and_not_scored(config, tmp_path):
    prompts = dataclasses.replace(config.prompts, chain_of_thought=True, answer_marker="no such marker")
    config = dataclasses.replace(config, prompts=prompts)
    base = model_source(pathlib.Path(config.model))
    queries = file_source(pathlib.Path(config.queries.evaluation))
    principles = file_source(pathlib.Path(config.constitutions.principles))
    stage = Evaluate.of(config, 0, model=base, base=base, baseline=None, queries=queries, principles=principles)
    out = complete(stage, tmp_path / "out", safe_point=lambda: None).source.path
    results = read_jsonl(out / "results.jsonl")
    assert {text for result in results for text in result["responses"]} == {""} and len(results) == 4
    assert read_json(out / "summary.json")["splits"]["learned"]["n_unscored"] == 4


def test_chats_are_kept_with_their_control_tokens(config, tmp_path):
    changes = {"style": "chat", "system": "{constitution}", "generation": "{query}</s>", "training": "{query}</s>"}
    tokenizer, pairs, entries = pairs_of(config, sampled(config, tmp_path / "out", **changes))
    end = tokenizer.end_id()
    for pair, queries in zip(pairs, entries.values(), strict=True):
        for entry, ids in zip(queries, pair.prompt_ids, strict=True):
            assert tokenizer.spell(ids) == entry["prompt"] and entry["prompt"].startswith("<s></s>system:1. ")
            assert ids.count(end) == 3 and entry["prompt"].count("</s>") == 4  # one of them is the user's text
