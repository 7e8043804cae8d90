"""Where a run's queries come from: sources that its config names become files of its own, once."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sami_jax.config.run import PRETRAINED, RunConfig
from sami_jax.data.queries import alternating_half
from sami_jax.data.sources import dropped_text, source_name
from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.files import read_json
from sami_jax.processes import agreed, from_writer
from sami_jax.stage_folder import DONE, read_done
from sami_jax.stages.prepare import EVALUATION, SOURCES, TRAIN, Prepare
from sami_jax.stages.stage import complete
from sami_jax.training import pairs_needed


def with_queries(config: RunConfig, folder: Path, *, iterations: int, say: Callable[[str], None]) -> RunConfig:
    """The config, its queries files in a folder, which are made of their sources where they do not stand there.

    Where they stand no source is looked at: a Hub that moves changes nothing, and no function is called again. A config
    whose queries are still to be pretrained is given back as it is.

    Args:
      config: the settings.
      folder: of the queries; see `stages.prepare.Prepare`.
      iterations: how many there are; 0 for an evaluation alone.
      say: takes sentences about new files for the person who watches.

    Raises:
      BadConfigError: a setting names nothing that is there.
      BadDataError: a source cannot be used.
      FetchFailedError: the Hub cannot be reached.
    """
    queries = config.queries
    if PRETRAINED in queries.evaluation + (queries.train if iterations else ""):
        return config
    if from_writer(lambda: (folder / DONE).exists() and bool(read_done(folder))):
        return _reading(config, folder, iterations=iterations)
    with agreed():
        stage = prepare_stage(config, iterations=iterations)
    complete(stage, folder, safe_point=lambda: None)
    for split, about in from_writer(lambda: read_json(folder / SOURCES)).items():
        used = f"{about['queries']} for {split}"
        say(f"queries of {about['source']}: {about['rows']} rows, {dropped_text(about['dropped'])}; {used}")
        warn_of_overlap(about, say)
    return _reading(config, folder, iterations=iterations)


def warn_of_overlap(about: dict[str, Any], say: Callable[[str], None]) -> None:
    """Says of a split in sources.json that a model will be evaluated on what it was trained on, where it will."""
    if overlap := about.get("also_in_train"):
        say(f"warning: {overlap} evaluation queries are training queries, too; give others, or the same source twice")


def prepare_stage(config: RunConfig, *, iterations: int) -> Prepare:
    """The stage that writes a config's queries.

    Raises:
      BadConfigError: a setting names nothing that is there.
    """
    queries = config.queries
    evaluation = source_name(queries.evaluation, setting="config.queries.evaluation")
    # An evaluation alone reads the training source only where some of it is held out.
    train = None
    with contextlib.suppress(*() if iterations else (BadConfigError,)):
        train = source_name(queries.train, setting="config.queries.train")
    if not iterations and train is not None and not train.same(evaluation):
        train = None
    return Prepare(
        train=train,
        evaluation=evaluation,
        evaluation_count=queries.evaluation_count,
        max_characters=queries.max_characters,
        seed=config.seed,
    )


def check_counts(config: RunConfig, *, iterations: int) -> None:
    """Refuses queries that are too few for the steps of an iteration. No model is needed.

    Args:
      config: the settings; its queries are files that `Prepare` wrote.
      iterations: how many there are.

    Raises:
      BadDataError: the source, the numbers and the remedy.
    """
    if not iterations:
        return
    about = read_json(Path(config.queries.train).with_name(SOURCES))["train"]
    count = about["queries"]
    if not count:
        raise BadDataError(
            f"config.queries.train and config.queries.evaluation are both {about['source']}, which has {about['kept']} "
            f"usable queries: with {about['held_out']} held out for evaluation none is left to train on. Give more, or "
            f"lower config.queries.evaluation_count, now {config.queries.evaluation_count}."
        )
    for iteration in range(1, iterations + 1):
        half = len(alternating_half(range(count), iteration))
        if half < (needed := pairs_needed(config.train, iteration)):
            raise BadDataError(
                f"{about['source']}: iteration {iteration} samples from {half} queries, every second one of {count}, "
                f"but its {config.train.steps[iteration - 1]} steps need {needed}; give more, or lower "
                "config.train.steps or config.train.queries_per_step, or raise config.train.passes."
            )


def source_of(path: Path) -> str:
    """What the config named for one of the files that `Prepare` wrote."""
    return str(read_json(path.with_name(SOURCES))[path.stem]["source"])


def _reading(config: RunConfig, folder: Path, *, iterations: int) -> RunConfig:
    queries = dataclasses.replace(
        config.queries,
        train=str(folder / TRAIN) if iterations else config.queries.train,
        evaluation=str(folder / EVALUATION),
    )
    return dataclasses.replace(config, queries=queries)
