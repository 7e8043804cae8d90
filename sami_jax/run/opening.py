"""Opens a run: the names in its config become files that are fetched, made and checked before the first stage."""

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sami_jax.clock import time_now
from sami_jax.config.chat import FREE
from sami_jax.config.data import ConstitutionsConfig
from sami_jax.config.fields import to_dict
from sami_jax.config.run import PRETRAINED, RunConfig, from_dict
from sami_jax.data.pools import LEARNED, read_pools
from sami_jax.data.queries import alternating_half, read_queries
from sami_jax.data.tasks import Task
from sami_jax.disk import check_disk
from sami_jax.errors import BadConfigError
from sami_jax.files import content_hash, read_json, write_json
from sami_jax.huggingface.folder import find_weights, read_config
from sami_jax.huggingface.hub import fetch_model, model_name
from sami_jax.huggingface.opened import open_model
from sami_jax.miniature.apart import pretrain_apart
from sami_jax.miniature.pretraining import base_shape, pretrain
from sami_jax.model.decoder import sharded_params
from sami_jax.model.shape import DecoderConfig
from sami_jax.processes import agreed, differences, from_writer, is_writer, process_count
from sami_jax.run.agreement import refuse_unseen
from sami_jax.run.attempts import QUERIES, drop_queries
from sami_jax.run.chats import check_chat
from sami_jax.run.judging import as_instruct, check_judging, instruct_folder
from sami_jax.run.queries import check_counts, source_of, with_queries
from sami_jax.safe_point import SafePoint
from sami_jax.seeds import generator
from sami_jax.sharding import make_mesh
from sami_jax.stages.answers import TaskRoom, check_tasks
from sami_jax.stages.evaluate import evaluation_tasks
from sami_jax.stages.sample import sampling_tasks

_SCHEMA_VERSION = 5  # of a run directory; raised where stages that were begun before could not go on


def open_run(config: RunConfig, workdir: Path, say: Callable[[str], None]) -> RunConfig:
    """Begins a run, or finds that it is the one begun before. Nothing is written where it is refused.

    RUN.json and config.json are written once, and compared afterwards. RUN.json keeps the commit of a model's name on
    the Hub: what moves there later does not change the run. Every process calls this; process 0 alone writes, and
    downloads.

    Args:
      config: the settings.
      workdir: the run directory, which exists.
      say: takes sentences for the person who watches.

    Returns:
      The config, its model a folder, fetched where it was a name.

    Raises:
      BadConfigError: the settings are not those the run was begun with, or cannot be used.
      BadDataError: a file cannot be used.
      SaveFailedError: the disk is too small.
    """
    if from_writer(lambda: (workdir / "config.json").exists()):
        return _open_begun(config, workdir, say)
    if config.constitutions.to_be_written:
        check_chat(config.constitutions.writer, config)
    check_judging(config)
    with _dropped_if_refused(workdir / QUERIES):
        found = with_files(config, workdir / QUERIES, iterations=config.iterations, say=say)
        _check_disk(found, workdir, say)
        if not needs_pretraining(found) and not found.constitutions.to_be_written:
            check_queries(found, iterations=found.iterations)
    plain = to_dict(config)
    about = {
        "run_id": str(uuid.uuid4()),
        "schema_version": _SCHEMA_VERSION,
        "created": time_now(),
        "seed": config.seed,
        "model": model_name(Path(found.model)) if Path(found.model) != Path(config.model) else config.model,
        "config_sha256": content_hash(plain),
    }
    with agreed():
        if is_writer():
            write_json(workdir / "RUN.json", about)
            write_json(workdir / "config.json", plain)  # last: where it stands, the run has begun
    return found


def begun_config(workdir: Path) -> RunConfig:
    """The settings that a run directory was begun with. Raises BadConfigError where it holds no run."""
    if not from_writer(lambda: (workdir / "config.json").exists()):
        raise BadConfigError(f"{workdir} holds no run to go on with; start one with --config=configs/....py.")
    return from_dict(read_json(workdir / "config.json"))  # a setting that was not there yet had its default


def _open_begun(config: RunConfig, workdir: Path, say: Callable[[str], None]) -> RunConfig:
    about = read_json(workdir / "RUN.json")
    if about.get("schema_version") != _SCHEMA_VERSION:
        raise BadConfigError(
            f"{workdir} was begun by another version of sami_jax, whose stages this one cannot go on with; finish it "
            "there, or choose another --workdir."
        )
    begun = _with_free_settings(begun_config(workdir), config)
    changed = differences(to_dict(begun), to_dict(config))
    if changed:
        named = "; ".join(f"{name}: {before!r} -> {after!r}" for name, (before, after) in changed.items())
        raise BadConfigError(
            f"{workdir} was started with other settings ({named}); choose another --workdir for the new "
            "ones, or leave out --config to go on with the old."
        )
    begun = dataclasses.replace(begun, model=about["model"])
    found = with_files(begun, workdir / QUERIES, iterations=begun.iterations, say=say)
    _check_disk(found, workdir, say)
    return found


def _with_free_settings(begun: RunConfig, config: RunConfig) -> RunConfig:
    """What a run was begun with, but for settings that no answer depends on: a budget may be raised on the way."""

    def free(section: Any) -> dict[str, Any]:
        return {name: getattr(section, name) for name in FREE}

    writer = dataclasses.replace(begun.constitutions.writer, **free(config.constitutions.writer))
    constitutions = dataclasses.replace(begun.constitutions, writer=writer)
    judge = dataclasses.replace(begun.evaluation, **free(config.evaluation))
    return dataclasses.replace(begun, constitutions=constitutions, evaluation=judge)


@contextlib.contextmanager
def _dropped_if_refused(queries: Path) -> Iterator[None]:
    """Deletes the queries of a run that does not begin, and those that such a run left when it was killed."""
    drop_queries(queries)
    try:
        yield
    except BaseException:
        drop_queries(queries)
        raise


@agreed()
def with_files(config: RunConfig, queries: Path, *, iterations: int, say: Callable[[str], None]) -> RunConfig:
    """The config, its queries and its model fetched. Refuses one whose files are missing or hold something else.

    Args:
      config: the settings.
      queries: folder that keeps the queries.
      iterations: how many there are; 0 for an evaluation alone, which needs no training queries.
      say: takes sentences for the person who watches.

    Raises:
      BadConfigError: a setting names nothing that is there.
      BadDataError: a file cannot be used, or an iteration has fewer queries than its training needs.
      FetchFailedError: queries or model could not be downloaded.
    """
    if needs_pretraining(config) and not config.pretraining.enabled:
        raise BadConfigError(f"A path of the config holds {PRETRAINED}, but config.pretraining.enabled is false.")
    place = config.constitutions.place
    to_be_written = bool(iterations) and config.constitutions.to_be_written  # an evaluation writes none
    if PRETRAINED not in place and not to_be_written:
        check_constitutions(config.constitutions)
    config = with_queries(config, queries, iterations=iterations, say=say)
    if PRETRAINED not in config.queries.train + config.queries.evaluation:
        check_counts(config, iterations=iterations)
    if PRETRAINED not in config.queries.evaluation + place and not to_be_written:
        evaluated_tasks(config)  # for what it refuses, before a model is fetched
    if PRETRAINED not in config.model:
        folder = Path(from_writer(lambda: str(_fetched(config.model))))
        refuse_unseen(folder)
        config = dataclasses.replace(config, model=str(folder))
    return config


def check_constitutions(config: ConstitutionsConfig) -> None:
    """Refuses constitutions that are not there, or cannot be drawn.

    Raises:
      BadConfigError: the setting names no file, or there are too few principles.
      BadDataError: a file cannot be used.
    """
    if config.folder and not Path(config.folder).is_dir():
        raise BadConfigError(f"config.constitutions.folder is {config.folder!r}, which is not a folder; name one.")
    if config.to_be_written:
        raise BadConfigError(
            "config.constitutions.writer writes principles in a run; here, name those that it has written (of a run: "
            "WORKDIR/principles/principles.json) by config.constitutions.principles."
        )
    if not config.folder and not Path(config.principles).is_file():
        raise BadConfigError(
            f"config.constitutions.principles is {config.principles!r}, which is not a file; name one, or a folder by "
            "config.constitutions.folder."
        )
    for pool in read_pools(Path(config.place), config).values():
        pool.draw(generator(0, "constitutions"))


def _fetched(model: str) -> Path:
    folder = fetch_model(model)
    read_config(folder)
    find_weights(folder)
    return folder


def check_mesh(config: RunConfig) -> None:
    """Raises BadConfigError where the config's mesh does not fit the devices or the base model."""
    sharded_params(_base_shape(config), make_mesh(config.mesh), config.train.weights_dtype)


def check_queries(config: RunConfig, *, iterations: int) -> None:
    """Refuses, before any work, the first query whose prompt may not fit the model together with a response.

    Args:
      config: the run's; its model and files are there.
      iterations: how many times the training queries are sampled from; 0 looks at the evaluation's alone.

    Raises:
      BadConfigError: the constitutions cannot be drawn.
      BadDataError: the file and the query.
    """
    opened = open_model(Path(config.model), config.mesh, config.compute_dtype)
    room = TaskRoom.of(config.sampling, config.train)
    evaluated = [task for tasks in evaluated_tasks(config).values() for task in tasks]
    check_tasks(opened, evaluated, config.prompts, room, file=source_of(Path(config.queries.evaluation)))
    if config.evaluation.instruct:
        instruct = open_model(instruct_folder(config), config.mesh, config.compute_dtype)
        file = f"{source_of(Path(config.queries.evaluation))}, for config.evaluation.instruct"
        check_tasks(instruct, evaluated, as_instruct(config).prompts, room, file=file)
    pool = read_pools(Path(config.constitutions.place), config.constitutions)[LEARNED]
    for iteration in range(1, iterations + 1):
        half = alternating_half(read_queries(Path(config.queries.train)), iteration)
        tasks = sampling_tasks(half, pool, seed=config.seed, iteration=iteration)
        file, long_prompts = source_of(Path(config.queries.train)), config.sampling.long_prompts
        check_tasks(opened, tasks, config.prompts, room, file=file, long_prompts=long_prompts)


def needs_pretraining(config: RunConfig) -> bool:
    """Whether a path of the config lies in the base's folder, which may have to be made."""
    return PRETRAINED in json.dumps(to_dict(config))


def with_pretrained(config: RunConfig, safe_point: SafePoint) -> RunConfig:
    """The config with `{pretrained}` in its paths replaced by the base's folder, made first if it is missing."""
    if not needs_pretraining(config):
        return config
    make = pretrain if process_count() == 1 else pretrain_apart
    folder = str(make(config.pretraining, safe_point=safe_point))
    return from_dict(_replaced(to_dict(config), folder))


def evaluated_tasks(config: RunConfig) -> dict[str, list[Task]]:
    """What a run evaluates on, by split; see `stages.evaluate.evaluation_tasks`."""
    return evaluation_tasks(
        queries=Path(config.queries.evaluation),
        count=config.queries.evaluation_count,
        principles=Path(config.constitutions.place),
        constitutions=config.constitutions,
        evaluation=config.evaluation,
        seed=config.seed,
    )


def _base_shape(config: RunConfig) -> DecoderConfig:
    """The shape of the base model, also of one that is still to be pretrained."""
    return base_shape(config.pretraining) if PRETRAINED in config.model else read_config(Path(config.model))


def _check_disk(config: RunConfig, workdir: Path, say: Callable[[str], None]) -> None:
    shape, mesh = _base_shape(config), make_mesh(config.mesh)
    sentence = from_writer(
        lambda: check_disk(workdir, config.train, iterations=config.iterations, shape=shape, mesh=mesh)
    )
    if sentence:
        say(sentence)


def _replaced(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, folder) for key, item in value.items()}
    return value.replace(PRETRAINED, folder) if isinstance(value, str) else value
