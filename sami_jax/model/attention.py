"""Who sees whom, and softmax attention among those who do.

Axes: B rows, T queries, S keys, N heads, K key/value heads, H head dim.
"""

import chex
import jax
import jax.numpy as jnp

from sami_jax.types import Array


def visible(positions: Array, ends: Array, *, window: int | None) -> Array:
    """[B, S, S] bool of `types.Rows`: True where query q sees key k.

    Args:
      positions: [B, S] int32.
      ends: [B, S] int32.
      window: the model's sliding window, in positions, or None.
    """
    slots = jnp.arange(ends.shape[1], dtype=jnp.int32)
    mask = (slots[None, None, :] <= slots[None, :, None]) & (slots[None, :, None] < ends[:, None, :])
    if window is not None:
        mask &= positions[:, :, None] - positions[:, None, :] < window
    return mask


def causal_mask(positions: Array, *, keys: int, window: int | None) -> Array:
    """[B, T, S] bool for queries at `positions` [B, T] and a cache of S = `keys` slots, where slot s holds position s:
    True where a key is not after the query and, with a window, fewer than `window` tokens back."""
    distance = positions[:, :, None] - jnp.arange(keys)[None, None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


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
