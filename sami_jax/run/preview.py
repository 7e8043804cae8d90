"""What a config's model will see, before any of it runs: queries by split, what was dropped, prompts as rendered."""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sami_jax.config.run import RunConfig, check_training
from sami_jax.data.constitutions import Constitution
from sami_jax.data.pools import LEARNED, read_pools
from sami_jax.data.prompts import render
from sami_jax.data.queries import Query, alternating_half, read_queries
from sami_jax.data.rendering import Renderer
from sami_jax.data.sources import REASONS
from sami_jax.data.tasks import Task
from sami_jax.data.tokenizer import Tokenizer, load_tokenizer
from sami_jax.errors import BadConfigError, SamiError
from sami_jax.files import read_json
from sami_jax.huggingface.hub import fetch_settings
from sami_jax.run.opening import check_constitutions, evaluated_tasks, with_pretrained
from sami_jax.run.queries import check_counts, warn_of_overlap, with_queries
from sami_jax.safe_point import stop_on_signal
from sami_jax.stages.prepare import SOURCES
from sami_jax.stages.sample import sampling_order, sampling_tasks

MOST_PAIRS = 10_000  # files of a folder of constitutions
MEASURED = 1000  # queries whose tokens are counted: a data set of any size is looked at within seconds


@dataclasses.dataclass(frozen=True)
class Example:
    """A query and what is made of it.

    Attributes:
      example_id: the query's.
      constitutions: C texts.
      prompts: C texts that are sampled from, with the words that every response begins with.
      training_prompts: C texts that are trained and scored on.
    """

    example_id: str
    constitutions: list[str]
    prompts: list[str]
    training_prompts: list[str]


@dataclasses.dataclass(frozen=True)
class Preview:
    """See `preview`.

    Attributes:
      splits: "train" (where there is one) and "evaluation": source, revision, rows, dropped, kept, queries, halves (of
        those that are trained on), and quantiles of tokens of the queries and of the prompts; None without a tokenizer.
      dropped: reason -> rows of all sources.
      examples: the first queries that iteration 1 samples from, else that are evaluated on.
    """

    splits: dict[str, Any]
    dropped: dict[str, int]
    examples: list[Example]


def preview(config: RunConfig, *, limit: int, say: Callable[[str], None]) -> Preview:
    """Reads the sources of a config, and renders the prompts of some of the queries. Writes nothing that stays.

    A miniature's base is made, once, since its queries are.

    Args:
      config: the settings.
      limit: examples.
      say: takes warnings for the person who watches.

    Raises:
      BadConfigError: a setting names nothing that is there.
      BadDataError: a file cannot be used.
      FetchFailedError: the Hub cannot be reached for the queries, or for a tokenizer whose chat template is needed.
    """
    with stop_on_signal() as safe_point:
        config = with_pretrained(config, safe_point)
    check_constitutions(config.constitutions)
    iterations = config.iterations if config.queries.train else 0
    with tempfile.TemporaryDirectory() as scratch:
        config = with_queries(config, Path(scratch) / "queries", iterations=iterations, say=lambda sentence: None)
        about = read_json(Path(config.queries.evaluation).with_name(SOURCES))
        _warn(config, about, iterations, say)
        tokenizer = _tokenizer(config, say)
        splits, evaluated = {}, evaluated_tasks(config)[LEARNED]
        first: Iterable[Task] = evaluated
        if iterations:
            queries = read_queries(Path(config.queries.train))
            halves = [alternating_half(queries, iteration) for iteration in (1, 2)]
            lengths = _lengths(config, tokenizer, _sampled(config, queries))
            splits["train"] = about["train"] | {"halves": list(map(len, halves))} | lengths
            first = _sampled(config, halves[0])
        splits["evaluation"] = about["evaluation"] | _lengths(config, tokenizer, evaluated)
        examples = [_example(config, tokenizer, task) for task in itertools.islice(first, limit)]
    sources = {split["source"]: split["dropped"] for split in splits.values()}
    dropped = {reason: sum(counts[reason] for counts in sources.values()) for reason in REASONS}
    return Preview(splits, dropped, examples)


def every_pair(config: RunConfig) -> list[tuple[Constitution, Constitution]]:
    """All pairs of constitutions that a training query of the config may get.

    Raises:
      BadConfigError: queries get more than two, or there are more than MOST_PAIRS.
      BadDataError: principles or constitutions cannot be used.
    """
    if config.constitutions.count != 2:
        raise BadConfigError("The authors' folders hold pairs of constitutions: set config.constitutions.count=2.")
    with stop_on_signal() as safe_point:
        config = with_pretrained(config, safe_point)
    pool = read_pools(Path(config.constitutions.place), config.constitutions)[LEARNED]
    pairs = list(itertools.islice(pool.every_pair(), MOST_PAIRS + 1))
    if len(pairs) > MOST_PAIRS:
        raise BadConfigError(
            f"A query may get more than {MOST_PAIRS} pairs of constitutions, too many for a folder; lower "
            "config.constitutions.principles_per_query, or set config.constitutions.pairing=authors."
        )
    return pairs


def _warn(config: RunConfig, about: dict[str, Any], iterations: int, say: Callable[[str], None]) -> None:
    """Says what a run would be refused for, or is to be known. Raises BadDataError where there is nothing to show."""
    try:
        if iterations:
            check_training(config, iterations=iterations)
        check_counts(config, iterations=iterations)
    except SamiError as error:
        if iterations and not about["train"]["queries"]:
            raise
        say(f"warning: {error}")
    warn_of_overlap(about["evaluation"], say)


def _tokenizer(config: RunConfig, say: Callable[[str], None]) -> Tokenizer | None:
    """The model's tokenizer, or None where it is not needed and cannot be had now, which is said."""
    if not config.model and config.prompts.style == "base":
        say("warning: config.model names no model, so that no tokens are counted")
        return None
    try:
        folder = fetch_settings(config.model)
    except SamiError as error:
        if config.prompts.style != "base":
            raise
        say(f"warning: no tokens are counted. {error}")
        return None
    return load_tokenizer(folder)


def _sampled(config: RunConfig, queries: Sequence[Query]) -> Iterator[Task]:
    """What iteration 1 asks of the queries, in its order."""
    pool = read_pools(Path(config.constitutions.place), config.constitutions)[LEARNED]
    order = sampling_order(len(queries), seed=config.seed, iteration=1)
    return sampling_tasks((queries[i] for i in order), pool, seed=config.seed, iteration=1)


def _lengths(config: RunConfig, tokenizer: Tokenizer | None, tasks: Iterable[Task]) -> dict[str, Any]:
    """Quantiles of tokens of the first tasks' queries and of their prompts, in an order that says nothing of them."""
    if tokenizer is None:
        return {"measured": 0, "query_tokens": None, "prompt_tokens": None}
    renderer, measured = Renderer(config.prompts, tokenizer), list(itertools.islice(tasks, MEASURED))
    queries = [len(tokenizer.plain_ids(task.query.text)) for task in measured]
    prompts = [len(prompt.ids) for task in measured for prompt in renderer.generation(task)]
    return {"measured": len(measured), "query_tokens": _quantiles(queries), "prompt_tokens": _quantiles(prompts)}


def _quantiles(lengths: Sequence[int]) -> dict[str, int] | None:
    if not lengths:
        return None
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: int(np.quantile(lengths, share, method="higher")) for name, share in shares.items()}


def _example(config: RunConfig, tokenizer: Tokenizer | None, task: Task) -> Example:
    constitutions = [constitution.text for constitution in task.constitutions]
    if tokenizer is None:
        templates = (config.prompts.generation, config.prompts.training)
        sides = [[render(t, constitution=c, query=task.query.text) for c in constitutions] for t in templates]
    else:
        renderer = Renderer(config.prompts, tokenizer)
        sides = [[p.text for p in prompts] for prompts in (renderer.generation(task), renderer.training(task))]
    prefix = config.prompts.response_prefix
    if prefix:
        sides = [[text + ("" if text[-1:].isspace() else " ") + prefix for text in side] for side in sides]
    return Example(task.query.example_id, constitutions, *sides)
