"""The stage that scores a pairs file: matrices of log-probs, their loss and their bound on mutual information."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.training import TrainConfig
from sami_jax.data.pairs import Pair, read_pairs
from sami_jax.errors import NonFiniteError, enough_memory
from sami_jax.evaluation.summary import query_mi_nats
from sami_jax.huggingface.opened import LoadedModel, OpenModel, open_model
from sami_jax.losses import sami_loss
from sami_jax.model.attention import BackEnd, check
from sami_jax.model.decoder import Model
from sami_jax.progress import Progress, say
from sami_jax.safe_point import SafePoint
from sami_jax.scoring.matrices import score_packed
from sami_jax.scoring.packed_rows import Packing, RowLimits, pack_rows
from sami_jax.sharding import batch_shards, more_devices
from sami_jax.stages.stage import FileStage, Output, Source
from sami_jax.types import Boundary, Dtype, Normalize, Params

_PART_QUERIES = 64  # kept together, and lost together when killed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How pairs are scored.

    Attributes:
      normalize: a response's log-prob: mean over its tokens or sum.
      rows_per_device: rows in memory at once, for each device that shares them.
      max_row_tokens: of the widest row.
    """

    normalize: Normalize
    rows_per_device: int
    max_row_tokens: int

    @classmethod
    def of(cls, train: TrainConfig) -> "Scoring":
        """As in training."""
        return cls(
            normalize=train.normalize,
            rows_per_device=train.rows_per_device,
            max_row_tokens=train.max_row_tokens,
        )


def packed(opened: OpenModel, groups: Sequence[Sequence[Pair]], how: Scoring, *, eos_id: int | None = None) -> Packing:
    """Queries in rows for the model's devices; see `pack_rows`. Says once which attention runs, and that it is right.

    Raises:
      BadDataError: a query does not fit into the rows.
      SamiError: the attention is wrong on this machine.
    """
    _announce(opened.model.attention, opened.mesh)
    return pack_rows(groups, row_limits(opened.model, opened.mesh, how), eos_id=eos_id)


def row_limits(model: Model, mesh: Mesh, how: Scoring) -> RowLimits:
    """What rows may be like for a model on a mesh."""
    return RowLimits(
        shards=batch_shards(mesh),
        rows_per_shard=how.rows_per_device,
        widest=how.max_row_tokens,
        multiple=model.attention.row_multiple,
        # A layer's matmuls take some 24 D^2 FLOPs a token, its attention 4 D for each slot of the row.
        dear_width=math.inf if model.attention.skips else 6 * model.config.embed_dim,
    )


@functools.cache
def _announce(attention: BackEnd, mesh: Mesh) -> None:
    check(attention, rows=batch_shards(mesh), heads=mesh.shape["tensor"])
    say(f"attention in {attention.name} ({mesh.devices.flat[0].platform})")


def matrices(
    loaded: LoadedModel,
    params: Params,
    pairs: Sequence[Pair],
    how: Scoring,
    *,
    scored: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """[Q, C, R] log-probs of Q pairs under the model with some weights, in nats; `scored` hears how many are done."""
    return _matrices(loaded, params, packed(loaded, [pairs], how), 0, how, scored)


def _matrices(
    loaded: LoadedModel, params: Params, packing: Packing, group: int, how: Scoring, scored: Callable[[int], None]
) -> np.ndarray:
    remedies = fewer_rows(how.rows_per_device), more_devices(loaded.mesh)
    with enough_memory(f"scoring {packing.describe()}", *remedies):
        return score_packed(
            loaded.model.rows, params, packing, group, normalize=how.normalize, mesh=loaded.mesh, scored=scored
        )


def refuse_nonfinite(pairs: Sequence[Pair], logps: np.ndarray, *, model: Path) -> None:
    """Raises NonFiniteError where a matrix of [Q, C, R] has a NaN or an infinity, with the queries and the model."""
    bad = [pair.example_id for pair, matrix in zip(pairs, logps, strict=True) if not np.isfinite(matrix).all()]
    if bad:
        raise NonFiniteError(
            f"The log-probs of queries {bad} are not finite; the model in {model} is damaged; bring back a copy."
        )


def fewer_rows(rows_per_device: int) -> str:
    """The remedy for too many tokens at once, to be said in a sentence."""
    name = "rows_per_device" if rows_per_device > 1 else "max_row_tokens"
    return f"lower config.train.{name}" + (f", now {rows_per_device}" if rows_per_device > 1 else "")


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
        chunks = [pairs[start : start + _PART_QUERIES] for start in range(0, len(pairs), _PART_QUERIES)]
        packing = packed(opened, chunks, self.scoring)
        loaded = opened.loaded(self.compute_dtype)
        out.begin()
        say(f"scoring {packing.describe()}")
        first = sum(len(chunk) for number, chunk in enumerate(chunks) if out.stands(f"{number:05d}.jsonl"))
        progress = Progress("scoring", len(pairs), unit="queries", done=first)
        lines: list[Any] = []
        for number in range(len(chunks)):
            before = len(lines)

            def scored(done: int, before: int = before) -> None:
                progress.update(before + done)

            lines += out.part(f"{number:05d}.jsonl", functools.partial(self._lines, loaded, packing, number, scored))
            safe_point()
        return lines

    def _lines(
        self, loaded: LoadedModel, packing: Packing, group: int, scored: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        pairs = packing.groups[group]
        logps = _matrices(loaded, loaded.params, packing, group, self.scoring, scored)
        refuse_nonfinite(pairs, logps, model=self.model.path)
        loss_of = functools.partial(
            sami_loss,
            over_responses_weight=self.over_responses_weight,
            over_constitutions_weight=self.over_constitutions_weight,
        )
        losses, mi_nats = jax.device_get(jax.jit(jax.vmap(loss_of))(logps)), query_mi_nats(logps)
        return [
            {
                "example_id": pair.example_id,
                "logps": matrix.tolist(),
                "loss": float(losses.loss[i]),
                "over_responses": float(losses.over_responses[i]),
                "over_constitutions": float(losses.over_constitutions[i]),
                "mi_nats": float(mi_nats[i]),
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
