"""The miniature's pretraining: its loss and optimizer by hand, and what a kill costs, which is time and no bit."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import doubles
from sami_jax.config.fields import to_dict
from sami_jax.config.pretraining import PretrainingConfig
from sami_jax.errors import StoppedError
from sami_jax.files import file_hash, read_json, read_log
from sami_jax.miniature import world
from sami_jax.miniature.pretraining import (
    BASE_VERSION,
    base_shape,
    muon_dimensions,
    pretrain,
    pretrained_folder,
    pretraining_optimizer,
    weighted_cross_entropy,
)
from sami_jax.model.decoder import abstract_params, init_params
from sami_jax.seeds import jax_key
from sami_jax.types import Params, RowModel

ROOT = pathlib.Path(__file__).parents[1]
LIMIT_S = 120  # a process here takes about 10 s on two cores

jit_and_eager: Any = chex.variants(with_jit=True, without_jit=True)
# float32 rounds at 6e-8 relative; the references are sums of a few terms of size 1 in float64.
assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)

MINIATURE = PretrainingConfig()
# Logged every step, checkpointed every 10.
TINY = PretrainingConfig(
    vocab_size=512,
    embed_dim=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    mlp_dim=16,
    max_positions=256,
    steps=30,
    batch_size=8,  # so many that the longest document is always about as long: few shapes to compile
    train_queries=4,
    validation_queries=2,
    test_queries=2,
)


def by_name(tree: Params, prefix: str = "") -> dict[str, Any]:
    """The leaves under their dotted names, None counted as a leaf."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: leaf for key in tree for name, leaf in by_name(tree[key], f"{prefix}.{key}".strip(".")).items()}


# A model whose prediction depends on the last token alone: row x of the table [V, V] are its logits.
BIGRAM = RowModel(lambda table, rows: table[rows.tokens], lambda table: jnp.eye(len(table)))


class WeightedCrossEntropyTest(chex.TestCase):
    variant: Any  # chex types it as a method that never returns

    # p(next 1 | 0) = 3/4 and p(next 1 | 1) = 1/8; a row may be shifted by any number.
    table = jnp.log(jnp.array([[0.25, 0.75, 1e-9], [0.875, 0.125, 1e-9], [0.2, 0.3, 0.5]])) + jnp.array(
        [[3.0], [-2.0], [0.0]]
    )
    tokens = jnp.array([[0, 1, 1], [0, 1, 2]], jnp.int32)  # the second row is padded with a 2
    weights = jnp.array([[0.0, 0.1, 1.0], [0.0, 1.0, 0.0]], jnp.float32)  # one prompt token, two response tokens

    @jit_and_eager
    def test_by_hand(self):
        loss = self.variant(functools.partial(weighted_cross_entropy, BIGRAM))(self.table, self.tokens, self.weights)
        # 1 after 0 at weight 0.1, 1 after 1 at weight 1, and 1 after 0 at weight 1.
        assert_close(loss, (0.1 * -math.log(3 / 4) + math.log(8) - math.log(3 / 4)) / 2.1)

    @jit_and_eager
    def test_gradient_by_hand(self):
        gradient = jax.grad(functools.partial(weighted_cross_entropy, BIGRAM))
        actual = self.variant(gradient)(self.table, self.tokens, self.weights)
        # Of -log softmax: probabilities less the target's one. Row 0 predicts at weight 1.1 in all, row 1 at 1. Row 2
        # is the padding: nothing reaches it, not even rounding.
        assert_close(actual[0], np.array([0.25, 0.75 - 1, 0]) * 1.1 / 2.1)
        assert_close(actual[1], np.array([0.875, 0.125 - 1, 0]) * 1.0 / 2.1)
        np.testing.assert_array_equal(actual[2], 0.0)

    def test_neither_the_first_tokens_weight_nor_what_stands_in_the_padding_counts(self):
        expected = weighted_cross_entropy(BIGRAM, self.table, self.tokens, self.weights)
        heavy = self.weights.at[:, 0].set(7.0)  # nothing predicts the first token
        assert_close(weighted_cross_entropy(BIGRAM, self.table, self.tokens, heavy), expected)
        other = self.tokens.at[1, 2].set(1)
        assert_close(weighted_cross_entropy(BIGRAM, self.table, other, self.weights), expected)

    def test_value_and_gradient_do_not_see_how_far_a_batch_is_padded(self):
        rng = np.random.default_rng(0)
        params, tokens = doubles.table_params(7), rng.integers(0, 7, (2, 9)).astype(np.int32)
        weights = rng.uniform(0.1, 1.0, (2, 9)).astype(np.float32)
        wide_tokens, wide_weights = (np.pad(array, ((0, 0), (0, 7)), constant_values=0) for array in (tokens, weights))
        of = jax.value_and_grad(functools.partial(weighted_cross_entropy, doubles.MODEL))
        narrow, wide = of(params, tokens, weights), of(params, wide_tokens, wide_weights)
        chex.assert_trees_all_close(wide, narrow, rtol=1e-6, atol=1e-6)  # longer sums, in another order


# (reduction axes, output axes) of a stacked leaf, None for AdamW. L layers, D embed, N heads, K kv heads, H head dim.
EXPECTED_DIMENSIONS = {
    "embedding": None,  # [V, D]
    "final_norm": None,  # [D]
    "blocks.attention_norm": None,  # [L, D]
    "blocks.attention.query": ((1,), (2, 3)),  # [L, D, N, H]
    "blocks.attention.key": ((1,), (2, 3)),  # [L, D, K, H]
    "blocks.attention.value": ((1,), (2, 3)),  # [L, D, K, H]
    "blocks.attention.out": ((1, 2), (3,)),  # [L, N, H, D]
    "blocks.mlp_norm": None,  # [L, D]
    "blocks.mlp.gate": ((1,), (2,)),  # [L, D, F]
    "blocks.mlp.up": ((1,), (2,)),  # [L, D, F]
    "blocks.mlp.down": ((1,), (2,)),  # [L, F, D]
}


class Updates(NamedTuple):
    config: PretrainingConfig
    gradients: dict[str, np.ndarray]
    steps: list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def updates() -> Updates:
    """Ten steps that all see the same gradients, at parameters of 0, so that there is no weight decay to see."""
    config = dataclasses.replace(TINY, n_layers=2, steps=10, warmup_share=0.2)
    shapes, rng = abstract_params(base_shape(config))[0], np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    gradients = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    optimizer, steps = pretraining_optimizer(config), []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(config.steps):
            made, state = update(gradients, state, params)
            steps.append(by_name(jax.device_get(made)))
    return Updates(config, by_name(gradients), steps)


# Two steps up, from 0, and eight down, to 0: the next one would be.
EXPECTED_SCHEDULE = np.array([0, 1 / 2, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


class TestOptimizer:
    def test_every_matrix_of_the_layers_is_muons_and_the_rest_adamws(self):
        params, _ = abstract_params(base_shape(MINIATURE))
        dimensions = by_name(muon_dimensions(params))
        assert by_name(params).keys() == EXPECTED_DIMENSIONS.keys()
        assert {k: d and (d.reduction_axis, d.output_axis) for k, d in dimensions.items()} == EXPECTED_DIMENSIONS
        for name, leaf in by_name(params).items():
            reduction, output = EXPECTED_DIMENSIONS[name] or ((), ())
            axes = (0, *reduction, *output)  # all of them, once and in order, the first one the layers'
            assert axes == tuple(range(leaf.ndim)) or EXPECTED_DIMENSIONS[name] is None

    def test_muons_updates_are_orthogonal(self, updates):
        peak = updates.steps[2]
        for name, dimensions in EXPECTED_DIMENSIONS.items():
            if dimensions is None:
                continue
            rows = math.prod(peak[name].shape[axis] for axis in dimensions[0])
            for layer in range(updates.config.n_layers):
                matrix, gradient = (tree[name][layer].reshape(rows, -1) for tree in (peak, updates.gradients))
                u, values, vt = np.linalg.svd(gradient, full_matrices=False)
                core = u.T @ matrix @ vt.T
                # Newton-Schulz keeps the singular vectors, and five steps bring all values but tiny ones to between 0.7
                # and 1.2 (Jordan et al. 2024); optax then scales by sqrt(max(1, columns / rows)).
                size = updates.config.matrix_learning_rate * math.sqrt(max(1, matrix.shape[1] / matrix.shape[0]))
                large = values > 0.2 * values[0]
                assert large.sum() >= 6 and values[0] > 2 * values[large][-1], name
                assert np.all(np.abs(-np.diag(core)[large] / size - 0.95) < 0.3), name
                np.testing.assert_allclose(core - np.diag(np.diag(core)), 0.0, atol=1e-3 * size, err_msg=name)

    def test_adamws_updates_are_signs_on_its_schedule(self, updates):
        t = np.arange(1, 11)
        # Both unbiased means of a constant gradient leave g / |g|; with Nesterov momentum (Dozat 2016), b1 = 0.9, the
        # first mean runs a step ahead: 0.9 m_t / (1 - 0.9^(t + 1)) + 0.1 g / (1 - 0.9^t), where m_t = (1 - 0.9^t) g.
        ahead = 0.9 * (1 - 0.9**t) / (1 - 0.9 ** (t + 1)) + 0.1 / (1 - 0.9**t)
        sizes = updates.config.other_learning_rate * EXPECTED_SCHEDULE * ahead
        for name in (name for name, dimensions in EXPECTED_DIMENSIONS.items() if dimensions is None):
            for step, size in zip(updates.steps, sizes, strict=True):
                np.testing.assert_allclose(step[name], -size * np.sign(updates.gradients[name]), rtol=1e-3)

    def test_muons_schedule_is_the_same(self, updates):
        sizes = np.array([np.linalg.norm(step["blocks.mlp.up"]) for step in updates.steps])
        np.testing.assert_allclose(sizes / sizes[2], EXPECTED_SCHEDULE, rtol=1e-4)


# Pretrains, and dies by SIGKILL in the n-th call of the safe point, or when it is about to delete its checkpoints.
KILLED = """
import itertools, json, os, signal, sys

from sami_jax.config.pretraining import PretrainingConfig
from sami_jax.miniature.pretraining import pretrain

config, moment = PretrainingConfig(**json.loads(sys.argv[1])), sys.argv[2]
calls = itertools.count(1)


def kill_if(now):
    if now:
        os.kill(os.getpid(), signal.SIGKILL)


def audit(event, arguments):
    kill_if(event == "shutil.rmtree" and str(arguments[0]).endswith("/checkpoints"))


if moment == "deletion":
    sys.addaudithook(audit)
print(pretrain(config, safe_point=lambda: kill_if(str(next(calls)) == moment)))
"""


def script(source: str, *arguments: str, package: pathlib.Path = ROOT) -> subprocess.CompletedProcess[str]:
    # As many devices as this process has, so that the same threads compute the same bits.
    environment = {**os.environ, "PYTHONPATH": str(package), "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, timeout=LIMIT_S)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file but the LOCK, which has a process id in it."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in files.items() if name != "LOCK"}


def must_not_be_called() -> None:
    raise AssertionError("a finished base was worked on")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """A base that nothing interrupted."""
    config = dataclasses.replace(TINY, cache_dir=str(tmp_path_factory.mktemp("whole")))
    return pretrain(config, safe_point=lambda: None)


@pytest.mark.slow
def test_a_base_has_what_it_promises(whole):
    names = {name for name in contents(whole) if not name.startswith("tokenizer/")}
    model = (
        "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json README.md".split()
    )
    data = "principles.json train.jsonl validation.jsonl test.jsonl".split()
    assert names == {*(f"model/{n}" for n in model), *(f"data/{n}" for n in data), "metrics.jsonl", "DONE.json"}
    assert [line["step"] for line in read_log(whole / "metrics.jsonl")] == list(range(1, 31))
    assert read_json(whole / "DONE.json")["counts"] == {"documents": 240, "steps": 30}


@pytest.mark.slow
def test_a_second_call_finds_it_finished(whole):
    before = {path: path.stat().st_mtime_ns for path in [whole, *whole.rglob("*")]}
    again = pretrain(dataclasses.replace(TINY, cache_dir=str(whole.parent)), safe_point=must_not_be_called)
    assert again == whole
    assert before == {path: path.stat().st_mtime_ns for path in [whole, *whole.rglob("*")]}


@pytest.mark.slow
def test_stopped_and_killed_between_steps_and_behind_the_seal_it_ends_bitwise_equal(whole, tmp_path):
    config = dataclasses.replace(TINY, cache_dir=str(tmp_path))
    folder, arguments = pretrained_folder(config), json.dumps(to_dict(config))

    calls = iter([None, None, None, StoppedError("enough")])

    def stop_at_step_4() -> None:
        if error := next(calls):
            raise error

    def logged() -> list[int]:
        return [line["step"] for line in read_log(folder / "metrics.jsonl")]

    def saved() -> list[str]:
        return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))

    with pytest.raises(StoppedError):
        pretrain(config, safe_point=stop_at_step_4)
    assert logged() == [1, 2, 3, 4] and saved() == ["step_00000004"]

    # Ten steps on from 4: 14 are logged, the checkpoint is of step 10, and the next attempt makes four again.
    assert script(KILLED, arguments, "10").returncode == -signal.SIGKILL
    assert logged() == list(range(1, 15)) and saved() == ["step_00000010"]
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"loss": 6.')  # torn, as a kill may leave it

    assert script(KILLED, arguments, "deletion").returncode == -signal.SIGKILL
    assert (folder / "DONE.json").exists() and saved() == ["step_00000030"]
    assert pretrain(config, safe_point=must_not_be_called) == folder
    assert contents(folder) == contents(whole)
    assert "checkpoints" not in {path.name for path in folder.iterdir()}


# Of TINY with BASE_VERSION 1.
RAISE = "the same settings make another base now: raise BASE_VERSION, and write the new values here"
DATA_SHA256 = {
    "corpus": "72141ffe3ef05c0a3a92378b77a230df1f56c4cb85f8bb1efc5dafd6c120124e",
    "principles.json": "8b75e74c4cd3ece1241a910ae5ab5b5f1f26af274154f4487abfbf26dd5bb270",
    "train.jsonl": "5afcde1e443d50eeca52006e20d4041056fc46f3002ede2396bba594085fdb97",
    "validation.jsonl": "28530256cafa0f43111cab6c1f9c9b407097885d7a69c5193333535e731d903a",
    "test.jsonl": "4de02a3db79a401ac2b7a71ca10191db29459d451469d64e8868cecfc0be222b",
}
INITIAL_WEIGHTS = {  # the first three of each leaf
    "embedding": [0.01426119, -0.004762919, -0.007394351],
    "blocks.attention_norm": [1.0, 1.0, 1.0],
    "blocks.attention.query": [-0.01207279, 0.009658409, 0.0004266556],
    "blocks.attention.key": [0.009313286, 0.05190027, 0.04007843],
    "blocks.attention.value": [-0.02136083, 0.0234227, -0.02059604],
    "blocks.attention.out": [-0.02775802, 0.01349871, 0.001156204],
    "blocks.mlp_norm": [1.0, 1.0, 1.0],
    "blocks.mlp.gate": [-0.01266575, 0.01045472, 0.01567089],
    "blocks.mlp.up": [-0.01164914, -0.009103045, -0.01837948],
    "blocks.mlp.down": [0.01521648, -0.01196862, 0.007838359],
    "final_norm": [1.0, 1.0, 1.0],
}
FIRST_AND_LAST_LOSS = (6.240674, 5.500989)


@pytest.mark.slow
def test_other_weights_or_data_of_the_same_settings_want_another_base_version(whole):
    assert BASE_VERSION == 1
    corpus = "\0".join(itertools.chain(*world.draw_corpus(TINY.seed, TINY.steps * TINY.batch_size)))
    found = {name: file_hash(whole / "data" / name) for name in DATA_SHA256 if name != "corpus"}
    assert found | {"corpus": hashlib.sha256(corpus.encode()).hexdigest()} == DATA_SHA256, RAISE
    params = by_name(init_params(base_shape(TINY), jax_key(TINY.seed, "init")))
    assert params.keys() == INITIAL_WEIGHTS.keys()
    for name, values in INITIAL_WEIGHTS.items():
        np.testing.assert_allclose(params[name].ravel()[:3], values, rtol=1e-5, err_msg=f"{name}: {RAISE}")
    losses = [line["loss"] for line in read_log(whole / "metrics.jsonl")]
    # Thirty steps of float32, whose sums other versions of XLA may order otherwise.
    np.testing.assert_allclose((losses[0], losses[-1]), FIRST_AND_LAST_LOSS, rtol=1e-4, err_msg=RAISE)


def other_version(library: str, name: str, version: Callable[[str], str] = importlib.metadata.version) -> str:
    """An installed version, but for one library's."""
    return "0" if name == library else version(name)


def test_base_version_and_library_versions_name_the_folder(monkeypatch):
    names = [pretrained_folder(TINY)]
    monkeypatch.setattr("sami_jax.miniature.pretraining.BASE_VERSION", BASE_VERSION + 1)
    names.append(pretrained_folder(TINY))
    for library in ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "transformers", "pytest"):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.metadata.version", functools.partial(other_version, library))
            names.append(pretrained_folder(TINY))
    assert len(set(names)) == len(names) - 1 and names[-1] == names[1]  # pytest's version alone decides nothing


def test_the_config_decides_the_folder_and_its_place_does_not(tmp_path):
    here, there = (dataclasses.replace(TINY, cache_dir=str(tmp_path / name)) for name in ("here", "there"))
    assert pretrained_folder(here).parent == tmp_path / "here" and pretrained_folder(there).parent == tmp_path / "there"
    names = {pretrained_folder(config).name for config in (here, there, dataclasses.replace(here, enabled=True))}
    assert len(names) == 1
    numbers = {key: value for key, value in to_dict(here).items() if key not in ("cache_dir", "enabled")}
    others = {
        pretrained_folder(dataclasses.replace(here, **{key: 2 * value + 2})).name for key, value in numbers.items()
    }
    assert len(names | others) == 1 + len(numbers)
