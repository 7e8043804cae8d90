"""Three iterations of a tiny model, in this process: which model each of them samples from, trains and evaluates."""

import dataclasses
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from sami_jax.config.run import RunConfig
from sami_jax.data.prompts import render
from sami_jax.data.rendering import plain_prompt
from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.files import read_json, read_jsonl, write_json
from sami_jax.huggingface.opened import load_model
from sami_jax.responding import respond
from sami_jax.run import loop
from sami_jax.run.single_stages import export_folder
from tiny_run import LEARNING_RATE, POSTS, tiny_run_config


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[RunConfig, pathlib.Path]:
    folder = tmp_path_factory.mktemp("run")
    config = tiny_run_config(folder)
    loop.run(config, folder / "run", say=lambda sentence: None)
    return config, folder / "run"


def model_of(run, iteration: int) -> pathlib.Path:
    """The folder of an iteration's model; the base is iteration 0's."""
    config, workdir = run
    return workdir / f"iter_{iteration:03d}" / "export" if iteration else pathlib.Path(config.model)


def answers_of(run, iteration: int, records: list[dict]) -> list[list[str]]:
    """What an iteration's model answers to the tasks of some records."""
    config, _ = run
    prompts = [
        render(config.prompts.generation, constitution=text, query=POSTS[record["example_id"]])
        for record in records
        for text in record["constitutions"]
    ]
    loaded = load_model(model_of(run, iteration), config.mesh, config.compute_dtype)
    given = [plain_prompt(loaded.tokenizer, text) for text in prompts]
    texts = [r.text for r in respond(loaded, given, config.sampling)]
    return [texts[i : i + 2] for i in range(0, len(texts), 2)]


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_samples_come_from_the_previous_iterations_model(run, iteration):
    records = read_jsonl(run[1] / f"iter_{iteration:03d}" / "sample" / "chunks" / "00000.jsonl")
    records = [record for record in records if None not in record["responses"]]  # the others were given up
    assert len(records) > 2
    sampled = [[response["text"] for response in record["responses"]] for record in records]
    found = [number for number in range(4) if answers_of(run, number, records) == sampled]
    assert found == [iteration - 1]


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [0, 1, 2, 3])
def test_each_iterations_own_model_is_evaluated(run, iteration):
    records = read_jsonl(run[1] / f"iter_{iteration:03d}" / "eval" / "results.jsonl")
    evaluated = [record["responses"] for record in records]
    assert [number for number in range(4) if answers_of(run, number, records) == evaluated] == [iteration]
    assert read_json(run[1] / f"iter_{iteration:03d}" / "eval" / "summary.json")["iteration"] == iteration


@pytest.mark.slow
@pytest.mark.parametrize("keep_time", [False, True])
def test_a_bit_flipped_in_a_sealed_export_is_noticed_before_it_is_used(run, tmp_path, keep_time):
    config, workdir = run[0], tmp_path / "run"
    shutil.copytree(run[1], workdir)
    weights = workdir / "iter_002" / "export" / "model.safetensors"
    state, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1  # of a weight
    weights.write_bytes(data)
    says = r"iter_002/export/model.safetensors has other bytes than .*/DONE.json sealed"
    if keep_time:
        os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
        shutil.rmtree(workdir / "iter_003" / "sample")  # which is made from that export
    with pytest.raises(BadDataError, match=says):
        loop.run(config, workdir, say=lambda sentence: None)
    with pytest.raises(BadDataError, match=says):
        export_folder(workdir, 2, tmp_path / "out", dtype="float32", verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_checkpoints_are_kept_where_asked_and_without_them_both_stages_are_made_anew(run, tmp_path):
    config, workdir = run[0], tmp_path / "run"
    shutil.copytree(run[1], workdir)
    assert all((workdir / f"iter_00{i}" / "train" / "checkpoints" / "step_00000001").is_dir() for i in (1, 2, 3))
    exported = workdir / "iter_003" / "export"
    before = (exported / "model.safetensors").read_bytes()
    for folder in (exported, exported.parent / "train" / "checkpoints"):
        shutil.rmtree(folder)
    with pytest.raises(BadDataError, match="iter_003/train: the checkpoint of its last step, 1, is missing .* delete"):
        loop.run(config, workdir, say=lambda sentence: None)
    shutil.rmtree(exported.parent / "train")
    loop.run(config, workdir, say=lambda sentence: None)
    assert (exported / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_run_that_another_version_began_is_refused(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run[1], workdir)
    about = read_json(workdir / "RUN.json")
    write_json(workdir / "RUN.json", about | {"schema_version": 1})
    with pytest.raises(BadConfigError, match="run was begun by another version of sami_jax"):
        loop.run(None, workdir, say=lambda sentence: None)


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_every_iteration_trains_the_base(run, iteration):
    """One step of AdamW moves a weight by the learning rate at most, and by the decay of 0.01 of it."""
    before, after = (load_file(model_of(run, number) / "model.safetensors") for number in (0, iteration))
    moved = max(float(np.abs(after[name] - before[name]).max()) for name in before)
    largest = max(float(np.abs(weights).max()) for weights in before.values())
    assert 0.9 * LEARNING_RATE < moved < LEARNING_RATE * (1 + 0.01 * largest) * 1.001


@pytest.mark.parametrize(
    ("narrow", "needs", "remedy"),
    [
        # A training prompt of some 17 tokens, and two responses of up to 24.
        ({"max_row_tokens": 60}, 1, "set it to {} or lower config.sampling.max_new_tokens"),
        (
            {"max_row_tokens": 100, "rows_per_device": 1},
            2,
            "set it to {}, raise config.train.rows_per_device, now 1, or",
        ),
    ],
)
def test_rows_that_may_be_too_narrow_are_refused_before_anything_is_sampled(tmp_path, narrow, needs, remedy):
    config = tiny_run_config(tmp_path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **narrow))
    with pytest.raises(BadDataError, match="query 'q[0-3]' may need rows of") as error:
        loop.run(config, tmp_path / "run", say=lambda sentence: None)
    needed, packs, prompt = map(int, re.search(r"rows of (\d+) .* (\d) x \(.* of (\d+) and", str(error.value)).groups())
    assert packs == needs and needed == packs * (prompt + 2 * 24) > narrow["max_row_tokens"]
    assert remedy.format(needed) in str(error.value)
    assert not (tmp_path / "run").exists()
