"""How the next token is chosen: the likeliest, or drawn from the likely ones, by a key of its text and its place."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from sami_jax.types import Array


class Choosing(NamedTuple):
    """How tokens are chosen.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token, of equals the lower id.
      top_p: only the likeliest tokens are drawn whose probabilities add up to this (Holtzman et al. 2020); 1 for all.
        The token with which the sum is reached is among them.
      min_p: only tokens are drawn that have at least this share of the likeliest one's probability (Nguyen et al.
        2024); 0 for all. Both bounds hold for probabilities at this temperature.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0


def likely(logits: Array, choosing: Choosing) -> Array:
    """[N, V] logits at the temperature, minus infinity where a token is not to be drawn. `choosing` is not greedy.

    Args:
      logits: [N, V] float32.
      choosing: what is likely enough.
    """
    chex.assert_rank(logits, 2)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / choosing.temperature
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    keep = jnp.ones(logits.shape, bool)
    if choosing.min_p > 0:
        keep &= logits >= math.log(choosing.min_p)  # the likeliest one's are 0
    if choosing.top_p < 1:
        probs = jnp.exp(log_probs)
        order = jnp.argsort(-probs, axis=-1)
        ranked = jnp.take_along_axis(probs, order, axis=-1)
        before = jnp.cumsum(ranked, axis=-1) - ranked
        first_out = jnp.sum(before < choosing.top_p, axis=-1, keepdims=True)  # the likeliest has 0 before it
        keep &= jnp.argsort(order, axis=-1) < jnp.maximum(first_out, 1)
    return jnp.where(keep, logits, -jnp.inf)


def choose(logits: Array, keys: Array, places: Array, choosing: Choosing) -> Array:
    """[N] int32 the next token of each text.

    Args:
      logits: [N, V] float32.
      keys: [N, 2] uint32, a key of threefry for each text.
      places: [N] int32, of the token in its response: a draw depends on key and place, not on what else is drawn.
      choosing: how.
    """
    chex.assert_rank([logits, keys, places], [2, 2, 1])
    if choosing.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(key: Array, place: Array, logits: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), place)
        return jax.random.categorical(key, logits)

    return jax.vmap(draw)(keys, places, likely(logits, choosing)).astype(jnp.int32)
