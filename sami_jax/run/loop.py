"""The loop of Algorithm 1 over a run directory: each stage completed once, resumed where it was left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sami_jax.config.run import RunConfig, check_training
from sami_jax.files import append_jsonl
from sami_jax.report.page import write_report
from sami_jax.run.attempts import attempt, forgotten_if_refused, has_begun, time_now
from sami_jax.run.opening import check_queries, needs_pretraining, open_run, with_pretrained
from sami_jax.safe_point import SafePoint, stop_on_signal
from sami_jax.stage_folder import locked
from sami_jax.stages.evaluate import Evaluate
from sami_jax.stages.export import Export
from sami_jax.stages.sample import Sample
from sami_jax.stages.stage import Source, Stage, complete, file_source, model_source
from sami_jax.stages.train import Train, drop_checkpoints


def run(config: RunConfig | None, workdir: Path, *, say: Callable[[str], None] = print) -> Path:
    """Runs SAMI, or what is left of it, and writes the report.

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
    if config is not None:
        check_training(config, iterations=config.iterations)
    with locked(workdir):
        config = open_run(config, workdir, say)
        to_check = needs_pretraining(config) and not has_begun(workdir)
        # Handle signals only from here on: a download has no safe points, and SIGTERM should end it.
        with stop_on_signal() as safe_point, forgotten_if_refused(workdir), attempt(workdir):
            config = with_pretrained(config, safe_point)
            if to_check:
                check_queries(config, iterations=config.iterations)
            return _Run(config, workdir, safe_point, say).finish()


class _Run:
    """One attempt at a run; holds what its stages share."""

    def __init__(self, config: RunConfig, workdir: Path, safe_point: SafePoint, say: Callable[[str], None]):
        self._config, self._workdir, self._safe_point, self._say = config, workdir, safe_point, say
        self._has_worked = False

    def finish(self) -> Path:
        """Completes every stage in order, then writes the report."""
        config = self._config
        base = model = model_source(Path(config.model))
        principles = file_source(Path(config.constitutions.principles))
        asked, tested = (file_source(Path(name)) for name in (config.queries.train, config.queries.evaluation))
        given: dict[str, Any] = {"base": base, "queries": tested, "principles": principles}
        baseline = self._complete(0, "eval", Evaluate.of(config, 0, model=base, baseline=None, **given))
        baseline = Source(baseline.path / "results.jsonl", baseline.fingerprint)
        for i in range(1, config.iterations + 1):
            sample = Sample.of(config, i, model=model, queries=asked, principles=principles)
            sampled = self._complete(i, "sample", sample)
            pairs = Source(sampled.path / "pairs.json", sampled.fingerprint)
            trained = self._complete(i, "train", Train.of(config, i, base=base, pairs=pairs))
            model = self._complete(i, "export", Export.of(config, i, base=base, trained=trained))
            drop_checkpoints(config.train, trained=trained.path)
            self._complete(i, "eval", Evaluate.of(config, i, model=model, baseline=baseline, **given))
        page = self._workdir / "report" / "index.html"
        if self._has_worked or not page.exists():
            page = write_report(self._workdir)
        else:
            self._say(f"This run is finished; nothing to do. Its report: {page}")
        return page

    def _complete(self, iteration: int, name: str, stage: Stage) -> Source:
        """Completes a stage in its folder of the run directory. Returns the folder."""
        folder = self._workdir / f"iter_{iteration:03d}" / name
        log = self._workdir / "metrics.jsonl"
        done = complete(stage, folder, safe_point=self._safe_point, log=lambda record: append_jsonl(log, record))
        if done.seconds is not None:
            self._has_worked = True
            event = {"event": "stage_done", "iteration": iteration, "stage": name, "seconds": round(done.seconds, 3)}
            append_jsonl(self._workdir / "events.jsonl", {**event, "time": time_now()})
        return done.source
