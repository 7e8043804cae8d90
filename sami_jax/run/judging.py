"""Comparisons of responses: of two files by `sami judge`, and of what a run or `sami evaluate` has evaluated."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from sami_jax.chat.opening import make_chat, open_answers
from sami_jax.config.run import PRETRAINED, RunConfig
from sami_jax.data.chat_template import ChatTemplate
from sami_jax.errors import BadConfigError
from sami_jax.evaluation.injection import attack_judge, attack_table
from sami_jax.evaluation.results import read_results
from sami_jax.huggingface.hub import fetch_model
from sami_jax.huggingface.opened import open_model
from sami_jax.processes import from_writer
from sami_jax.progress import Progress, say
from sami_jax.run.chats import check_chat, given_source, given_to
from sami_jax.safe_point import stop_on_signal
from sami_jax.sharding import use_platform
from sami_jax.stage_folder import locked, refuse_foreign
from sami_jax.stages.evaluate import Evaluate
from sami_jax.stages.judge import Judge
from sami_jax.stages.stage import Source, complete, file_source, model_source

JUDGE, INSTRUCT = "judge", "instruct"  # folders of a run, and of an evaluation
RESULTS = "results.jsonl"


def judge_files(config: RunConfig, *, responses: Path, baseline: Path, split: str, out: Path) -> None:
    """Compares two files of responses, in a folder that keeps the judge's answers; a finished one is not judged again.

    Args:
      config: the settings; `evaluation` names the judge.
      responses: a results.jsonl, or a file in the authors' format.
      baseline: likewise.
      split: of a results.jsonl; "" for both.
      out: gets summary.json, verdicts.jsonl and details.json.

    Raises:
      BadConfigError: `out` was begun with another judge or other files, or nobody can be asked.
      BadDataError: the files cannot be used, or the judge says nothing that can be.
      SaveFailedError: the disk is full or not writable.
      UnavailableError: the judge does not answer now.
    """
    refuse_no_judge(config)
    refuse_foreign(out, outside=Judge.outside)  # answers to attacks on the judge
    use_platform(config.platform)
    files = {"responses": file_source(responses), "baseline": file_source(baseline)}
    log = out / Judge.outside / "answers.jsonl"
    stage = Judge.of(config, **files, split=split, given=_given(config), log=log)
    stage.matched()  # for what it refuses, before anything is asked or loaded
    with locked(out), stop_on_signal() as safe_point:
        complete(stage, out, safe_point=safe_point)


def attack_with(config: RunConfig, *, out: Path | None) -> str:
    """A table of attacks on a judge and what became of them; with a folder its answers are kept there.

    Raises:
      SamiError: as `judge_files`.
    """
    refuse_no_judge(config)
    if not config.evaluation.is_asked:
        raise BadConfigError("Only a language model can be attacked by texts: give --judge=server, or model:DIR.")
    use_platform(config.platform)
    chat = config.evaluation.chat
    judge = make_chat(chat, given_to(chat), mesh=config.mesh, compute_dtype=config.compute_dtype, say=say)
    with contextlib.ExitStack() as stack:
        folder = out / Judge.outside if out else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        safe_point = stack.enter_context(stop_on_signal())
        log = folder / "answers.jsonl"
        answers = stack.enter_context(open_answers(chat, judge, log, safe_point=safe_point, say=say))
        progress = Progress("attacking", 0, unit="questions")
        return attack_table(judge.name, *attack_judge(answers, progress))


def refuse_no_judge(config: RunConfig) -> None:
    """Raises BadConfigError where a config names no judge."""
    if config.evaluation.judge == "none":
        raise BadConfigError(
            "Nobody is named who judges: give --judge=server, --judge=model:DIR or --judge=replay:FILE."
        )


def comparisons(
    config: RunConfig, *, evaluated: Source, against: Mapping[str, Source], log: Path
) -> Iterator[tuple[str, Judge]]:
    """The comparisons of an evaluation, each with the folder it belongs in: opponent/split.

    Args:
      config: the settings.
      evaluated: folder of an evaluation.
      against: opponent -> folder of its evaluation on the same queries.
      log: keeps the answers of the judge, of all comparisons: one budget, and nothing is asked twice.
    """
    given = _given(config)
    files = {name: Source(source.path / RESULTS, source.fingerprint) for name, source in against.items()}
    responses = Source(evaluated.path / RESULTS, evaluated.fingerprint)
    splits = dict.fromkeys(result.split for result in read_results(responses.path))
    for opponent, baseline in files.items():
        for split in splits:
            stage = Judge.of(config, responses=responses, baseline=baseline, split=split, given=given, log=log)
            yield f"{opponent}/{split}", stage


def as_instruct(config: RunConfig) -> RunConfig:
    """The settings by which the instruction-tuned model answers a run's queries: through its own chat template.

    It is asked what the base is asked, without what belongs to plain text: stop markers, forced words, the authors'
    boundary.
    """
    prompts = dataclasses.replace(config.prompts, style="chat", boundary="exact", response_prefix="")
    sampling = dataclasses.replace(config.sampling, stop=())
    return dataclasses.replace(config, model=config.evaluation.instruct, prompts=prompts, sampling=sampling)


def instruct_folder(config: RunConfig) -> Path:
    """The instruction-tuned model's folder, fetched where it is a name. Raises BadDataError where there is none."""
    return Path(from_writer(lambda: str(fetch_model(config.evaluation.instruct))))


def evaluate_instruct(config: RunConfig, *, queries: Source, principles: Source) -> Evaluate:
    """The stage in which the instruction-tuned model answers a run's queries; its mutual information is measured, too.

    Args:
      config: the run's settings.
      queries: file of evaluation queries.
      principles: file of principles, or folder of constitutions.
    """
    model = model_source(instruct_folder(config))
    files = {"queries": queries, "principles": principles}
    return Evaluate.of(as_instruct(config), 0, model=model, base=model, baseline=None, **files)


def check_judging(config: RunConfig) -> None:
    """Refuses a judge that cannot be asked and an instruction-tuned model that cannot chat, before anything is made.

    Raises:
      BadConfigError: the key of a server is missing.
      BadDataError: a model or a record cannot be used.
      FetchFailedError: a model could not be downloaded.
    """
    evaluation = config.evaluation
    if evaluation.is_asked and PRETRAINED not in evaluation.judge:
        check_chat(evaluation.chat, config)
    if evaluation.instruct and PRETRAINED not in evaluation.instruct:
        folder = instruct_folder(config)
        ChatTemplate(open_model(folder, config.mesh, config.compute_dtype).tokenizer).check(folder)


def _given(config: RunConfig) -> Source | None:
    return given_source(config.evaluation.chat) if config.evaluation.is_asked else None
