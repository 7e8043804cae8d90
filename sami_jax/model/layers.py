"""The layers of a Llama / Mistral / Mixtral decoder, as functions of one layer's weights.

Axes: B rows, T tokens, D embed, N heads, K key/value heads, H head dim, F mlp, E experts,
L layers. Parameters are born stacked on a leading L axis, and every one names its logical axes, which `sharding` maps
to a mesh. The decoder scans over L, so the code below sees one layer's slice.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sami_jax.model.shape import DecoderConfig, RopeScaling
from sami_jax.types import Array

# (queries [B, T, N, H], keys [B, T, K, H], values [B, T, K, H], all rotated that are to be) -> mixed [B, T, N, H], and
# what there is to keep of them.
Mix = Callable[[Array, Array, Array], tuple[Array, Any]]

_INIT_STDDEV = 0.02  # Mistral's and Llama's initializer_range


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A normal float32 parameter that knows its logical axes."""
    return nnx.Param(_INIT_STDDEV * jax.random.normal(rngs.params(), shape, jnp.float32), logical_axes=axes)


def scale(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A float32 parameter of ones that knows its logical axes."""
    return nnx.Param(jnp.ones(shape, jnp.float32), logical_axes=axes)


def project(x: Array, weight: Array, *, axes: int = 1) -> Array:
    """Contracts the last `axes` axes of activations with the first ones of a weight, in the activations' dtype.

    As a product of two matrices: XLA's CPU computes the gradients of a batched einsum at two thirds of the speed.
    """
    matrix = weight.astype(x.dtype).reshape(math.prod(weight.shape[:axes]), -1)
    return (x.reshape(-1, len(matrix)) @ matrix).reshape(*x.shape[:-axes], *weight.shape[axes:])


def rms_norm(x: Array, gain: Array, *, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis, in float32 (Zhang & Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * jnp.broadcast_to(gain.astype(x.dtype), x.shape)


def rope_frequencies(head_dim: int, *, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Rotary frequencies, computed in float32 as transformers does.

    Rounded from float64 they differ in the last bit, which times a position of 8000 changes logits by up to 1e-4
    (tests/parity).

    Args:
      head_dim: H.
      theta: base; the frequency of pair i is theta ** (-2 i / H).
      scaling: Llama 3.1's stretching of the long waves, or None.

    Returns:
      [H / 2] float32, radians per position.
    """
    frequencies = 1 / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if scaling is not None:
        # Number of turns over the pretraining context: the fewer, the longer the wave.
        turns = np.float32(scaling.original_positions) / (np.float32(2 * np.pi) / frequencies)
        low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
        share = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = (1 - share) * frequencies / np.float32(scaling.factor) + share * frequencies
    return frequencies


def rotate(x: Array, positions: Array, frequencies: np.ndarray) -> Array:
    """Rotary position embedding (Su et al. 2021), in the half-split layout of Hugging Face checkpoints.

    Args:
      x: [B, T, heads, H].
      positions: [B, T] int32.
      frequencies: [H / 2] float32, of `rope_frequencies`.

    Returns:
      [B, T, heads, H]: pairs (x[i], x[i + H/2]) turned by position * frequency. Angles are float32, since bfloat16
      cannot count positions past 256.
    """
    chex.assert_rank([x, positions], [4, 2])
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = self.config = config
        heads = (c.n_layers, c.embed_dim, c.n_heads, c.head_dim)
        kv_heads = (c.n_layers, c.embed_dim, c.n_kv_heads, c.head_dim)
        self.query = weight(rngs, heads, ("layers", "embed", "heads", "head_dim"))
        self.key = weight(rngs, kv_heads, ("layers", "embed", "kv_heads", "head_dim"))
        self.value = weight(rngs, kv_heads, ("layers", "embed", "kv_heads", "head_dim"))
        out = (c.n_layers, c.n_heads, c.head_dim, c.embed_dim)
        self.out = weight(rngs, out, ("layers", "heads", "head_dim", "embed"))

    def __call__(self, x: Array, positions: Array, mix: Mix) -> tuple[Array, Any]:
        """Mixes tokens.

        Args:
          x: [B, T, D].
          positions: [B, T] int32.
          mix: who sees whom.

        Returns:
          [B, T, D], and what `mix` keeps.
        """
        c = self.config
        frequencies = rope_frequencies(c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling)
        queries = rotate(project(x, self.query[...]), positions, frequencies)
        keys = rotate(project(x, self.key[...]), positions, frequencies)
        mixed, kept = mix(queries, keys, project(x, self.value[...]))
        return project(mixed, self.out[...], axes=2), kept


class MLP(nnx.Module):
    """SwiGLU: (silu(x gate) * (x up)) down (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        wide = (config.n_layers, config.embed_dim, config.mlp_dim)
        self.gate = weight(rngs, wide, ("layers", "embed", "mlp"))
        self.up = weight(rngs, wide, ("layers", "embed", "mlp"))
        self.down = weight(rngs, (wide[0], wide[2], wide[1]), ("layers", "mlp", "embed"))

    def __call__(self, x: Array) -> Array:
        return project(jax.nn.silu(project(x, self.gate[...])) * project(x, self.up[...]), self.down[...])
