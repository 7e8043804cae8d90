"""Packed rows to log-probs: every response under every constitution."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sami_jax.scoring.head import label_terms, logits_of
from sami_jax.scoring.packed_rows import Packing
from sami_jax.sharding import batch_sharding, gather, micro_batch_sharding, put_on_devices, replicated
from sami_jax.types import Array, ContrastiveRows, Normalize, Params, Reference, RowModel, Rows


def causal_rows(tokens: Array) -> Rows:
    """Rows [N, S] of one sequence each: every token sees those before it."""
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    return Rows(tokens, slots, jnp.full_like(slots, tokens.shape[1]))


def all_logits(model: RowModel, params: Params, tokens: Array) -> Array:
    """[N, S, V] float32: after every token of rows [N, S] of one sequence each."""
    return logits_of(model.hidden(params, causal_rows(tokens)), model.head(params))


def label_hidden(model: RowModel, params: Params, batch: ContrastiveRows) -> Array:
    """[G, L, D] hidden states that predict the labels, a third of all slots at C = 2."""
    n, s = batch.rows.tokens.shape
    g, labels = batch.at.shape
    chex.assert_shape(batch.rows, (n, s))
    chex.assert_shape([batch.labels, batch.cells], (g, labels))
    chex.assert_shape(batch.queries, batch.counts.shape[:1])
    hidden = model.hidden(params, batch.rows)
    hidden = hidden.reshape(g, n // g * s, hidden.shape[-1])
    return jnp.take_along_axis(hidden, batch.at[:, :, None], axis=1)


def logps_and_kls(
    model: RowModel, params: Params, batch: ContrastiveRows, reference: Reference | None = None
) -> tuple[Array, Array]:
    """[G, L] log-probs of the labels and [G, L] KL from the reference there, in nats; see `label_terms`."""
    hidden, head = label_hidden(model, params, batch), model.head(params)
    return label_terms(hidden, head, batch.labels, reference, chunk=model.head_chunk, sharding=model.head_sharding)


def over_cells(values: Array, batch: ContrastiveRows, *, normalize: Normalize) -> Array:
    """[Q, C, R] sums or means over the tokens of each cell, of one value [G, L] per label; 0 where it has none."""
    q, c, r = batch.counts.shape
    sums = jax.ops.segment_sum(values.reshape(-1), batch.cells.reshape(-1), q * c * r + 1)[:-1].reshape(q, c, r)
    return sums / jnp.maximum(batch.counts, 1).astype(sums.dtype) if normalize == "mean" else sums


@functools.partial(jax.jit, static_argnames=("model", "normalize"))
def contrastive_logps(model: RowModel, params: Params, batch: ContrastiveRows, *, normalize: Normalize) -> Array:
    """[Q, C, R] log p(response r | query, constitution c) in nats: mean over its tokens, or sum."""
    return over_cells(logps_and_kls(model, params, batch)[0], batch, normalize=normalize)


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
