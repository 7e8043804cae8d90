"""Nothing is sampled that cannot be used: pairs with a hopeless member, and queries that do not fit."""

import dataclasses
import json
import pathlib

import pytest

from sami_jax.config.run import RunConfig
from sami_jax.data.filters import drop_reason
from sami_jax.data.pools import LEARNED, read_pools
from sami_jax.data.queries import alternating_half, read_queries
from sami_jax.data.rendering import Renderer
from sami_jax.data.tasks import Task
from sami_jax.errors import BadDataError
from sami_jax.files import read_json, read_jsonl
from sami_jax.huggingface.opened import load_model, open_model
from sami_jax.responding import respond
from sami_jax.run.single_stages import generate_file
from sami_jax.stages.answers import TaskRoom, check_tasks
from sami_jax.stages.sample import Sample, sampling_tasks
from sami_jax.stages.stage import complete, file_source, model_source
from tiny_run import tiny_run_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    return tiny_run_config(tmp_path_factory.mktemp("files"))


def sampled(config: RunConfig, out: pathlib.Path) -> pathlib.Path:
    files = (file_source(pathlib.Path(path)) for path in (config.queries.train, config.constitutions.principles))
    queries, principles = files
    stage = Sample.of(config, 1, model=model_source(pathlib.Path(config.model)), queries=queries, principles=principles)
    return complete(stage, out, safe_point=lambda: None).source.path


def tasks_of(config: RunConfig) -> dict[str | int, Task]:
    """The tasks of the first iteration, by their query."""
    pool = read_pools(pathlib.Path(config.constitutions.place), config.constitutions)[LEARNED]
    half = alternating_half(read_queries(pathlib.Path(config.queries.train)), 1)
    return {task.query.example_id: task for task in sampling_tasks(half, pool, seed=config.seed, iteration=1)}


def test_a_pair_is_given_up_with_its_first_hopeless_member_and_the_kept_pairs_are_the_same(config, tmp_path):
    # A character that some of a random model's responses have, as the format's brackets in some of a real one's.
    raw = read_jsonl(sampled(config, tmp_path / "raw") / "chunks/00000.jsonl")
    texts = [response["text"] for line in raw for response in line["responses"]]
    mark = min(map(chr, range(33, 127)), key=lambda c: abs(sum(c in text for text in texts) / len(texts) - 0.3))
    filters = dataclasses.replace(config.filters, placeholders=(mark,))
    few = dataclasses.replace(config.sampling, slots=3, chunk_steps=2)
    out = sampled(dataclasses.replace(config, filters=filters, sampling=few), tmp_path / "out")
    records = [line for part in sorted(out.glob("chunks/*")) for line in read_jsonl(part)]
    assert sum(None in line["responses"] for line in records) > 0

    loaded = load_model(pathlib.Path(config.model), config.mesh, config.compute_dtype)
    renderer = Renderer(config.prompts, loaded.tokenizer)
    tasks = [tasks_of(config)[line["example_id"]] for line in records]
    whole = respond(loaded, [p for task in tasks for p in renderer.generation(task)], config.sampling)
    reasons = {task.query.example_id: drop_reason(whole[2 * i : 2 * i + 2], filters) for i, task in enumerate(tasks)}
    kept = [name for name, reason in reasons.items() if reason is None]
    entries = read_json(out / "pairs.json")
    assert [queries[0]["example_id"] for queries in entries.values()] == kept and 0 < len(kept) < len(records)
    counts = read_json(out / "DONE.json")["counts"]
    assert counts["kept"] == len(kept) and counts["sampled"] == len(records)
    rejects = read_jsonl(out / "rejects.jsonl")
    assert sum(counts["dropped"].values()) == len(rejects) == len(records) - len(kept)
    # Whoever was given up for the mark has it in what was written so far.
    for reject in rejects:
        there = [text for text in reject["responses"] if text is not None]
        assert reject["reason"] != "placeholder" or any(mark in text for text in there)


class TestLongPrompts:
    @pytest.fixture(scope="class")
    @staticmethod
    def long(config, tmp_path_factory) -> RunConfig:
        """Every fourth training query is longer than the model."""
        path = tmp_path_factory.mktemp("long") / "train.jsonl"
        lines = read_jsonl(pathlib.Path(config.queries.train))
        lines = [line | {"text": "far too long " * 60} if i % 4 == 0 else line for i, line in enumerate(lines)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return dataclasses.replace(config, queries=dataclasses.replace(config.queries, train=str(path)))

    def test_a_run_refuses_them_by_default_and_drops_and_counts_them_where_it_may(self, long, tmp_path):
        opened = open_model(pathlib.Path(long.model), long.mesh, long.compute_dtype)
        room = TaskRoom.of(long.sampling, long.train)
        with pytest.raises(BadDataError, match="train.jsonl: the generation prompt of query .* 256 positions"):
            check_tasks(opened, tasks_of(long).values(), long.prompts, room, file="train.jsonl")
        check_tasks(opened, tasks_of(long).values(), long.prompts, room, file="train.jsonl", long_prompts="drop")
        dropping = dataclasses.replace(long, sampling=dataclasses.replace(long.sampling, long_prompts="drop"))
        out = sampled(dropping, tmp_path / "out")
        counts, rejects = read_json(out / "DONE.json")["counts"], read_jsonl(out / "rejects.jsonl")
        too_long = [reject for reject in rejects if reject["reason"] == "too_long"]
        assert counts["dropped"]["too_long"] == len(too_long) > 0
        assert all(reject["responses"] == [] for reject in too_long)
        assert counts["sampled"] == counts["kept"] + len(rejects)

    def test_generate_refuses_a_prompt_or_says_in_its_line_that_it_was_dropped(self, config, tmp_path):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text(json.dumps({"prompt": "far too long " * 60}) + '\n{"prompt": "A trip"}\n')
        given = {"model": config.model, "prompts": prompts, "out": tmp_path / "out.jsonl", "rows": 2}
        with pytest.raises(BadDataError, match="Prompt 1 .* 256 positions"):
            generate_file(config, **given)
        dropping = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, long_prompts="drop"))
        first, second = generate_file(dropping, **given)
        assert (first["response"], first["response_ids"], first["dropped"]) == ("", [], "too_long")
        assert "dropped" not in second and second["response_ids"]
        assert read_json(tmp_path / "out.jsonl.DONE.json")["counts"]["dropped"] == {"too_long": 1}
