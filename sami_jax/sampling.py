"""Greedy sampling over any DecodeFn: prefill, then one jitted loop until every row has stopped."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sami_jax.data.tokenizer import Tokenizer
from sami_jax.sharding import gather, padded_size, place
from sami_jax.types import Array, DecodeFn, Params


class Samples(NamedTuple):
    """What a batch of rows emitted.

    Attributes:
      tokens: [B, max_new_tokens] int32; entries past a row's length are undefined.
      lengths: [B] int32, tokens emitted, a stop token included.
      stopped: [B] bool, False where the row ran out of tokens.
    """

    tokens: Array
    lengths: Array
    stopped: Array


@dataclasses.dataclass(frozen=True)
class Response:
    """A sampled continuation, cut at the first stop marker.

    Attributes:
      text: without white space around it.
      ids: its tokens.
      finished: a stop token or marker ended it, not the token limit.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool


@functools.partial(jax.jit, static_argnames=("decode", "max_new_tokens"))
def greedy(
    decode: DecodeFn, params: Params, tokens: Array, lengths: Array, stop_mask: Array, *, max_new_tokens: int
) -> Samples:
    """The most likely next token, over and over (temperature 0; ties go to the lower id).

    Args:
      decode: the model.
      params: its parameters.
      tokens: [B, T] int32 prompts, padded on the right.
      lengths: [B] int32, each at least 1.
      stop_mask: [V] bool, True = a row ends with this token.
      max_new_tokens: a row ends after so many tokens in any case.
    """
    chex.assert_rank([tokens, lengths, stop_mask], [2, 1, 1])
    rows, width = tokens.shape

    def choose(logits: Array) -> Array:
        return jnp.argmax(logits.astype(jnp.float32), axis=-1).astype(jnp.int32)

    def unfinished(carry: tuple) -> Array:
        step, _, _, samples = carry
        return (step < max_new_tokens) & ~jnp.all(samples.stopped)

    def emit(carry: tuple) -> tuple:
        step, token, cache, samples = carry
        emitted = samples.tokens.at[:, step].set(token)
        row_lengths = samples.lengths + jnp.where(samples.stopped, 0, 1)
        stopped = samples.stopped | stop_mask[token]
        logits, cache = decode.step(params, cache, token, lengths + step)
        return step + 1, choose(logits), cache, Samples(emitted, row_lengths, stopped)

    logits, cache = decode.prefill(params, tokens, lengths, width + max_new_tokens)
    nothing = Samples(
        jnp.zeros((rows, max_new_tokens), jnp.int32), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.bool_)
    )
    start = (jnp.zeros((), jnp.int32), choose(logits), cache, nothing)
    return jax.lax.while_loop(unfinished, emit, start)[3]


def stop_tokens(tokenizer: Tokenizer, markers: Sequence[str], *, vocab_size: int) -> np.ndarray:
    """[V] bool: end of sequence, and tokens whose own text holds a marker.

    A marker spread over several tokens does not stop the loop; `cut_response` finds it afterwards all the same.
    """
    mask = np.zeros(vocab_size, bool)
    if tokenizer.eos_id is not None:
        mask[tokenizer.eos_id] = True
    for token, text in enumerate(tokenizer.token_texts()[:vocab_size]):
        mask[token] |= any(marker in text for marker in markers)
    return mask


def cut_response(ids: Sequence[int], tokenizer: Tokenizer, markers: Sequence[str], *, stopped: bool) -> Response:
    """The response in a row's tokens: up to end of sequence or the first marker, white space at its end removed.

    Where the cut falls inside a token, the piece that stays is tokenised anew.
    """
    ids = list(ids)
    if ids and ids[-1] == tokenizer.eos_id:
        ids.pop()
    text = tokenizer.decode(ids)
    end = min((text.index(marker) for marker in markers if marker in text), default=len(text))
    kept = text[:end].rstrip()
    if kept != text:
        count = len(ids)
        while not kept.startswith(tokenizer.decode(ids[:count])):
            count -= 1
        rest = kept[len(tokenizer.decode(ids[:count])) :]
        ids = ids[:count] + tokenizer.response_ids(rest, prompt=":" if rest[:1].isspace() else " ")
    return Response(kept.strip(), tuple(ids), stopped or end < len(text))


def sample_responses(
    decode: DecodeFn,
    params: Params,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    *,
    stop_mask: np.ndarray,
    markers: Sequence[str],
    max_new_tokens: int,
    rows: int,
    round_to: int,
    sharding: jax.sharding.Sharding,
) -> list[Response]:
    """Greedy responses to tokenised prompts.

    Args:
      decode: the model.
      params: its parameters.
      prompts: token ids, each at least one.
      tokenizer: turns ids to text.
      stop_mask: [V] bool, of `stop_tokens`.
      markers: texts that end a response.
      max_new_tokens: longest response.
      rows: rows of the compiled batch; `prompts` has at most so many, the rest repeats the first.
      round_to: prompt width is padded to a multiple of this, a long one more coarsely (`padded_size`).
      sharding: of the batch's leading axis.
    """
    padded = [*prompts, *([prompts[0]] * (rows - len(prompts)))]
    width = padded_size(max(map(len, padded)), round_to)
    tokens = np.zeros((rows, width), np.int32)
    for row, ids in enumerate(padded):
        tokens[row, : len(ids)] = ids
    lengths = np.array([len(ids) for ids in padded], np.int32)
    placed = place((tokens, lengths), sharding)
    samples = gather(greedy(decode, params, *placed, stop_mask, max_new_tokens=max_new_tokens))
    return [
        cut_response(
            samples.tokens[row, : samples.lengths[row]].tolist(), tokenizer, markers, stopped=bool(samples.stopped[row])
        )
        for row in range(len(prompts))
    ]
