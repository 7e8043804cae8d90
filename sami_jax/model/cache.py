"""Keys and values of the texts that are being written, and attention behind them.

Axes: L layers, B slots, S places of a slot, K key/value heads, H head dim; G parts that devices share, T tokens each.
"""

from typing import NamedTuple

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

    def of_layer(self, layer: Array) -> tuple[Array, Array]:
        """[B, K, S, H] keys and values."""
        return self.keys[layer], self.values[layer]


def attend_behind(queries: Array, keys: Array, values: Array, positions: Array, *, window: int | None) -> Array:
    """Grouped-query softmax attention of one query a slot, scores in float32.

    Args:
      queries: [B, N, H]; N is a multiple of K, and head n reads key/value head n // (N / K).
      keys: [B, K, S, H].
      values: [B, K, S, H].
      positions: [B] int32. A query sees the places up to its own; with a window, so many of them, itself included.
      window: the model's sliding window, or None.

    Returns:
      [B, N, H].
    """
    chex.assert_rank([queries, keys, values, positions], [3, 4, 4, 1])
    b, n, h = queries.shape
    back = positions[:, None] - jnp.arange(keys.shape[2])[None, :]
    seen = back >= 0 if window is None else (back >= 0) & (back < window)
    grouped = queries.reshape(b, keys.shape[1], -1, h)
    scores = jnp.einsum("bkgh,bksh->bkgs", grouped, keys, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(seen[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights, values).reshape(b, n, h)
