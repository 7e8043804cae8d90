"""The TPU kernel against the rule of attention, in Pallas' simulation of a TPU: no TPU needed.

Not in the plain Pallas interpreter, which ignores that outputs are aliased to inputs, and gets gradients wrong.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sami_jax.flops import count_flops
from sami_jax.model.attention import DENSE, BackEnd, check, visible
from sami_jax.model.attention_tpu import kernel_flops, splash, visited_blocks


@pytest.fixture(autouse=True)
def _simulated():
    with pltpu.force_tpu_interpret_mode():
        yield


def rows_of(*packs: tuple[int, int, int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and ends [1, width] of packs (shared tokens, first branch, second branch), then padding."""
    ends, positions = np.arange(1, width + 1, dtype=np.int32)[None], np.zeros((1, width), np.int32)
    start = 0
    for shared, *branches in packs:
        ends[0, start : start + shared] = start + shared + sum(branches)
        positions[0, start : start + shared] = np.arange(shared)
        start += shared
        for length in branches:
            ends[0, start : start + length] = start + length
            positions[0, start : start + length] = shared + np.arange(length)
            start += length
    return positions, ends


# Blocks of 128 queries and keys unless 256 or 512 divide the width.
ROWS = {
    "two packs": rows_of((120, 40, 30), (100, 20, 50), width=384),
    "mostly padding": rows_of((10, 3, 5), width=384),
    "a pack over five blocks of keys": rows_of((430, 90, 110), width=640),
    "one block": rows_of((200, 40, 30), (100, 20, 50), width=512),
}
TWO_ROWS = tuple(np.concatenate(parts) for parts in zip(ROWS["two packs"], ROWS["mostly padding"], strict=True))


def outcome(one: BackEnd, qkv, positions, ends, window=None):
    """Outputs and gradients."""

    @jax.jit
    def of(qkv):
        seen = one.prepare(jnp.asarray(positions), jnp.asarray(ends), window)
        out, pull = jax.vjp(lambda *qkv: one.attend(*qkv, seen), *qkv)
        return out, *pull(jnp.sin(1 + out.astype(jnp.float32)).astype(out.dtype))

    return of(qkv)


def operands(rows: int, width: int, *, heads: int, kv_heads: int, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(rows, width, n, 64)), dtype) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "window"),
    [
        (TWO_ROWS, 4, 2, None),
        (ROWS["a pack over five blocks of keys"], 2, 1, 100),
        (ROWS["one block"], 4, 2, None),
    ],
)
def test_outputs_and_gradients_are_those_of_the_rule(rows, heads, kv_heads, window):
    qkv = operands(*rows[0].shape, heads=heads, kv_heads=kv_heads)
    for ours, rule in zip(outcome(splash(None), qkv, *rows, window), outcome(DENSE, qkv, *rows, window), strict=True):
        np.testing.assert_allclose(ours, rule, rtol=0, atol=5e-6 * float(jnp.abs(rule).max()))


def test_bfloat16():
    qkv = operands(1, 384, heads=2, kv_heads=1, dtype="bfloat16")
    exact = outcome(DENSE, [x.astype(jnp.float32) for x in qkv], *ROWS["two packs"])
    for ours, rule in zip(outcome(splash(None), qkv, *ROWS["two packs"]), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        # Weights and outputs are rounded to 8 bits; a wrong mask is off by a tenth and more.
        np.testing.assert_allclose(ours.astype(jnp.float32), rule, rtol=0, atol=2e-2 * float(jnp.abs(rule).max()))


def test_a_row_that_no_block_divides_takes_the_mask():
    rows = rows_of((60, 20, 10), width=100)
    qkv = operands(1, 100, heads=2, kv_heads=1)
    for ours, rule in zip(outcome(splash(None), qkv, *rows), outcome(DENSE, qkv, *rows), strict=True):
        np.testing.assert_array_equal(ours, rule)


def test_the_check_of_every_run_passes_it():
    check(splash(None))


class TestFlops:
    @pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
    def test_visited_blocks_are_those_in_which_some_key_is_seen(self, rows):
        positions, ends = rows
        n = ends.shape[1] // 128
        seen = np.asarray(visible(jnp.asarray(positions), jnp.asarray(ends), window=None))[0]
        expected = sum(seen[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].any() for i in range(n) for j in range(n))
        assert visited_blocks(ends, 128).tolist() == [expected]

    def test_two_matmuls_forward_and_five_backward_in_each_of_them(self):
        qkv, (positions, ends) = operands(2, 384, heads=4, kv_heads=2), TWO_ROWS

        def loss(qkv):
            seen = splash(None).prepare(jnp.asarray(positions), jnp.asarray(ends), None)
            return jnp.sum(splash(None).attend(*qkv, seen))

        of = functools.partial(kernel_flops, ends=ends)
        blocks, a_block = visited_blocks(ends, 128), 2 * 128**2 * 64
        assert blocks.tolist() == [5, 3]  # the second pack does not look at the first
        assert count_flops(loss, qkv, of_kernel=of) == 4 * 8 * 2 * a_block
        assert count_flops(jax.grad(loss), qkv, of_kernel=of) == 4 * 8 * 7 * a_block
        with pytest.raises(ValueError, match="a Pallas kernel whose grid is data"):
            count_flops(loss, qkv)
