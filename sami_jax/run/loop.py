"""The loop of Algorithm 1 over a run directory: each stage completed once, resumed where it was left."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sami_jax.clock import time_now
from sami_jax.config.run import RunConfig, check_training
from sami_jax.errors import BadConfigError, BadDataError, UnavailableError
from sami_jax.files import append_jsonl
from sami_jax.processes import agreed, enter_once, from_writer, is_writer
from sami_jax.report.page import write_report
from sami_jax.run.agreement import Given, check_alike, check_seen, read_given
from sami_jax.run.attempts import QUERIES, attempt, forgotten_if_refused, has_begun
from sami_jax.run.judging import INSTRUCT, JUDGE, RESULTS, comparisons, evaluate_instruct
from sami_jax.run.opening import begun_config, check_queries, needs_pretraining, open_run, with_pretrained
from sami_jax.run.principles import WRITTEN, with_principles
from sami_jax.run.queries import check_counts, with_queries
from sami_jax.safe_point import SafePoint, stop_on_signal
from sami_jax.sharding import make_mesh, place_of_process, use_platform
from sami_jax.stage_folder import locked
from sami_jax.stages.evaluate import Evaluate
from sami_jax.stages.export import Export
from sami_jax.stages.sample import Sample
from sami_jax.stages.stage import Source, Stage, complete
from sami_jax.stages.train import Train, drop_checkpoints


def run(config: RunConfig | None, workdir: Path, *, say: Callable[[str], None] = print) -> Path:
    """Runs SAMI, or what is left of it, and writes the report. Each of several processes calls this.

    Args:
      config: the settings, or None to go on with those the run directory was started with.
      workdir: the run directory; made if missing.
      say: takes sentences for the person who watches.

    Returns:
      The report's page.

    Raises:
      BadConfigError: the settings are not those the run was started with.
      RunInUseError: another process works on it.
      StoppedError: someone asked it to stop; the same command goes on from here.
    """
    with agreed():
        if config is not None:
            check_training(config, iterations=config.iterations)
    with contextlib.ExitStack() as stack:
        enter_once(stack, locked(workdir))
        check_seen(workdir)
        check_alike(config)
        config = config or begun_config(workdir)
        with agreed():
            use_platform(config.platform)
            say(place_of_process(make_mesh(config.mesh)))
        say = say if is_writer() else _say_nothing
        config = open_run(config, workdir, say)
        begun = from_writer(lambda: has_begun(workdir))
        to_check = (needs_pretraining(config) or config.constitutions.to_be_written) and not begun
        # Handle signals only from here on: a download has no safe points, and SIGTERM should end it.
        safe_point = stack.enter_context(stop_on_signal())
        enter_once(stack, forgotten_if_refused(workdir))
        enter_once(stack, attempt(workdir))
        config = with_queries(
            with_pretrained(config, safe_point), workdir / QUERIES, iterations=config.iterations, say=say
        )
        if to_check:
            with agreed():
                check_counts(config, iterations=config.iterations)
        config = with_principles(config, workdir / WRITTEN, begun=begun, safe_point=safe_point, say=say)
        given = read_given(config)
        if to_check:
            check_queries(config, iterations=config.iterations)
        return _Run(config, given, workdir, safe_point, say).finish()


def _say_nothing(sentence: str) -> None: ...


class _Run:
    """One attempt at a run; holds what its stages share."""

    def __init__(
        self, config: RunConfig, given: Given, workdir: Path, safe_point: SafePoint, say: Callable[[str], None]
    ):
        self._config, self._given, self._workdir, self._safe_point, self._say = config, given, workdir, safe_point, say
        self._has_worked = False

    def finish(self) -> Path:
        """Completes every stage in order, then writes the report."""
        config, principles = self._config, self._given.principles
        base = model = self._given.model
        asked = {"queries": self._given.evaluation, "principles": principles}
        given: dict[str, Any] = {"base": base, **asked}
        evaluated = [self._complete(0, "eval", Evaluate.of(config, 0, model=base, baseline=None, **given))]
        baseline = Source(evaluated[0].path / RESULTS, evaluated[0].fingerprint)
        opponents = {"base": evaluated[0]}
        if config.evaluation.instruct:
            opponents[INSTRUCT] = self._complete(0, INSTRUCT, evaluate_instruct(config, **asked))
        for i in range(1, config.iterations + 1):
            sample = Sample.of(config, i, model=model, queries=self._given.train, principles=principles)
            sampled = self._complete(i, "sample", sample)
            pairs = Source(sampled.path / "pairs.json", sampled.fingerprint)
            trained = self._complete(i, "train", Train.of(config, i, base=base, pairs=pairs))
            model = self._complete(i, "export", Export.of(config, i, base=base, trained=trained))
            drop_checkpoints(config.train, trained=trained.path)
            evaluated.append(self._complete(i, "eval", Evaluate.of(config, i, model=model, baseline=baseline, **given)))
        page = self._workdir / "report" / "index.html"
        try:
            self._judge(evaluated, opponents)
        except (BadConfigError, BadDataError, UnavailableError):  # a spent budget, a judge that says nothing or is away
            if is_writer():
                self._report(page)  # of all that was measured
            raise
        with agreed():
            if is_writer():
                self._report(page)
        return page

    def _judge(self, evaluated: Sequence[Source], opponents: dict[str, Source]) -> None:
        """Compares every iteration with the base, and with the instruction-tuned model.

        Nothing but the report depends on it, so it comes last: a judge that does not answer stops no training.
        """
        if self._config.evaluation.judge == "none":
            return
        log = self._workdir / JUDGE / "answers.jsonl"
        for iteration, model in enumerate(evaluated):
            against = {name: other for name, other in opponents.items() if other is not model}
            for name, stage in comparisons(self._config, evaluated=model, against=against, log=log):
                self._complete(iteration, f"{JUDGE}/{name}", stage)

    def _report(self, page: Path) -> None:
        if self._has_worked or not page.exists():
            write_report(self._workdir)
        else:
            self._say(f"This run is finished; nothing to do. Its report: {page}")

    def _complete(self, iteration: int, name: str, stage: Stage) -> Source:
        """Completes a stage in its folder of the run directory. Returns the folder."""
        folder = self._workdir / f"iter_{iteration:03d}" / name
        log = self._workdir / "metrics.jsonl"
        done = complete(stage, folder, safe_point=self._safe_point, log=lambda record: append_jsonl(log, record))
        if done.seconds is not None:
            self._has_worked = True
            event = {"event": "stage_done", "iteration": iteration, "stage": name, "seconds": round(done.seconds, 3)}
            if is_writer():
                append_jsonl(self._workdir / "events.jsonl", {**event, "time": time_now()})
        return done.source
