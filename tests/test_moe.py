"""The mixture of experts against numpy in float64, token by token; its two back-ends against each other."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sami_jax.model.moe import blocked_mlp, mixed_experts, ragged_mlp, route

E, D, F = 5, 12, 9
# float32 rounds at 6e-8 relative; a few dozen terms of size 1 are summed.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


WEIGHTS = normal(E, D, F), normal(E, D, F, seed=1), normal(E, F, D, seed=2)


def weights() -> list[jax.Array]:
    return [jnp.asarray(weight) for weight in WEIGHTS]


def np_expert(x: np.ndarray, expert: int) -> np.ndarray:
    gate, up, down = (weight[expert].astype(np.float64) for weight in WEIGHTS)
    gated = x @ gate
    return (gated / (1 + np.exp(-gated)) * (x @ up)) @ down


class TestRoute:
    def test_by_hand(self):
        # softmax(log 1, log 2, log 5) = 1/8, 2/8, 5/8; the best two again sum to one: 5/7 and 2/7.
        chosen, shares = route(jnp.ones((1, 1, 1)), jnp.log(jnp.array([[1.0, 2.0, 5.0]])), k=2)
        np.testing.assert_array_equal(chosen[0, 0], [2, 1])
        assert_close(shares[0, 0], [5 / 7, 2 / 7])

    def test_of_equals_the_lower_id(self):
        chosen, shares = route(jnp.ones((1, 1, 2)), jnp.zeros((2, 4)), k=2)
        np.testing.assert_array_equal(chosen[0, 0], [0, 1])
        assert_close(shares[0, 0], [0.5, 0.5])

    def test_bfloat16_is_routed_in_float32(self):
        # 300 ones and one 0.5 sum to 300.5; bfloat16 has 300 and 302 only, and would call it a tie.
        x = jnp.ones((1, 1, 301), jnp.bfloat16)
        router = jnp.ones((301, 2), jnp.bfloat16).at[0, 0].set(0.5).at[0, 1].set(1.0)
        chosen, shares = route(x, router, k=1)
        assert chosen[0, 0, 0] == 1 and shares.dtype == jnp.float32


class TestMixedExperts:
    @pytest.mark.parametrize("jit", [False, True])
    def test_against_numpy(self, jit):
        x, k = normal(2, 7, D, seed=3), 3
        chosen = np.stack([np.random.default_rng(i).permutation(E)[:k] for i in range(14)]).reshape(2, 7, k)
        shares = np.random.default_rng(9).dirichlet(np.ones(k), (2, 7)).astype(np.float32)
        function = functools.partial(mixed_experts, mesh=None)
        function = jax.jit(function) if jit else function
        actual = function(jnp.asarray(x), jnp.asarray(chosen, jnp.int32), jnp.asarray(shares), *weights())
        for b, t in np.ndindex(2, 7):
            expected = sum(shares[b, t, i] * np_expert(x[b, t], chosen[b, t, i]) for i in range(k))
            assert_close(actual[b, t], expected)

    def test_no_token_is_dropped_when_all_want_one_expert(self):
        x = normal(1, 40, D, seed=4)
        chosen = jnp.full((1, 40, 1), 3, jnp.int32)
        assert_close(
            mixed_experts(jnp.asarray(x), chosen, jnp.ones((1, 40, 1)), *weights(), mesh=None)[0], np_expert(x[0], 3)
        )


class TestPlatforms:
    @pytest.mark.parametrize("platform, ragged", [("tpu", True), ("cuda", False), ("rocm", False), ("cpu", False)])
    def test_ragged_dot_is_taken_on_tpu_alone(self, platform, ragged):
        x, chosen, shares = jnp.ones((1, 8, D)), jnp.zeros((1, 8, 2), jnp.int32), jnp.ones((1, 8, 2))
        function = jax.jit(functools.partial(mixed_experts, mesh=None))
        lowered = function.trace(x, chosen, shares, *weights()).lower(lowering_platforms=(platform,)).as_text()
        assert ("ragged_dot" in lowered) == ragged
        assert ("stablehlo.while" in lowered) != ragged  # the scan over blocks


class TestBackEnds:
    # Rows of each expert: even, with empty experts, all in the first, all in the last; blocks have 16 rows.
    SIZES = [(80, 80, 80, 80, 80), (0, 399, 0, 1, 0), (400, 0, 0, 0, 0), (0, 0, 0, 0, 400), (3, 0, 0, 0, 0)]

    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_outputs_and_gradients_agree(self, sizes):
        rows, seen = normal(sum(sizes), D, seed=5), normal(sum(sizes), D, seed=6)
        count = jnp.asarray(sizes, jnp.int32)

        def outputs(function, rows, *weights):
            out = function(rows, count, *weights)
            return jnp.sum(out * seen), out

        both = [
            jax.value_and_grad(functools.partial(outputs, function), argnums=(0, 1, 2, 3), has_aux=True)(
                jnp.asarray(rows), *weights()
            )
            for function in (ragged_mlp, blocked_mlp)
        ]
        (_, ragged), ragged_gradients = both[0]
        (_, blocked), blocked_gradients = both[1]
        expert_of_row = np.repeat(np.arange(E), sizes)
        assert_close(blocked, np.stack([np_expert(*pair) for pair in zip(rows, expert_of_row, strict=True)]))
        assert_close(blocked, ragged)
        # Sums over up to 400 rows, of size 100.
        chex.assert_trees_all_close(blocked_gradients, ragged_gradients, rtol=1e-4, atol=1e-4)
        assert all(float(jnp.abs(gradient).max()) > 0.1 for gradient in blocked_gradients)

    def test_experts_without_rows_have_no_gradient(self):
        gradient = jax.grad(
            lambda gate: blocked_mlp(jnp.asarray(normal(3, D)), jnp.array([0, 3, 0, 0, 0]), gate, *weights()[1:]).sum()
        )
        moved = np.abs(gradient(weights()[0])).max(axis=(1, 2)) > 0
        np.testing.assert_array_equal(moved, [False, True, False, False, False])

    def test_bfloat16_gradients_are_summed_in_float32(self):
        # One weight, 1024 rows whose gradients are 1 each: in bfloat16 the sum would stop at 256.
        weights = [jnp.full((1, 1, 1), value, jnp.bfloat16) for value in (30.0, 1 / 30, 1.0)]
        rows, sizes = jnp.ones((1024, 1), jnp.bfloat16), jnp.array([1024], jnp.int32)
        gradient = jax.grad(lambda down: blocked_mlp(rows, sizes, *weights[:2], down).astype(jnp.float32).sum())
        np.testing.assert_allclose(gradient(weights[2]).astype(np.float32)[0, 0, 0], 1024, rtol=0.01)
