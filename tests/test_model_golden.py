"""Decoder, scoring and training against what torch said once (tests/goldens/make_families.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import doubles
from ladder import rungs
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import from_dict
from sami_jax.data.pairs import Pair
from sami_jax.huggingface.folder import read_config
from sami_jax.losses import sami_loss
from sami_jax.model.decoder import Model, make_model
from sami_jax.model.layers import rope_frequencies, rotate
from sami_jax.model.moe import route
from sami_jax.scoring.matrices import all_logits, contrastive_logps, score_packed
from sami_jax.sharding import make_mesh
from sami_jax.training import init_state, make_optimizer, make_train_step
from sami_jax.types import Array, Params
from tiny_models import load_float32

FAMILIES = ("mistral", "llama3", "mixtral")


class Golden(NamedTuple):
    """A family's file, its model and pairs."""

    says: dict[str, np.ndarray]
    model: Model
    params: Params
    pairs: list[Pair]
    load: Callable[[str], Params]  # the file's tensors under a prefix, as a tree like params


def cross_entropy(matrix: np.ndarray, axis: int) -> float:
    """Of the softmax over the axis (1: responses, 0: constitutions) against the diagonal, in nats."""
    return float(-np.mean(np.diagonal(matrix - np.logaddexp.reduce(matrix, axis=axis, keepdims=True))))


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request, tmp_path_factory) -> Golden:
    with np.load(Path(__file__).parent / "goldens" / f"{request.param}.npz") as file:
        says = dict(file)
    folder = tmp_path_factory.mktemp("golden")
    (folder / "config.json").write_text(str(says["config"]))
    config = read_config(folder)

    def load(prefix: str) -> Params:
        tensors = {name.removeprefix(prefix): array for name, array in says.items() if name.startswith(prefix)}
        save_file(tensors, folder / "model.safetensors")
        return load_float32(folder, config)

    pairs = [
        Pair(
            number,
            ("a prompt",) * len(query["prompts"]),
            ("a response",) * len(query["responses"]),
            tuple(map(tuple, query["prompts"])),
            tuple(map(tuple, query["responses"])),
        )
        for number, query in enumerate(json.loads(str(says["queries"])))
    ]
    return Golden(says, make_model(config, remat="full"), load("weights/"), pairs, load)


def test_rungs(golden):
    """Norms, attention, MLP or experts of each layer, the layer, the final norm: each from torch's own input."""
    ours = rungs(golden.model.config, golden.params, tokens=20)
    theirs = {name.removeprefix("out/"): array for name, array in golden.says.items() if name.startswith("out/")}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        given = golden.says[f"in/{name}"]
        assert np.abs(expected - given).max() > 0.1
        # Of size 1 to 5, and a few dozen terms are summed in another order.
        np.testing.assert_allclose(ours[name](jnp.asarray(given)), expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_rope(golden):
    x, positions = (jnp.asarray(golden.says[f"rope/{name}"]) for name in ("x", "positions"))
    config = golden.model.config
    frequencies = rope_frequencies(config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)
    # Angles reach 127 radians, where float32 is exact to 4e-6 (half a unit in the last place).
    actual = rotate(x, positions.astype(jnp.int32), frequencies)
    np.testing.assert_allclose(actual, golden.says["rope/turned"], rtol=0, atol=5e-5)
    assert np.abs(actual - x).max() > 1


@pytest.mark.parametrize("golden", ["mixtral"], indirect=True)
def test_router(golden):
    router = golden.params["blocks"]["mlp"]["router"][1]
    chosen, shares = route(jnp.asarray(golden.says["router/x"]), router, k=golden.model.config.experts_per_token)
    np.testing.assert_array_equal(chosen[0], golden.says["router/chosen"])
    np.testing.assert_allclose(shares[0], golden.says["router/shares"], rtol=0, atol=1e-6)
    assert set(golden.says["router/chosen"].ravel()) == set(range(golden.model.config.n_experts))


def test_logits(golden):
    tokens = jnp.asarray(golden.says["tokens"], jnp.int32)
    logits = all_logits(golden.model.rows, golden.params, tokens)
    np.testing.assert_allclose(logits, golden.says["logits"], rtol=0, atol=1e-4)
    # The same by prefill and steps, from where each row's prompt ends.
    lengths = jnp.array([12, 3])
    decoded, cache = doubles.prefilled(golden.model.decode, golden.params, tokens[:, :12], lengths, 20)
    step = jax.jit(golden.model.decode.step)
    rows = np.arange(2)
    for count in range(8):
        at = np.asarray(lengths) + count
        np.testing.assert_allclose(decoded, golden.says["logits"][rows, at - 1], rtol=0, atol=1e-4)
        decoded, cache = step(golden.params, cache, tokens[rows, at], jnp.asarray(at))


def test_greedy_tokens(golden):
    prompts = [pair.prompt_ids[0] for pair in golden.pairs]
    tokens = doubles.greedy(golden.model.decode, golden.params, prompts, count=8)
    np.testing.assert_array_equal(tokens, golden.says["greedy"])
    assert len(set(golden.says["greedy"].ravel())) > 5  # a model that repeats itself would prove little


def test_gradients(golden):
    rows = [golden.pairs[i] for i in golden.says["order"][0]]
    [batch] = doubles.packing(rows, rows=6).micro_batches(0)

    def loss(params: Params) -> Array:
        return jnp.mean(jax.vmap(sami_loss)(contrastive_logps(golden.model.rows, params, batch, normalize="mean")).loss)

    expected = golden.load("gradients/")
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(jax.grad(loss)(golden.params)), jax.tree.leaves(expected), strict=True
    ):
        # Sums of some hundred float32 terms, in another order: of the size of the leaf's largest entry.
        largest = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))
        assert largest > 1e-4


@pytest.mark.parametrize("normalize", ["mean", "sum"])
@pytest.mark.parametrize("rows", [2, 5])
def test_contrastive_matrix(golden, normalize, rows):
    scored: list[int] = []
    packing, mesh = doubles.packing(golden.pairs, rows=rows), make_mesh(MeshConfig())
    matrices = score_packed(
        golden.model.rows, golden.params, packing, 0, normalize=normalize, mesh=mesh, scored=scored.append
    )
    expected = golden.says[f"{normalize}_logps"]
    # A sum of up to eight tokens is up to 60 nats, where float32 has steps of 4e-6.
    np.testing.assert_allclose(matrices, expected, rtol=0 if normalize == "mean" else 1e-6, atol=1e-5)
    assert scored[-1] == len(golden.pairs)
    # Transposed it would not pass, nor with a token too few or too many.
    assert np.abs(expected - expected.transpose(0, 2, 1)).max() > 0.1


@pytest.mark.parametrize("optimizer, learning_rate", [("adamw", 1e-3), ("rmsprop", 1e-4)])
@pytest.mark.parametrize("rows", [2, 6])
def test_four_step_losses(golden, optimizer, learning_rate, rows):
    settings = {"optimizer": optimizer, "learning_rate": learning_rate, "queries_per_step": 3}
    train = from_dict({"train": settings}).train
    step = make_train_step(golden.model.rows, train)
    state = init_state(jax.tree.map(jnp.copy, golden.params), make_optimizer(train))
    steps = [[golden.pairs[i] for i in indices] for indices in golden.says["order"]]
    packing = doubles.packing(*steps, rows=rows, widest=40)
    assert packing.depth == {2: 3, 6: 1}[rows]
    losses, over_responses, over_constitutions = [], [], []
    for number in range(len(steps)):
        state, metrics = step(state, None, jax.tree.map(jnp.asarray, packing.stacked(number)))
        losses.append(float(metrics.loss))
        over_responses.append(float(metrics.over_responses))
        over_constitutions.append(float(metrics.over_constitutions))
    expected = golden.says[f"{optimizer}_losses"]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)
    # The loss is the mean of both sides, which a transposed matrix would exchange unseen.
    first = [golden.says["mean_logps"][i] for i in golden.says["order"][0]]
    for actual, axis in ((over_responses[0], 1), (over_constitutions[0], 0)):
        np.testing.assert_allclose(actual, np.mean([cross_entropy(m, axis) for m in first]), rtol=0, atol=1e-5)


def test_the_golden_losses_tell_training_from_none(golden):
    """The losses that weights left as they are would give: far from the golden ones after the first step."""
    losses = np.mean([[cross_entropy(m, axis) for m in golden.says["mean_logps"]] for axis in (0, 1)], axis=0)
    untrained = losses[golden.says["order"]].mean(axis=1)
    for optimizer in ("adamw", "rmsprop"):
        difference = np.abs(untrained - golden.says[f"{optimizer}_losses"])
        assert difference[0] < 1e-6
        assert (difference[1:] > 1e-3).all()
