"""The disk space that a run needs, known before it takes any."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sami_jax.checkpoints import KEPT
from sami_jax.config.training import TrainConfig
from sami_jax.errors import SaveFailedError
from sami_jax.model.decoder import sharded_params
from sami_jax.model.shape import DecoderConfig
from sami_jax.stage_folder import DONE
from sami_jax.training import abstract_state, make_optimizer


def check_disk(workdir: Path, train: TrainConfig, *, iterations: int, shape: DecoderConfig, mesh: Mesh) -> str | None:
    """Says in a sentence how much more a run directory will hold at its fullest; None where nothing is left to train.

    Checkpoints and exports are counted, beside which samples and evaluations are small. A base that is still to be
    pretrained lies elsewhere.

    Args:
      workdir: the run directory, which exists.
      train: how the run trains.
      iterations: how many there are.
      shape: of its base model.
      mesh: the devices.

    Raises:
      BadConfigError: the mesh does not fit the model.
      SaveFailedError: less is free.
    """
    folders = [workdir / f"iter_{iteration:03d}" for iteration in range(1, iterations + 1)]
    steps = [n for n, folder in zip(train.steps, folders, strict=False) if not _is_exported(folder)]
    if not steps:
        return None
    params = sharded_params(shape, mesh, train.weights_dtype)
    state = _bytes_of(abstract_state(params, make_optimizer(train)))
    # An interrupted iteration has some of its checkpoints already.
    there = sum(_bytes_in(folder / "train" / "checkpoints") for folder in folders if not _is_exported(folder))
    needed = max(0, peak_bytes(train, steps, state=state, weights=_bytes_of(params)) - there)
    free = shutil.disk_usage(workdir).free
    parts = f"a checkpoint takes {human(state)}, an exported model {human(_bytes_of(params))}"
    if needed > free:
        keep = " set config.train.keep_checkpoints=false," if train.keep_checkpoints else ""
        raise SaveFailedError(
            f"{workdir} will need up to {human(needed)} more ({parts}), but {human(free)} are free there; free some "
            f"space,{keep} or choose another --workdir."
        )
    return f"{workdir} will need up to {human(needed)} more ({parts}); {human(free)} are free."


def peak_bytes(train: TrainConfig, steps: Sequence[int], *, state: int, weights: int) -> int:
    """Most bytes that checkpoints and exports of some iterations take at one time.

    Args:
      train: the settings.
      steps: of each iteration.
      state: bytes of a checkpoint.
      weights: bytes of an export.
    """
    held = peak = 0
    for count in steps:
        saves = math.ceil(count / train.checkpoint_every)
        kept = min(saves, KEPT) * state
        writing = min(saves, KEPT + 1) * state  # the oldest goes when the newest stands
        peak = max(peak, held + writing, held + kept + weights)
        held += weights + (kept if train.keep_checkpoints else 0)
    return peak


def human(size: int) -> str:
    """A size for people: `1.5 GB`, where 1 GB is 10^9 bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _bytes_of(specs: Any) -> int:
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in jax.tree.leaves(specs))


def _is_exported(folder: Path) -> bool:
    return (folder / "export" / DONE).is_file()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
