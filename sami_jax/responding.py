"""Prompts to responses with a loaded model: checked, and sampled in slots."""

from collections.abc import Callable, Sequence

import numpy as np

from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.prompts import Prompt
from sami_jax.errors import BadDataError
from sami_jax.huggingface.opened import LoadedModel, OpenModel
from sami_jax.sampling.choosing import Choosing
from sami_jax.sampling.slots import Request, Room, Sampler, Spent
from sami_jax.sampling.stop_text import Response, Stops
from sami_jax.sharding import batch_sharding, batch_shards, replicated, shared_rows


def check_prompts(opened: OpenModel, prompts: Sequence[Prompt], *, max_new_tokens: int) -> None:
    """Raises BadDataError where a prompt has no tokens, or may not fit with its response."""
    for number, prompt in enumerate(prompts, start=1):
        if problem := prompt_problem(opened, prompt.ids, max_new_tokens):
            raise BadDataError(f"Prompt {number} ({prompt.text[:60]!r}...) {problem}")


def prompt_problem(
    opened: OpenModel, ids: Sequence[int], new_tokens: int, *, limit: str = "config.sampling.max_new_tokens"
) -> str:
    """Returns what is wrong with a prompt, and the remedy; "" where nothing is. `limit` is the name of `new_tokens`."""
    shape = opened.model.config
    if not ids:
        return "has no tokens; remove it."
    if max(ids) >= shape.vocab_size:
        return (
            f"has token ids beyond the model's vocabulary of {shape.vocab_size}; the tokenizer and the weights in "
            f"{opened.folder} do not belong together."
        )
    if len(ids) + new_tokens > shape.max_positions:
        return (
            f"has {len(ids)} tokens; with {new_tokens} new ones it exceeds the model's {shape.max_positions} "
            f"positions. Shorten it, or lower {limit}."
        )
    return ""


def respond(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    progressed: Callable[[Spent], None] = lambda spent: None,
) -> list[Response]:
    """Responses to prompts, in order; `progressed` hears of those that have ended.

    Raises:
      BadDataError: as `check_prompts` does.
    """
    check_prompts(loaded, prompts, max_new_tokens=config.max_new_tokens)
    sampler = Sampler(
        loaded.model.decode,
        loaded.params,
        loaded.tokenizer,
        stops=Stops(frozenset(loaded.end_ids), config.stop),
        choosing=Choosing(),
        max_new_tokens=config.max_new_tokens,
        vocab_size=loaded.model.config.vocab_size,
        room=room_for(loaded, [len(prompt.ids) for prompt in prompts], config),
        sharding=batch_sharding(loaded.mesh),
        everywhere=replicated(loaded.mesh),
    )
    key = np.zeros(2, np.uint32)
    return sampler.responses([Request(tuple(prompt.ids), prompt.prefix_ids, key) for prompt in prompts], progressed)


def room_for(opened: OpenModel, lengths: Sequence[int], config: SamplingConfig) -> Room:
    """The shapes that prompts of these lengths are answered in: rough ones, so that few are compiled."""
    parts, multiple = batch_shards(opened.mesh), opened.model.attention.row_multiple
    longest = _rough(max(lengths), multiple)
    row = max(longest, min(_rough(config.prefill_tokens, multiple), _rough(-(-sum(lengths) // parts), multiple)))
    slots = shared_rows(min(config.slots, 1 << (len(lengths) - 1).bit_length()), opened.mesh)
    return Room(slots, parts, row, longest + config.max_new_tokens, min(config.chunk_steps, config.max_new_tokens))


def _rough(tokens: int, multiple: int) -> int:
    """At least so many tokens: a multiple, and of large sizes only four in every doubling."""
    unit = max(multiple, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // unit) * unit
