"""Greedy sampling over any DecodeFn: prefill, then one jitted loop until every row has stopped."""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sami_jax.data.prompts import Prompt
from sami_jax.data.tokenizer import Tokenizer
from sami_jax.sharding import gather, padded_size, put_on_devices
from sami_jax.types import Array, DecodeFn, Params, Prompts, Rows

_PIECES = 3  # tokens that may have to follow a piece of a character, which has up to four bytes


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
      text: what the tokenizer decodes `ids` to, behind the prompt's prefix, without white space around it; "" where
        there are none.
      ids: its tokens, those of the prefix left out.
      finished: a stop token or marker ended it, not the token limit.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool


@functools.partial(jax.jit, static_argnames=("decode", "max_new_tokens"))
def greedy(
    decode: DecodeFn, params: Params, tokens: Array, lengths: Array, stop_mask: Array, *, max_new_tokens: int
) -> Samples:
    """Samples the most likely next token, over and over (temperature 0; ties go to the lower id).

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

    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], tokens.shape)
    own = Rows(tokens, positions, jnp.full_like(tokens, width))  # a part with one slot for each prompt
    prompts = Prompts(own, (positions >= lengths[:, None]).astype(jnp.int32), (lengths - 1)[:, None])
    logits, cache = decode.prefill(params, decode.empty(rows, width + max_new_tokens), prompts)
    nothing = Samples(
        jnp.zeros((rows, max_new_tokens), jnp.int32), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.bool_)
    )
    start = (jnp.zeros((), jnp.int32), choose(logits[:, 0]), cache, nothing)
    return jax.lax.while_loop(unfinished, emit, start)[3]


class Stops(NamedTuple):
    """What ends a response.

    Attributes:
      end_ids: tokens that end a text; none of them is part of it.
      markers: texts that end a response, wherever they stand in it; what follows is cut.
      mask: [V] bool, True = a row ends with this token: an end token, or one whose own text holds a marker. A marker
        spread over several tokens does not stop the loop; `cut_response` finds it afterwards all the same.
    """

    end_ids: frozenset[int]
    markers: tuple[str, ...]
    mask: np.ndarray


@functools.lru_cache(maxsize=8)  # decoding a vocabulary takes a second
def make_stops(tokenizer: Tokenizer, *, end_ids: frozenset[int], markers: tuple[str, ...], vocab_size: int) -> Stops:
    """The stops of a model with V tokens, whose end tokens are all below V."""
    mask = np.zeros(vocab_size, bool)
    mask[list(end_ids)] = True
    for token, text in enumerate(tokenizer.token_texts[:vocab_size]):
        mask[token] |= any(marker in text for marker in markers)
    mask.setflags(write=False)
    return Stops(end_ids, markers, mask)


def cut_response(
    ids: Sequence[int], tokenizer: Tokenizer, stops: Stops, *, stopped: bool, prefix: Sequence[int] = ()
) -> Response:
    """The response in a row's tokens: up to an end token or the first marker, white space at its end removed.

    A special token counts as the text of its name, so that it may be a marker. Where the cut falls inside a token, the
    piece that stays is tokenised anew, or dropped in the rare case that no ids spell it.

    Args:
      ids: that were emitted.
      tokenizer: turns ids to text.
      stops: what ends a response.
      stopped: whether a stop token did.
      prefix: the prompt's last ids, of the words that every response begins with.
    """
    ids, given = [*prefix, *ids], len(prefix)
    if len(ids) > given and ids[-1] in stops.end_ids:
        ids.pop()
    text, begin = tokenizer.spell(ids), len(tokenizer.spell(prefix)) if prefix else 0
    end = min((text.index(marker, begin) for marker in stops.markers if marker in text[begin:]), default=len(text))
    kept = text[:end].rstrip()
    if kept != text:
        count = _tokens_inside(ids, kept, tokenizer)
        rest = kept[len(tokenizer.spell(ids[:count])) :]
        ids = ids[:count] + (tokenizer.continuation_ids(rest, behind=ids[:count]) or [])
    shown = tokenizer.decode(ids).strip() if tokenizer.decode(ids[given:]).strip() else ""
    return Response(shown, tuple(ids[given:]) if shown else (), stopped or end < len(text))


def _tokens_inside(ids: list[int], kept: str, tokenizer: Tokenizer) -> int:
    """Number of leading ids whose text is a beginning of the kept text."""

    def length(count: int) -> int:
        """Characters up to the end of the one that token `count` is a piece of: unlike others, it never falls."""
        text = ""
        for end in range(count, min(count + _PIECES, len(ids)) + 1):
            text = tokenizer.spell(ids[:end])
            if not text.endswith("\ufffd"):
                break
        return len(text)

    count = bisect.bisect_right(range(len(ids) + 1), len(kept), key=length) - 1
    count = min(count + _PIECES, len(ids))  # pieces that never become a character are U+FFFD in the text as well
    while not kept.startswith(tokenizer.spell(ids[:count])):
        count -= 1
    return count


def sample_responses(
    decode: DecodeFn,
    params: Params,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    stops: Stops,
    max_new_tokens: int,
    rows: int,
    round_to: int,
    sharding: jax.sharding.Sharding,
) -> list[Response]:
    """Greedy responses to tokenised prompts.

    Args:
      decode: the model.
      params: its parameters.
      prompts: each of at least one token.
      tokenizer: turns ids to text.
      stops: what ends a response, of `make_stops`.
      max_new_tokens: longest response.
      rows: rows of the compiled batch; `prompts` has at most so many, the rest repeats the first.
      round_to: prompt width is padded to a multiple of this, a long one more coarsely (`padded_size`).
      sharding: of the batch's leading axis.
    """
    padded = [prompt.ids for prompt in [*prompts, *([prompts[0]] * (rows - len(prompts)))]]
    width = padded_size(max(map(len, padded)), round_to)
    tokens = np.zeros((rows, width), np.int32)
    for row, ids in enumerate(padded):
        tokens[row, : len(ids)] = ids
    lengths = np.array([len(ids) for ids in padded], np.int32)
    on_devices = put_on_devices((tokens, lengths), sharding)
    samples = gather(greedy(decode, params, *on_devices, stops.mask, max_new_tokens=max_new_tokens))
    return [
        cut_response(
            samples.tokens[row, : samples.lengths[row]].tolist(),
            tokenizer,
            stops,
            stopped=bool(samples.stopped[row]),
            prefix=prompt.ids[len(prompt.ids) - prompt.prefix_ids :],
        )
        for row, prompt in enumerate(prompts)
    ]
