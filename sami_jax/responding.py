"""Prompts to responses with a loaded model: checked, and sampled in slots."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.prompts import Prompt
from sami_jax.errors import BadDataError
from sami_jax.huggingface.opened import LoadedModel, OpenModel
from sami_jax.sampling.choosing import Choosing
from sami_jax.sampling.slots import Hopeless, Request, Room, Sampler, Spent
from sami_jax.sampling.stop_text import Response, Stops
from sami_jax.seeds import key_data
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
    if too_long(opened, ids, new_tokens):
        return (
            f"has {len(ids)} tokens; with {new_tokens} new ones it exceeds the model's {shape.max_positions} "
            f"positions. Shorten it, or lower {limit}."
        )
    return ""


def too_long(opened: OpenModel, ids: Sequence[int], new_tokens: int) -> bool:
    """Whether a prompt and a response of so many tokens do not fit the model."""
    return len(ids) + new_tokens > opened.model.config.max_positions


def respond(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    seed: int = 0,
    names: Sequence[tuple[str | int, ...]] | None = None,
    progressed: Callable[[Spent], None] = lambda spent: None,
) -> list[Response]:
    """Responses to prompts, in order; see `respond_in_groups`."""
    how: dict[str, Any] = {"seed": seed, "names": names, "progressed": progressed}
    responses = respond_in_groups(loaded, prompts, config, groups=range(len(prompts)), **how)
    return [response for response in responses if response is not None]


def respond_in_groups(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    groups: Sequence[int],
    hopeless: Hopeless | None = None,
    seed: int = 0,
    names: Sequence[tuple[str | int, ...]] | None = None,
    progressed: Callable[[Spent], None] = lambda spent: None,
) -> list[Response | None]:
    """Responses to prompts, in order; None for those that were given up.

    Args:
      loaded: the model.
      prompts: what is to be answered.
      config: how to sample.
      groups: of each prompt: those whose responses are of use only together.
      hopeless: with which of its responses a group is given up, see `Sampler.responses`; None for none.
      seed: with a name decides what is drawn for a response, whatever else is sampled. At temperature 0 nothing is.
      names: one for each prompt; needed above temperature 0.
      progressed: hears of the responses that have ended.

    Raises:
      BadDataError: as `check_prompts` does.
      ValueError: names are needed.
    """
    if config.temperature > 0 and names is None:
        raise ValueError("Responses that are drawn need a name each.")
    if not prompts:
        return []
    check_prompts(loaded, prompts, max_new_tokens=config.max_new_tokens)
    sampler = Sampler(
        loaded.model.decode,
        loaded.params,
        loaded.tokenizer,
        stops=Stops(frozenset(loaded.end_ids), config.stop),
        choosing=Choosing(config.temperature, config.top_p, config.min_p),
        max_new_tokens=config.max_new_tokens,
        vocab_size=loaded.model.config.vocab_size,
        room=room_for(loaded, [len(prompt.ids) for prompt in prompts], config),
        sharding=batch_sharding(loaded.mesh),
        everywhere=replicated(loaded.mesh),
    )
    none = np.zeros(2, np.uint32)
    keys = [none] * len(prompts) if names is None else [key_data(seed, *name) for name in names]
    requests = [
        Request(tuple(prompt.ids), prompt.prefix_ids, key, group)
        for prompt, key, group in zip(prompts, keys, groups, strict=True)
    ]
    return sampler.responses(requests, progressed, hopeless=hopeless)


def room_for(opened: OpenModel, lengths: Sequence[int], config: SamplingConfig) -> Room:
    """The shapes that prompts of these lengths are answered in: rough ones, so that few are compiled."""
    parts, multiple = batch_shards(opened.mesh), opened.model.attention.row_multiple
    longest = _rough(max(lengths), multiple)
    row = max(longest, min(_rough(config.prefill_tokens, multiple), _rough(-(-sum(lengths) // parts), multiple)))
    slots = shared_rows(min(config.slots, 1 << (len(lengths) - 1).bit_length()), opened.mesh)
    length = -(-(longest + config.max_new_tokens) // multiple) * multiple
    return Room(slots, parts, row, length, min(config.chunk_steps, config.max_new_tokens))


def _rough(tokens: int, multiple: int) -> int:
    """At least so many tokens: a multiple, and of large sizes only four in every doubling."""
    unit = max(multiple, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // unit) * unit
