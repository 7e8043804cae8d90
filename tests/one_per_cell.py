"""The layout that packed rows are held against: every cell of the matrix a sequence of its own, as the authors have it.

A prompt is computed R times and a response C times, each sequence padded to the longest: nothing is shared, so nothing
can leak.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sami_jax.data.pairs import Pair
from sami_jax.losses import sami_loss
from sami_jax.scoring.matrices import all_logits
from sami_jax.types import Array, Normalize, Params, RowModel


def logps_one_per_cell(
    model: RowModel, params: Params, pairs: Sequence[Pair], *, normalize: Normalize = "mean", ending: tuple = ()
) -> Array:
    """[Q, C, R] log p(response r | query, constitution c) in nats."""
    cells = [(prompt, (*ids, *ending)) for one in pairs for prompt in one.prompt_ids for ids in one.response_ids]
    width = max(len(prompt) + len(ids) for prompt, ids in cells)
    tokens, counts = np.zeros((len(cells), width), np.int32), np.zeros((len(cells), width - 1), np.float32)
    for row, (prompt, ids) in enumerate(cells):
        tokens[row, : len(prompt) + len(ids)] = (*prompt, *ids)
        counts[row, len(prompt) - 1 : len(prompt) + len(ids) - 1] = 1
    logps = jax.nn.log_softmax(all_logits(model, params, jnp.asarray(tokens))[:, :-1])
    each = jnp.take_along_axis(logps, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    sums = jnp.sum(each * counts, axis=1)
    if normalize == "mean":
        sums = sums / counts.sum(axis=1)
    return sums.reshape(len(pairs), len(pairs[0].prompt_ids), len(pairs[0].response_ids))


def loss_one_per_cell(model: RowModel, params: Params, pairs: Sequence[Pair], **how) -> Array:
    """[] mean SAMI loss, nats."""
    return jnp.mean(jax.vmap(sami_loss)(logps_one_per_cell(model, params, pairs, **how)).loss)
