"""Packed rows to log-probs: every response under every constitution."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sami_jax.losses import token_logps
from sami_jax.scoring.packed_rows import Packing
from sami_jax.sharding import batch_sharding, gather, micro_batch_sharding, put_on_devices, replicated
from sami_jax.types import Array, ContrastiveRows, Normalize, Params, RowModel, Rows


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
    rows = hidden.reshape(-1, hidden.shape[-1])  # two matrices, as in `model.layers.project`
    logits = jnp.matmul(rows, head, preferred_element_type=jnp.float32, precision=precision)
    return logits.reshape(*hidden.shape[:-1], head.shape[1])


def all_logits(model: RowModel, params: Params, tokens: Array) -> Array:
    """[N, S, V] float32: after every token of rows [N, S] of one sequence each."""
    return logits_of(model.hidden(params, causal_rows(tokens)), model.head(params))


def label_logits(model: RowModel, params: Params, batch: ContrastiveRows) -> Array:
    """[G, L, V] logits that predict the labels; the head runs where there are some, a third of the slots at C = 2."""
    n, s = batch.rows.tokens.shape
    g, labels = batch.at.shape
    chex.assert_shape(batch.rows, (n, s))
    chex.assert_shape([batch.labels, batch.cells], (g, labels))
    chex.assert_shape(batch.queries, batch.counts.shape[:1])
    hidden = model.hidden(params, batch.rows)
    hidden = hidden.reshape(g, n // g * s, hidden.shape[-1])
    return logits_of(jnp.take_along_axis(hidden, batch.at[:, :, None], axis=1), model.head(params))


def over_cells(values: Array, batch: ContrastiveRows, *, normalize: Normalize) -> Array:
    """[Q, C, R] sums or means over the tokens of each cell, of one value [G, L] per label; 0 where it has none."""
    q, c, r = batch.counts.shape
    sums = jax.ops.segment_sum(values.reshape(-1), batch.cells.reshape(-1), q * c * r + 1)[:-1].reshape(q, c, r)
    return sums / jnp.maximum(batch.counts, 1).astype(sums.dtype) if normalize == "mean" else sums


def cell_logps(logits: Array, batch: ContrastiveRows, *, normalize: Normalize) -> Array:
    """[Q, C, R] log p(response r | query, constitution c) in nats: mean over its tokens, or sum.

    Args:
      logits: [G, L, V], of `label_logits`.
      batch: its labels.
      normalize: "mean" or "sum".
    """
    return over_cells(jax.vmap(token_logps)(logits, batch.labels), batch, normalize=normalize)


@functools.partial(jax.jit, static_argnames=("model", "normalize"))
def contrastive_logps(model: RowModel, params: Params, batch: ContrastiveRows, *, normalize: Normalize) -> Array:
    """[Q, C, R] log p(response r | query, constitution c) in nats; see `cell_logps`."""
    return cell_logps(label_logits(model, params, batch), batch, normalize=normalize)


def shardings_of_rows(mesh: Mesh, *, stacked: bool = False) -> ContrastiveRows:
    """Rows and labels are split over the mesh; what speaks of queries, every device has whole.

    Args:
      mesh: the devices.
      stacked: whether there is a leading axis of micro-batches.
    """
    split, whole = micro_batch_sharding(mesh) if stacked else batch_sharding(mesh), replicated(mesh)
    return ContrastiveRows(Rows(split, split, split), split, split, split, whole, whole)  # type: ignore[arg-type]


def score_packed(
    model: RowModel,
    params: Params,
    packing: Packing,
    group: int,
    *,
    normalize: Normalize,
    mesh: Mesh,
    scored: Callable[[int], None],
) -> np.ndarray:
    """[Q, C, R] float32 log-probs of a group's Q queries, in the group's order.

    Args:
      model: the model.
      params: its parameters.
      packing: of the group, among others.
      group: which.
      normalize: "mean" or "sum".
      mesh: the devices that share the rows.
      scored: called with the number of queries done, after each micro-batch.
    """
    pairs = packing.groups[group]
    found = np.zeros((len(pairs) + 1, len(pairs[0].prompt_ids), len(pairs[0].response_ids)), np.float32)
    done = 0
    for batch in packing.micro_batches(group):
        queries = np.asarray(batch.queries)
        logps = contrastive_logps(model, params, put_on_devices(batch, shardings_of_rows(mesh)), normalize=normalize)
        found[queries] = gather(logps)
        done += int(np.sum(queries < len(pairs)))
        scored(done)
    return found[:-1]
