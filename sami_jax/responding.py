"""Prompts to responses with a loaded model: checked, and sampled in batches."""

from collections.abc import Sequence

from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.prompts import Prompt
from sami_jax.errors import BadDataError
from sami_jax.huggingface.opened import LoadedModel, OpenModel
from sami_jax.sampling import Response, make_stops, sample_responses
from sami_jax.sharding import batch_sharding, shared_rows


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


def respond(loaded: LoadedModel, prompts: Sequence[Prompt], config: SamplingConfig, *, rows: int) -> list[Response]:
    """Greedy responses to prompts, in batches of `rows`, or as many more as the mesh can share evenly.

    Raises:
      BadDataError: as `check_prompts` does.
    """
    check_prompts(loaded, prompts, max_new_tokens=config.max_new_tokens)
    stops = make_stops(
        loaded.tokenizer,
        end_ids=loaded.end_ids,
        markers=config.stop,
        vocab_size=loaded.model.config.vocab_size,
    )
    rows = shared_rows(rows, loaded.mesh)
    responses = []
    for start in range(0, len(prompts), rows):
        responses += sample_responses(
            loaded.model.decode,
            loaded.params,
            prompts[start : start + rows],
            loaded.tokenizer,
            stops=stops,
            max_new_tokens=config.max_new_tokens,
            rows=rows,
            round_to=config.round_prompt_tokens_to,
            sharding=batch_sharding(loaded.mesh),
        )
    return responses
