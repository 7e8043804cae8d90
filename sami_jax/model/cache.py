"""Keys and values of the texts that are being written, and attention behind them.

Axes: L layers, B slots, S places of a slot, K key/value heads, H head dim; G parts that devices share, T tokens each.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from sami_jax.types import Array

# Where [G, T] tokens go in [L, G, B / G, K, S, H]: G is said to be the same axis, so that parts stay on their devices.
_PLACES = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3),  # K and H of the new [G, T, K, H]
    inserted_window_dims=(0, 2, 4),
    scatter_dims_to_operand_dims=(0, 2, 4),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)


class KVCache(NamedTuple):
    """Keys and values of B texts, the token at position s in place s.

    Places come behind heads, so that a head reads its keys in one piece: with heads behind places, XLA's CPU copies the
    whole cache at every step to turn it round, which takes eight times as long as attention itself.

    Attributes:
      keys: [L, B, K, S, H], rotated.
      values: [L, B, K, S, H].
    """

    keys: Array
    values: Array

    def written(self, layer: Array, slots: Array, positions: Array, keys: Array, values: Array) -> "KVCache":
        """The cache with a layer's new tokens.

        Args:
          layer: [] int32.
          slots: [G, T] int32, of the B / G of its own part; B / G for a token that is not to be kept.
          positions: [G, T] int32.
          keys: [G, T, K, H].
          values: [G, T, K, H].
        """
        chex.assert_rank([layer, slots, positions, keys, values], [0, 2, 2, 4, 4])
        at = jnp.stack([jnp.broadcast_to(layer, slots.shape), slots, positions], axis=-1)

        def write(cache: Array, new: Array) -> Array:
            shared = cache.reshape(cache.shape[0], len(slots), -1, *cache.shape[2:])  # [L, G, B / G, K, S, H]
            drop = jax.lax.GatherScatterMode.FILL_OR_DROP
            return jax.lax.scatter(shared, at, new, _PLACES, mode=drop).reshape(cache.shape)

        return KVCache(write(self.keys, keys), write(self.values, values))

    def attend(
        self, layer: Array, queries: Array, positions: Array, *, window: int | None, block: int | None = None
    ) -> Array:
        """Grouped-query softmax attention of one query a slot, scores and sums in float32.

        Args:
          layer: [] int32.
          queries: [B, N, H]; N is a multiple of K, and head n reads key/value head n // (N / K).
          positions: [B] int32. A query sees the places up to its own; with a window, so many of them, itself included.
          window: the model's sliding window, or None.
          block: places are read so many at a time, and none behind the furthest position; None reads all at once.

        Returns:
          [B, N, H].
        """
        chex.assert_rank([layer, queries, positions], [0, 3, 1])
        b, n, h = queries.shape
        _, _, k, places, _ = self.keys.shape
        block = min(block or places, places)
        grouped = queries.reshape(b, k, n // k, h)
        least = jnp.finfo(jnp.float32).min

        def piece(cache: Array, first: Array) -> Array:
            return jax.lax.dynamic_slice(cache, (layer, 0, 0, first, 0), (1, b, k, block, h))[0]

        def add(number: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            highest, total, mixed = so_far
            # The last block begins sooner where the places are no multiple of it; what was read before is hidden.
            first = jnp.minimum(number * block, places - block)
            place = first + jnp.arange(block)[None, :]
            back = positions[:, None] - place
            seen = (back >= 0) & (place >= number * block)
            if window is not None:
                seen &= back < window
            scores = jnp.einsum("bkgh,bksh->bkgs", grouped, piece(self.keys, first), preferred_element_type=jnp.float32)
            scores = jnp.where(seen[:, None, None, :], scores * h**-0.5, least)
            now = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.where(seen[:, None, None, :], jnp.exp(scores - now[..., None]), 0)
            values = piece(self.values, first)
            new = jnp.einsum(
                "bkgs,bksh->bkgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
            )
            kept = jnp.exp(highest - now)
            return now, total * kept + jnp.sum(weights, axis=-1), mixed * kept[..., None] + new

        shape = (b, k, n // k)
        so_far = (jnp.full(shape, least), jnp.zeros(shape), jnp.zeros((*shape, h), jnp.float32))
        blocks, furthest = -(-places // block), jnp.max(positions)
        if blocks == 1:
            so_far = add(jnp.zeros((), jnp.int32), so_far)
        else:  # of static length, so that its FLOPs can be counted
            for_all = functools.partial(_unless_behind, furthest, block, add)
            so_far = jax.lax.fori_loop(0, blocks, for_all, so_far)
        _, total, mixed = so_far
        return (mixed / total[..., None]).astype(queries.dtype).reshape(b, n, h)


def _unless_behind(furthest: Array, block: int, add: Callable, number: Array, so_far: Any) -> Any:
    return jax.lax.cond(number * block <= furthest, add, lambda number, so_far: so_far, number, so_far)
