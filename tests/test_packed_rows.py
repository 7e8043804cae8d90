"""Packed rows against one sequence per cell: matrix, loss, every gradient, twenty steps; and how rows are filled."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import doubles
from one_per_cell import logps_one_per_cell, loss_one_per_cell
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.training import TrainConfig
from sami_jax.data.pairs import Pair
from sami_jax.losses import sami_loss
from sami_jax.model.decoder import abstract_params, make_model
from sami_jax.scoring.matrices import contrastive_logps, shardings_of_rows
from sami_jax.sharding import make_mesh, param_shardings, put_on_devices
from sami_jax.training import init_state, make_optimizer, make_train_step
from sami_jax.types import Array, ContrastiveRows, Params, RowModel
from tiny_models import FAMILIES, random_params

WINDOW = 5  # shorter than most prompts and some responses
DENSE = dataclasses.replace(FAMILIES["mistral"], sliding_window=None)
SHAPES = {"dense": DENSE, "experts": FAMILIES["mixtral"]}
# The largest difference over the largest value, of a matrix, of the loss, or of one leaf of the gradient. Float32 sums
# in another order leave up to 1.5e-6 (20 times that of a matrix); a planted bug moves them by 5e-3 and more.
CLOSE = 1e-5


def shape_of(name: str, *, window: int | None):
    return dataclasses.replace(SHAPES[name], sliding_window=window)


def weights(shape, *, seed: int = 0) -> Params:
    """Of std 1 / sqrt(fan in), as a trained model's: with 0.02, a wrong position would hardly show."""
    params = random_params(shape, seed=seed, stddev=shape.embed_dim**-0.5)
    return {**params, "embedding": params["embedding"] * np.float32(shape.embed_dim**0.5)}


def ragged(count: int, *, constitutions: int, seed: int = 0) -> list[Pair]:
    """Prompts and responses of many lengths, among them prompts and responses of one token."""
    some = doubles.random_pairs(
        count, vocab=DENSE.vocab_size, seed=seed, constitutions=constitutions, prompts=(3, 19), responses=(1, 11)
    )
    least = doubles.random_pairs(
        1, vocab=DENSE.vocab_size, seed=seed + 1, constitutions=constitutions, prompts=(1, 1), responses=(1, 2)
    )
    return some + [dataclasses.replace(least[0], example_id="least")]


def packed_matrix(model: RowModel, params: Params, batch: ContrastiveRows) -> Array:
    """[Q, C, R] of one micro-batch, in the order of its queries."""
    return contrastive_logps(model, params, batch, normalize="mean")


def packed_loss(model: RowModel, params: Params, batch: ContrastiveRows) -> tuple[Array, Array]:
    matrix = packed_matrix(model, params, batch)
    return jnp.mean(jax.vmap(sami_loss)(matrix).loss), matrix


def reference_loss(model: RowModel, params: Params, pairs: list[Pair]) -> tuple[Array, Array]:
    matrix = logps_one_per_cell(model, params, pairs)
    return jnp.mean(jax.vmap(sami_loss)(matrix).loss), matrix


def compiled(function, *args):
    """Called without the optimizations that cost most of these tests' time."""
    return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": "0"})(*args)


REFERENCES: dict = {}


def references(model: RowModel, params: Params, pairs: list[Pair]):
    """((loss, matrix), gradient) of one sequence per cell, for the one model of a module's weights."""
    key = model, tuple(pairs)
    if key not in REFERENCES:
        of = jax.value_and_grad(functools.partial(reference_loss, model, pairs=pairs), has_aux=True)
        REFERENCES[key] = compiled(of, params)
    return REFERENCES[key]


def difference(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def differences(model: RowModel, params: Params, pairs: list[Pair], batch: ContrastiveRows) -> dict[str, float]:
    """Of matrix, loss and each leaf of the gradient, between a batch of all pairs and one sequence per cell."""
    of = jax.value_and_grad(lambda p, b: packed_loss(model, p, b), has_aux=True)
    (loss, matrix), gradient = compiled(of, params, batch)
    (expected_loss, expected), gradients = references(model, params, pairs)
    order = np.argsort(batch.queries)
    found = {"matrix": difference(np.asarray(matrix)[order], expected), "loss": difference(loss, expected_loss)}
    for (path, leaf), theirs in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(gradients), strict=True):
        assert float(np.abs(theirs).max()) > 1e-4  # every weight matters to the loss
        found[jax.tree_util.keystr(path)] = difference(leaf, theirs)
    return found


def one_batch(pairs: list[Pair]) -> ContrastiveRows:
    """All pairs in one micro-batch, two rows of several packs each."""
    total = sum(len(prompt) + sum(map(len, one.response_ids)) for one in pairs for prompt in one.prompt_ids)
    packing = doubles.packing(pairs, rows=2, widest=4096, multiple=3 * total // 4)
    [batch] = packing.micro_batches(0)
    restarts = np.sum(np.diff(batch.rows.positions, axis=1) < 0, axis=1)
    assert restarts.max() > 2 * len(pairs[0].response_ids)
    return batch


class TestEquality:
    @pytest.mark.parametrize(
        ("family", "constitutions", "window"),
        # Experts compile for ten seconds, and so take turns.
        [*itertools.product(["dense"], [2, 3, 4, 8], [None, WINDOW])]
        + [*zip(["experts"] * 4, [2, 3, 4, 8], [None, WINDOW, None, WINDOW], strict=True)],
    )
    def test_matrix_loss_and_gradients(self, family, constitutions, window):
        shape = shape_of(family, window=window)
        pairs = ragged(3 if constitutions < 8 else 2, constitutions=constitutions, seed=constitutions)
        found = differences(make_model(shape).rows, weights(shape), pairs, one_batch(pairs))
        assert max(found.values()) < CLOSE, found

    @pytest.mark.parametrize(("family", "window", "mesh"), [("dense", WINDOW, "data"), ("experts", None, "expert")])
    def test_on_eight_devices(self, family, window, mesh):
        """Packs of a query on different devices, in rows of random order."""
        shape, devices = shape_of(family, window=window), make_mesh(MeshConfig(**{mesh: 4, "fsdp": 2}))
        pairs = ragged(7, constitutions=4)
        batch = doubles.packing(pairs, shards=8, rows=2, widest=128, multiple=128)
        params = weights(shape)
        [rows] = batch.micro_batches(0)
        of_queries = [set(cells[cells < 128] // 16) for cells in np.asarray(rows.cells)]
        assert any(a & b for a, b in itertools.combinations(of_queries, 2))
        placed = put_on_devices(params, param_shardings(devices, *abstract_params(shape)))
        model = make_model(shape, mesh=devices).rows
        of = jax.jit(jax.value_and_grad(functools.partial(packed_loss, model), has_aux=True))
        (loss, matrix), gradient = of(placed, put_on_devices(rows, shardings_of_rows(devices)))
        (expected_loss, expected), gradients = references(make_model(shape).rows, params, pairs)
        assert difference(np.asarray(matrix)[np.argsort(rows.queries)], expected) < CLOSE
        assert difference(loss, expected_loss) < CLOSE
        leaves = zip(jax.tree.leaves(gradient), jax.tree.leaves(gradients), strict=True)
        assert max(difference(ours, theirs) for ours, theirs in leaves) < CLOSE

    def test_twenty_steps(self):
        """Of AdamW, in micro-batches of two rows, against one sequence per cell in one batch."""
        shape = shape_of("dense", window=WINDOW)
        pairs, model, params = ragged(5, constitutions=2), make_model(shape).rows, weights(shape)
        train = TrainConfig(queries_per_step=len(pairs), learning_rate=1e-3, eps=1e-4, weight_decay=0.01)
        packing, optimizer = doubles.packing(pairs, rows=2, widest=96), make_optimizer(train)
        assert packing.depth > 1
        batch = jax.tree.map(jnp.asarray, packing.stacked(0))
        step, state = make_train_step(model, train), init_state(jax.tree.map(jnp.copy, params), optimizer)
        expected = jax.tree.map(jnp.asarray, params), optimizer.init(params)

        def reference(params, opt_state):
            loss, gradient = jax.value_and_grad(functools.partial(loss_one_per_cell, model, pairs=pairs))(params)
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(gradient, opt_state, params)
            return loss, (optax.apply_updates(params, updates), opt_state)

        fast = {"xla_backend_optimization_level": "0"}
        reference, losses = jax.jit(reference).lower(*expected).compile(fast), []
        for _ in range(20):
            state, metrics = step(state, None, batch)
            loss, expected = reference(*expected)
            losses.append((float(metrics.loss), float(loss)))
        ours, theirs = np.transpose(losses)
        assert theirs[-1] < 0.7 * theirs[0]  # it is a training
        # A float32 gradient differs by 1e-6 of its size; an update feels that through eps, and steps add up.
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)


class TestWhoSeesWhom:
    def test_another_response_moves_no_other_cell(self):
        shape = shape_of("dense", window=None)
        pairs = ragged(2, constitutions=3)
        responses = [list(ids) for ids in pairs[0].response_ids]
        responses[1] = [(token + 1) % shape.vocab_size for token in responses[1]]
        other = dataclasses.replace(pairs[0], response_ids=tuple(map(tuple, responses)))
        of = jax.jit(functools.partial(packed_matrix, make_model(shape).rows, weights(shape)))
        before, after = (np.asarray(of(one_batch(some))) for some in (pairs, [other, *pairs[1:]]))
        query = list(one_batch(pairs).queries).index(0)
        moved = before != after
        assert moved[query, :, 1].all()
        moved[query, :, 1] = False
        assert not moved.any()

    def test_another_prompt_moves_its_own_row_of_the_matrix_only(self):
        shape = shape_of("experts", window=None)
        pairs = ragged(2, constitutions=3)
        prompts = [list(ids) for ids in pairs[1].prompt_ids]
        prompts[2][0] = (prompts[2][0] + 1) % shape.vocab_size
        other = dataclasses.replace(pairs[1], prompt_ids=tuple(map(tuple, prompts)))
        of = jax.jit(functools.partial(packed_matrix, make_model(shape).rows, weights(shape)))
        before, after = (np.asarray(of(one_batch(some))) for some in (pairs, [pairs[0], other, *pairs[2:]]))
        query = list(one_batch(pairs).queries).index(1)
        moved = np.abs(before - after) > 1e-6  # experts sort tokens, and so sum in another order
        assert moved[query, 2].all()
        moved[query, 2] = False
        assert not moved.any()


def _ends_of_rows(batch: ContrastiveRows) -> np.ndarray:
    return np.full_like(batch.rows.ends, batch.rows.ends.shape[1])


def _ends_of_packs(batch: ContrastiveRows) -> np.ndarray:
    """The end of the pack for each of its slots: that of the shared part, which lasts longest."""
    return np.maximum.accumulate(batch.rows.ends, axis=1)


def _one_earlier(batch: ContrastiveRows) -> np.ndarray:
    slots = np.arange(batch.rows.ends.shape[1])
    return np.maximum(batch.rows.ends - 1, slots + 1).astype(np.int32)


def _counted_through(batch: ContrastiveRows) -> np.ndarray:
    """Positions that go on from one response to the next."""
    positions = np.array(batch.rows.positions)
    for row, ends in zip(positions, _ends_of_packs(batch), strict=True):
        for end in np.unique(ends):
            places = np.flatnonzero(ends == end)
            row[places] = np.arange(len(places))
    return positions


def _rolled(batch: ContrastiveRows) -> np.ndarray:
    """For each slot with a label, the token that happens to stand behind it."""
    return np.roll(batch.rows.tokens, -1, axis=1).reshape(-1)[batch.at]


PLANTED = {
    "plain causal over the row": lambda b: b._replace(rows=b.rows._replace(ends=_ends_of_rows(b))),
    "responses that see each other": lambda b: b._replace(rows=b.rows._replace(ends=_ends_of_packs(b))),
    "positions not restarted": lambda b: b._replace(rows=b.rows._replace(positions=_counted_through(b))),
    "labels a roll of the ids": lambda b: b._replace(labels=_rolled(b)),
    "an end one too early": lambda b: b._replace(rows=b.rows._replace(ends=_one_earlier(b))),
}


class TestPlantedBugs:
    """That the equality above would notice."""

    @pytest.mark.parametrize("bug", PLANTED)
    def test_moves_matrix_loss_and_gradients(self, bug):
        shape = shape_of("dense", window=None)
        pairs = ragged(3, constitutions=2)
        batch = PLANTED[bug](one_batch(pairs))
        found = differences(make_model(shape).rows, weights(shape), pairs, batch)
        assert found["matrix"] > 300 * CLOSE and found["loss"] > 30 * CLOSE, found
        assert max(found.values()) > 1e4 * CLOSE, found

    def test_a_window_counted_in_slots_moves_them(self):
        """As a model would have it that takes slots for positions where it looks for the window."""
        shape = shape_of("dense", window=WINDOW)
        pairs = ragged(3, constitutions=2)
        batch, model = one_batch(pairs), make_model(shape).rows
        by_slot = make_model(shape_of("dense", window=None)).rows  # its window is cut out of `ends` below
        slots = np.arange(batch.rows.ends.shape[1], dtype=np.int32)
        cut = np.minimum(batch.rows.ends, slots + WINDOW).astype(np.int32)
        params = weights(shape)
        right = np.asarray(packed_matrix(model, params, batch))
        wrong = np.asarray(packed_matrix(by_slot, params, batch._replace(rows=batch.rows._replace(ends=cut))))
        assert difference(wrong, right) > 300 * CLOSE
