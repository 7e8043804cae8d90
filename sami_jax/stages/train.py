"""The training stage: the base model learns from contrastive pairs, step by step, from the newest checkpoint on."""

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from sami_jax.checkpoints import Checkpoints, fingerprint
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.training import TrainConfig
from sami_jax.data.pairs import Pair, read_pairs
from sami_jax.errors import BadDataError, NonFiniteError, enough_memory
from sami_jax.files import write_json
from sami_jax.huggingface.opened import OpenModel, open_model
from sami_jax.processes import is_writer
from sami_jax.progress import Progress, say
from sami_jax.safe_point import SafePoint
from sami_jax.scoring.matrices import shardings_of_rows
from sami_jax.scoring.packed_rows import Packing
from sami_jax.scoring.reference import KeptReference, group_hidden, head_of
from sami_jax.sharding import device_bytes, more_devices, put_on_devices
from sami_jax.stages.score import Scoring, fewer_rows, packed
from sami_jax.stages.stage import Output, Source, Stage, settings_but
from sami_jax.training import (
    StepMetrics,
    abstract_state,
    init_state,
    make_optimizer,
    make_train_step,
    nonfinite_examples,
    pairs_needed,
    query_indices,
)
from sami_jax.types import Boundary, Dtype, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Stage):
    """Algorithm 1, training: always of the base model.

    Attributes:
      iteration: 1, 2, ....
      base: folder of the base model.
      pairs: file of contrastive pairs.
      seed: decides their order, and stochastic rounding.
      train: how; how often weights are saved, and for how long, changes none of them.
      boundary: where a response begins.
      compute_dtype: of activations and matmuls.
      mesh: the devices.
    """

    name = "train"
    outside = "checkpoints"

    iteration: int
    base: Source
    pairs: Source
    seed: int
    train: TrainConfig = settings_but("checkpoint_every", "keep_checkpoints")
    boundary: Boundary
    compute_dtype: Dtype
    mesh: MeshConfig

    @classmethod
    def of(cls, config: RunConfig, iteration: int, *, base: Source, pairs: Source) -> "Train":
        """The stage of a run's iteration."""
        return cls(
            iteration=iteration,
            base=base,
            pairs=pairs,
            seed=config.seed,
            train=config.train,
            boundary=config.prompts.boundary,
            compute_dtype=config.compute_dtype,
            mesh=config.mesh,
        )

    def make(self, out: Output, safe_point: SafePoint) -> Any:
        """Makes `checkpoints/` and `data.json`, the example ids of every step, and logs each step's metrics.

        Raises:
          BadDataError: model or pairs cannot be used, or there are fewer pairs than the steps need.
          NonFiniteError: loss or gradient became NaN or infinite; the queries are named.
        """
        train, count = self.train, self.train.steps[self.iteration - 1]
        head_chunk = train.head_chunk or None
        opened = open_model(self.base.path, self.mesh, self.compute_dtype, remat=train.remat, head_chunk=head_chunk)
        pairs = self._read_pairs(opened)
        packing = self._packed(opened, pairs)
        # Read the weights before the folder is begun, so that weights that are refused leave nothing behind.
        fresh = None if out.stands("checkpoints") else fresh_state(opened, train)
        out.begin()
        out.write("data.json", write_json, [[pair.example_id for pair in step] for step in packing.groups])
        say(f"training on {packing.describe()}")
        step_fn = make_train_step(opened.model.rows, train, seed=self.seed)
        remedies = self._remedies(opened)
        with Checkpoints(out.folder / "checkpoints") as checkpoints:
            state = fresh or checkpoints.restore_latest(abstract_train_state(opened, train))
            state = state or fresh_state(opened, train)
            first = int(state.step)
            kept = self._reference(opened, packing, range(first, count)) if train.kl_beta > 0 else None
            title = f"iteration {self.iteration}: training"
            progress = Progress(title, count, unit="steps", done=first, log_every_s=5.0)
            for step in range(first, count):
                started = time.monotonic()
                work = f"in step {step + 1} of iteration {self.iteration}, on {packing.describe()}"
                with enough_memory(work, *remedies):
                    batch = put_on_devices(packing.stacked(step), shardings_of_rows(opened.mesh, stacked=True))
                    state, metrics = step_fn(state, kept.of(step) if kept else None, batch)
                    finite = bool(metrics.finite)
                if not finite:
                    raise self._not_finite(step, metrics, packing.groups[step])
                scalars = {k: float(v) for k, v in metrics._asdict().items() if k not in ("finite", "query_losses")}
                where = {"iteration": self.iteration, "stage": self.name, "step": step + 1}
                out.log({**where, **scalars, "step_time_s": time.monotonic() - started})
                note = f"loss {scalars['loss']:.4f}, MI {scalars['mi_nats']:.4f} nats"
                progress.update(step + 1, f"{len(pairs)} pairs, {self._passes(pairs):.1f} passes, {note}")
                if (step + 1) % train.checkpoint_every == 0 or step + 1 == count:
                    checkpoints.save(state)
                    safe_point()
                else:
                    checkpoints.save_if_stopped(state, safe_point)
        rows = {"rows": packing.layout.rows, "row_tokens": packing.layout.width, "real_share": packing.real_share}
        return {"steps": count, "pairs": len(pairs), **rows, "state": fingerprint(state)}

    def _read_pairs(self, opened: OpenModel) -> list[Pair]:
        train, steps = self.train, self.train.steps[self.iteration - 1]
        pairs = read_pairs(
            self.pairs.path,
            opened.tokenizer,
            boundary=self.boundary,
            max_positions=opened.model.config.max_positions - train.train_eos,
            vocab_size=opened.model.config.vocab_size,
        )
        passes, needed = self._passes(pairs), pairs_needed(train, self.iteration)
        if len(pairs) < needed:
            raise BadDataError(
                f"{self.pairs.path} holds {len(pairs)} pairs, but {steps} steps of {train.queries_per_step} queries "
                f"need {needed}: each pair would be used {passes:.1f} times, more than "
                f"config.train.passes={train.passes:g}. Give more pairs, lower config.train.steps or "
                f"config.train.queries_per_step, or set config.train.passes={math.ceil(100 * passes) / 100:g}."
            )
        return pairs

    def _packed(self, opened: OpenModel, pairs: Sequence[Pair]) -> Packing:
        """The queries of every step, in rows of one shape."""
        train = self.train
        order = {"seed": self.seed, "iteration": self.iteration, "queries_per_step": train.queries_per_step}
        steps = [
            [pairs[i] for i in query_indices(len(pairs), step, **order)]
            for step in range(train.steps[self.iteration - 1])
        ]
        eos_id = opened.tokenizer.end_id() if train.train_eos else None
        return packed(opened, steps, Scoring.of(train), eos_id=eos_id)

    def _reference(self, opened: OpenModel, packing: Packing, steps: range) -> KeptReference:
        """What the base says of the labels of these steps. Its weights leave the devices again, but for the head."""
        model, hidden = opened.model.rows, {}
        params = opened.load(self.compute_dtype)
        title = f"iteration {self.iteration}: reading the responses with the base, for KL"
        progress = Progress(title, len(steps), unit="steps")
        work = f"computing hidden states of the base, for KL, on {packing.describe()}"
        with enough_memory(work, *self._remedies(opened)):
            for done, step in enumerate(steps, start=1):
                hidden[step] = group_hidden(model, params, packing, step, opened.mesh)
                progress.update(done)
            kept = KeptReference(head_of(model, params), hidden)
        say(f"the base's hidden states at the responses take {kept.host_bytes / 1e9:.1f} GB of this host's memory")
        return kept

    def _passes(self, pairs: Sequence[Pair]) -> float:
        return self.train.steps[self.iteration - 1] * self.train.queries_per_step / len(pairs)

    def _remedies(self, opened: OpenModel) -> list[str]:
        return [
            fewer_rows(self.train.rows_per_device),
            "set config.train.remat=full" if self.train.remat != "full" else "",
            f"lower config.train.head_chunk, now {opened.model.rows.head_chunk}",
            more_devices(opened.mesh),
            _rounded_weights(self.train),
        ]

    def _not_finite(self, step: int, metrics: StepMetrics, pairs: Sequence[Pair]) -> NonFiniteError:
        ids = [pair.example_id for pair in pairs]
        bad = nonfinite_examples(metrics, ids) or ids
        return NonFiniteError(
            f"Step {step + 1} of iteration {self.iteration}: loss {float(metrics.loss)}, gradient norm "
            f"{float(metrics.grad_norm)} are not finite (queries {bad}); the update was not applied. "
            "Look at these queries, and lower config.train.learning_rate if they are sound."
        )


def abstract_train_state(opened: OpenModel, train: TrainConfig) -> TrainState:
    """Shape, dtype and sharding of the state of a training of the model."""
    return abstract_state(opened.abstract_params(train.weights_dtype), make_optimizer(train))


def fresh_state(opened: OpenModel, train: TrainConfig) -> TrainState:
    """The state before the first step: the folder's weights, and the optimizer's beside them."""
    specs = abstract_train_state(opened, train)
    with enough_memory(
        f"making the optimizer's state; with the weights it takes {device_bytes(specs) / 1e9:.1f} GB of each device",
        more_devices(opened.mesh),
        _rounded_weights(train),
    ):
        state = init_state(opened.load(train.weights_dtype), make_optimizer(train))
        return put_on_devices(state, jax.tree.map(lambda spec: spec.sharding, specs))


def _rounded_weights(train: TrainConfig) -> str:
    return "set config.train.weights=bfloat16_stochastic" if train.weights == "float32" else ""


def drop_checkpoints(train: TrainConfig, *, trained: Path) -> None:
    """Deletes the checkpoints of a finished training whose exported model stands, unless they are to be kept."""
    if is_writer() and not train.keep_checkpoints:
        shutil.rmtree(trained / "checkpoints", ignore_errors=True)  # what is left of it goes at the next start
