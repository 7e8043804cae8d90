"""The sampling stage: responses under contrasting constitutions, until there are pairs enough to train on."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sami_jax.config.data import ConstitutionsConfig, FiltersConfig
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.prompts import PromptsConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.data.filters import REASONS, cannot_pass, cut_reasoning, drop_reason
from sami_jax.data.pairs import Pair, write_pairs
from sami_jax.data.pools import LEARNED, Pool, read_pools
from sami_jax.data.queries import Query, alternating_half, read_queries
from sami_jax.data.rendering import Renderer
from sami_jax.data.tasks import Task
from sami_jax.errors import BadDataError
from sami_jax.files import write_jsonl
from sami_jax.huggingface.opened import load_model
from sami_jax.progress import Progress
from sami_jax.safe_point import SafePoint
from sami_jax.sampling.stop_text import Response
from sami_jax.seeds import generator
from sami_jax.stages.answers import TaskRoom, answer, answered_pair, answers_behind_reasoning, long_task
from sami_jax.stages.stage import Output, Source, Stage, settings_but
from sami_jax.training import pairs_needed
from sami_jax.types import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Stage):
    """Algorithm 1, sampling: the previous iteration's model answers its half of the queries.

    Attributes:
      iteration: 1, 2, ....
      model: folder of the previous iteration's model.
      queries: file of training queries.
      principles: file of principles, or folder of constitutions.
      seed: decides order and constitutions.
      constitutions: how they are drawn.
      prompts: templates.
      sampling: how to sample.
      filters: which queries are kept.
      room: that a query's prompts and responses have to fit in.
      steps: optimizer steps that are to follow.
      needed: pairs that those steps need.
      compute_dtype: of activations and matmuls.
      mesh: the devices.
    """

    name = "sample"

    iteration: int
    model: Source
    queries: Source
    principles: Source
    seed: int
    constitutions: ConstitutionsConfig = settings_but("principles", "folder", "writer")
    prompts: PromptsConfig
    sampling: SamplingConfig
    filters: FiltersConfig
    room: TaskRoom
    steps: int
    needed: int
    compute_dtype: Dtype
    mesh: MeshConfig

    @classmethod
    def of(cls, config: RunConfig, iteration: int, *, model: Source, queries: Source, principles: Source) -> "Sample":
        """The stage of a run's iteration."""
        return cls(
            iteration=iteration,
            model=model,
            queries=queries,
            principles=principles,
            seed=config.seed,
            constitutions=config.constitutions,
            prompts=config.prompts,
            sampling=config.sampling,
            filters=config.filters,
            room=TaskRoom.of(config.sampling, config.train),
            steps=config.train.steps[iteration - 1],
            needed=pairs_needed(config.train, iteration),
            compute_dtype=config.compute_dtype,
            mesh=config.mesh,
        )

    def make(self, out: Output, safe_point: SafePoint) -> Any:
        """Makes `chunks/00000.jsonl` ..., `pairs.json` and `rejects.jsonl`; see `Stage.make`.

        Raises:
          BadDataError: the queries run out before enough pairs are kept.
        """
        queries = alternating_half(read_queries(self.queries.path), self.iteration)
        pool = read_pools(self.principles.path, self.constitutions)[LEARNED]
        loaded = load_model(self.model.path, self.mesh, self.compute_dtype)
        renderer = Renderer(self.prompts, loaded.tokenizer)
        out.begin()
        order = sampling_order(len(queries), seed=self.seed, iteration=self.iteration)
        kept: list[Pair] = []
        rejects: list[dict[str, Any]] = []
        asked, size = 0, self.sampling.shard_queries
        progress = Progress(f"iteration {self.iteration}: sampling", self.needed, unit="pairs")
        for number, start in enumerate(range(0, len(order), size)):
            asked_now = [queries[i] for i in order[start : start + size]]
            tasks = list(sampling_tasks(asked_now, pool, seed=self.seed, iteration=self.iteration))
            if self.sampling.long_prompts == "drop":
                long = [task for task in tasks if long_task(loaded, task, renderer, self.room)]
                rejects += [_reject(task, "too_long", ()) for task in long]
                tasks = [task for task in tasks if task not in long]

            def progressed(answered: float, speed: str, asked: int = asked) -> None:
                note = f"{len(kept)} of {asked} queries kept, {answered:.0f} more answered, {speed}"
                progress.update(min(len(kept), self.needed), note, answered * len(kept) / asked if asked else answered)

            part = f"chunks/{number:05d}.jsonl"
            how: dict[str, Any] = {"seed": self.seed, "purpose": ("sample", self.iteration), "progressed": progressed}
            answers = answer(loaded, tasks, renderer, self.sampling, out=out, part=part, hopeless=self._hopeless, **how)
            for task, responses in zip(tasks, answers, strict=True):
                there = [response for response in responses if response is not None]  # all, if it was not given up
                found = answers_behind_reasoning(there, self.prompts)
                reason = drop_reason(found, self.filters)
                if reason is None:
                    kept.append(self._pair(task, [response for response in found if response], renderer))
                else:
                    rejects.append(_reject(task, reason, responses))
            asked += len(asked_now)
            progress.update(min(len(kept), self.needed), f"{len(kept)} of {asked} queries kept")
            if len(kept) >= self.needed:
                break
            safe_point()
        dropped = {reason: sum(reject["reason"] == reason for reject in rejects) for reason in REASONS}
        if len(kept) < self.needed:
            raise BadDataError(
                f"Iteration {self.iteration} kept {len(kept)} pairs of {asked} queries ({dropped}), but its "
                f"{self.steps} steps need {self.needed}; start a run in another folder with more queries, fewer "
                "config.train.steps, or higher config.train.passes."
            )
        out.write("pairs.json", write_pairs, kept)
        out.write("rejects.jsonl", write_jsonl, rejects)
        return {
            "queries": len(queries),
            "sampled": asked,
            "kept": len(kept),
            "dropped": dropped,
            "sampling": self.sampling.manifest,
        }

    def _hopeless(self, beginning: str, ended: Response | None) -> bool:
        """Whether a query is dropped for one of its responses alone, whatever the others are."""
        if ended is not None:
            return drop_reason(answers_behind_reasoning([ended], self.prompts), self.filters) is not None
        if self.prompts.chain_of_thought:
            beginning = cut_reasoning(beginning, self.prompts.answer_marker) or ""
        return cannot_pass(beginning, self.filters)

    def _pair(self, task: Task, responses: Sequence[Response], renderer: Renderer) -> Pair:
        rng = generator(self.seed, "reshuffle", self.iteration, task.query.example_id)
        constitutions = tuple(c.shuffled(rng) if self.constitutions.reshuffle else c for c in task.constitutions)
        return answered_pair(Task(task.query, constitutions), responses, renderer)


def _reject(task: Task, reason: str, responses: Sequence[Response | None]) -> dict[str, Any]:
    texts = [response and response.text for response in responses]
    return {"example_id": task.query.example_id, "reason": reason, "responses": texts}


def sampling_order(count: int, *, seed: int, iteration: int) -> np.ndarray:
    """[count] indices: the order in which an iteration samples from its queries."""
    return generator(seed, "sample", iteration).permutation(count)


def sampling_tasks(queries: Iterable[Query], pool: Pool, *, seed: int, iteration: int) -> Iterator[Task]:
    """What each query is asked under in an iteration, whatever the other queries are."""
    for query in queries:
        yield Task(query, pool.draw(generator(seed, "constitutions", "sample", iteration, query.example_id)))
