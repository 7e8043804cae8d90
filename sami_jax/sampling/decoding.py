"""The two programs of sampling, over any DecodeFn: prompts go into slots, and all slots go on by some tokens."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from sami_jax.sampling.choosing import Choosing, choose
from sami_jax.types import Array, DecodeFn, Params, Prompts


class Slots(NamedTuple):
    """B texts that are being written, on the devices.

    Attributes:
      cache: the model's.
      tokens: [B] int32, the next token of each, chosen and not yet read by the model.
      positions: [B] int32, its position.
      written: [B] int32, tokens of the response before it.
      left: [B] int32, tokens that may still be written, it included; 0 for a slot at rest, which writes nothing that
        anyone reads.
      keys: [B, 2] uint32, of `choose`.
    """

    cache: Any
    tokens: Array
    positions: Array
    written: Array
    left: Array
    keys: Array


class Joining(NamedTuple):
    """The texts of `Prompts`, up to P for each of G parts.

    Attributes:
      slots: [G, P] int32, of the part's B / G; B / G where there is none.
      lengths: [G, P] int32, of the prompts.
      left: [G, P] int32, of their longest responses.
      keys: [G, P, 2] uint32.
    """

    slots: Array
    lengths: Array
    left: Array
    keys: Array


@functools.partial(jax.jit, static_argnames=("decode", "slots", "length", "sharding"))
def at_rest(decode: DecodeFn, *, slots: int, length: int, sharding: Sharding) -> Slots:
    """Empty slots.

    Args:
      decode: the model.
      slots: B.
      length: most tokens of a prompt and its response.
      sharding: of the leading axis.
    """
    zeros = jnp.zeros(slots, jnp.int32)
    each = Slots(None, zeros, zeros, zeros, zeros, jnp.zeros((slots, 2), jnp.uint32))
    each = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), each)
    return each._replace(cache=decode.empty(slots, length))


@functools.partial(jax.jit, static_argnames=("decode", "choosing"), donate_argnames="slots")
def join(
    decode: DecodeFn, params: Params, slots: Slots, prompts: Prompts, joining: Joining, *, choosing: Choosing
) -> Slots:
    """Reads prompts into slots, whose texts are given up, and chooses the first token behind each."""
    chex.assert_equal_shape([joining.slots, joining.lengths, joining.left, prompts.last])
    logits, cache = decode.prefill(params, slots.cache, prompts)
    parts, count = joining.slots.shape
    first = choose(
        logits.reshape(parts * count, -1),
        joining.keys.reshape(parts * count, 2),
        jnp.zeros(parts * count, jnp.int32),
        choosing,
    ).reshape(parts, count)
    part = jnp.arange(parts)[:, None]

    def put(old: Array, new: Array) -> Array:
        shared = old.reshape(parts, -1, *old.shape[1:])
        return shared.at[part, joining.slots].set(new, mode="drop").reshape(old.shape)

    return Slots(
        cache,
        put(slots.tokens, first),
        put(slots.positions, joining.lengths),
        put(slots.written, jnp.zeros_like(first)),
        put(slots.left, joining.left),
        put(slots.keys, joining.keys),
    )


@functools.partial(jax.jit, static_argnames=("decode", "steps", "choosing", "everywhere"), donate_argnames="slots")
def go_on(
    decode: DecodeFn,
    params: Params,
    slots: Slots,
    alive: Array,
    ends: Array,
    *,
    steps: int,
    choosing: Choosing,
    everywhere: Sharding,
) -> tuple[Array, Slots]:
    """Lets every slot write up to `steps` tokens; ends sooner where all are at rest.

    Args:
      decode: the model.
      params: its parameters.
      slots: that go on.
      alive: [B] bool, False for slots that are to rest, whatever they have left.
      ends: [V] bool, True for tokens behind which nothing is written.
      steps: most tokens of a slot.
      choosing: how they are chosen.
      everywhere: the sharding of what every device holds whole.

    Returns:
      [B, steps] int32, the tokens, on every device; undefined behind an end token and behind a slot's last one. And the
      slots.
    """
    chex.assert_rank([alive, ends], 1)
    slots = slots._replace(left=jnp.where(alive, slots.left, 0))

    def busy(carry: tuple) -> Array:
        step, _, slots = carry
        return (step < steps) & jnp.any(slots.left > 0)

    def write(carry: tuple) -> tuple:
        step, tokens, slots = carry
        tokens = tokens.at[:, step].set(slots.tokens)
        writes = slots.left > 0
        left = jnp.where(ends[slots.tokens], 0, jnp.maximum(slots.left - 1, 0))
        # A slot at rest writes over its first place, so that nobody waits for the places behind.
        positions = jnp.where(writes, slots.positions, 0)
        logits, cache = decode.step(params, slots.cache, slots.tokens, positions)
        written, positions = slots.written + writes.astype(jnp.int32), positions + writes.astype(jnp.int32)
        chosen = choose(logits, slots.keys, written, choosing)
        return step + 1, tokens, Slots(cache, chosen, positions, written, left, slots.keys)

    nothing = jnp.zeros((slots.tokens.shape[0], steps), jnp.int32)
    _, tokens, slots = jax.lax.while_loop(busy, write, (jnp.zeros((), jnp.int32), nothing, slots))
    return jax.lax.with_sharding_constraint(tokens, everywhere), slots
