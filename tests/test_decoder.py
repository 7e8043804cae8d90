"""The decoder's two faces, scoring and decoding, against each other, and what must not change either."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import doubles
from sami_jax.model.decoder import abstract_params, init_params, make_model
from sami_jax.scoring import matrices
from sami_jax.sharding import RULES
from sami_jax.types import Remat
from tiny_models import random_params, tiny_config

# Logits of size 10 in float32, summed in another order: 1e-5 of the largest.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)

CONFIGS = {
    "plain": tiny_config(),
    "window": tiny_config(sliding_window=3),
    "tied": tiny_config(tied_embeddings=True),
    "one_kv_head": tiny_config(n_kv_heads=1),
    "llama": tiny_config(model_type="llama", n_kv_heads=4),
    "mixtral": tiny_config(model_type="mixtral", n_experts=4, experts_per_token=2),
}
DTYPES = ("float32", "bfloat16")
LENGTHS = (5, 1, 8)  # of the prompts; one token is the shortest


def tokens_of(rows: int, width: int, *, seed: int = 0, vocab_size: int = 61) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab_size, (rows, width)), jnp.int32)


def all_logits(model, params, tokens: jax.Array) -> jax.Array:
    """[B, T, V], scored at every position."""
    return matrices.all_logits(model.rows, params, tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_steps_give_the_logits_of_score_at_every_position(name):
    config = CONFIGS[name]
    model, params = make_model(config), random_params(config)
    tokens = tokens_of(3, 14)
    expected = np.asarray(all_logits(model, params, tokens))
    lengths = jnp.array(LENGTHS)
    # Beyond a row's prompt stands rubbish, as a batch of ragged prompts has it.
    prompts = jnp.where(jnp.arange(8)[None] < lengths[:, None], tokens[:, :8], 60)
    logits, cache = doubles.prefilled(model.decode, params, prompts, lengths, 14)
    step = jax.jit(model.decode.step)
    for count in range(7):
        assert_close(logits, expected[np.arange(3), np.array(LENGTHS) + count - 1])
        if count < 6:
            positions = lengths + count
            logits, cache = step(params, cache, tokens[jnp.arange(3), positions], positions)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_sees_the_past_only(name):
    config = CONFIGS[name]
    model, params = make_model(config), random_params(config)
    tokens = tokens_of(1, 9)
    before, after = (all_logits(model, params, t) for t in (tokens, tokens.at[0, 5].set(tokens[0, 5] ^ 1)))
    changed = np.abs(np.asarray(after - before)).max(axis=(0, 2)) > 1e-3
    # Two layers with a window of 3 reach back 2 * (3 - 1) = 4 tokens: the last one, 3 further on, still sees it.
    np.testing.assert_array_equal(changed, np.arange(9) >= 5)


def test_the_window_hides_what_lies_behind_it():
    config = tiny_config(sliding_window=3)
    model, params = make_model(config), random_params(config)
    tokens = tokens_of(1, 12)
    before, after = (all_logits(model, params, t) for t in (tokens, tokens.at[0, 2].set(tokens[0, 2] ^ 1)))
    changed = np.abs(np.asarray(after - before)).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(changed, (np.arange(12) >= 2) & (np.arange(12) <= 6))


def test_order_of_the_past_matters():
    config = tiny_config()
    model, params = make_model(config), random_params(config)
    tokens = jnp.array([[3, 4, 5, 6]])
    swapped = jnp.array([[4, 3, 5, 6]])
    last = [all_logits(model, params, t)[0, -1] for t in (tokens, swapped)]
    assert float(jnp.abs(last[0] - last[1]).max()) > 1e-2


def test_padding_past_a_rows_length_changes_nothing():
    config = tiny_config()
    model, params = make_model(config), random_params(config)
    tokens = tokens_of(2, 6)
    short = all_logits(model, params, tokens)
    for filler in (0, 2, 60):
        padded = jnp.concatenate([tokens, jnp.full((2, 5), filler, jnp.int32)], axis=1)
        assert_close(all_logits(model, params, padded)[:, :6], short)


@pytest.mark.parametrize("filler", [0, 60])
def test_padding_past_a_prompt_changes_nothing_when_decoding(filler):
    config = tiny_config()
    model, params = make_model(config), random_params(config)
    row = tokens_of(1, 4)
    lengths, token = jnp.array([4]), jnp.array([9])
    exact, exact_cache = doubles.prefilled(model.decode, params, row, lengths, 8)
    padded = jnp.concatenate([row, jnp.full((1, 3), filler, jnp.int32)], axis=1)
    logits, cache = doubles.prefilled(model.decode, params, padded, lengths, 8)
    assert_close(logits, exact)
    assert_close(
        model.decode.step(params, cache, token, lengths)[0], model.decode.step(params, exact_cache, token, lengths)[0]
    )


def test_rows_do_not_know_each_other():
    config = tiny_config()
    model, params = make_model(config), random_params(config)
    tokens = tokens_of(3, 5)
    assert_close(all_logits(model, params, tokens)[1:2], all_logits(model, params, tokens[1:2]))


def test_the_tied_head_is_the_embedding():
    config = tiny_config(tied_embeddings=True)
    tied = random_params(config)
    assert "head" not in tied
    untied = {**tied, "head": tied["embedding"].T}
    tokens = tokens_of(2, 5)
    assert_close(
        all_logits(make_model(config), tied, tokens),
        all_logits(make_model(tiny_config()), untied, tokens),
    )


class TestRemat:
    def test_gives_the_same_gradients(self):
        config = tiny_config(sliding_window=3)
        params, tokens = random_params(config), tokens_of(2, 6)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 61)), jnp.float32)

        def gradient(remat: Remat):
            model = make_model(config, remat=remat)
            return jax.jit(jax.grad(lambda p: jnp.sum(weights * all_logits(model, p, tokens))))(params)

        kept = gradient("none")
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(kept))
        assert largest > 1.0
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * largest)
        for remat in ("dots", "full"):
            jax.tree.map(close, gradient(remat), kept)

    def test_recomputes_what_it_says(self):
        """A layer has nine matmuls, two of them without weights: scores, and their sum over the values."""
        config, tokens = tiny_config(), tokens_of(2, 6)

        def matmuls(remat: Remat) -> int:
            model = make_model(config, remat=remat)
            gradient = jax.grad(lambda p: jnp.sum(all_logits(model, p, tokens)))
            return str(jax.make_jaxpr(gradient)(random_params(config))).count("dot_general[")

        once = matmuls("none")
        # The attention's own are made again, but for the last matmul of a layer, which no gradient asks for.
        assert (matmuls("dots") - once, matmuls("full") - once) == (2, 8)


class TestBfloat16Compute:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_logits_are_float32_and_near_those_of_float32(self, name):
        config = CONFIGS[name]
        params, tokens = random_params(config), tokens_of(2, 6)
        exact, rough = (all_logits(make_model(config, dtype=dtype), params, tokens) for dtype in DTYPES)
        assert rough.dtype == jnp.float32
        difference = np.abs(np.asarray(rough - exact)).max() / np.abs(exact).max()
        # A unit in bfloat16's last place is 0.4 to 0.8 %, and some forty roundings follow one another.
        assert 1e-4 < difference < 0.05

    def test_logits_are_not_rounded_to_bfloat16(self):
        config = tiny_config()
        logits = all_logits(make_model(config, dtype="bfloat16"), random_params(config), tokens_of(2, 6))
        assert np.mean(np.asarray(logits.astype(jnp.bfloat16).astype(jnp.float32) != logits)) > 0.9

    def test_weights_kept_in_bfloat16_or_rounded_to_it_are_the_same(self):
        config = tiny_config()
        model, tokens = make_model(config, dtype="bfloat16"), tokens_of(2, 6)
        params = random_params(config)
        kept = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        np.testing.assert_array_equal(all_logits(model, kept, tokens), all_logits(model, params, tokens))

    def test_gradients_have_the_dtype_of_the_weights(self):
        config, tokens = tiny_config(), tokens_of(2, 6)
        for weights, compute in itertools.product(DTYPES, DTYPES):
            model = make_model(config, dtype=compute)
            params = jax.tree.map(lambda x, dtype=weights: x.astype(dtype), random_params(config))
            gradient = jax.eval_shape(jax.grad(lambda p, model=model: jnp.sum(all_logits(model, p, tokens))), params)
            assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(weights)}

    def test_the_cache_is_bfloat16(self):
        config = tiny_config()
        model = make_model(config, dtype="bfloat16")
        logits, cache = doubles.prefilled(model.decode, random_params(config), tokens_of(2, 4), jnp.array([4, 3]), 8)
        assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
        assert logits.dtype == jnp.float32

    def test_float32_means_it_on_accelerators(self):
        """Whose matmuls of float32 are by default less than that: bfloat16 on TPUs, TF32 on GPUs."""
        config, tokens = tiny_config(), tokens_of(2, 6)
        programs = [
            str(jax.make_jaxpr(lambda p, model=model: all_logits(model, p, tokens))(random_params(config)))
            for model in (make_model(config, dtype=dtype) for dtype in DTYPES)
        ]
        assert ["HIGHEST" in program for program in programs] == [True, False]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_one_known_axis_per_dimension(name):
    config = CONFIGS[name]
    shapes, axes = abstract_params(config)
    sizes = {
        "layers": config.n_layers,
        "embed": config.embed_dim,
        "features": config.embed_dim,
        "expert_embed": config.embed_dim,
        "experts": config.n_experts,
        "router": config.n_experts,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_dim,
        "vocab": config.vocab_size,
    }
    assert sizes.keys() == RULES.keys()

    def check(shape: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> None:
        assert shape.dtype == jnp.float32
        assert shape.shape == tuple(sizes[name] for name in names)

    jax.tree.map(check, shapes, axes)


def test_init_is_as_described_and_follows_its_key():
    config = tiny_config(embed_dim=64, vocab_size=128)
    params, again, other = (init_params(config, jax.random.key(seed)) for seed in (0, 0, 1))
    shapes, _ = abstract_params(config)
    jax.tree.map(lambda leaf, spec: np.testing.assert_array_equal(leaf.shape, spec.shape), params, shapes)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert not np.array_equal(params["embedding"], other["embedding"])
    np.testing.assert_array_equal(params["final_norm"], 1.0)
    query, key = (np.asarray(params["blocks"]["attention"][name]) for name in ("query", "key"))
    assert abs(query.std() - 0.02) < 1e-3  # 5120 draws: the standard error is 0.02 / sqrt(2 * 5120) = 2e-4
    assert abs(np.corrcoef(query[0].ravel(), query[1].ravel())[0, 1]) < 0.1  # layers draw for themselves
    assert not np.array_equal(query[:, :, :2], key)
