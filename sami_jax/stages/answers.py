"""Tasks to responses: checked before a model is loaded, kept in parts, made into pairs."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from sami_jax.config.prompts import PromptsConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.config.training import TrainConfig
from sami_jax.data.filters import cut_reasoning
from sami_jax.data.pairs import Pair
from sami_jax.data.rendering import Renderer
from sami_jax.data.tasks import Task
from sami_jax.errors import BadDataError, enough_memory
from sami_jax.huggingface.opened import LoadedModel, OpenModel
from sami_jax.responding import prompt_problem, respond_in_groups, too_long
from sami_jax.safe_point import SafePoint
from sami_jax.sampling.slots import Hopeless
from sami_jax.sampling.stop_text import Response
from sami_jax.sharding import batch_shards, more_devices
from sami_jax.stages.stage import Output


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRoom:
    """What a task's prompts and responses have to fit in, beside the model's positions.

    Attributes:
      new_tokens: of the longest response.
      rows_per_device: rows that are scored or trained on at once, for each device that shares them.
      max_row_tokens: of the widest row.
    """

    new_tokens: int
    rows_per_device: int
    max_row_tokens: int

    @classmethod
    def of(cls, sampling: SamplingConfig, train: TrainConfig) -> "TaskRoom":
        """Of a run's settings."""
        return cls(
            new_tokens=sampling.max_new_tokens + train.train_eos,
            rows_per_device=train.rows_per_device,
            max_row_tokens=train.max_row_tokens,
        )


def check_tasks(
    opened: OpenModel,
    tasks: Iterable[Task],
    templates: PromptsConfig,
    room: TaskRoom,
    *,
    file: str,
    long_prompts: Literal["refuse", "drop"] = "refuse",
) -> None:
    """Refuses the first task with a prompt that may not fit the model together with a response, or a row with all.

    Args:
      opened: the model.
      tasks: what is to be asked.
      templates: of the prompts.
      room: that they have to fit in.
      file: that the queries are from, to be named.
      long_prompts: "drop" leaves what does not fit to the stage, which drops it.

    Raises:
      BadDataError: the query, what is wrong and the remedy.
    """
    renderer = Renderer(templates, opened.tokenizer)
    for number, task in enumerate(tasks):
        if number == 0:  # it is tokenised in any case, to see that the tokenizer belongs to the model
            for name, prompts in (("generation", renderer.generation(task)), ("training", renderer.training(task))):
                for prompt in prompts:
                    problem = prompt_problem(opened, prompt.ids, room.new_tokens)
                    if problem and not too_long(opened, prompt.ids, room.new_tokens):
                        raise BadDataError(f"{file}: the {name} prompt of query {task.query.example_id!r} {problem}")
        if long_prompts == "drop":
            return
        if problem := long_task(opened, task, renderer, room):
            raise BadDataError(f"{file}: {problem}")


def long_task(opened: OpenModel, task: Task, renderer: Renderer, room: TaskRoom) -> str:
    """Returns what is too long of a task, with the remedy; "" where all fits.

    Prompts are tokenised only where their bytes do not tell.
    """
    count, new_tokens = len(task.constitutions), room.new_tokens
    packs = -(-count // (room.rows_per_device * batch_shards(opened.mesh)))  # in a row, each a prompt and all responses
    in_a_row = room.max_row_tokens // packs - count * new_tokens
    if renderer.most_tokens(task) <= min(opened.model.config.max_positions - new_tokens, in_a_row):
        return ""
    for name, prompts in (("generation", renderer.generation(task)), ("training", renderer.training(task))):
        for prompt in prompts:
            if problem := prompt_problem(opened, prompt.ids, new_tokens):
                return f"the {name} prompt of query {task.query.example_id!r} {problem}"
    widest = max(len(prompt.ids) for prompt in renderer.training(task))
    if widest <= in_a_row:
        return ""
    needed = packs * (widest + count * new_tokens)
    return (
        f"query {task.query.example_id!r} may need rows of {needed} tokens, for {packs} x (a training "
        f"prompt of {widest} and {count} responses of up to {new_tokens}), but config.train.max_row_tokens is "
        f"{room.max_row_tokens}; set it to {needed}"
        + (f", raise config.train.rows_per_device, now {room.rows_per_device}," if packs > 1 else "")
        + " or lower config.sampling.max_new_tokens."
    )


def answer(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    renderer: Renderer,
    config: SamplingConfig,
    *,
    out: Output,
    part: str,
    seed: int,
    purpose: tuple[str | int, ...],
    progressed: Callable[[float, str], None],
    hopeless: Hopeless | None = None,
) -> list[list[Response | None]]:
    """The C responses of each task, kept as a part of a stage.

    Args:
      loaded: the model.
      tasks: C constitutions each.
      renderer: of the prompts.
      config: how to sample.
      out: the stage's.
      part: name of the file that keeps them.
      seed: with purpose, query and constitution decides what is drawn.
      purpose: what the responses are for.
      progressed: hears how many of the tasks are about answered, and how fast.
      hopeless: of a response with which its task is given up, whose other responses are None where they have not ended.

    Raises:
      BadDataError: a prompt does not fit the model, or the part holds other queries.
    """

    def sampled() -> list[dict]:
        prompts = [prompt for task in tasks for prompt in renderer.generation(task)]
        count = len(tasks[0].constitutions) if tasks else 0
        with enough_memory(
            f"sampling {config.slots} responses of up to {config.max_new_tokens} tokens at once",
            f"lower config.sampling.slots, now {config.slots}",
            more_devices(loaded.mesh),
        ):
            flat = respond_in_groups(
                loaded,
                prompts,
                config,
                groups=[number for number in range(len(tasks)) for _ in range(count)],
                hopeless=hopeless,
                seed=seed,
                names=[("text", *purpose, task.query.example_id, c) for task in tasks for c in range(count)],
                progressed=lambda spent: progressed(spent.done / count, spent.speed),
            )
        prefix = {"response_prefix": renderer.response_prefix} if renderer.response_prefix else {}
        return [
            {
                "example_id": task.query.example_id,
                "constitutions": [constitution.text for constitution in task.constitutions],
                "responses": [
                    response and dataclasses.asdict(response) for response in flat[i * count : (i + 1) * count]
                ],
                **prefix,
            }
            for i, task in enumerate(tasks)
        ]

    records = out.part(part, sampled)
    if [record["example_id"] for record in records] != [task.query.example_id for task in tasks]:
        path = out.folder / part
        raise BadDataError(f"{path} holds other queries than the run asks for; delete it to have it sampled anew.")
    return [
        [r and Response(r["text"], tuple(r["ids"]), r["finished"]) for r in record["responses"]] for record in records
    ]


def answer_all(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    templates: PromptsConfig,
    config: SamplingConfig,
    *,
    out: Output,
    folder: str,
    seed: int,
    purpose: tuple[str | int, ...],
    safe_point: SafePoint,
    answered: Callable[[int, str, float], None],
) -> list[list[Response]]:
    """The C answers of every task, without their reasoning: none is dropped, and one that comes to no answer is empty.

    Args:
      loaded: the model.
      tasks: C constitutions each.
      templates: of the prompts.
      config: how to sample.
      out: the stage's, which keeps them as parts of `folder`.
      folder: name of it.
      seed: see `answer`.
      purpose: likewise.
      safe_point: called behind each part.
      answered: hears how many tasks are done, how fast, and how many more are about answered.

    Raises:
      BadDataError: as `answer`.
    """
    answers: list[list[Response]] = []
    renderer, size = Renderer(templates, loaded.tokenizer), config.shard_queries
    for number, start in enumerate(range(0, len(tasks), size)):
        asked = tasks[start : start + size]

        def progressed(ahead: float, speed: str) -> None:
            answered(len(answers), speed, ahead)

        part = f"{folder}/{number:05d}.jsonl"
        how: dict[str, Any] = {"out": out, "part": part, "seed": seed, "purpose": purpose, "progressed": progressed}
        for responses in answer(loaded, asked, renderer, config, **how):
            found = answers_behind_reasoning([response for response in responses if response], templates)
            answers.append([response or Response("", (), finished=False) for response in found])
        answered(len(answers), "", 0.0)
        safe_point()
    return answers


def answers_behind_reasoning(responses: Sequence[Response], templates: PromptsConfig) -> list[Response | None]:
    """The responses as they are judged and trained: without their reasoning; None for one that comes to no answer.

    The ids stay those that were sampled; `answered_pair` finds those of an answer.
    """
    if not templates.chain_of_thought:
        return list(responses)
    answers = [cut_reasoning(response.text, templates.answer_marker) for response in responses]
    return [
        None if answer is None else dataclasses.replace(response, text=answer)
        for response, answer in zip(responses, answers, strict=True)
    ]


def answered_pair(task: Task, responses: Sequence[Response], renderer: Renderer) -> Pair:
    """The pair that is trained or scored.

    Responses have the ids that were sampled, or are tokenised anew behind the training prompt: with it as one text, as
    the authors do, or where it is not what they were sampled behind, as an answer behind its reasoning.
    """
    prompts = renderer.training(task)
    response_ids = tuple(response.ids for response in responses)
    if renderer.tokenises_anew:
        response_ids = tuple(
            renderer.response_ids(prompt, response.text, constitution.text, task.query.text)
            for prompt, response, constitution in zip(prompts, responses, task.constitutions, strict=True)
        )
    return Pair(
        task.query.example_id,
        tuple(prompt.text for prompt in prompts),
        tuple(response.text for response in responses),
        tuple(prompt.ids for prompt in prompts),
        response_ids,
        renderer.response_prefix,
    )
