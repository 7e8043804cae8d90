"""The export stage: trained weights as a Hugging Face folder, and such a folder in another dtype."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sami_jax.checkpoints import Checkpoints, fingerprint
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.training import TrainConfig
from sami_jax.errors import BadDataError, SaveFailedError
from sami_jax.huggingface.folder import save_finetuned
from sami_jax.huggingface.hub import model_name
from sami_jax.huggingface.opened import LoadedModel, load_model, open_model
from sami_jax.safe_point import SafePoint
from sami_jax.scoring.matrices import all_logits
from sami_jax.sharding import batch_sharding, batch_shards, gather, put_on_devices
from sami_jax.stage_folder import read_done
from sami_jax.stages.stage import Output, Source, Stage, settings_but
from sami_jax.stages.train import abstract_train_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Stage):
    """The weights of a finished training as a Hugging Face folder.

    Attributes:
      iteration: 1, 2, ....
      base: folder of the base model, whose config and tokenizer are kept.
      trained: folder of the training.
      train: how it was trained; whether its checkpoints are kept changes nothing in the folder.
      card: README.md.
      mesh: the devices.
    """

    name = "export"

    iteration: int
    base: Source
    trained: Source
    train: TrainConfig = settings_but("checkpoint_every", "keep_checkpoints")
    card: str
    mesh: MeshConfig

    @classmethod
    def of(cls, config: RunConfig, iteration: int, *, base: Source, trained: Source) -> "Export":
        """The stage of a run's iteration."""
        return cls(
            iteration=iteration,
            base=base,
            trained=trained,
            train=config.train,
            card=model_card(config.train, iteration, base=model_name(base.path)),
            mesh=config.mesh,
        )

    @property
    def made_of(self) -> str:
        """The training's folder, where its checkpoints go."""
        return "" if self.train.keep_checkpoints else self.trained.path.name

    def make(self, out: Output, safe_point: SafePoint) -> Any:
        """Makes config.json, safetensors, tokenizer, generation config and README.md; see `Stage.make`.

        Raises:
          BadDataError: the training's last checkpoint is damaged.
        """
        finished = read_done(self.trained.path)["counts"]
        opened = open_model(self.base.path, self.mesh, "float32")
        with Checkpoints(self.trained.path / "checkpoints") as checkpoints:
            state = checkpoints.restore_latest(abstract_train_state(opened, self.train))
        if state is None or fingerprint(state) != finished["state"]:
            raise BadDataError(
                f"{self.trained.path}: the checkpoint of its last step, {finished['steps']}, is missing or damaged; "
                "delete this folder to have it made anew."
            )
        safe_point()
        out.build()
        dtype, source = self.train.weights_dtype, self.base.path
        save_finetuned(out.folder, state.params, opened.model.config, dtype=dtype, source=source, card=self.card)
        return {"step": int(state.step)}


def model_card(train: TrainConfig, iteration: int, *, base: str) -> str:
    """README.md of a trained folder: what it was made from (`hub.model_name` of the base), and how."""
    return (
        f"# {base.partition('@')[0]} after SAMI, iteration {iteration}\n\n"
        f"Trained from `{base}` by sami_jax with SAMI (arXiv:2404.14313): "
        f"{train.steps[iteration - 1]} optimizer steps of {train.queries_per_step} queries, learning rate "
        f"{train.learning_rate:g} ({train.optimizer}), {train.normalize} log-probs, KL weight {train.kl_beta:g}.\n"
    )


def convert(mesh: MeshConfig, *, model: Path, out: Path, dtype: str, verify: bool) -> None:
    """Writes a model folder anew, its weights in another dtype.

    Args:
      mesh: the devices.
      model: the folder.
      out: the new one.
      dtype: "float32", "bfloat16" or "float16".
      verify: load `out` again, and compare the logits of random tokens.

    Raises:
      BadDataError: `model` cannot be used, or `out` holds files.
      NonFiniteError: a weight is not finite in `dtype`.
      SaveFailedError: the disk is full or not writable, or `out` gives other logits than the rounded weights do.
    """
    loaded = load_model(model, mesh, "float32")  # bfloat16 would round differences away
    card = (model / "README.md").read_text(encoding="utf-8") if (model / "README.md").is_file() else ""
    save_finetuned(out, loaded.params, loaded.model.config, dtype=dtype, source=model, card=card)
    if verify:
        _verify(out, loaded, mesh, dtype=dtype)


def _verify(out: Path, loaded: LoadedModel, mesh: MeshConfig, *, dtype: str) -> None:
    """Loads a written model folder and compares its logits with those of the weights it was written from.

    Args:
      out: the written folder.
      loaded: the float32 weights.
      mesh: the devices.
      dtype: what they were rounded to.

    Raises:
      SaveFailedError: the logits of random tokens are others.
    """
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), loaded.params)
    shape = (batch_shards(loaded.mesh), min(64, loaded.model.config.max_positions))
    tokens = np.random.default_rng(0).integers(0, loaded.model.config.vocab_size, shape).astype(np.int32)
    on_devices = put_on_devices(tokens, batch_sharding(loaded.mesh))
    logits = jax.jit(functools.partial(all_logits, loaded.model.rows))
    written = load_model(out, mesh, "float32").params
    before, after = (gather(logits(params, on_devices)) for params in (rounded, written))
    if not np.array_equal(before, after):
        raise SaveFailedError(
            f"{out} does not give the logits of the weights it was made from (largest difference "
            f"{np.abs(before - after).max():.3g}); do not use it, and export again."
        )
