"""The stage that scores a pairs file: matrices of log-probs, their loss and their bound on mutual information."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.training import TrainConfig
from sami_jax.data.pairs import Pair, read_pairs
from sami_jax.errors import NonFiniteError, enough_memory
from sami_jax.evaluation.summary import query_mi_nats
from sami_jax.huggingface.opened import LoadedModel, open_model
from sami_jax.losses import sami_loss
from sami_jax.progress import Progress
from sami_jax.safe_point import SafePoint
from sami_jax.scoring import score_pairs
from sami_jax.sharding import batch_sharding, batch_shards, more_devices
from sami_jax.stages.stage import FileStage, Output, Source
from sami_jax.types import Boundary, Dtype, Normalize, Params

_PART_QUERIES = 64  # kept together, and lost together when killed; a batch at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How pairs are scored.

    Attributes:
      normalize: a response's log-prob: mean over its tokens or sum.
      micro_batch_queries: queries in memory at once, for each device that shares the batch.
      round_tokens_to: sequences are padded to multiples of this.
    """

    normalize: Normalize
    micro_batch_queries: int
    round_tokens_to: int

    @classmethod
    def of(cls, train: TrainConfig) -> "Scoring":
        """As in training."""
        return cls(
            normalize=train.normalize,
            micro_batch_queries=train.micro_batch_queries,
            round_tokens_to=train.round_tokens_to,
        )


def matrices(
    loaded: LoadedModel,
    params: Params,
    pairs: Sequence[Pair],
    how: Scoring,
    *,
    scored: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """[Q, C, R] log-probs of Q pairs under the model with some weights, in nats; `scored` hears how many are done."""
    rows = how.micro_batch_queries * batch_shards(loaded.mesh)
    remedies = fewer_queries(how.micro_batch_queries), more_devices(loaded.mesh)
    with enough_memory(f"scoring {rows} queries at once", *remedies):
        return score_pairs(
            loaded.model.rows,
            params,
            pairs,
            normalize=how.normalize,
            rows=rows,
            round_to=how.round_tokens_to,
            sharding=batch_sharding(loaded.mesh),
            scored=scored,
        )


def refuse_nonfinite(pairs: Sequence[Pair], logps: np.ndarray, *, model: Path) -> None:
    """Raises NonFiniteError where a matrix of [Q, C, R] has a NaN or an infinity, with the queries and the model."""
    bad = [pair.example_id for pair, matrix in zip(pairs, logps, strict=True) if not np.isfinite(matrix).all()]
    if bad:
        raise NonFiniteError(
            f"The log-probs of queries {bad} are not finite; the model in {model} is damaged; bring back a copy."
        )


def fewer_queries(micro_batch_queries: int) -> str:
    """The remedy for too many queries at once, to be said in a sentence; "" where there is one only."""
    rows = micro_batch_queries
    return f"lower config.train.micro_batch_queries, now {rows}" if rows > 1 else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(FileStage):
    """Scores every query of a pairs file.

    Attributes:
      model: folder.
      pairs: file in the authors' format.
      scoring: how.
      over_responses_weight: of the loss' softmax over responses.
      over_constitutions_weight: of its softmax over constitutions.
      boundary: where a response begins.
      compute_dtype: of activations and matmuls.
      mesh: the devices.
    """

    name = "score"

    model: Source
    pairs: Source
    scoring: Scoring
    over_responses_weight: float
    over_constitutions_weight: float
    boundary: Boundary
    compute_dtype: Dtype
    mesh: MeshConfig

    @classmethod
    def of(cls, config: RunConfig, *, model: Source, pairs: Source) -> "Score":
        """The stage with a config's settings."""
        return cls(
            model=model,
            pairs=pairs,
            scoring=Scoring.of(config.train),
            over_responses_weight=config.train.over_responses_weight,
            over_constitutions_weight=config.train.over_constitutions_weight,
            boundary=config.prompts.boundary,
            compute_dtype=config.compute_dtype,
            mesh=config.mesh,
        )

    def make(self, out: Output, safe_point: SafePoint) -> list[Any]:
        """A line per query: example_id, logps [C][R], loss, over_responses, over_constitutions, mi_nats (all nats),
        normalize; see `FileStage.make`.

        Raises:
          BadDataError: model or pairs cannot be used.
          NonFiniteError: a log-prob is NaN or infinite.
        """
        opened = open_model(self.model.path, self.mesh, self.compute_dtype)
        shape = opened.model.config
        pairs = read_pairs(
            self.pairs.path,
            opened.tokenizer,
            boundary=self.boundary,
            max_positions=shape.max_positions,
            vocab_size=shape.vocab_size,
        )
        loaded = opened.loaded(self.compute_dtype)
        out.begin()
        rows = self.scoring.micro_batch_queries * batch_shards(loaded.mesh)
        size = rows * math.ceil(_PART_QUERIES / rows)
        chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        first = sum(len(chunk) for number, chunk in enumerate(chunks) if out.stands(f"{number:05d}.jsonl"))
        progress = Progress("scoring", len(pairs), unit="queries", done=first)
        lines: list[Any] = []
        for number, chunk in enumerate(chunks):
            before = len(lines)

            def scored(done: int, before: int = before) -> None:
                progress.update(before + done)

            lines += out.part(f"{number:05d}.jsonl", functools.partial(self._lines, loaded, chunk, scored))
            safe_point()
        return lines

    def _lines(self, loaded: LoadedModel, pairs: Sequence[Pair], scored: Callable[[int], None]) -> list[dict[str, Any]]:
        logps = matrices(loaded, loaded.params, pairs, self.scoring, scored=scored)
        refuse_nonfinite(pairs, logps, model=self.model.path)
        loss_of = functools.partial(
            sami_loss,
            over_responses_weight=self.over_responses_weight,
            over_constitutions_weight=self.over_constitutions_weight,
        )
        losses = jax.vmap(loss_of)(jnp.asarray(logps))
        return [
            {
                "example_id": pair.example_id,
                "logps": matrix.tolist(),
                "loss": float(losses.loss[i]),
                "over_responses": float(losses.over_responses[i]),
                "over_constitutions": float(losses.over_constitutions[i]),
                "mi_nats": float(query_mi_nats(matrix[None])[0]),
                "normalize": self.scoring.normalize,
            }
            for i, (pair, matrix) in enumerate(zip(pairs, logps, strict=True))
        ]


def score_summary(lines: Sequence[dict[str, Any]]) -> str:
    """A sentence that sums up a scores file."""
    loss, mi = (float(np.mean([line[key] for line in lines])) for key in ("loss", "mi_nats"))
    count = len(lines[0]["logps"])
    return (
        f"{len(lines)} queries, {count} constitutions, {lines[0]['normalize']} log-probs: loss {loss:.6f} nats, "
        f"MI bound {mi:.6f} of at most {math.log(count):.6f} nats"
    )
