"""Checkpoints come back bit by bit, or not at all: damage of every kind is found, set aside and survived."""

import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import doubles
from sami_jax.checkpoints import Checkpoints, fingerprint
from sami_jax.errors import BadDataError, SaveFailedError, StoppedError
from sami_jax.types import TrainState

# A read that fails leaves coroutines of Orbax unawaited; they complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step: int) -> TrainState:
    """Random bits, which do not compress: a flipped bit lands in the numbers rather than in a format's header."""
    rng = np.random.default_rng(step)
    params = {
        "matrix": jnp.asarray(rng.normal(size=(64, 40)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(7, 3)), jnp.bfloat16),
    }
    moments = (jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype), params), jnp.asarray(step, jnp.int32))
    return TrainState(params, moments, jnp.asarray(step, jnp.int32))


def save(folder: Path, *steps: int) -> None:
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in steps:
            checkpoints.save(state(step))


def restore(folder: Path) -> TrainState | None:
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_latest(state(0))


def array_file(folder: Path, step: int) -> Path:
    files = [path for path in (folder / f"step_{step:08d}" / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path: Path, *, place: int | None = None, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1 << bit
    path.write_bytes(data)


class TestSaveAndRestore:
    def test_bitwise(self, tmp_path, capsys):
        save(tmp_path / "checkpoints", 3)
        assert doubles.same_bits(restore(tmp_path / "checkpoints"), state(3))
        assert capsys.readouterr().err == ""

    def test_the_newest_counts_and_old_ones_go(self, tmp_path, capsys):
        with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
            for step in (2, 10, 9):  # 10 is newer than 9, whatever the order of their names
                checkpoints.save(state(step))
            assert int(checkpoints.restore_latest(state(0)).step) == 10
        assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 2

    def test_nothing_saved_is_none(self, tmp_path, capsys):
        assert restore(tmp_path / "checkpoints") is None

    def test_an_unfinished_save_does_not_count(self, tmp_path, capsys):
        save(tmp_path / "checkpoints", 1)
        torn = tmp_path / "checkpoints" / "step_00000002.orbax-checkpoint-tmp"
        torn.mkdir()
        (torn / "half").write_bytes(b"\0" * 100)
        assert int(restore(tmp_path / "checkpoints").step) == 1
        assert capsys.readouterr().err == ""

    def test_the_targets_shardings_are_followed(self, tmp_path, capsys):
        save(tmp_path / "checkpoints", 4)
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
        whole = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec("fsdp"))
        target = jax.tree.map(lambda x: jax.device_put(x, split if x.shape == (64, 40) else whole), state(0))
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            restored = checkpoints.restore_latest(target)
        assert restored.params["matrix"].sharding == split and restored.params["half"].sharding == whole
        assert doubles.same_bits(restored, state(4))

    def test_a_step_is_saved_once(self, tmp_path, capsys):
        save(tmp_path / "checkpoints", 1)
        with Checkpoints(tmp_path / "checkpoints") as checkpoints, pytest.raises(SaveFailedError):
            checkpoints.save(state(1))

    def test_a_full_disk_is_a_save_failure_and_loses_nothing(self, tmp_path, capsys):
        # A limit on the size of files stands for the disk: the write of the array fails in the kernel, half-way.
        big = state(2)._replace(params=jnp.asarray(np.random.default_rng(0).random(60000), jnp.float32))
        target = jax.tree.map(jnp.zeros_like, big)
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            checkpoints.save(big._replace(step=jnp.asarray(1, jnp.int32)))
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            try:
                with pytest.raises(SaveFailedError, match=r"step 2 could not be saved .*free some space"):
                    checkpoints.save(big)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert int(checkpoints.restore_latest(target).step) == 1
            checkpoints.save(big)  # once there is space, the same step can be saved
            assert doubles.same_bits(checkpoints.restore_latest(target), big)

    def test_a_folder_that_cannot_be_written_is_a_save_failure(self, tmp_path, capsys):
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            (tmp_path / "checkpoints").rmdir()
            (tmp_path / "checkpoints").write_text("a file where the folder was")
            with pytest.raises(SaveFailedError, match="step 1 could not be saved"):
                checkpoints.save(state(1))


class TestSaveIfStopped:
    def test_saves_first_and_then_stops(self, tmp_path):
        def stop():
            raise StoppedError("asked to stop")

        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            with pytest.raises(StoppedError):
                checkpoints.save_if_stopped(state(2), stop)
        assert doubles.same_bits(restore(tmp_path / "checkpoints"), state(2))

    def test_otherwise_saves_nothing(self, tmp_path):
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            checkpoints.save_if_stopped(state(2), lambda: None)
        assert restore(tmp_path / "checkpoints") is None


class TestDamage:
    @pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
    def test_is_set_aside_and_the_one_before_is_used(self, tmp_path, capsys, damage):
        folder = tmp_path / "checkpoints"
        save(folder, 1, 2)
        damage(array_file(folder, 2))
        assert doubles.same_bits(restore(folder), state(1))
        [sentence] = capsys.readouterr().err.splitlines()
        aside = tmp_path / "checkpoints" / "damaged-step-2"
        assert "step 2 is damaged" in sentence and str(aside) in sentence
        assert aside.is_dir() and not (folder / "step_00000002").exists()

    def test_a_flipped_bit_is_found_by_the_fingerprint(self, tmp_path, capsys):
        # Orbax reads the file without complaint; were this not so, the test above would say nothing of ours.
        save(tmp_path / "checkpoints", 1, 2)
        flip_bit(array_file(tmp_path / "checkpoints", 2))
        restore(tmp_path / "checkpoints")
        assert "fingerprint" in capsys.readouterr().err

    def test_training_goes_on_and_saves_the_damaged_step_again(self, tmp_path, capsys):
        folder = tmp_path / "checkpoints"
        save(folder, 1, 2)
        truncate(array_file(folder, 2))
        with Checkpoints(folder) as checkpoints:
            assert int(checkpoints.restore_latest(state(0)).step) == 1
            for step in (2, 3, 4):
                checkpoints.save(state(step))
        capsys.readouterr()
        assert doubles.same_bits(restore(folder), state(4))
        assert capsys.readouterr().err == ""

    def test_several_in_a_row(self, tmp_path, capsys):
        folder = tmp_path / "checkpoints"
        save(folder, 1, 2, 3)
        for step in (2, 3):
            flip_bit(array_file(folder, step))
        assert int(restore(folder).step) == 1
        first, second = capsys.readouterr().err.splitlines()
        assert "step 3" in first and "step 2" in second

    def test_all_damaged_is_bad_data_and_no_fresh_start(self, tmp_path, capsys):
        folder = tmp_path / "checkpoints"
        save(folder, 1, 2)
        for step in (1, 2):
            truncate(array_file(folder, step))
        with pytest.raises(BadDataError, match="no checkpoint can be read") as caught:
            restore(folder)
        assert str(folder) in str(caught.value) and len(capsys.readouterr().err.splitlines()) == 2

    def test_a_cast_is_no_restore(self, tmp_path, capsys):
        # Orbax would cast float32 to the target's bfloat16 in silence.
        save(tmp_path / "checkpoints", 1)
        target = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state(0))
        with Checkpoints(tmp_path / "checkpoints") as checkpoints, pytest.raises(BadDataError):
            checkpoints.restore_latest(target)


TREE = {
    "float32": np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32),
    "bfloat16": np.asarray(jnp.asarray(np.random.default_rng(1).normal(size=(8, 8)), jnp.bfloat16)),
    "int32": np.arange(-8, 8, dtype=np.int32),
    "bool": np.arange(16) % 3 == 0,
    "step": np.asarray(5, np.int32),
}


def with_flipped_bit(tree: dict, rng: np.random.Generator) -> tuple[dict, str]:
    name = str(rng.choice([name for name in tree if name != "bool"]))
    leaf = tree[name]
    raw = np.frombuffer(leaf.tobytes(), np.uint8).copy()
    place, bit = int(rng.integers(raw.size)), int(rng.integers(8))
    raw[place] ^= np.uint8(1 << bit)
    flipped = np.frombuffer(raw.tobytes(), leaf.dtype).reshape(leaf.shape)
    return tree | {name: flipped}, f"{name}, byte {place}, bit {bit}"


class TestFingerprint:
    def test_no_sharding_changes_it(self):
        mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        specs = [(), ("a",), ("b",), (None, "b"), ("a", "b"), ("b", "a"), (("a", "b"),)]
        for spec in specs:
            sharding = NamedSharding(mesh, PartitionSpec(*spec))
            whole = NamedSharding(mesh, PartitionSpec())
            placed = {
                name: jax.device_put(leaf, sharding if leaf.ndim >= len(spec) else whole) for name, leaf in TREE.items()
            }
            assert fingerprint(placed) == fingerprint(TREE), spec

    def test_forty_random_single_bit_flips_each_change_it(self):
        rng, before = np.random.default_rng(7), fingerprint(TREE)
        for _ in range(40):
            flipped, what = with_flipped_bit(TREE, rng)
            assert fingerprint(flipped) != before, what

    def test_a_bool_counts(self):
        changed = TREE["bool"].copy()
        changed[3] = not changed[3]
        assert fingerprint(TREE | {"bool": changed}) != fingerprint(TREE)

    def test_places_count(self):
        swapped = TREE["float32"].copy()
        swapped[0, 0], swapped[0, 1] = swapped[0, 1], swapped[0, 0]
        assert fingerprint(TREE | {"float32": swapped}) != fingerprint(TREE)
        a, b = np.float32([1, 2]), np.float32([3, 4])
        assert fingerprint({"a": a, "b": b}) != fingerprint({"a": b, "b": a})

    def test_signed_zeros_and_nan_payloads_count(self):
        payloads = np.array([0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
        assert len({fingerprint([payloads[i : i + 1]]) for i in range(4)}) == 4

    def test_bfloat16_is_not_float32(self):
        values = np.random.default_rng(2).normal(size=9).astype(np.float32)
        assert fingerprint([jnp.asarray(values, jnp.bfloat16)]) != fingerprint([values])

    def test_is_part_of_the_format(self):
        # A checkpoint written by an older version must still match: the fingerprint of 0..15 may never change.
        assert fingerprint([np.arange(16, dtype=np.float32)]) == "eb41b880754cd480"
