"""The evaluation stage: a model answers the evaluation queries, and its answers are judged and scored."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sami_jax.config.data import ConstitutionsConfig
from sami_jax.config.evaluation import ASKING, EvaluationConfig
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.prompts import PromptsConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.pools import HELD_OUT, read_pools
from sami_jax.data.queries import read_queries
from sami_jax.data.rendering import Renderer
from sami_jax.data.tasks import Task
from sami_jax.errors import BadDataError
from sami_jax.evaluation.judge_by_name import judge_by_name
from sami_jax.evaluation.results import QueryResult, read_results, write_results
from sami_jax.evaluation.summary import query_mi_nats, summarize
from sami_jax.files import write_json
from sami_jax.huggingface.opened import LoadedModel, load_model
from sami_jax.progress import Progress
from sami_jax.safe_point import SafePoint
from sami_jax.sampling.stop_text import Response
from sami_jax.seeds import generator
from sami_jax.stages.answers import answer_all, answered_pair
from sami_jax.stages.score import Scoring, matrices, refuse_nonfinite
from sami_jax.stages.stage import Output, Source, Stage, settings_but
from sami_jax.types import Dtype, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """What the paper's section 4 measures, of one model.

    Attributes:
      iteration: whose model it is; 0 for the base.
      model: its folder.
      base: the base model's folder; the answers' log-prob under it shows over-optimisation.
      baseline: results.jsonl of the base's evaluation, to compare with; None for the base itself.
      queries: file of evaluation queries.
      evaluation_count: so many of them, the first.
      principles: file of principles, or folder of constitutions.
      seed: decides the constitutions.
      constitutions: how they are drawn.
      prompts: templates.
      sampling: how to sample.
      evaluation: what is measured.
      scoring: how answers are scored.
      compute_dtype: of activations and matmuls.
      mesh: the devices.
    """

    name = "evaluate"

    iteration: int
    model: Source
    base: Source
    baseline: Source | None
    queries: Source
    evaluation_count: int
    principles: Source
    seed: int
    constitutions: ConstitutionsConfig = settings_but("principles", "folder", "writer")
    prompts: PromptsConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig = settings_but("instruct", *ASKING)
    scoring: Scoring
    compute_dtype: Dtype
    mesh: MeshConfig

    @classmethod
    def of(
        cls,
        config: RunConfig,
        iteration: int,
        *,
        model: Source,
        base: Source,
        baseline: Source | None,
        queries: Source,
        principles: Source,
    ) -> "Evaluate":
        """The stage of a run's iteration."""
        return cls(
            iteration=iteration,
            model=model,
            base=base,
            baseline=baseline,
            queries=queries,
            evaluation_count=config.queries.evaluation_count,
            principles=principles,
            seed=config.seed,
            constitutions=config.constitutions,
            prompts=config.prompts,
            sampling=config.sampling,
            evaluation=config.evaluation,
            scoring=Scoring.of(config.train),
            compute_dtype=config.compute_dtype,
            mesh=config.mesh,
        )

    def make(self, out: Output, safe_point: SafePoint) -> Any:
        """Makes `responses/*/00000.jsonl` ..., `results.jsonl` and `summary.json`; see `Stage.make`.

        Raises:
          BadDataError: queries, principles or baseline cannot be used.
          NonFiniteError: a log-prob is NaN or infinite.
        """
        all_tasks = self.tasks()
        baseline = self._read_baseline(self.baseline.path, all_tasks) if self.baseline else None
        loaded = load_model(self.model.path, self.mesh, self.compute_dtype)
        same = self.model.path == self.base.path
        base_params = loaded.params if same else load_model(self.base.path, self.mesh, self.compute_dtype).params
        out.begin()
        scored: list[QueryResult] = []
        for split, tasks in all_tasks.items():
            answers = self._answers(loaded, split, tasks, out, safe_point)
            scored += self._scored(loaded, base_params, split, tasks, answers)
        every_task = [task for tasks in all_tasks.values() for task in tasks]
        results = out.alone(lambda: self._judged(scored, every_task)) or []
        out.write("results.jsonl", write_results, results)
        out.write("summary.json", write_json, out.alone(lambda: self._summary(results, baseline)))
        return {split: len(tasks) for split, tasks in all_tasks.items()}

    def tasks(self) -> dict[str, list[Task]]:
        """The queries and constitutions of each split; see `evaluation_tasks`."""
        return evaluation_tasks(
            queries=self.queries.path,
            count=self.evaluation_count,
            principles=self.principles.path,
            constitutions=self.constitutions,
            evaluation=self.evaluation,
            seed=self.seed,
        )

    def _answers(
        self, loaded: LoadedModel, split: str, tasks: Sequence[Task], out: Output, safe_point: SafePoint
    ) -> list[list[Response]]:
        progress = Progress(f"iteration {self.iteration}: evaluating {split}", len(tasks), unit="queries")
        parts: dict[str, Any] = {"out": out, "folder": f"responses/{split}"}
        parts |= {"seed": self.seed, "purpose": ("evaluate", self.iteration, split)}
        return answer_all(
            loaded, tasks, self.prompts, self.sampling, **parts, safe_point=safe_point, answered=progress.update
        )

    def _scored(
        self,
        loaded: LoadedModel,
        base_params: Params,
        split: str,
        tasks: Sequence[Task],
        answers: Sequence[Sequence[Response]],
    ) -> list[QueryResult]:
        renderer = Renderer(self.prompts, loaded.tokenizer)
        pairs = [answered_pair(task, responses, renderer) for task, responses in zip(tasks, answers, strict=True)]
        ours, bases = (matrices(loaded, params, pairs, self.scoring) for params in (loaded.params, base_params))
        refuse_nonfinite(pairs, ours, model=self.model.path)
        refuse_nonfinite(pairs, bases, model=self.base.path)
        results = []
        rows = zip(tasks, pairs, ours, bases, query_mi_nats(ours), strict=True)
        for task, pair, logps, base_logps, mi_nats in rows:
            scored = all(pair.response_ids)  # an empty response has no log-prob; such queries are counted, not averaged
            results.append(
                QueryResult(
                    split=split,
                    example_id=task.query.example_id,
                    query=task.query.text,
                    constitutions=[constitution.text for constitution in task.constitutions],
                    responses=list(pair.responses),
                    response_tokens=[len(ids) for ids in pair.response_ids],
                    logps=logps if scored else None,
                    base_logps=np.diagonal(base_logps) if scored else None,
                    mi_nats=float(mi_nats) if scored else None,
                    verdicts=None,
                    response_prefix=renderer.response_prefix,
                )
            )
        return results

    def _judged(self, results: Sequence[QueryResult], tasks: Sequence[Task]) -> list[QueryResult]:
        judge = judge_by_name(self.evaluation.judge)
        if judge is None:
            return list(results)
        judged = []
        for result, task in zip(results, tasks, strict=True):
            answers = zip(task.constitutions, result.responses, strict=True)
            verdicts = [judge.judge(task.query, constitution, response) for constitution, response in answers]
            judged.append(dataclasses.replace(result, verdicts=verdicts))
        return judged

    def _summary(self, results: Sequence[QueryResult], baseline: Sequence[QueryResult] | None) -> dict[str, Any]:
        splits = {}
        for name in dict.fromkeys(result.split for result in results):
            ours, bases = ([r for r in of or [] if r.split == name] for of in (results, baseline))
            splits[name] = summarize(ours, None if baseline is None else bases)
            splits[name]["judge"] = self.evaluation.judge if judge_by_name(self.evaluation.judge) else None
        return {
            "iteration": self.iteration,
            "normalize": self.scoring.normalize,
            "ceiling_nats": math.log(self.constitutions.count),
            "splits": splits,
        }

    def _read_baseline(self, path: Path, tasks: dict[str, list[Task]]) -> list[QueryResult]:
        """The base's results. Raises BadDataError where they answer other tasks or were not judged alike."""
        results = read_results(path)
        judged = judge_by_name(self.evaluation.judge) is not None
        wanted = [
            (name, task.query.example_id, [constitution.text for constitution in task.constitutions], judged)
            for name, split in tasks.items()
            for task in split
        ]
        if [(r.split, r.example_id, r.constitutions, r.verdicts is not None) for r in results] != wanted:
            raise BadDataError(
                f"{path.parent} is no baseline for this evaluation: its queries, constitutions or judge are others. "
                "Evaluate the base with the same config first."
            )
        return results


def evaluation_tasks(
    *,
    queries: Path,
    count: int,
    principles: Path,
    constitutions: ConstitutionsConfig,
    evaluation: EvaluationConfig,
    seed: int,
) -> dict[str, list[Task]]:
    """The queries and constitutions of each split, the same for every iteration.

    "learned": principles SAMI trains on; "held_out": the others, where there are enough of them for a constitution.

    Args:
      queries: file.
      count: so many of its queries, the first.
      principles: file of principles, or folder of constitutions.
      constitutions: how they are drawn.
      evaluation: the judge, and whether held-out principles are wanted.
      seed: decides them.

    Raises:
      BadConfigError: the constitutions cannot be drawn.
      BadDataError: queries or principles cannot be used, or the judge cannot read them.
    """
    asked, pools = read_queries(queries)[:count], read_pools(principles, constitutions)
    if judge := judge_by_name(evaluation.judge):
        judge.check(asked, [name for pool in pools.values() for name in pool.names])
    if not evaluation.held_out:
        pools.pop(HELD_OUT, None)
    return {
        split: [Task(q, pool.draw(generator(seed, "constitutions", "evaluate", split, q.example_id))) for q in asked]
        for split, pool in pools.items()
    }
