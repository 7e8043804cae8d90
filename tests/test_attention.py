"""Who sees whom, by hand; and every back-end of attention against the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sami_jax.errors import SamiError
from sami_jax.model.attention import BLOCKED, DENSE, BackEnd, check, visible
from sami_jax.model.decoder import make_model
from tiny_models import tiny_config

# A prompt of three tokens, then two responses behind copies of its last one; then a token of another pack; padding.
ENDS = np.array([[7, 7, 5, 5, 5, 7, 7, 8, 9]])
POSITIONS = np.array([[0, 1, 2, 3, 4, 2, 3, 0, 0]])
SEEN = [
    [1, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 1, 0, 0, 0],
    [1, 1, 0, 0, 0, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 1],
]


class TestVisible:
    def test_by_hand(self):
        np.testing.assert_array_equal(visible(POSITIONS, jnp.asarray(ENDS), window=None)[0], np.array(SEEN, bool))

    def test_a_window_counts_positions(self):
        near = POSITIONS[0][:, None] - POSITIONS[0] < 2
        expected = np.array(SEEN, bool) & near
        assert expected[5, 1] and not expected[4, 2]  # four slots back, yet one position; two slots, two positions
        np.testing.assert_array_equal(visible(jnp.asarray(POSITIONS), jnp.asarray(ENDS), window=2)[0], expected)

    def test_a_block_of_queries_has_its_part_of_it(self):
        whole = visible(jnp.asarray(POSITIONS), jnp.asarray(ENDS), window=3)
        part = visible(jnp.asarray(POSITIONS), jnp.asarray(ENDS), window=3, first=2, last=6)
        np.testing.assert_array_equal(part, whole[:, 2:6, :6])
        assert not whole[:, 2:6, 6:].any()


class TestBackEnds:
    @pytest.mark.parametrize("window", [None, 100])
    @pytest.mark.parametrize("width", [40, 256, 600])
    def test_blocks_of_queries_give_the_rule(self, width, window):
        rng = np.random.default_rng(width)
        queries, keys, values = (jnp.asarray(rng.normal(size=(2, width, n, 8)), jnp.float32) for n in (4, 2, 2))
        slots = np.arange(width)
        ends = jnp.asarray(rng.integers(slots + 1, width + 1, (2, width)), jnp.int32)
        positions = jnp.asarray(np.sort(rng.integers(0, width, (2, width))), jnp.int32)

        def outcome(one: BackEnd):
            seen = one.prepare(positions, ends, window)
            out, pull = jax.vjp(lambda *qkv: one.attend(*qkv, seen), queries, keys, values)
            return out, *pull(jnp.cos(out))

        for ours, rule in zip(jax.jit(lambda: outcome(BLOCKED))(), jax.jit(lambda: outcome(DENSE))(), strict=True):
            np.testing.assert_allclose(ours, rule, rtol=1e-5, atol=1e-5)  # sums of size 1 to 10 in another order

    def test_the_platform_decides(self):
        assert make_model(tiny_config()).attention is BLOCKED  # these tests run on a CPU


class TestCheck:
    @pytest.mark.parametrize("one", [DENSE, BLOCKED])
    def test_right_ones_pass(self, one):
        check(one)

    @pytest.mark.parametrize("fault", ["keys", "values", "queries"])
    def test_a_wrong_gradient_is_told(self, fault):
        """Its outputs are right."""

        def attend(queries, keys, values, mask):
            parts = {"queries": queries, "keys": keys, "values": values}
            parts[fault] = 0.5 * parts[fault] + 0.5 * jax.lax.stop_gradient(parts[fault])
            return DENSE.attend(*parts.values(), mask)

        with pytest.raises(SamiError, match="Attention in a broken way differs from the rule by .* was not used"):
            check(BackEnd("a broken way", DENSE.prepare, attend, 1))

    @pytest.mark.parametrize("fault", ["ends", "window"])
    def test_wrong_outputs_are_told(self, fault):
        def prepare(positions, ends, window):
            if fault == "ends":
                return DENSE.prepare(positions, jnp.maximum(ends - 1, 1), window)
            return DENSE.prepare(jnp.zeros_like(positions), ends, window)

        with pytest.raises(SamiError, match="differs from the rule"):
            check(BackEnd("another broken way", prepare, DENSE.attend, 1))
