"""Contrastive batches to log-probs: every response under every constitution."""

import functools
from collections.abc import Callable, Sequence
from typing import cast

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sami_jax.data.pairs import Pair
from sami_jax.losses import sequence_logps, token_logps
from sami_jax.sharding import gather, padded_size, put_on_devices
from sami_jax.types import Array, ContrastiveBatch, Normalize, Params, RowModel, Rows


def make_batch(pairs: Sequence[Pair], *, width: int, response_width: int, eos_id: int | None) -> ContrastiveBatch:
    """One sequence per cell: prompt c, then response r, padded on the right.

    Args:
      pairs: B queries of C constitutions and R responses each.
      width: T, at least the longest prompt plus response.
      response_width: K, at least the longest response.
      eos_id: appended to every response and trained, or None.

    Returns:
      A batch of numpy arrays.
    """
    ending = () if eos_id is None else (eos_id,)
    constitutions, responses = len(pairs[0].prompt_ids), len(pairs[0].response_ids)
    tokens = np.zeros((len(pairs), constitutions, responses, width), np.int32)
    prompt_lengths = np.zeros((len(pairs), constitutions), np.int32)
    targets = np.zeros((len(pairs), responses, response_width), np.int32)
    target_mask = np.zeros((len(pairs), responses, response_width), bool)
    for b, pair in enumerate(pairs):
        for c, prompt in enumerate(pair.prompt_ids):
            prompt_lengths[b, c] = len(prompt)
            for r, ids in enumerate(pair.response_ids):
                sequence = (*prompt, *ids, *ending)
                tokens[b, c, r, : len(sequence)] = sequence
        for r, ids in enumerate(pair.response_ids):
            response = (*ids, *ending)
            targets[b, r, : len(response)] = response
            target_mask[b, r, : len(response)] = True
    # The arrays stay in the host's memory: the caller knows the devices.
    return ContrastiveBatch(*cast(list[Array], [tokens, prompt_lengths, targets, target_mask]))


def batch_widths(pairs: Sequence[Pair], *, round_to: int, eos_id: int | None) -> tuple[int, int]:
    """(T, K) that hold every one of `pairs`, padded so that few shapes compile (`padded_size`)."""
    extra = 0 if eos_id is None else 1
    response = max(1, max(len(ids) for pair in pairs for ids in pair.response_ids) + extra)  # all may be empty
    sequence = max(max(map(len, p.prompt_ids)) + max(map(len, p.response_ids)) for p in pairs) + extra
    return padded_size(sequence, round_to), padded_size(response, round_to)


def causal_rows(tokens: Array) -> Rows:
    """Rows [N, S] of one sequence each: every token sees those before it."""
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    return Rows(tokens, slots, jnp.full_like(slots, tokens.shape[1]))


def logits_of(hidden: Array, head: Array) -> Array:
    """[..., V] float32 logits of hidden states [..., D] and a head [D, V].

    Rounded to bfloat16, the log-probs of a contrast would be equal too often. Of float32 operands the product is
    float32 on accelerators too, whose default is less.
    """
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32, precision=precision)


def all_logits(model: RowModel, params: Params, tokens: Array) -> Array:
    """[N, S, V] float32: after every token of rows [N, S] of one sequence each."""
    return logits_of(model.hidden(params, causal_rows(tokens)), model.head(params))


def response_logits(model: RowModel, params: Params, batch: ContrastiveBatch) -> Array:
    """[B, C, R, K, V] logits that predict response token k of response r under constitution c.

    The head runs at response positions only: response token k stands at prompt length + k, and the position before it
    predicts it.
    """
    b, c, r, t = batch.tokens.shape
    k = batch.targets.shape[-1]
    chex.assert_shape(batch.prompt_lengths, (b, c))
    chex.assert_shape([batch.targets, batch.target_mask], (b, r, k))
    at = batch.prompt_lengths[:, :, None, None] - 1 + jnp.arange(k, dtype=jnp.int32)[None, None, None, :]
    at = jnp.broadcast_to(jnp.minimum(at, t - 1), (b, c, r, k))  # past a response's end, where the mask is False
    hidden = model.hidden(params, causal_rows(batch.tokens.reshape(b * c * r, t)))
    hidden = jnp.take_along_axis(hidden, at.reshape(b * c * r, k, 1), axis=1)
    return logits_of(hidden, model.head(params)).reshape(b, c, r, k, -1)


def cell_logps(logits: Array, batch: ContrastiveBatch, *, normalize: Normalize) -> Array:
    """[B, C, R] log p(response r | query b, constitution c) in nats: mean over its tokens, or sum.

    Args:
      logits: [B, C, R, K, V], of `response_logits`.
      batch: the targets and their mask.
      normalize: "mean" or "sum".
    """

    def cell(logits: Array, targets: Array, mask: Array) -> Array:
        return sequence_logps(token_logps(logits, targets), mask, normalize=normalize)

    over_responses = jax.vmap(cell)
    over_constitutions = jax.vmap(over_responses, in_axes=(0, None, None))
    return jax.vmap(over_constitutions)(logits, batch.targets, batch.target_mask)


@functools.partial(jax.jit, static_argnames=("model", "normalize"))
def contrastive_logps(model: RowModel, params: Params, batch: ContrastiveBatch, *, normalize: Normalize) -> Array:
    """[B, C, R] log p(response r | query b, constitution c) in nats; see `cell_logps`."""
    return cell_logps(response_logits(model, params, batch), batch, normalize=normalize)


def score_pairs(
    model: RowModel,
    params: Params,
    pairs: Sequence[Pair],
    *,
    normalize: Normalize,
    rows: int,
    round_to: int,
    sharding: jax.sharding.Sharding,
    scored: Callable[[int], None],
) -> np.ndarray:
    """[Q, C, R] float32 log-probs of Q pairs, `rows` queries at a time; each batch is as wide as it needs.

    Args:
      model: the model.
      params: its parameters.
      pairs: Q queries.
      normalize: "mean" or "sum".
      rows: queries per batch; the last batch repeats its first query to fill up.
      round_to: widths are padded to multiples of this, longer ones more coarsely (`padded_size`).
      sharding: of the batch's leading axis.
      scored: called with the number of queries done, after each batch.
    """
    matrices = []
    for start in range(0, len(pairs), rows):
        chunk = list(pairs[start : start + rows])
        width, response_width = batch_widths(chunk, round_to=round_to, eos_id=None)
        filled = chunk + [chunk[0]] * (rows - len(chunk))
        batch = make_batch(filled, width=width, response_width=response_width, eos_id=None)
        logps = contrastive_logps(model, params, put_on_devices(batch, sharding), normalize=normalize)
        matrices.append(gather(logps)[: len(chunk)])
        scored(start + len(chunk))
    return np.concatenate(matrices)
