"""One stage on files of the user's own: what `sami train`, `evaluate`, `generate`, `score` and `export` do."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from sami_jax.chat.principle_writer import Written
from sami_jax.config.run import RunConfig, check_training, from_dict
from sami_jax.data.pairs import read_entries
from sami_jax.data.principles import read_principles
from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.files import append_jsonl, read_json, read_text, write_text
from sami_jax.huggingface.folder import read_config
from sami_jax.huggingface.hub import fetch_model
from sami_jax.outputs import check_file, check_folder, is_stream, refuse_file
from sami_jax.progress import say
from sami_jax.run.chats import given_source
from sami_jax.run.judging import INSTRUCT, JUDGE, RESULTS, check_judging, comparisons, evaluate_instruct
from sami_jax.run.opening import check_mesh, check_queries, with_files, with_pretrained
from sami_jax.run.queries import with_queries
from sami_jax.safe_point import SafePoint, stop_on_signal
from sami_jax.sharding import use_platform
from sami_jax.stage_folder import DONE, PLAN, check_stage_file, locked, read_done, refuse_foreign
from sami_jax.stages.evaluate import Evaluate
from sami_jax.stages.export import Export, convert
from sami_jax.stages.generate import Generate, read_prompts
from sami_jax.stages.score import Score
from sami_jax.stages.score_principles import ScorePrinciples
from sami_jax.stages.stage import (
    FileStage,
    Source,
    complete,
    complete_file,
    constitutions_source,
    file_source,
    model_source,
)
from sami_jax.stages.train import Train, drop_checkpoints
from sami_jax.stages.write_principles import PRINCIPLES, PROVENANCE, WritePrinciples, read_written


def train_folder(config: RunConfig, *, model: str, pairs: Path, out: Path) -> Path:
    """Trains a model on a pairs file and writes the trained folder `out`.

    `out` with ".training" behind its name keeps metrics.jsonl and checkpoints: an interrupted training goes on there,
    and a finished one is not done again.

    Args:
      config: the settings; the first of `train.steps` counts.
      model: a folder, or a name on the Hub.
      pairs: JSON in the authors' format.
      out: the trained folder.

    Raises:
      BadConfigError: `out` was begun with other settings, model or pairs.
      BadDataError: model or pairs cannot be used, or `out` holds something else.
    """
    check_training(config, iterations=1)
    use_platform(config.platform)
    read_entries(pairs)  # for what it refuses, before a model is fetched
    refuse_file(out)
    out = Path(os.path.realpath(out))
    training = out.with_name(f"{out.name}.training") if out.name else check_folder(out)
    if not (training / DONE).is_file():  # only a finished training writes there
        check_folder(out)
    base = model_source(fetch_model(model))
    with locked(training), stop_on_signal() as safe_point:
        trained = complete(
            Train.of(config, 1, base=base, pairs=file_source(pairs)),
            training,
            safe_point=safe_point,
            log=lambda record: append_jsonl(training / "metrics.jsonl", record),
        )
        complete(Export.of(config, 1, base=base, trained=trained.source), out, safe_point=safe_point)
        drop_checkpoints(config.train, trained=training)
    return out


def evaluate_folder(config: RunConfig, *, model: str, baseline: Path | None, out: Path) -> Path:
    """Evaluates a model as a run would, against the base's evaluation folder where one is given.

    Comparisons by the config's judge lie in `out/judge/`, what the instruction-tuned model answered in `out/instruct/`.

    Args:
      config: the settings; its model is the base.
      model: a folder, or a name on the Hub.
      baseline: the base's evaluation folder, or None.
      out: gets summary.json and results.jsonl.

    Returns:
      `out/summary.json`.

    Raises:
      BadConfigError: `out` was made from other inputs, or nobody can be asked who judges.
      BadDataError: a folder cannot be used.
      UnavailableError: the judge does not answer now.
    """
    refuse_foreign(out)
    use_platform(config.platform)
    with contextlib.ExitStack() as stack:
        queries = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "queries"
        config = with_files(config, queries, iterations=0, say=say)
        check_mesh(config)
        check_judging(config)
        folder = fetch_model(model)
        read_config(folder)
        stack.enter_context(locked(out))
        safe_point = stack.enter_context(stop_on_signal())
        config = with_queries(with_pretrained(config, safe_point), queries, iterations=0, say=say)
        evaluated, base = model_source(folder), model_source(Path(config.model))
        stage = Evaluate.of(
            config,
            0 if evaluated.fingerprint == base.fingerprint else 1,
            model=evaluated,
            base=base,
            baseline=file_source(baseline / "results.jsonl") if baseline else None,
            queries=file_source(Path(config.queries.evaluation)),
            principles=constitutions_source(Path(config.constitutions.place)),
        )
        if not (out / DONE).is_file():
            check_queries(config, iterations=0)
        complete(stage, out, safe_point=safe_point)
        _judge_evaluated(config, stage, out, baseline=baseline, safe_point=safe_point)
    return out / "summary.json"


def _judge_evaluated(
    config: RunConfig, stage: Evaluate, out: Path, *, baseline: Path | None, safe_point: SafePoint
) -> None:
    """Compares what was evaluated with its baseline, and with the instruction-tuned model, which answers first."""
    against = {} if baseline is None else {"base": Source(baseline, file_source(baseline / RESULTS).fingerprint)}
    if config.evaluation.judge == "none":
        return
    if config.evaluation.instruct:
        instruct = evaluate_instruct(config, queries=stage.queries, principles=stage.principles)
        against[INSTRUCT] = complete(instruct, out / INSTRUCT, safe_point=safe_point).source
    elif not against:
        return
    evaluated = Source(out, file_source(out / RESULTS).fingerprint)
    log = out / JUDGE / "answers.jsonl"
    for name, comparison in comparisons(config, evaluated=evaluated, against=against, log=log):
        complete(comparison, out / JUDGE / name, safe_point=safe_point)


def generate_file(
    config: RunConfig,
    *,
    model: str,
    prompts: Path,
    out: Path,
    rows: int,
    samples: int = 1,
    format: Literal["jsonl", "authors"] = "jsonl",
) -> list[Any]:
    """Answers a prompts file. Returns the lines of `out`: the prompts' with response, response_ids and finished.

    Args:
      config: the settings.
      model: a folder, or a name on the Hub.
      prompts: see `stages.generate.read_prompts`.
      out: a file, a device or a pipe.
      rows: prompts answered at once.
      samples: responses to each prompt, a line for each.
      format: of `out`: JSON lines, or the authors' responses, whose rows are returned then.

    Raises:
      BadConfigError: `out`, or its parts, were made from other inputs; or several samples would be the same.
      BadDataError: model or prompts cannot be used, or `out` is another file.
    """
    check_stage_file(out)
    if samples > 1 and config.sampling.temperature == 0:
        raise BadConfigError(
            f"--samples={samples} would give the same response each time, since config.sampling.temperature is 0; set "
            "it above 0, for instance to 1."
        )
    if samples > 1 and format == "authors":
        raise BadConfigError(f"--format=authors has one response to a question; leave out --samples={samples}.")
    use_platform(config.platform)
    read_prompts(prompts, format=format)  # for what it refuses, before a model is fetched
    source = model_source(fetch_model(model))
    stage = Generate.of(config, model=source, prompts=file_source(prompts), rows=rows, samples=samples, format=format)
    return _completed_lines(stage, out)


def score_file(config: RunConfig, *, model: str, pairs: Path, out: Path | None) -> list[Any]:
    """Scores a pairs file. Returns the lines of `out`; see `stages.score.Score.make`.

    Args:
      config: the settings.
      model: a folder, or a name on the Hub.
      pairs: JSON in the authors' format.
      out: JSON lines, a device or a pipe; None writes nothing.

    Raises:
      BadConfigError: `out`, or its parts, were made from other inputs.
      BadDataError: model or pairs cannot be used, or `out` is another file.
      NonFiniteError: a log-prob is NaN or infinite.
    """
    if out:
        check_stage_file(out)
    use_platform(config.platform)
    read_entries(pairs)  # for what it refuses, before a model is fetched
    stage = Score.of(config, model=model_source(fetch_model(model)), pairs=file_source(pairs))
    return _completed_lines(stage, out)


def write_principles_file(config: RunConfig, *, out: Path) -> Written:
    """Has principles written into a file.

    `out` with ".writer" behind its name keeps the answers, from which an interrupted command goes on; a finished one is
    not done again. Its provenance is written beside it.

    Args:
      config: the settings; `constitutions.writer` says who writes, and about what.
      out: JSON, as `data.principles.read_principles` reads it.

    Raises:
      BadConfigError: `out` was begun with another writer or about something else, or nobody can be asked.
      BadDataError: `out` is another file, or the writer writes nothing that can be used.
      SaveFailedError: the disk is full or not writable.
      UnavailableError: the server does not answer now.
    """
    if not config.constitutions.writer.enabled:
        raise BadConfigError(
            "Nobody is named who writes the principles: give --model=DIR, or --base_url=... and --chat_model=..., and "
            "say by --about what they are for."
        )
    if is_stream(out):
        raise BadDataError(f"{out} is no file; name one, beside which the writer's answers are kept.")
    folder, provenance = out.with_name(f"{out.name}.writer"), out.with_suffix(".provenance.json")
    check_file(out)
    check_file(provenance)
    begun = any((folder / name).exists() for name in (PLAN, DONE))
    for path in (out, provenance):
        if path.exists() and not begun:
            raise BadDataError(f"{path} already exists, and no such command made it; choose another, or delete it.")
    use_platform(config.platform)
    given = given_source(config.constitutions.writer)
    with locked(folder), stop_on_signal() as safe_point:
        complete(WritePrinciples.of(config, given=given), folder, safe_point=safe_point)
    for path, name in ((provenance, PROVENANCE), (out, PRINCIPLES)):
        text = read_text(folder / name)
        if path.exists() and read_text(path) != text:
            raise BadDataError(f"{path} was changed after it was made; choose another --out, or delete it.")
        write_text(path, text)
    return read_written(folder)


def score_principles_file(config: RunConfig, *, out: Path) -> list[Any]:
    """Scores principles under a base model. Returns the lines of `out`; see `ScorePrinciples.make`.

    Args:
      config: the settings; its model, principles and evaluation queries.
      out: JSON lines, a device or a pipe.

    Raises:
      BadConfigError: `out`, or its parts, were made from other inputs; or a setting names nothing that is there.
      BadDataError: model, principles or queries cannot be used, or `out` is another file.
      NonFiniteError: a log-prob is NaN or infinite.
    """
    check_stage_file(out)
    for name, value in (("model", config.model), ("principles", config.constitutions.principles)):
        if not value:
            raise BadConfigError(f"There is nothing to score: give --{name}, or a --config that names it.")
    use_platform(config.platform)
    with contextlib.ExitStack() as stack:
        queries = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "queries"
        with stop_on_signal() as safe_point:
            config = with_pretrained(config, safe_point)
        principles = Path(config.constitutions.principles)
        read_principles(principles)  # for what it refuses, before a model is fetched
        config = with_queries(config, queries, iterations=0, say=say)
        stage = ScorePrinciples.of(
            config,
            model=model_source(fetch_model(config.model)),
            principles=file_source(principles),
            queries=file_source(Path(config.queries.evaluation)),
        )
        return _completed_lines(stage, out)


def _completed_lines(stage: FileStage, out: Path | None) -> list[Any]:
    if out is None or is_stream(out):  # nothing of it is kept, so that a signal may end it at once
        return complete_file(stage, out, safe_point=lambda: None)
    with stop_on_signal() as safe_point:
        return complete_file(stage, out, safe_point=safe_point)


def export_folder(workdir: Path, iteration: int, out: Path, *, dtype: str, verify: bool) -> Path:
    """Writes the Hugging Face folder of a run's iteration elsewhere, in any dtype.

    Args:
      workdir: the run directory.
      iteration: 1, 2, ....
      out: new folder.
      dtype: of its weights.
      verify: load it again, and compare the logits of random tokens, which must be those of the rounded weights.

    Raises:
      BadDataError: the iteration has no finished export, or `out` holds files.
      NonFiniteError: a weight is not finite in `dtype`.
      SaveFailedError: the disk is full or not writable, or what was written gives other logits.
    """
    out = check_folder(out)
    exported = workdir / f"iter_{iteration:03d}" / "export"
    if not (exported / DONE).is_file():
        raise BadDataError(f"{workdir} has no finished export of iteration {iteration}; go on with `sami run` first.")
    read_done(exported)
    config = from_dict(read_json(workdir / "config.json"))
    convert(config.mesh, model=exported, out=out, dtype=dtype, verify=verify)
    return out
