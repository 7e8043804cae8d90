"""Stand-ins that obey the contract they replace: a model small enough for numpy, and a tokenizer with chosen merges.

The model knows every token of its prefix and the place of each, so a wrong mask, a shifted position, a prompt that is
swapped or a stale cache slot changes its logits. All its numbers are small integers: float32 sums of them are exact.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sami_jax.data.pairs import Pair
from sami_jax.data.tokenizer import Tokenizer
from sami_jax.sampling.choosing import Choosing
from sami_jax.sampling.decoding import Joining, at_rest, go_on, join
from sami_jax.scoring.matrices import causal_rows
from sami_jax.scoring.packed_rows import Packing, RowLimits, pack_rows
from sami_jax.scoring.reference import reference_hidden
from sami_jax.types import Array, ContrastiveRows, DecodeFn, Params, Prompts, Reference, RowModel, Rows


def table_params(vocab: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """`last` [V, V]: logits by the last token; `context` [V, V]: what every token of the prefix adds to them."""
    rng = np.random.default_rng(seed)
    last, context = rng.integers(-4, 5, (2, vocab, vocab)).astype(np.float32)
    return {"last": last, "context": context}


def logits_after(params: Params, prefix: Sequence[int]) -> np.ndarray:
    """[V] float64: last[x_t] + sum_s (1 + s mod 3) context[x_s], the definition in numpy."""
    total = params["last"][prefix[-1]].astype(np.float64)
    for place, token in enumerate(prefix):
        total = total + (1 + place % 3) * params["context"][token].astype(np.float64)
    return total


def hidden(params: Params, rows: Rows) -> Array:
    """The logits themselves, summed over what each slot sees: the head is the identity."""
    slots = jnp.arange(rows.tokens.shape[1])
    seen = (slots[None, None, :] <= slots[None, :, None]) & (slots[None, :, None] < rows.ends[:, None, :])
    context = jnp.asarray(params["context"])[rows.tokens]
    context = context * (1 + rows.positions % 3).astype(context.dtype)[:, :, None]
    return jnp.asarray(params["last"])[rows.tokens] + jnp.einsum("nqk,nkv->nqv", seen.astype(context.dtype), context)


def head(params: Params) -> Array:
    return jnp.eye(params["last"].shape[1], dtype=params["last"].dtype)


MODEL = RowModel(hidden, head)


def empty(slots: int, length: int) -> Array:
    """The cache holds the token of every place of every slot [B, S], as a decoder's holds its keys."""
    return jnp.zeros((slots, length), jnp.int32)


def prefill(params: Params, cache: Array, prompts: Prompts) -> tuple[Array, Array]:
    parts = len(prompts.last)
    shared = cache.reshape(parts, -1, cache.shape[1])
    part = jnp.arange(parts)[:, None]
    shared = shared.at[part, prompts.slots, prompts.rows.positions].set(prompts.rows.tokens, mode="drop")
    logits = jnp.take_along_axis(hidden(params, prompts.rows), prompts.last[:, :, None], axis=1)
    return logits, shared.reshape(cache.shape)


def step(params: Params, cache: Array, tokens: Array, positions: Array) -> tuple[Array, Array]:
    cache = cache.at[jnp.arange(cache.shape[0]), positions].set(tokens)
    logits = hidden(params, causal_rows(cache))
    return jnp.take_along_axis(logits, positions[:, None, None], axis=1)[:, 0], cache


def own_rows(tokens: Array, lengths: Array) -> Prompts:
    """Prompts [B, W], padded on the right, each in a row and a slot of its own."""
    tokens, lengths = jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    rows = Rows(tokens, positions, jnp.full_like(tokens, tokens.shape[1]))
    return Prompts(rows, (positions >= lengths[:, None]).astype(jnp.int32), (lengths - 1)[:, None])


def prefilled(decode: DecodeFn, params: Params, tokens: Array, lengths: Array, length: int) -> tuple[Array, Any]:
    """Logits [B, V] behind such prompts, and a cache for texts of up to `length` tokens."""
    logits, cache = decode.prefill(params, decode.empty(len(tokens), length), own_rows(tokens, lengths))
    return logits[:, 0], cache


DECODE = DecodeFn(empty, prefill, step)


def greedy(decode: DecodeFn, params: Params, prompts: Sequence[Sequence[int]], *, count: int) -> np.ndarray:
    """[B, count] the likeliest tokens behind each prompt, whatever ends a text."""
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    lengths = np.array([[len(ids)] for ids in prompts], np.int32)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    slots = at_rest(decode, slots=len(prompts), length=tokens.shape[1] + count, sharding=one)
    joining = Joining(
        np.zeros_like(lengths), lengths, np.full_like(lengths, count), np.zeros((*lengths.shape, 2), np.uint32)
    )
    slots = join(decode, params, slots, own_rows(tokens, lengths[:, 0]), joining, choosing=Choosing())
    vocab = jax.eval_shape(decode.step, params, slots.cache, slots.tokens, slots.positions)[0].shape[1]
    never = np.zeros(vocab, bool)
    alive = np.ones(len(prompts), bool)
    return np.asarray(go_on(decode, params, slots, alive, never, steps=count, choosing=Choosing(), everywhere=one)[0])


def byte_tokenizer(*merges: tuple[str, str]) -> Tokenizer:
    """A byte-level BPE whose only merges are these, the earlier the stronger; `Ġ` is a space, `Ċ` a newline."""
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    vocab = {name: number for number, name in enumerate(names)}
    backend = Backend(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))


def token(tokenizer: Tokenizer, text: str) -> int:
    """The id of the one token with this text."""
    return _token_texts(tokenizer).index(text)


@functools.lru_cache
def _token_texts(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.spell([i]) for i in range(tokenizer.vocab_size)]


def pair(
    prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]], example_id: str | int = "q"
) -> Pair:
    """A pair for what reads token ids only; its texts say so."""
    texts = ("not read",) * len(prompt_ids)
    return Pair(example_id, texts, texts, tuple(map(tuple, prompt_ids)), tuple(map(tuple, response_ids)))


def reference(model: RowModel, params: Params, batch: ContrastiveRows) -> Reference:
    """What the model with these weights says of stacked micro-batches' labels."""
    return Reference(reference_hidden(model, params, batch), model.head(params))


def packing(
    *groups: Sequence[Pair], shards: int = 1, rows: int = 2, widest: int = 64, eos_id: int | None = None, **limits: int
) -> Packing:
    """Groups of pairs in rows: `rows` in each of `shards` parts, of any width up to `widest`."""
    limits = {"multiple": 1, "dear_width": 10**6, **limits}
    return pack_rows(groups, RowLimits(shards, rows, widest, **limits), eos_id=eos_id)


def random_pairs(
    count: int,
    *,
    vocab: int,
    seed: int = 0,
    constitutions: int = 2,
    prompts: tuple[int, int] = (2, 5),
    responses: tuple[int, int] = (1, 4),
) -> list[Pair]:
    """Pairs with ragged prompts and responses, of so many tokens at least and at most."""
    rng = np.random.default_rng(seed)

    def rows(low: int, high: int) -> list[list[int]]:
        return [rng.integers(0, vocab, rng.integers(low, high + 1)).tolist() for _ in range(constitutions)]

    return [pair(rows(*prompts), rows(*responses), f"q{i}") for i in range(count)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    logits = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def response_logps(params: Params, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
    """[K] float64 log-prob of each response token after the prompt and the response tokens before it."""
    return np.array(
        [log_softmax(logits_after(params, [*prompt, *response[:k]]))[response[k]] for k in range(len(response))]
    )


def pair_logps(params: Params, one: Pair, *, normalize: str) -> np.ndarray:
    """[C, R] float64 by definition, one cell at a time."""
    reduce = {"mean": np.mean, "sum": np.sum}[normalize]
    return np.array(
        [[reduce(response_logps(params, prompt, ids)) for ids in one.response_ids] for prompt in one.prompt_ids]
    )


def same_bits(a: object, b: object) -> bool:
    """Whether two trees have equal structure, dtypes, shapes and bytes; NaN equals itself, 0 does not equal -0."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (a, b)), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)
