"""The decoder's layers against arithmetic by hand, plain numpy in float64, and what must not change them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sami_jax.model.attention import attend
from sami_jax.model.cache import KVCache
from sami_jax.model.decoder import Block
from sami_jax.model.layers import MLP, Attention, rms_norm, rope_frequencies, rotate
from sami_jax.model.shape import DecoderConfig, RopeScaling
from tiny_models import tiny_config

FREQUENCIES = rope_frequencies(8, theta=50.0, scaling=None)

# float32 rounds at 6e-8 relative; a few dozen terms of size 1 are summed. References are float64.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


class TestRmsNorm:
    def test_by_hand(self):
        # mean([9, 16]) = 12.5; with eps 3.5 the root is 4: [3, 4] / 4 * [2, 10]
        assert_close(rms_norm(jnp.array([3.0, 4.0]), jnp.array([2.0, 10.0]), eps=3.5), [1.5, 10.0])

    def test_scale_of_the_input_drops_out(self):
        x, gain = normal(2, 3, 8), normal(8, seed=1)
        assert_close(rms_norm(jnp.asarray(1000 * x), gain, eps=1e-12), rms_norm(jnp.asarray(x), gain, eps=1e-12))

    def test_bfloat16_is_normed_in_float32(self):
        # 256 squared entries of 1/16 sum to 1: bfloat16 would stop counting at 1/256 of its total.
        x = jnp.full((256,), 1 / 16, jnp.bfloat16)
        actual = rms_norm(x, jnp.ones(256, jnp.bfloat16), eps=0.0)
        assert actual.dtype == jnp.bfloat16
        np.testing.assert_array_equal(actual.astype(jnp.float32), np.ones(256, np.float32))

    def test_zeros_have_a_finite_gradient(self):
        gradient = jax.grad(lambda x: rms_norm(x, jnp.ones(4), eps=1e-6).sum())(jnp.zeros(4))
        assert_close(gradient, np.full(4, 1e3))  # 1 / sqrt(eps)


def frequencies_of(config: DecoderConfig) -> np.ndarray:
    return rope_frequencies(config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)


class TestRopeFrequencies:
    def test_by_hand(self):
        # theta ** (-2 i / H): 256 ** (0, -1/4, -1/2, -3/4)
        assert_close(rope_frequencies(8, theta=256.0, scaling=None), [1, 1 / 4, 1 / 16, 1 / 64])

    def test_llama3_stretches_the_long_waves_by_hand(self):
        # Over 64 positions the pairs turn 64 f / 2 pi = 10.19, 2.546, 0.637 and 0.159 times. Above 4 turns a wave
        # stays, below 1 it is slowed to a half; 2.546 is (2.546 - 1) / 3 = 0.5155 of the way:
        # (0.5155 + 0.4845 / 2) / 4.
        scaling = RopeScaling(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=64)
        actual = rope_frequencies(8, theta=256.0, scaling=scaling)
        np.testing.assert_allclose(actual, [1, (1 + 0.5155) / 8, 1 / 32, 1 / 128], rtol=1e-4)


class TestRotate:
    def test_by_hand(self):
        # H = 4, theta = 100: frequencies 1 and 100 ** (-1/2) = 0.1. Pairs are (x0, x2) and (x1, x3).
        x = jnp.array([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
        actual = rotate(x, jnp.array([[3]]), rope_frequencies(4, theta=100.0, scaling=None))[0, 0, 0]
        # (1, 0) turned by 3 radians; (0, 2) turned by 0.3.
        assert_close(actual, [math.cos(3), -2 * math.sin(0.3), math.sin(3), 2 * math.cos(0.3)])

    def test_position_zero_changes_nothing_and_lengths_stay(self):
        x = jnp.asarray(normal(2, 5, 3, 8))
        np.testing.assert_array_equal(rotate(x, jnp.zeros((2, 5), jnp.int32), FREQUENCIES), x)
        positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
        turned = rotate(x, positions, FREQUENCIES)
        assert_close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1))

    def test_only_the_distance_of_two_positions_matters(self):
        query, key = (jnp.asarray(normal(1, 1, 1, 8, seed=seed)) for seed in (1, 2))

        def product(query_position: int, key_position: int) -> float:
            at = (jnp.array([[position]], jnp.int32) for position in (query_position, key_position))
            turned = (rotate(x, position, FREQUENCIES) for x, position in zip((query, key), at, strict=True))
            return float(jnp.vdot(*turned))

        np.testing.assert_allclose(product(7, 3), product(107, 103), rtol=1e-4)
        assert abs(product(7, 3) - product(7, 4)) > 1e-2

    def test_bfloat16_counts_positions_past_256(self):
        x = jnp.asarray(normal(1, 2, 1, 8)[:, :1]).repeat(2, axis=1).astype(jnp.bfloat16)
        a, b = rotate(x, jnp.array([[1000, 1001]]), FREQUENCIES)[0]
        assert float(jnp.abs(a - b).max()) > 0.1


def np_attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One query of one head of one row at a time."""
    out = np.zeros(queries.shape)
    rows, tokens, heads, head_dim = queries.shape
    for b in range(rows):
        for n in range(heads):
            k = n // (heads // keys.shape[2])
            for t in range(tokens):
                scores = keys[b, :, k].astype(np.float64) @ queries[b, t, n] / math.sqrt(head_dim)
                weights = np.exp(scores - scores.max()) * mask[b, t]
                out[b, t, n] = weights / weights.sum() @ values[b, :, k]
    return out


class TestAttention:
    @pytest.mark.parametrize("kv_heads", [1, 2, 6])
    def test_numpy_reference(self, kv_heads):
        queries, keys, values = normal(2, 4, 6, 8), normal(2, 5, kv_heads, 8), normal(2, 5, kv_heads, 8, seed=1)
        mask = np.random.default_rng(0).random((2, 4, 5)) < 0.5
        mask[:, :, 0] = True
        actual = attend(*map(jnp.asarray, (queries, keys, values, mask)))
        assert_close(actual, np_attention(queries, keys, values, mask))

    def test_what_the_mask_hides_changes_nothing(self):
        queries, keys, values = (jnp.asarray(normal(1, 3, 2, 4, seed=seed)) for seed in range(3))
        mask = jnp.tril(jnp.ones((1, 3, 3), bool))
        before = attend(queries, keys, values, mask)
        after = attend(queries, keys.at[:, 2].set(1e4), values.at[:, 2].set(1e4), mask)
        np.testing.assert_array_equal(after[:, :2], before[:, :2])


class TestAttentionBehindACache:
    @pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (2, 3), (6, None)])
    @pytest.mark.parametrize("block", [None, 1, 3, 7, 20])
    def test_is_the_rule_with_each_slots_own_past(self, kv_heads, window, block):
        queries, keys, values = normal(3, 6, 8), normal(2, 3, kv_heads, 7, 8), normal(2, 3, kv_heads, 7, 8, seed=1)
        positions = np.array([0, 4, 5], np.int32)
        keys[:, :, :, 6], values[:, :, :, 6] = np.inf, np.nan  # rubbish that was never written over
        cache = KVCache(jnp.asarray(keys), jnp.asarray(values))
        at = jnp.asarray(queries), jnp.asarray(positions)
        if block in (None, 7, 20):  # what lies behind all positions may be read, and must then be finite
            cache = jax.tree.map(lambda x: jnp.nan_to_num(x, posinf=1e4), cache)
        actual = cache.attend(jnp.asarray(1), *at, window=window, block=block)
        back = positions[:, None] - np.arange(6)
        mask = (back >= 0) & (back < (window or 7))
        past = (x[1, :, :, :6].swapaxes(1, 2) for x in (keys, values))
        assert_close(actual, np_attention(queries[:, None], *past, mask[:, None])[:, 0])

    def test_tokens_are_written_at_their_positions_of_their_parts_slots(self):
        layers, slots, places = 2, 4, 5
        cache = KVCache(*(jnp.full((layers, slots, 2, places, 3), 7.0) for _ in range(2)))
        keys, values = normal(2, 3, 2, 3), normal(2, 3, 2, 3, seed=1)
        # Two parts of two slots; the last token of the first part, and the first of the second, belong to no slot.
        own = jnp.array([[0, 1, 2], [2, 1, 1]])
        at = jnp.array([[4, 0, 1], [0, 2, 3]])
        written = cache.written(jnp.asarray(1), own, at, jnp.asarray(keys), jnp.asarray(values))
        for now, new in zip(written, (keys, values), strict=True):
            expected = np.full(now.shape, 7.0, np.float32)
            for part, token, slot, place in ((0, 0, 0, 4), (0, 1, 1, 0), (1, 1, 3, 2), (1, 2, 3, 3)):
                expected[1, slot, :, place] = new[part, token]
            np.testing.assert_array_equal(now, expected)


def first_layer(module: nnx.Module) -> nnx.Module:
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda x: x[0], state))


class TestModules:
    def test_mlp_is_swiglu(self):
        mlp = first_layer(MLP(tiny_config(), nnx.Rngs(0)))
        x = normal(2, 3, 24)
        gate, up, down = (np.asarray(w[...], np.float64) for w in (mlp.gate, mlp.up, mlp.down))
        gated = x @ gate
        assert_close(mlp(jnp.asarray(x)), (gated / (1 + np.exp(-gated)) * (x @ up)) @ down)

    def test_attention_module_against_its_parts(self):
        config = tiny_config(sliding_window=2)
        module = first_layer(Attention(config, nnx.Rngs(0)))
        x, positions = normal(2, 5, 24), np.tile(np.arange(5, dtype=np.int32), (2, 1))
        query, key, value, out = (np.asarray(w[...]) for w in (module.query, module.key, module.value, module.out))
        queries, keys = (
            np.asarray(rotate(jnp.asarray(np.tensordot(x, w, 1)), jnp.asarray(positions), frequencies_of(config)))
            for w in (query, key)
        )
        back = positions[:, :, None] - positions[:, None, :]
        mixed = np_attention(queries, keys, np.tensordot(x, value, 1), (back >= 0) & (back < 2))
        kept = []

        def mix(*qkv: jax.Array) -> tuple[jax.Array, int]:
            kept.extend(qkv)
            return attend(*qkv, jnp.asarray((back >= 0) & (back < 2))), 5

        actual, what = module(jnp.asarray(x), jnp.asarray(positions), mix)
        assert what == 5
        assert_close(kept[1], keys)
        assert_close(actual, np.tensordot(mixed, out, 2))

    def test_block_adds_both_branches_to_the_stream(self):
        config = tiny_config()
        block = first_layer(Block(config, nnx.Rngs(0)))
        x, positions = jnp.asarray(normal(1, 4, 24)), jnp.arange(4)[None]

        def mix(*qkv: jax.Array) -> tuple[jax.Array, None]:
            return attend(*qkv, jnp.tril(jnp.ones((1, 4, 4), bool))), None

        middle = x + block.attention(rms_norm(x, block.attention_norm[...], eps=1e-5), positions, mix)[0]
        expected = middle + block.mlp(rms_norm(middle, block.mlp_norm[...], eps=1e-5))
        assert_close(block(x, positions, mix)[0], expected)
