"""The arrays that travel between the stages, and the pure functions that stand for a model."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import NamedSharding

Array = jax.Array
Normalize = Literal["mean", "sum"]  # a response's log-prob over its tokens
Boundary = Literal["exact", "authors"]  # between prompt and response, in tokens
PromptStyle = Literal["base", "chat"]  # a template is the whole text, or what a user says in a chat
Orders = Literal["both", "paper"]  # in which a judge sees two responses
Dtype = Literal["float32", "bfloat16"]
Platform = Literal["any", "cpu", "gpu", "tpu"]
Remat = Literal["none", "dots", "full"]  # what of a layer the backward pass recomputes: nothing, all but matmuls, all
Params = Any  # nested dict of arrays, as `model.decoder.Decoder` splits into


class Rows(NamedTuple):
    """Tokens as a model sees them when it scores: several sequences may share a row, and a beginning.

    Who sees whom is one integer a slot: the token in slot k is visible to the one in slot q of its row if and only if
    k <= q < ends[k], and, in a model with a sliding window, positions[q] - positions[k] is below the window. Every slot
    sees itself, padding included.

    Attributes:
      tokens: [N, S] int32.
      positions: [N, S] int32. Place of each token in its own sequence, which decides its rotary angle.
      ends: [N, S] int32. Slot before which a token is seen; at least its own slot + 1.
    """

    tokens: Array
    positions: Array
    ends: Array


class RowModel(NamedTuple):
    """A model as scoring and training see it: rows to hidden states, and the head that makes logits of them.

    Attributes:
      hidden: (params, rows) -> [N, S, D] final hidden states. That of slot q predicts the token after it, and depends
        on the tokens that q sees only.
      head: (params) -> [D, V] as it is kept: logits are hidden @ head, of operands in the dtype of the hidden states,
        in float32.
      head_chunk: labels of a device whose logits are in memory at once; None for all.
      head_sharding: where the head's columns and rows live; None leaves that to the compiler.
    """

    hidden: Callable[[Params, Rows], Array]
    head: Callable[[Params], Array]
    head_chunk: int | None = None
    head_sharding: NamedSharding | None = None


class Reference(NamedTuple):
    """The base model as KL to it needs it: what it says where labels are predicted, and its head.

    Attributes:
      hidden: [G, L, D] its hidden states, of `ContrastiveRows`; [M, G, L, D] of M micro-batches.
      head: [D, V].
    """

    hidden: Array
    head: Array


class Prompts(NamedTuple):
    """Prompts as a model reads them before it goes on with them in slots.

    Rows and slots are shared by G parts, a row for each: prompts stand one behind the other in the row of the part
    whose slots go on with them.

    Attributes:
      rows: G rows of W tokens.
      slots: [G, W] int32. The slot of the part that each token is for; the number of them, B / G, for padding.
      last: [G, P] int32. Where in its row the last token of each prompt is; anything for a prompt that is not there.
    """

    rows: Rows
    slots: Array
    last: Array


class DecodeFn(NamedTuple):
    """A model as sampling sees it; a bigram table can be one.

    Attributes:
      empty: (slots B, length S) -> a cache for B texts of up to S tokens.
      prefill: (params, cache, prompts) -> (logits [G, P, V] float32 behind each prompt, cache). Slots that have no
        prompt among these stay as they are; of the others, what lies behind the prompt must not matter.
      step: (params, cache, tokens [B] int32, positions [B] int32) -> (logits [B, V] float32, cache). Feeds one token a
        slot, to be seen by those after it.
    """

    empty: Callable[[int, int], Any]
    prefill: Callable[[Params, Any, Prompts], tuple[Array, Any]]
    step: Callable[[Params, Any, Array, Array], tuple[Array, Any]]


class ContrastiveRows(NamedTuple):
    """A micro-batch: up to Q whole queries of C constitutions and R responses in packed rows (`scoring.packed_rows`).

    Labels come from lengths, never from a pad id: Mistral's pad is its end-of-sequence token.

    Attributes:
      rows: N rows of S slots, N / G of them in each of the G parts that devices share.
      at: [G, L] int32. Slots of a part, row by row, whose hidden state predicts a label.
      labels: [G, L] int32. The response tokens.
      cells: [G, L] int32. Cell (q C + c) R + r that a label counts in; Q C R for padding.
      counts: [Q, C, R] int32. Tokens of each cell.
      queries: [Q] int32. Which query of its group each is, of n queries; n where there is none.
    """

    rows: Rows
    at: Array
    labels: Array
    cells: Array
    counts: Array
    queries: Array


class TrainState(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      params: the policy.
      opt_state: the optimizer's state, shaped like `params` leaf by leaf.
      step: [] int32, optimizer steps done.
    """

    params: Params
    opt_state: Any
    step: Array
