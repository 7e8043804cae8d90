"""The stage that scores principles: how well a model can tell a definition from its antithesis before any training."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from sami_jax.config.mesh import MeshConfig
from sami_jax.config.prompts import PromptsConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.constitutions import Constitution
from sami_jax.data.principles import Principle, read_principles
from sami_jax.data.queries import Query, read_queries
from sami_jax.data.rendering import Renderer
from sami_jax.data.tasks import Task
from sami_jax.evaluation.statistics import Estimate, mean_with_interval
from sami_jax.evaluation.summary import query_mi_nats
from sami_jax.huggingface.opened import LoadedModel, open_model
from sami_jax.progress import Progress
from sami_jax.safe_point import SafePoint
from sami_jax.stages.answers import TaskRoom, answer_all, answered_pair, check_tasks
from sami_jax.stages.score import Scoring, matrices, refuse_nonfinite
from sami_jax.stages.stage import FileStage, Output, Source
from sami_jax.types import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorePrinciples(FileStage):
    """Each principle's mutual information: responses under definition and antithesis, and their 2 x 2 matrix.

    Attributes:
      model: folder of the base model.
      principles: file of principles.
      queries: file of queries.
      query_count: so many of them, the first.
      prompts: templates.
      sampling: how to sample.
      seed: decides what is drawn where the temperature is above 0.
      scoring: how responses are scored.
      compute_dtype: of activations and matmuls.
      mesh: the devices.
    """

    name = "score_principles"

    model: Source
    principles: Source
    queries: Source
    query_count: int
    prompts: PromptsConfig
    sampling: SamplingConfig
    seed: int
    scoring: Scoring
    compute_dtype: Dtype
    mesh: MeshConfig

    @classmethod
    def of(cls, config: RunConfig, *, model: Source, principles: Source, queries: Source) -> "ScorePrinciples":
        """The stage with a config's settings."""
        return cls(
            model=model,
            principles=principles,
            queries=queries,
            query_count=config.queries.evaluation_count,
            prompts=config.prompts,
            sampling=config.sampling,
            seed=config.seed,
            scoring=Scoring.of(config.train),
            compute_dtype=config.compute_dtype,
            mesh=config.mesh,
        )

    def make(self, out: Output, safe_point: SafePoint) -> list[Any]:
        """A line per principle, the most readable first: name, definition, antithesis, held_out; mi_nats, the mean over
        queries of the lower bound on the mutual information of response and constitution (at most log 2), with its 95 %
        interval {mean, low, high, n}, None where no query has it; readable, whether that interval lies above 0;
        distinct, the share of queries whose two responses differ; n_queries; n_unscored, those with an empty response,
        which has no log-prob; normalize. See `FileStage.make`.

        Raises:
          BadDataError: model, principles or queries cannot be used.
          NonFiniteError: a log-prob is NaN or infinite.
        """
        principles = read_principles(self.principles.path)
        queries = read_queries(self.queries.path)[: self.query_count]
        tasks = {principle.name: _tasks(principle, queries) for principle in principles}
        opened = open_model(self.model.path, self.mesh, self.compute_dtype)
        every_task = (task for of_one in tasks.values() for task in of_one)
        room = TaskRoom(
            new_tokens=self.sampling.max_new_tokens,
            rows_per_device=self.scoring.rows_per_device,
            max_row_tokens=self.scoring.max_row_tokens,
        )
        check_tasks(opened, every_task, self.prompts, room, file=str(self.queries.path))
        loaded = opened.loaded(self.compute_dtype)
        out.begin()
        progress = Progress("scoring principles", len(principles) * len(queries), unit="queries")
        lines: list[Any] = []
        for number, principle in enumerate(principles):

            def answered(
                count: int,
                speed: str = "",
                ahead: float = 0.0,
                done: int = number * len(queries),
                name: str = principle.name,
            ) -> None:
                progress.update(done + count, f"{name}, {speed}" if speed else name, ahead)

            answers = {"out": out, "folder": f"{number:03d}", "safe_point": safe_point, "answered": answered}
            answers |= {"seed": self.seed, "purpose": ("score_principles", principle.name)}
            scored = functools.partial(self._scored, loaded, principle, tasks[principle.name], answers)
            lines += out.part(f"{number:03d}.jsonl", scored)
            answered(len(queries))
            safe_point()
        return sorted(lines, key=lambda line: -line["mi_nats"]["mean"] if line["mi_nats"] else np.inf)

    def _scored(
        self, loaded: LoadedModel, principle: Principle, tasks: Sequence[Task], how: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The principle's line alone; `how` is handed on to `answer_all`."""
        answers = answer_all(loaded, tasks, self.prompts, self.sampling, **how)
        renderer = Renderer(self.prompts, loaded.tokenizer)
        pairs = [answered_pair(task, responses, renderer) for task, responses in zip(tasks, answers, strict=True)]
        logps = matrices(loaded, loaded.params, pairs, self.scoring)
        refuse_nonfinite(pairs, logps, model=self.model.path)
        known = [all(pair.response_ids) for pair in pairs]  # an empty response has no log-prob
        mi_nats = mean_with_interval(query_mi_nats(logps)[known]) if any(known) else None
        distinct = [len(set(pair.responses)) == len(pair.responses) for pair in pairs]
        line = {
            **dataclasses.asdict(principle),
            "mi_nats": mi_nats and mi_nats._asdict(),
            "readable": is_readable(mi_nats),
            "distinct": float(np.mean(distinct)),
            "n_queries": len(pairs),
            "n_unscored": known.count(False),
            "normalize": self.scoring.normalize,
        }
        return [line]


def is_readable(mi_nats: Estimate | None) -> bool:
    """Whether the 95 % interval of a principle's mutual information is known, and lies above 0."""
    return mi_nats is not None and mi_nats.low is not None and mi_nats.low > 0


def _tasks(principle: Principle, queries: Sequence[Query]) -> list[Task]:
    """Each query under the principle's definition, then under its antithesis."""
    both = tuple(Constitution((principle.statement(asked),)) for asked in (True, False))
    return [Task(query, both) for query in queries]


def scores_table(lines: Sequence[dict[str, Any]]) -> str:
    """A table of scores for people, with a warning for those that the base cannot tell apart."""
    width = max(len("principle"), *(len(line["name"]) for line in lines))
    rows = [f"{'principle':{width}}   MI nats  95 % interval         differing  queries"]
    for line in lines:
        mi = line["mi_nats"] or {"mean": None, "low": None, "high": None}
        mean, low, high = ("-" if mi[key] is None else f"{mi[key]:.3g}" for key in ("mean", "low", "high"))
        counted = line["n_queries"] - line["n_unscored"]
        held_out = "  held out" if line["held_out"] else ""
        interval = f"[{low}, {high}]"
        rows.append(f"{line['name']:{width}}  {mean:>8}  {interval:20}  {line['distinct']:9.0%}  {counted:7}{held_out}")
    unknown = [line["name"] for line in lines if line["mi_nats"] is None or line["mi_nats"]["low"] is None]
    if unread := [line["name"] for line in lines if not line["readable"] and line["name"] not in unknown]:
        rows.append(
            f"warning: the base cannot tell definition from antithesis of {', '.join(unread)}: the interval reaches 0. "
            "SAMI amplifies a reading, it does not create one: reword them, score more queries, or leave them out."
        )
    if unknown:
        rows.append(
            f"warning: {', '.join(unknown)} has no interval: fewer than two queries have responses that are not empty."
        )
    return "\n".join(rows)
