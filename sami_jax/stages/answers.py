"""Prompts to responses: checked before a model is loaded, sampled in batches, kept in parts."""

import dataclasses
from collections.abc import Iterable, Sequence

from sami_jax.config.data import PromptsConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.constitutions import Constitution
from sami_jax.data.pairs import Pair
from sami_jax.data.prompts import render
from sami_jax.data.queries import Query
from sami_jax.data.tasks import Task
from sami_jax.data.tokenizer import Tokenizer
from sami_jax.errors import BadDataError, enough_memory
from sami_jax.huggingface.opened import LoadedModel, OpenModel
from sami_jax.sampling import Response, make_stops, sample_responses
from sami_jax.sharding import batch_sharding, more_devices, shared_rows
from sami_jax.stages.stage import Output


def check_prompts(opened: OpenModel, prompts: Sequence[str], *, max_new_tokens: int) -> list[list[int]]:
    """The prompts' token ids. Raises BadDataError where one has none, or may not fit with its response."""
    ids = [opened.tokenizer.prompt_ids(prompt) for prompt in prompts]
    for number, (prompt, row) in enumerate(zip(prompts, ids, strict=True), start=1):
        if problem := _prompt_problem(opened, row, max_new_tokens):
            raise BadDataError(f"Prompt {number} ({prompt[:60]!r}...) {problem}")
    return ids


def check_tasks(
    opened: OpenModel, tasks: Iterable[Task], templates: PromptsConfig, *, new_tokens: int, file: str
) -> None:
    """Refuses the first task with a prompt that may not fit the model together with a response.

    Args:
      opened: the model.
      tasks: what is to be asked.
      templates: of the prompts.
      new_tokens: of the longest response.
      file: that the queries are from, to be named.

    Raises:
      BadDataError: the query, what is wrong and the remedy.
    """
    # A token is at least one byte, except those that the tokenizer puts in front. So prompts of fewer bytes than this
    # fit, and need not be tokenised; only the first one is, to see that the tokenizer belongs to the model.
    fitting = opened.model.config.max_positions - new_tokens - len(opened.tokenizer.leading_ids) - 1
    for number, task in enumerate(tasks):
        for name, template in (("generation", templates.generation), ("training", templates.training)):
            for prompt in task.prompts(template):
                if number and len(prompt.encode()) <= fitting:
                    continue
                if problem := _prompt_problem(opened, opened.tokenizer.prompt_ids(prompt), new_tokens):
                    raise BadDataError(f"{file}: the {name} prompt of query {task.query.example_id!r} {problem}")


def _prompt_problem(opened: OpenModel, ids: Sequence[int], new_tokens: int) -> str:
    """Returns what is wrong with a prompt, and the remedy; "" where nothing is."""
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
            "positions. Shorten it, or lower config.sampling.max_new_tokens."
        )
    return ""


def respond(loaded: LoadedModel, prompts: Sequence[str], config: SamplingConfig, *, rows: int) -> list[Response]:
    """Greedy responses to prompt texts, in batches of `rows`, or as many more as the mesh can share evenly.

    Raises:
      BadDataError: as `check_prompts` does.
    """
    ids = check_prompts(loaded, prompts, max_new_tokens=config.max_new_tokens)
    stops = make_stops(
        loaded.tokenizer,
        end_ids=loaded.end_ids,
        markers=config.stop,
        vocab_size=loaded.model.config.vocab_size,
    )
    rows = shared_rows(rows, loaded.mesh)
    responses = []
    for start in range(0, len(ids), rows):
        responses += sample_responses(
            loaded.model.decode,
            loaded.params,
            ids[start : start + rows],
            loaded.tokenizer,
            stops=stops,
            max_new_tokens=config.max_new_tokens,
            rows=rows,
            round_to=config.round_prompt_tokens_to,
            sharding=batch_sharding(loaded.mesh),
        )
    return responses


def answer(
    loaded: LoadedModel, tasks: Sequence[Task], template: str, config: SamplingConfig, *, out: Output, part: str
) -> list[list[Response]]:
    """The C responses of each task, kept as a part of a stage.

    Args:
      loaded: the model.
      tasks: C constitutions each.
      template: of the prompts.
      config: how to sample.
      out: the stage's.
      part: name of the file that keeps them.

    Raises:
      BadDataError: a prompt does not fit the model, or the part holds other queries.
    """

    def sampled() -> list[dict]:
        prompts = [prompt for task in tasks for prompt in task.prompts(template)]
        with enough_memory(
            f"sampling {len(prompts)} responses of up to {config.max_new_tokens} tokens at once",
            f"lower config.sampling.chunk_queries, now {config.chunk_queries}",
            more_devices(loaded.mesh),
        ):
            count = len(tasks[0].constitutions)
            flat = respond(loaded, prompts, config, rows=config.chunk_queries * count)
        return [
            {
                "example_id": task.query.example_id,
                "constitutions": [constitution.text for constitution in task.constitutions],
                "responses": [dataclasses.asdict(response) for response in flat[i * count : (i + 1) * count]],
            }
            for i, task in enumerate(tasks)
        ]

    records = out.part(part, sampled)
    if [record["example_id"] for record in records] != [task.query.example_id for task in tasks]:
        path = out.folder / part
        raise BadDataError(f"{path} holds other queries than the run asks for; delete it to have it sampled anew.")
    return [[Response(r["text"], tuple(r["ids"]), r["finished"]) for r in record["responses"]] for record in records]


def answered_pair(
    query: Query,
    constitutions: Sequence[Constitution],
    responses: Sequence[Response],
    templates: PromptsConfig,
    tokenizer: Tokenizer,
) -> Pair:
    """The pair that is trained or scored: responses as sampled, or tokenised anew with the prompt as the authors do."""
    prompts = [render(templates.training, constitution=c.text, query=query.text) for c in constitutions]
    response_ids = [response.ids for response in responses]
    if templates.boundary == "authors":
        response_ids = [
            tuple(tokenizer.response_ids(response.text, prompt=prompt, boundary="authors"))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    return Pair(
        query.example_id,
        tuple(prompts),
        tuple(response.text for response in responses),
        tuple(tuple(tokenizer.prompt_ids(prompt)) for prompt in prompts),
        tuple(response_ids),
    )
