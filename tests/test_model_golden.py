"""Decoder, scoring and training against what torch said once (tests/goldens/make_model.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sami_jax.config import MeshConfig, from_dict
from sami_jax.data.pairs import Pair
from sami_jax.model.decoder import make_model
from sami_jax.model.huggingface import read_config
from sami_jax.scoring import batch_widths, make_batch, score_pairs
from sami_jax.sharding import batch_sharding, make_mesh
from sami_jax.training import init_state, make_optimizer, make_train_step, micro_batches
from tiny_models import load_float32

GOLDENS = dict(np.load(Path(__file__).parent / "goldens" / "model.npz"))
QUERIES = json.loads(str(GOLDENS["queries"]))
PAIRS = [
    Pair(
        number,
        ("a prompt",) * len(query["prompts"]),
        ("a response",) * len(query["responses"]),
        tuple(map(tuple, query["prompts"])),
        tuple(map(tuple, query["responses"])),
    )
    for number, query in enumerate(QUERIES)
]


def cross_entropy(matrix: np.ndarray, axis: int) -> float:
    """Of the softmax over the axis (1: responses, 0: constitutions) against the diagonal, in nats."""
    return float(-np.mean(np.diagonal(matrix - np.logaddexp.reduce(matrix, axis=axis, keepdims=True))))


@pytest.fixture(scope="module")
def model_and_params(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    (folder / "config.json").write_text(str(GOLDENS["config"]))
    prefix = "weights/"
    weights = {name.removeprefix(prefix): array for name, array in GOLDENS.items() if name.startswith(prefix)}
    save_file(weights, folder / "model.safetensors")
    config = read_config(folder)
    return make_model(config, remat=True), jax.tree.map(jnp.asarray, load_float32(folder, config))


def test_logits(model_and_params):
    model, params = model_and_params
    tokens = jnp.asarray(GOLDENS["tokens"], jnp.int32)
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    logits = model.score(params, tokens, at)
    np.testing.assert_allclose(logits, GOLDENS["logits"], rtol=0, atol=1e-4)
    # The same by prefill and steps, from where each row's prompt ends.
    lengths = jnp.array([12, 3])
    decoded, cache = model.decode.prefill(params, tokens[:, :12], lengths, 20)
    step = jax.jit(model.decode.step)
    rows = np.arange(2)
    for count in range(8):
        at = np.asarray(lengths) + count
        np.testing.assert_allclose(decoded, GOLDENS["logits"][rows, at - 1], rtol=0, atol=1e-4)
        decoded, cache = step(params, cache, tokens[rows, at], jnp.asarray(at))


@pytest.mark.parametrize("normalize", ["mean", "sum"])
@pytest.mark.parametrize("rows, round_to", [(2, 1), (5, 16)])  # five queries: the first way leaves a batch half full
def test_contrastive_matrix(model_and_params, normalize, rows, round_to):
    model, params = model_and_params
    scored: list[int] = []
    matrices = score_pairs(
        model.score,
        params,
        PAIRS,
        normalize=normalize,
        rows=rows,
        round_to=round_to,
        sharding=batch_sharding(make_mesh(MeshConfig())),
        scored=scored.append,
    )
    expected = GOLDENS[f"{normalize}_logps"]
    # A sum of up to eight tokens is up to 60 nats, where float32 has steps of 4e-6.
    np.testing.assert_allclose(matrices, expected, rtol=0 if normalize == "mean" else 1e-6, atol=1e-5)
    assert scored[-1] == len(PAIRS)
    # Transposed it would not pass, nor with a token too few or too many.
    assert np.abs(expected - expected.transpose(0, 2, 1)).max() > 0.1


@pytest.mark.parametrize("optimizer, learning_rate", [("adamw", 1e-3), ("rmsprop", 1e-4)])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_four_step_losses(model_and_params, optimizer, learning_rate, micro_batch):
    model, params = model_and_params
    train = from_dict({"train": {"optimizer": optimizer, "learning_rate": learning_rate}}).train
    step = make_train_step(model.score, train)
    state = init_state(jax.tree.map(jnp.copy, params), make_optimizer(train))
    width, response_width = batch_widths(PAIRS, round_to=4, eos_id=None)
    losses, over_responses, over_constitutions = [], [], []
    for indices in GOLDENS["order"]:
        rows = [PAIRS[i] for i in indices]
        batch = make_batch(rows, width=width, response_width=response_width, eos_id=None)
        state, metrics = step(state, params, jax.tree.map(jnp.asarray, micro_batches(batch, micro_batch)))
        losses.append(float(metrics.loss))
        over_responses.append(float(metrics.over_responses))
        over_constitutions.append(float(metrics.over_constitutions))
    expected = GOLDENS[f"{optimizer}_losses"]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)
    # The loss is the mean of both sides, which a transposed matrix would exchange unseen.
    first = [GOLDENS["mean_logps"][i] for i in GOLDENS["order"][0]]
    for actual, axis in ((over_responses[0], 1), (over_constitutions[0], 0)):
        np.testing.assert_allclose(actual, np.mean([cross_entropy(m, axis) for m in first]), rtol=0, atol=1e-5)


def test_the_golden_losses_tell_training_from_none(model_and_params):
    """The losses that weights left as they are would give: far from the golden ones after the first step."""
    losses = np.mean([[cross_entropy(m, axis) for m in GOLDENS["mean_logps"]] for axis in (0, 1)], axis=0)
    untrained = losses[GOLDENS["order"]].mean(axis=1)
    for optimizer in ("adamw", "rmsprop"):
        difference = np.abs(untrained - GOLDENS[f"{optimizer}_losses"])
        assert difference[0] < 1e-6
        assert (difference[1:] > 1e-3).all()
