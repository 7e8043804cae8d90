"""Training state on disk: saved and restored by Orbax, with a fingerprint that finds what Orbax does not check."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sami_jax.errors import BadDataError, SaveFailedError, StoppedError, is_out_of_memory
from sami_jax.processes import agreed, is_writer
from sami_jax.types import Array, TrainState

KEPT = 2  # checkpoints, the newest ones


class Checkpoints:
    """The checkpoints of one training stage, newest last; use as a context manager.

    Orbax has no checksum on array data (a flipped bit restores silently) and casts dtypes silently. So every save
    carries an integer fingerprint of all leaves, which no sharding changes, and a restore that does not match it is set
    aside.
    """

    def __init__(self, folder: Path, *, keep: int = KEPT):
        """Opens the folder.

        Args:
          folder: made if missing; only the holder of the run's lock may use it.
          keep: how many of the newest to keep.
        """
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            step_prefix="step",
            step_format_fixed_length=8,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,  # after a failed save, its threads would keep the process for 5 minutes
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: TrainState) -> None:
        """Saves the state, and returns when it is on disk. A failed asynchronous save would stay silent.

        Raises:
          SaveFailedError: the disk is full or not writable.
        """
        step = int(state.step)
        meta = {"fingerprint": fingerprint(state)}
        try:
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), meta=ocp.args.JsonSave(meta)),
                force=True,
            )
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax raises many kinds, down to a bare Exception
            if is_out_of_memory(error):
                raise
            raise SaveFailedError(
                f"{self._folder}: step {step} could not be saved ({error}); free some space."
            ) from error
        if not saved:
            raise SaveFailedError(f"{self._folder}: step {step} was not saved, since it exists already.")

    def save_if_stopped(self, state: TrainState, safe_point: Callable[[], None]) -> None:
        """Calls `safe_point`; where it raises, because someone asked to stop, saves first."""
        try:
            safe_point()
        except StoppedError:
            self.save(state)
            raise

    def restore_latest(self, target: TrainState) -> TrainState | None:
        """The newest sound checkpoint, or None where none was ever saved.

        Args:
          target: state of the same structure, shapes, dtypes and shardings; its values are not read.

        Raises:
          BadDataError: there are checkpoints, but all are damaged. Nothing starts afresh by itself.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), target
        )
        for step in steps:
            try:
                state, meta = self._read(step, abstract)
                if meta["fingerprint"] == fingerprint(state):
                    return state
                reason = "its contents do not match their fingerprint"
            except Exception as error:  # a damaged file surfaces as almost any kind
                if _is_no_damage(error):
                    raise
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            aside = self._folder / f"damaged-step-{step}"
            with agreed():
                if is_writer():
                    shutil.rmtree(aside, ignore_errors=True)
                    self._step_folder(step).rename(aside)
            self._manager.reload()  # it lists steps once; without this, it would refuse to save this step again
            if is_writer():
                print(
                    f"warning: the checkpoint of step {step} is damaged ({reason}); it was set aside as {aside}.",
                    file=sys.stderr,
                    flush=True,
                )
        if steps:
            raise BadDataError(f"{self._folder}: no checkpoint can be read; delete the folder to train from the start.")
        return None

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract._asdict()), meta=ocp.args.JsonRestore()),
        )
        return TrainState(**restored["state"]), restored["meta"]

    def _step_folder(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}"


def _is_no_damage(error: Exception) -> bool:
    """Whether an error says nothing of the checkpoint: the disk failed, or memory ran out."""
    failing_disk = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return failing_disk or is_out_of_memory(error)


def fingerprint(tree: Any) -> str:
    """16 hex digits that change with any bit of any leaf, and with no sharding.

    Every element's bits are mixed with its position and summed as integers mod 2^32, twice; integer sums have no order.
    """
    total = [0, 0]
    for number, pair in enumerate(jax.device_get(_fingerprints(jax.tree.leaves(tree))), start=1):
        for i in range(2):
            total[i] = (total[i] * 31 + int(pair[i]) * (2 * number + 1)) % 2**32
    return f"{total[0]:08x}{total[1]:08x}"


# All leaves in one program: several at once, each with sums over all processes, lock each other on CPU (gloo).
@jax.jit
def _fingerprints(leaves: list[Array]) -> list[tuple[Array, Array]]:
    return [_leaf_fingerprint(jnp.asarray(leaf)) for leaf in leaves]


def _leaf_fingerprint(leaf: Array) -> tuple[Array, Array]:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, unsigned)
    bits = bits.astype(jnp.uint32)
    # Mod 2^32, counted along each axis: a reshape would gather a sharded leaf whole on every device.
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)

    def mixed(multiplier: int, odd: int) -> Array:
        weight = (position * jnp.uint32(multiplier) + jnp.uint32(odd)) | jnp.uint32(1)
        word = bits ^ (bits >> jnp.uint32(15))
        return jnp.sum(word * weight, dtype=jnp.uint32)

    return mixed(2654435761, 2246822519), mixed(2246822519, 3266489917)
