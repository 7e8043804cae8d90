"""The stages on a tiny model folder, in this process: what they refuse, and what a refusal leaves behind."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sami_jax.config.fields import to_dict
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import RunConfig, from_dict
from sami_jax.data.pairs import read_pairs
from sami_jax.data.rendering import plain_prompt
from sami_jax.data.tokenizer import load_tokenizer
from sami_jax.errors import BadConfigError, BadDataError, SaveFailedError, StoppedError
from sami_jax.huggingface.families import config_to_huggingface
from sami_jax.huggingface.folder import folder_hash, read_config, save_model
from sami_jax.huggingface.opened import load_model, open_model
from sami_jax.model.decoder import abstract_params
from sami_jax.model.shape import DecoderConfig
from sami_jax.responding import check_prompts, respond
from sami_jax.run.loop import run
from sami_jax.run.single_stages import evaluate_folder, score_file, train_folder
from sami_jax.scoring.matrices import all_logits
from sami_jax.stages.export import Export, convert
from sami_jax.stages.stage import Source, complete, file_source, model_source
from sami_jax.stages.train import Train
from tiny_models import random_params, tiny_config, write_tokenizer

PRINCIPLES = [
    {"name": name, "definition": f"Be {name}.", "antithesis": f"Do not be {name}.", "held_out": False}
    for name in ("brief", "kind", "exact")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model")
    size = write_tokenizer(folder / "tokenizer", "byte_level", bos=True).get_vocab_size()
    write_model(folder / "model", tiny_config(vocab_size=size, max_positions=256), folder / "tokenizer")
    return folder / "model"


def write_model(folder: pathlib.Path, config: DecoderConfig, tokenizer_folder: pathlib.Path) -> None:
    save_model(
        folder,
        random_params(config),
        config,
        huggingface_config=config_to_huggingface(config, bos_token_id=1, eos_token_id=2),
        generation_config=None,
        tokenizer_folder=tokenizer_folder,
        card="# Tiny\n",
        dtype="float32",
    )


@pytest.fixture
def pairs(tmp_path) -> pathlib.Path:
    path = tmp_path / "pairs.json"
    queries = {
        str(query): [
            {"prompt": f"Be {sign}. Query {query}:", "response": f"{sign} answer {query}", "example_id": query}
            for sign in ("brief", "long")
        ]
        for query in range(4)
    }
    path.write_text(json.dumps(queries))
    return path


def config_of(**train: Any) -> RunConfig:
    settings = {
        "steps": [3],
        "queries_per_step": 2,
        "rows_per_device": 2,
        "passes": 1.5,
        "learning_rate": 1e-2,
    }
    return from_dict({"iterations": 1, "train": settings | train})


def go_on_training(
    model: pathlib.Path, pairs: pathlib.Path, folder: pathlib.Path, safe_point: Callable[[], None], **settings: Any
) -> list[int]:
    """The steps that a training made before it was done, or stopped."""
    steps: list[int] = []
    stage = Train.of(config_of(**settings), 1, base=model_source(model), pairs=file_source(pairs))
    with contextlib.suppress(StoppedError):
        complete(stage, folder, safe_point=safe_point, log=lambda record: steps.append(record["step"]))
    return steps


def export(model: pathlib.Path, trained: pathlib.Path, out: pathlib.Path, **settings: Any) -> None:
    stage = Export.of(config_of(**settings), 1, base=model_source(model), trained=Source(trained, "x"))
    complete(stage, out, safe_point=lambda: None)


def train(model: pathlib.Path, pairs: pathlib.Path, out: pathlib.Path, **settings: Any) -> dict[str, np.ndarray]:
    train_folder(config_of(**settings), model=str(model), pairs=pairs, out=out)
    return load_file(out / "model.safetensors")


class TestTrain:
    def test_a_stop_is_heard_at_every_step_and_what_follows_is_bitwise_equal(self, model, pairs, tmp_path):
        """checkpoint_every=1 saves at every step; a request to stop must not have to wait for a step without."""
        whole = train(model, pairs, tmp_path / "whole", checkpoint_every=1)
        calls = iter([False, *[True] * 3])  # asked before the stage, and behind its steps

        def stop() -> None:
            if next(calls):
                raise StoppedError("stop")

        made = [go_on_training(model, pairs, tmp_path / "stopped", stop, checkpoint_every=1)]
        for _ in range(2):
            calls = iter([False, True])
            made.append(go_on_training(model, pairs, tmp_path / "stopped", stop, checkpoint_every=1))
        assert made == [[1], [2], [3]] and not (tmp_path / "stopped" / "DONE.json").exists()
        made = go_on_training(model, pairs, tmp_path / "stopped", lambda: None, checkpoint_every=1)
        assert made == [] and (tmp_path / "stopped" / "DONE.json").exists()  # nothing was left but to seal
        export(model, tmp_path / "stopped", tmp_path / "exported", checkpoint_every=1)
        exported = tmp_path / "exported" / "model.safetensors"
        assert exported.read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
        assert whole.keys() == load_file(model / "model.safetensors").keys()

    def test_no_older_checkpoint_is_exported_in_place_of_a_damaged_last_one(self, model, pairs, tmp_path, capsys):
        train(model, pairs, tmp_path / "out", checkpoint_every=1, keep_checkpoints=True)
        trained = tmp_path / "out.training"
        for path in (trained / "checkpoints" / "step_00000003").rglob("*"):
            if path.is_file() and path.stat().st_size > 1000:
                path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(BadDataError, match="last step, 3, is missing or damaged"):
            export(model, trained, tmp_path / "again")
        assert not (tmp_path / "again").exists()

    def test_checkpoints_go_when_the_trained_folder_stands(self, model, pairs, tmp_path):
        train(model, pairs, tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out.training").iterdir() if path.name != "LOCK") == [
            "DONE.json",
            "PLAN.json",
            "data.json",
            "metrics.jsonl",
        ]
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(BadDataError, match="out.training: the checkpoint of its last step, 3, is missing"):
            train(model, pairs, tmp_path / "out")

    def test_a_refused_pairs_file_leaves_nothing_and_may_be_mended(self, model, pairs, tmp_path):
        sound = pairs.read_text()
        pairs.write_text(sound.replace('"brief answer 2"', '""'))
        with pytest.raises(BadDataError, match="no tokens"):
            train(model, pairs, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["pairs.json"]
        pairs.write_text(sound)
        assert train(model, pairs, tmp_path / "out")

    def test_more_passes_than_the_config_says_are_refused_with_the_numbers(self, model, pairs, tmp_path):
        says = (
            r"holds 4 pairs, but 3 steps of 2 queries need 5: each pair would be used 1.5 times, more than "
            r"config.train.passes=1.3.*or set config.train.passes=1.5\."
        )
        with pytest.raises(BadDataError, match=says):
            train(model, pairs, tmp_path / "out", passes=1.3)
        assert [path.name for path in tmp_path.iterdir()] == ["pairs.json"]

    @pytest.mark.parametrize("changed", [{"compute_dtype": "bfloat16"}, {"prompts": {"boundary": "authors"}}])
    def test_a_finished_folder_is_not_passed_off_as_another_settings(self, model, pairs, tmp_path, changed):
        train(model, pairs, tmp_path / "out")
        other = from_dict(to_dict(config_of()) | changed)
        with pytest.raises(BadConfigError, match="made from other inputs"):
            train_folder(other, model=str(model), pairs=pairs, out=tmp_path / "out")

    @pytest.mark.parametrize("weights", ["bfloat16_stochastic", "bfloat16"])
    def test_bfloat16_weights_stay_bfloat16_from_checkpoint_to_export(self, model, pairs, tmp_path, weights):
        settings = {"weights": weights, "kl_beta": 0.1}
        whole = train(model, pairs, tmp_path / "whole", **settings)
        exact = train(model, pairs, tmp_path / "exact", kl_beta=0.1)
        before = load_file(model / "model.safetensors")
        config = json.loads((tmp_path / "whole" / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        for name, weight in whole.items():
            assert weight.dtype == "bfloat16" and exact[name].dtype == np.float32
            # Three AdamW steps of 1e-2 each; a weight of up to 4 is rounded by up to 2^-6 in each.
            assert np.abs(weight.astype(np.float32) - before[name]).max() <= 0.03 + 4 * 2**-6
            assert np.any(weight != before[name].astype("bfloat16"))

        calls = iter([False, True])

        def stop() -> None:
            if next(calls):
                raise StoppedError("stop")

        assert go_on_training(model, pairs, tmp_path / "stopped", stop, **settings) == [1]
        assert go_on_training(model, pairs, tmp_path / "stopped", lambda: None, **settings) == [2, 3]
        export(model, tmp_path / "stopped", tmp_path / "exported", **settings)
        exported = tmp_path / "exported" / "model.safetensors"
        assert exported.read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()

    def test_weights_that_are_not_finite_are_refused(self, model, pairs, tmp_path):
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"][3] = np.nan
        for path in model.iterdir():
            (tmp_path / "broken").mkdir(exist_ok=True)
            (tmp_path / "broken" / path.name).write_bytes(path.read_bytes())
        save_file(weights, tmp_path / "broken" / "model.safetensors")
        with pytest.raises(BadDataError, match=r"model\.norm\.weight holds NaN"):
            train(tmp_path / "broken", pairs, tmp_path / "out")
        assert not (tmp_path / "out.training").exists()


class TestSettingsReachTheModel:
    """Each of these could be a constant somewhere below, and everything else would look right."""

    def scores(self, model, pairs, **settings: Any) -> np.ndarray:
        config = from_dict(to_dict(config_of()) | settings)
        lines = score_file(config, model=str(model), pairs=pairs, out=None)
        return np.array([line["logps"] for line in lines])

    def test_compute_dtype(self, model, pairs):
        exact, rounded = (self.scores(model, pairs, compute_dtype=dtype) for dtype in ("float32", "bfloat16"))
        # bfloat16 has 8 bits: logits of size 5 to 10 are off by some hundredths, not by more than a tenth of a nat.
        assert 1e-3 < np.abs(exact - rounded).max() < 0.3

    def test_sixty_queries_of_many_lengths_compile_four_programs(self, model, tmp_path, caplog):
        """Matrices, loss, bound, and the check of the attention; reading the weights comes on top."""
        rng = np.random.default_rng(0)
        lengths = rng.integers(1, 60, (60, 2, 2)).tolist()
        queries = {
            str(number): [{"prompt": "p" * p, "response": "r" * r, "example_id": number} for p, r in query]
            for number, query in enumerate(lengths)
        }
        assert len({tuple(map(tuple, query)) for query in lengths}) == 60
        (tmp_path / "many.json").write_text(json.dumps(queries))
        with jax.log_compiles():
            self.scores(model, tmp_path / "many.json")
        compiled = re.findall(r"Finished XLA compilation of (\S+) in", caplog.text)
        compiled = [name for name in compiled if name not in ("jit(zeros)", "jit(_put)")]
        assert compiled.count("jit(contrastive_logps)") == 1 and len(compiled) <= 4, compiled

    def test_a_pack_longer_than_the_widest_row_is_refused_with_nothing_written(self, model, pairs, tmp_path):
        """Of scoring and of training."""
        narrow, says = (
            config_of(max_row_tokens=20),
            "^Query [0-3]: a prompt and its 2 responses take 37 tokens, .*max_row_tokens=20;",
        )
        with pytest.raises(BadDataError, match=says):
            score_file(narrow, model=str(model), pairs=pairs, out=tmp_path / "scores.jsonl")
        with pytest.raises(BadDataError, match=says):
            train_folder(narrow, model=str(model), pairs=pairs, out=tmp_path / "trained")
        assert [path.name for path in tmp_path.iterdir()] == ["pairs.json"]

    def test_says_how_rows_are_filled(self, model, pairs, capsys):
        self.scores(model, pairs)
        says = r"scoring 2 rows of 64 tokens, \d+% of them real, up to 1 query at once"
        assert re.search(says, capsys.readouterr().err)

    def test_normalize(self, model, pairs):
        tokenizer = load_tokenizer(model)
        data = read_pairs(pairs, tokenizer, boundary="exact", max_positions=256, vocab_size=tokenizer.vocab_size)
        lengths = np.array([[len(ids) for ids in pair.response_ids] for pair in data])  # [Q, R]
        mean, total = (self.scores(model, pairs, train={"normalize": name}) for name in ("mean", "sum"))
        np.testing.assert_allclose(total, mean * lengths[:, None, :], rtol=1e-5)

    def program(self, model, config: RunConfig) -> str:
        """The jaxpr of logits with float32 parameters."""
        opened = open_model(model, config.mesh, config.compute_dtype, remat=config.train.remat)
        logits = functools.partial(all_logits, opened.model.rows)
        return str(jax.make_jaxpr(logits)(abstract_params(read_config(model))[0], np.zeros((1, 4), np.int32)))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_compute_dtype_of_activations_and_weights(self, model, dtype):
        config = dataclasses.replace(config_of(), compute_dtype=dtype)
        assert ("bf16[" in self.program(model, config)) == (dtype == "bfloat16")
        weights = jax.tree.leaves(load_model(model, config.mesh, config.compute_dtype).params)
        assert {weight.dtype.name for weight in weights} == {dtype}

    def test_remat(self, model):
        programs = {remat: self.program(model, config_of(remat=remat)) for remat in ("none", "dots", "full")}
        assert "remat" not in programs["none"]
        assert "policy=None" in programs["full"] and "policy=DotsSaveable" in programs["dots"]


@pytest.fixture
def copied(model, tmp_path) -> pathlib.Path:
    """A copy of the model that a test may spoil."""
    shutil.copytree(model, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_every_end_token_of_the_folder_ends_a_response(copied, file):
    (copied / "generation_config.json").write_text("{}")
    config = from_dict({"sampling": {"max_new_tokens": 12, "stop": []}})
    prompts = [plain_prompt(load_tokenizer(copied), text) for text in ["The post asks how to make peace.", "x"]]
    before = respond(load_model(copied, config.mesh, config.compute_dtype), prompts, config.sampling)
    end = before[0].ids[3]
    content = json.loads((copied / file).read_text())
    (copied / file).write_text(json.dumps(content | {"eos_token_id": [2, end]}))
    loaded = load_model(copied, config.mesh, config.compute_dtype)
    assert loaded.end_ids == {2, end}
    after = respond(loaded, prompts, config.sampling)
    for long, short in zip(before, after, strict=True):
        cut = long.ids.index(end) if end in long.ids else len(long.ids)
        assert short.ids == long.ids[:cut] and short.finished == (cut < len(long.ids))
    assert after[0].ids == before[0].ids[: before[0].ids.index(end)]


@pytest.mark.parametrize("named", [9999, [2, 9999], -1, "</s>", 2.0, True])
def test_an_end_token_that_is_none_of_the_models_is_refused_by_name(copied, named):
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(BadDataError, match=r"generation_config.json: eos_token_id names .* vocabulary of \d+; correct"):
        open_model(copied, MeshConfig(), "float32")


def test_a_tokenizer_whose_end_token_lies_beyond_the_vocabulary_is_refused(copied):
    path = copied / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(
        {"id": 999, "content": "<end>", "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    )
    content["model"]["vocab"]["<end>"] = 999
    path.write_text(json.dumps(content))
    about = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(about | {"eos_token": "<end>"}))
    with pytest.raises(BadDataError, match="end token has the id 999, beyond the model's vocabulary .* do not belong"):
        open_model(copied, MeshConfig(), "float32")


def test_rows_that_the_mesh_does_not_divide_are_filled_up(tmp_path):
    """Experts are split over the rows' devices by hand, so that their number must divide."""
    size = write_tokenizer(tmp_path / "tokenizer", "byte_level", bos=True).get_vocab_size()
    config = tiny_config(vocab_size=size, model_type="mixtral", n_experts=4, experts_per_token=2, max_positions=256)
    write_model(tmp_path / "model", config, tmp_path / "tokenizer")
    prompts = [
        plain_prompt(load_tokenizer(tmp_path / "model"), text) for text in ["Be brief. Query:", "x", "The post asks"]
    ]
    found = []
    for mesh in ({"fsdp": 2}, {}):
        run = from_dict({"mesh": mesh, "sampling": {"max_new_tokens": 4, "stop": []}})
        found.append(respond(load_model(tmp_path / "model", run.mesh, run.compute_dtype), prompts, run.sampling))
    assert found[0] == found[1] and len(found[0]) == 3


def test_a_folder_is_what_is_read_of_it(model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "params.json").write_text("{}")  # what another tool fetched into a folder of the Hub's cache
    (folder / "consolidated.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text("of shards that are gone")
    assert folder_hash(folder) == folder_hash(model)
    (folder / "tokenizer.json").unlink()
    assert folder_hash(folder) != folder_hash(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convert_and_verify(model, tmp_path, dtype):
    out = tmp_path / "out"
    convert(MeshConfig(), model=model, out=out, dtype=dtype, verify=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, out))
    for name, weight in before.items():
        np.testing.assert_array_equal(after[name], weight.astype(dtype))
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_verify_notices_a_weight_that_was_written_wrongly(model, tmp_path, monkeypatch):
    def write_wrongly(tensors: dict[str, np.ndarray], path: pathlib.Path, **about: Any) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.1
        save_file(tensors, path, **about)

    # The disk's failure, which cannot be had otherwise.
    monkeypatch.setattr("sami_jax.huggingface.folder.save_file", write_wrongly)
    convert(MeshConfig(), model=model, out=tmp_path / "unseen", dtype="float32", verify=False)
    with pytest.raises(SaveFailedError, match="does not give the logits of the weights it was made from"):
        convert(MeshConfig(), model=model, out=tmp_path / "out", dtype="float32", verify=True)


def test_score_weighs_the_two_sides_as_the_config_says(model, pairs):
    one_side = config_of(over_responses_weight=1.0, over_constitutions_weight=0.0)
    lines = score_file(one_side, model=str(model), pairs=pairs, out=None)
    for line in lines:
        assert line["loss"] == pytest.approx(line["over_responses"], abs=1e-6)
        assert line["loss"] != pytest.approx(line["over_constitutions"], abs=1e-4)


def test_a_prompt_beyond_the_vocabulary_is_refused(model):
    loaded = load_model(model, MeshConfig(), "float32")
    write_tokenizer(larger := model.parent / "larger", "byte_level", bos=True, vocab_size=400)
    other = dataclasses.replace(loaded, tokenizer=load_tokenizer(larger))
    text = "The post asks how to make peace. Summaries should be comprehensive."
    prompts = [plain_prompt(other.tokenizer, text) for text in [text]]
    with pytest.raises(BadDataError, match="do not belong together"):
        check_prompts(other, prompts, max_new_tokens=4)


class TestEvaluate:
    @pytest.fixture
    def settings(self, model, tmp_path) -> dict[str, Any]:
        (tmp_path / "principles.json").write_text(json.dumps(PRINCIPLES))
        queries = tmp_path / "queries.jsonl"
        queries.write_text("".join(json.dumps({"example_id": f"q{i}", "text": f"Post {i}"}) + "\n" for i in range(3)))
        template = "{constitution}\n{query}:"
        return {
            "model": str(model),
            "queries": {"train": str(queries), "evaluation": str(queries), "evaluation_count": 3},
            "constitutions": {"principles": str(tmp_path / "principles.json"), "principles_per_query": 1},
            "prompts": {"generation": template, "training": template},
            "sampling": {"max_new_tokens": 4, "shard_queries": 3},
            "evaluation": {"judge": "none"},
        }

    def evaluate(self, settings: dict[str, Any], out: pathlib.Path, baseline: pathlib.Path | None = None) -> Any:
        config = from_dict(settings)
        path = evaluate_folder(config, model=config.model, baseline=baseline, out=out)
        return json.loads(path.read_text())

    def test_a_baseline_of_other_tasks_is_refused(self, settings, tmp_path):
        base = tmp_path / "base"
        summary = self.evaluate(settings, base)
        assert summary["iteration"] == 0 and summary["splits"]["learned"]["n_queries"] == 3
        other = settings | {"seed": 5}
        with pytest.raises(BadDataError, match="no baseline for this evaluation"):
            self.evaluate(other, tmp_path / "other", base)
        fewer = settings | {"queries": settings["queries"] | {"evaluation_count": 2}}
        with pytest.raises(BadDataError, match="no baseline for this evaluation"):
            self.evaluate(fewer, tmp_path / "fewer", base)
        assert not (tmp_path / "other").exists() and not (tmp_path / "fewer").exists()

    @pytest.mark.parametrize("changed", [{"compute_dtype": "bfloat16"}, {"train": {"rows_per_device": 16}}])
    def test_a_finished_folder_is_not_passed_off_as_another_settings(self, settings, tmp_path, changed):
        self.evaluate(settings, tmp_path / "out")
        with pytest.raises(BadConfigError, match="made from other inputs"):
            self.evaluate(settings | changed, tmp_path / "out")

    def test_a_judge_that_cannot_read_the_queries_is_refused_at_the_start(self, settings, tmp_path):
        foreign = settings | {"evaluation": {"judge": "miniature"}, "model": str(tmp_path / "not looked at")}
        foreign["queries"] = settings["queries"] | {"evaluation_count": 1}
        foreign |= {"train": {"steps": [1, 1, 1], "queries_per_step": 1}}
        with pytest.raises(BadDataError, match="'q[012]' has no fact.*set config.evaluation.judge=none"):
            run(from_dict(foreign | {"model": settings["model"]}), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_changed_queries_are_noticed(self, settings, tmp_path):
        self.evaluate(settings, tmp_path / "out")
        queries = pathlib.Path(settings["queries"]["evaluation"])
        queries.write_text(queries.read_text().replace("Post 1", "Another post"))
        with pytest.raises(BadConfigError, match="made from other inputs"):
            self.evaluate(settings, tmp_path / "out")


@pytest.mark.parametrize("kept", [False, True])
def test_a_signal_ends_at_once_what_keeps_nothing(model, pairs, tmp_path, kept):
    """The test's own handler stays where there are no parts to go on from; a file's command hears the signal itself."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    alarm = signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    try:
        out = tmp_path / "scores.jsonl" if kept else pathlib.Path("/dev/null")
        if kept:
            with pytest.raises(StoppedError):
                score_file(config_of(), model=str(model), pairs=pairs, out=out)
        else:
            assert len(score_file(config_of(), model=str(model), pairs=pairs, out=out)) == 4 and heard
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGTERM, before)
