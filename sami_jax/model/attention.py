"""Who sees whom, and softmax attention among those who do, by the back-end that is best on a platform.

Axes: B rows, T queries, S keys, N heads, K key/value heads, H head dim.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from sami_jax.errors import SamiError
from sami_jax.types import Array

_BLOCK = 128  # queries; of 256 and 512 a step on a CPU takes longer (benchmarks/train_step.py), on a GPU the same


class BackEnd(NamedTuple):
    """One way to compute attention among the tokens of rows; all give the same.

    Attributes:
      name: for people.
      prepare: (positions [B, S], ends [B, S], window) -> what `attend` needs to know of who sees whom (`types.Rows`),
        made once for all layers.
      attend: (queries [B, S, N, H], keys [B, S, K, H], values [B, S, K, H], what was prepared) -> [B, S, N, H].
      row_multiple: it is fastest where S is a multiple of this.
      kernel_flops: where it runs a kernel that passes over what no query of a block sees: FLOPs of the kernel that this
        equation of a jaxpr runs, for rows whose ends are [N, S], on average.
    """

    name: str
    prepare: Callable[[Array, Array, int | None], Any]
    attend: Callable[[Array, Array, Array, Any], Array]
    row_multiple: int
    kernel_flops: Callable[[JaxprEqn, np.ndarray], int] | None = None

    @property
    def skips(self) -> bool:
        """Whether wide rows of many packs cost no more than narrow ones, since one passes over another."""
        return self.kernel_flops is not None


def visible(positions: Array, ends: Array, *, window: int | None, first: int = 0, last: int | None = None) -> Array:
    """[B, T, S] bool of `types.Rows`: True where query q sees key k, for q in first .. last - 1 and k in 0 .. last - 1.

    Args:
      positions: [B, S] int32.
      ends: [B, S] int32.
      window: the model's sliding window, in positions, or None.
      first: slot of the first query.
      last: slot behind the last query and key; None for all.
    """
    slots = jnp.arange(ends.shape[1], dtype=jnp.int32)
    queries, keys = slots[None, first:last, None], slots[None, None, :last]
    mask = (keys <= queries) & (queries < ends[:, None, :last])
    if window is not None:
        mask &= positions[:, first:last, None] - positions[:, None, :last] < window
    return mask


def attend(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Grouped-query softmax attention, scores in float32.

    Args:
      queries: [B, T, N, H].
      keys: [B, S, K, H]; N is a multiple of K, and head n reads key/value head n // (N / K).
      values: [B, S, K, H].
      mask: [B, T, S] bool, True = may look. Each query sees at least itself.

    Returns:
      [B, T, N, H].
    """
    chex.assert_rank([queries, keys, values, mask], [4, 4, 4, 3])
    b, t, n, h = queries.shape
    k = keys.shape[2]
    grouped = queries.reshape(b, t, k, n // k, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, values).reshape(b, t, n, h)


def _mask(positions: Array, ends: Array, window: int | None) -> Array:
    return visible(positions, ends, window=window)


def _block_masks(positions: Array, ends: Array, window: int | None) -> list[Array]:
    """The mask of each block of queries, [B, _BLOCK, S] of the keys up to its end."""
    s = ends.shape[1]
    return [
        visible(positions, ends, window=window, first=first, last=min(first + _BLOCK, s))
        for first in range(0, s, _BLOCK)
    ]


def _blocked(queries: Array, keys: Array, values: Array, masks: list[Array]) -> Array:
    """A block of queries reads the keys up to its own end only, which halves the work of long rows.

    Heads come first, once, so that each block is a product of matrices, and weights are divided by their sum behind it.
    """
    b, s, n, h = queries.shape
    k, dtype = keys.shape[2], values.dtype
    grouped = (queries * jnp.asarray(h**-0.5, queries.dtype)).reshape(b, s, k, n // k, h).transpose(0, 2, 3, 1, 4)
    keys, values = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
    outs = []
    for first, mask in zip(range(0, s, _BLOCK), masks, strict=True):
        last = mask.shape[2]
        rows, shape = (b, k, n // k * (last - first)), (b, k, n // k, last - first)
        block = grouped[:, :, :, first:last].reshape(*rows, h)
        scores = jnp.matmul(block, keys[..., :last], preferred_element_type=jnp.float32).reshape(*shape, last)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        sums = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(dtype).reshape(*rows, last)
        mixed = jnp.matmul(weights, values[:, :, :last], preferred_element_type=jnp.float32).reshape(*shape, h)
        outs.append((mixed / sums).astype(dtype))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(b, s, n, h)


DENSE = BackEnd("one mask over the row", _mask, attend, row_multiple=128)
BLOCKED = BackEnd(f"blocks of {_BLOCK} queries", _block_masks, _blocked, row_multiple=64)


@functools.cache
def check(chosen: BackEnd, *, rows: int = 1, heads: int = 1) -> None:
    """Holds a back-end's outputs and gradients against the dense rule on small rows, once in a process.

    Args:
      chosen: the back-end.
      rows: a number that its devices share evenly.
      heads: key/value heads, likewise; of queries there are twice as many.

    Raises:
      SamiError: they differ, which is a fault of the back-end or of the compiler.
    """
    width, rng = 384, np.random.default_rng(0)
    sizes = (2 * heads, heads, heads, 2 * heads)
    arrays = [rng.normal(size=(rows, width, n, 64)).astype(np.float32) for n in sizes]
    # Two packs of a prompt and two responses, and padding.
    ends, positions = np.arange(1, width + 1, dtype=np.int32)[None], np.zeros((1, width), np.int32)
    for start, middle, last, end in ((0, 90, 131, 170), (170, 220, 263, 290)):
        ends[0, start:middle], ends[0, middle:last], ends[0, last:end] = end, last, end
        for branch, stop in ((middle, last), (last, end)):
            positions[0, branch:stop] = middle - start + np.arange(stop - branch)
        positions[0, start:middle] = np.arange(middle - start)
    ends, positions = np.tile(ends, (rows, 1)), np.tile(positions, (rows, 1))

    def outcome(one: BackEnd, qkv: list[Array]) -> list[Array]:
        def weighed(queries: Array, keys: Array, values: Array) -> tuple[Array, Array]:
            out = one.attend(queries, keys, values, one.prepare(jnp.asarray(positions), jnp.asarray(ends), 60))
            return jnp.sum(out * arrays[3]), out

        (_, out), gradients = jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True)(*qkv)
        return [out, *gradients]

    def largest_difference(*qkv: Array) -> Array:
        pairs = zip(outcome(chosen, list(qkv)), outcome(DENSE, list(qkv)), strict=True)
        return jnp.max(jnp.stack([jnp.abs(ours - rule).max() for ours, rule in pairs]))

    with jax.default_matmul_precision("highest"):
        worst = float(jax.jit(largest_difference)(*arrays[:3]))
    if not worst < 1e-4:  # float32 sums of size 1 in another order leave 1e-6
        raise SamiError(
            f"Attention in {chosen.name} differs from the rule by {worst:.2g} on this machine, and was not used; try "
            "another version of jax and jaxlib, and report it."
        )
