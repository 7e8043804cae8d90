"""The head where it is needed: log-probs of labels, and KL to a reference, without the logits of all of them at once.

The gradient is written out. It computes the logits of a chunk of labels again, and takes a cotangent for each label,
since what one of them is worth to the loss is unknown until the whole matrix of log-probs exists.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sami_jax.types import Array, Reference

# Bytes of float32 logits that a device has at once, unless told otherwise.
_LOGITS_BYTES = {"cpu": 256 * 2**20}
_LOGITS_BYTES_ELSEWHERE = 512 * 2**20
_PADDED = -1e30  # the logit of what is no token: finite, since 0 times infinity is no number


class _How(NamedTuple):
    chunk: int | None
    vocab_size: int | None
    sharding: NamedSharding | None


def default_chunk(vocab_size: int, embed_dim: int, platform: str) -> int:
    """Labels of a device at once, on one of JAX's platforms.

    Each further chunk adds up the gradient of the head once more, on several devices after a sum over them. On
    accelerators that takes more time than it saves memory while a chunk has no more labels than the head has rows,
    since its logits are then no more than that gradient (benchmarks/logprob_head.py).
    """
    by_bytes = max(1, _LOGITS_BYTES.get(platform, _LOGITS_BYTES_ELSEWHERE) // (4 * vocab_size))
    return by_bytes if platform == "cpu" else max(by_bytes, embed_dim)


def logits_of(hidden: Array, head: Array) -> Array:
    """[..., V] float32 logits of hidden states [..., D] and a head [D, V]: all of them at once.

    Rounded to bfloat16, the log-probs of a contrast would be equal too often.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])  # two matrices, as in `model.layers.project`
    return _product(rows, head.astype(hidden.dtype)).reshape(*hidden.shape[:-1], head.shape[1])


def label_terms(
    hidden: Array,
    head: Array,
    labels: Array,
    reference: Reference | None = None,
    *,
    chunk: int | None = None,
    vocab_size: int | None = None,
    sharding: NamedSharding | None = None,
) -> tuple[Array, Array]:
    """Log-probs of labels, and KL(policy || reference) where each of them is predicted.

    log p(y) = z_y - log sum_v exp z_v and sum_v p(v) (log p(v) - log q(v)), with logits z = hidden @ head in float32:
    `losses.token_logps` and `losses.response_kl` of one token, and their gradients. Products are of operands in the
    dtype of `hidden`, sums are float32 throughout; gradients reach `hidden` and `head`, never the reference.

    Args:
      hidden: [G, L, D] hidden states that predict the labels, G parts for the devices that share them.
      head: [D, V] any float dtype, in which its gradient is rounded, once.
      labels: [G, L] int. One outside the vocabulary has a log-prob of NaN.
      reference: hidden [G, L, D] and head [D, V] of the model that KL is measured from.
      chunk: labels of each part whose logits are in memory at once; None for all.
      vocab_size: where the columns of `head` from this one on are padding, and no tokens.
      sharding: of `head`, in which its gradient is summed up; None leaves that to the compiler.

    Returns:
      [G, L] float32 log-probs and [G, L] float32 KL, nats; the latter 0 without a reference.

    Raises:
      AssertionError: shapes or dtypes are not those above.
    """
    chex.assert_rank([hidden, head, labels], [3, 2, 2])
    chex.assert_type([hidden, head, labels], [float, float, int])
    chex.assert_equal_shape_prefix([hidden, labels], 2)
    if reference is not None:
        chex.assert_equal_shape([hidden, reference.hidden])
        chex.assert_equal_shape([head, reference.head])
        reference = reference._replace(hidden=reference.hidden.astype(hidden.dtype))
    padded = vocab_size if vocab_size != head.shape[1] else None
    return _terms(hidden, head, labels, reference, _How(chunk, padded, sharding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _terms(hidden: Array, head: Array, labels: Array, reference: Reference | None, how: _How) -> tuple[Array, Array]:
    return _forward(hidden, head, labels, reference, how)[0]


def _forward(hidden: Array, head: Array, labels: Array, reference: Reference | None, how: _How) -> tuple:
    weights = _weights(hidden, head, reference)
    vocab_size = how.vocab_size or head.shape[1]

    def one(part: tuple[Array, Array, Array | None]) -> tuple[Array, ...]:
        x, y, of_reference = part
        logits = _logits(x, weights[0], how)
        chosen = jnp.sum(jnp.where(_is_label(logits, y), logits, 0.0), axis=-1)
        largest, rest = _log_sum(logits)
        log_sum = largest + rest
        # Logits near 20 are subtracted first, since a float32 sum of that size loses 1e-6.
        logps = jnp.where((y >= 0) & (y < vocab_size), (chosen - largest) - rest, jnp.nan)
        if of_reference is None:
            return logps, log_sum
        policy, reference = logits - log_sum[:, None], _logits(of_reference, weights[1], how)
        reference_sum = jnp.add(*_log_sum(reference))
        kls = jnp.sum(jnp.exp(policy) * (policy - (reference - reference_sum[:, None])), axis=-1)
        return logps, log_sum, reference_sum, kls

    parts = _chunks((hidden, labels, None if reference is None else reference.hidden), how)
    logps, *kept = _joined(jax.lax.map(one, parts), *labels.shape)
    kls = jnp.zeros_like(logps) if reference is None else kept[2]
    return (logps, kls), (hidden, head, labels, reference, kept)


def _backward(how: _How, saved: tuple, cotangents: tuple[Array, Array]) -> tuple[Array | None, ...]:
    hidden, head, labels, reference, kept = saved
    weights = _weights(hidden, head, reference)

    def one(total: Array, part: tuple) -> tuple[Array, Array]:
        x, y, of_reference, of_logp, of_kl, log_sum, *rest = part
        policy = _logits(x, weights[0], how) - log_sum[:, None]
        probs = jnp.exp(policy)
        slope = of_logp[:, None] * (_is_label(policy, y).astype(jnp.float32) - probs)
        if of_reference is not None:
            reference_sum, kl = rest
            ratio = policy - (_logits(of_reference, weights[1], how) - reference_sum[:, None])
            slope += of_kl[:, None] * probs * (ratio - kl[:, None])
        slope = slope.astype(x.dtype)
        return _constrained(total + _product(x.T, slope), how), _product(slope, weights[0].T)

    parts = _chunks((hidden, labels, None if reference is None else reference.hidden, *cotangents, *kept), how)
    d_head, d_hidden = jax.lax.scan(one, _constrained(jnp.zeros(head.shape, jnp.float32), how), parts)
    return _joined(d_hidden, *labels.shape).astype(hidden.dtype), d_head.astype(head.dtype), None, None


_terms.defvjp(_forward, _backward)


def _chunks(parts: tuple, how: _How) -> tuple:
    """Arrays [G, L, ...] as [n, G t, ...], n chunks of t labels of each part, padded with zeros."""

    def of(x: Array) -> Array:
        g, labels = x.shape[:2]
        n = -(-labels // (how.chunk or labels))
        size = -(-labels // n)
        x = jnp.pad(x, [(0, 0), (0, n * size - labels), *([(0, 0)] * (x.ndim - 2))])
        return jnp.moveaxis(x.reshape(g, n, size, *x.shape[2:]), 1, 0).reshape(n, g * size, *x.shape[2:])

    return jax.tree.map(of, parts)


def _joined(parts: Any, g: int, labels: int) -> Any:
    """Arrays [n, G t, ...] as [G, L, ...]."""

    def of(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(x.shape[0], g, -1, *x.shape[2:]), 0, 1)
        return x.reshape(g, -1, *x.shape[3:])[:, :labels]

    return jax.tree.map(of, parts)


def _weights(hidden: Array, head: Array, reference: Reference | None) -> list[Array]:
    heads = [head] if reference is None else [head, reference.head]
    return [one.astype(hidden.dtype) for one in heads]


def _product(a: Array, b: Array) -> Array:
    """Of two matrices, in float32. Of float32 operands it is float32 on accelerators too, whose default is less."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, preferred_element_type=jnp.float32, precision=precision)


def _logits(x: Array, weight: Array, how: _How) -> Array:
    logits = _product(x, weight)
    if how.vocab_size is None:
        return logits
    return jnp.where(jnp.arange(logits.shape[1])[None, :] < how.vocab_size, logits, _PADDED)


def _log_sum(logits: Array) -> tuple[Array, Array]:
    """[T] the largest logit, and what the log of the sum of exponentials is above it."""
    largest = jnp.max(logits, axis=-1)
    return largest, jnp.log(jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1))


def _is_label(logits: Array, labels: Array) -> Array:
    """[T, V]. Compared, not gathered: columns may lie on several devices."""
    return jnp.arange(logits.shape[1], dtype=labels.dtype)[None, :] == labels[:, None]


def _constrained(gradient: Array, how: _How) -> Array:
    return gradient if how.sharding is None else jax.lax.with_sharding_constraint(gradient, how.sharding)
