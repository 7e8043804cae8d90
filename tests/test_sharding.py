"""Meshes and shardings: refusals that name the remedy, and a train step that eight devices do as one does."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import doubles
from sami_jax.config import MeshConfig, TrainConfig
from sami_jax.errors import BadConfigError
from sami_jax.model.decoder import abstract_params, make_model
from sami_jax.scoring import make_batch
from sami_jax.sharding import (
    AXES,
    RULES,
    batch_sharding,
    batch_shards,
    make_mesh,
    padded_size,
    param_shardings,
    place,
    replicated,
)
from sami_jax.training import init_state, make_optimizer, make_train_step, micro_batches
from tiny_models import random_params, tiny_config

SHAPE = tiny_config(vocab_size=32, n_layers=2, embed_dim=16, head_dim=4, mlp_dim=24)


class TestMesh:
    def test_axes_and_sizes(self):
        mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
        assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
        assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}

    def test_a_smaller_mesh_takes_the_first_devices(self):
        assert make_mesh(MeshConfig(data=2)).devices.ravel().tolist() == jax.devices()[:2]

    def test_too_many_devices_names_numbers_and_remedy(self):
        with pytest.raises(BadConfigError, match=r"2 x 4 x 2 = 16 devices.* are 8; .*JAX_NUM_CPU_DEVICES=16"):
            make_mesh(MeshConfig(data=2, fsdp=4, tensor=2))

    def test_batches_are_split_over_data_and_fsdp(self):
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        assert batch_shards(mesh) == 4
        placed = place(np.zeros((4, 3)), batch_sharding(mesh))
        assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 3)}
        assert place(np.zeros(3), replicated(mesh)).is_fully_replicated


class TestPaddedSize:
    @pytest.mark.parametrize(
        ("size", "multiple", "expected"),
        [(1, 32, 32), (32, 32, 32), (33, 32, 64), (512, 32, 512), (513, 32, 576), (1050, 32, 1152), (7, 5, 10)],
    )
    def test_by_hand(self, size, multiple, expected):
        assert padded_size(size, multiple) == expected

    def test_padding_stays_below_an_eighth_and_shapes_are_few(self):
        sizes = np.arange(512, 8193)
        padded = np.array([padded_size(int(size), 32) for size in sizes])
        assert (padded >= sizes).all() and (padded % 32 == 0).all() and (np.diff(padded) >= 0).all()
        assert (padded - sizes < sizes / 8).all()
        assert len(set(padded)) == 1 + 4 * 8  # four doublings


class TestParamShardings:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))

    def test_by_hand(self):
        shapes = {"w": jax.ShapeDtypeStruct((3, 6, 8), jnp.float32), "gain": jax.ShapeDtypeStruct((5,), jnp.float32)}
        axes = {"w": ("layers", "embed", "mlp"), "gain": ("norm",)}
        assert param_shardings(self.mesh, shapes, axes) == {
            "w": NamedSharding(self.mesh, PartitionSpec(None, "fsdp", "tensor")),
            "gain": NamedSharding(self.mesh, PartitionSpec(None)),
        }

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocab_size": 30}, r"vocab axis has 30 entries, which tensor=4 .* config.mesh.tensor .* divisors of 30"),
            ({"embed_dim": 15}, r"embed axis has 15 entries, which fsdp=2 .* config.mesh.fsdp .* divisors of 15"),
            ({"n_kv_heads": 2}, r"kv_heads axis has 2 entries, which tensor=4"),
            ({"mlp_dim": 22}, r"mlp axis has 22 entries"),
        ],
    )
    def test_an_axis_that_cannot_be_shared_is_named_with_the_remedy(self, changes, message):
        sound = {"vocab_size": 32, "embed_dim": 16, "n_heads": 4, "n_kv_heads": 4, "head_dim": 4, "mlp_dim": 24}
        param_shardings(self.mesh, *abstract_params(tiny_config(**sound)))
        with pytest.raises(BadConfigError, match=message):
            param_shardings(self.mesh, *abstract_params(tiny_config(**sound | changes)))

    def test_every_axis_of_the_decoder_has_a_rule_and_every_rule_an_axis(self):
        _, axes = abstract_params(tiny_config())
        names = {name for leaf in jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)) for name in leaf}
        assert names == set(RULES)


SETTINGS = TrainConfig(learning_rate=1e-2, eps=1e-3, kl_beta=0.5)  # eps: updates that feel the gradient's size


@functools.cache
def two_steps(mesh_config: MeshConfig):
    """The states after two steps of eight queries, four in memory at once, and their metrics."""
    mesh = make_mesh(mesh_config)
    shardings = param_shardings(mesh, *abstract_params(SHAPE))
    policy, reference = (place(random_params(SHAPE, seed=seed), shardings) for seed in (0, 1))
    state = init_state(policy, make_optimizer(SETTINGS))
    state = jax.tree.map(lambda x: x if x.ndim else place(x, replicated(mesh)), state)
    pairs = doubles.random_pairs(8, vocab=SHAPE.vocab_size, seed=5)
    batch = micro_batches(make_batch(pairs, width=12, response_width=4, eos_id=None), 4)
    batch = place(batch, NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec)))
    # One trace of policy and reference: the step's outputs are its next inputs, sharded as they are.
    chex.clear_trace_counter()
    score = chex.assert_max_traces(make_model(SHAPE, remat=False).score, n=2)
    train_step = make_train_step(score, SETTINGS)
    states, seen = [], []
    for _ in range(2):
        state, metrics = train_step(state, reference, batch)
        states.append((jax.tree.map(np.array, state), jax.tree.map(lambda x: x.sharding, state)))
        seen.append(jax.device_get(metrics))
    return states, seen, shardings


ONE, EIGHT = MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.slow
class TestEightDevices:
    def test_the_first_loss_is_that_of_one_device(self):
        ones, eights = two_steps(ONE)[1][0], two_steps(EIGHT)[1][0]
        # The promise D1: 1e-6 relative in float32.
        np.testing.assert_allclose(eights.loss, ones.loss, rtol=1e-6)
        np.testing.assert_allclose(eights.query_losses, ones.query_losses, rtol=1e-5)

    def test_gradients_and_updates_are_those_of_one_device(self):
        (ones, _), (eights, _) = two_steps(ONE)[0][0], two_steps(EIGHT)[0][0]
        # The first moment is 0.1 x the gradient. Sums of a few hundred float32 terms in another order: 1e-6 of the
        # gradient's own size, which is that of its largest entry.
        for one, eight in zip(jax.tree.leaves(ones.opt_state), jax.tree.leaves(eights.opt_state), strict=True):
            np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())
        for one, eight in zip(jax.tree.leaves(ones.params), jax.tree.leaves(eights.params), strict=True):
            # An update is 1e-2 x g / (|g| + 1e-3) and so feels an error of 1e-6 in g a thousandfold x 1e-2.
            np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5)
            assert np.abs(one).max() > 0
        np.testing.assert_allclose(two_steps(EIGHT)[1][0].grad_norm, two_steps(ONE)[1][0].grad_norm, rtol=1e-5)

    def test_the_second_step_is_that_of_one_device(self):
        for name, one in two_steps(ONE)[1][1]._asdict().items():
            np.testing.assert_allclose(getattr(two_steps(EIGHT)[1][1], name), one, rtol=1e-4, atol=1e-5, err_msg=name)

    def test_the_step_moves_the_weights(self):
        _, seen, _ = two_steps(EIGHT)
        assert seen[1].loss < seen[0].loss and seen[0].share_changed > 0.5

    def test_outputs_are_sharded_like_the_inputs(self):
        states, _, shardings = two_steps(EIGHT)
        for values, placed in states:
            for tree in (placed.params, placed.opt_state[0].mu, placed.opt_state[0].nu):
                same = jax.tree.map(
                    lambda actual, expected, x: actual.is_equivalent_to(expected, x.ndim),
                    tree,
                    shardings,
                    values.params,
                )
                assert all(jax.tree.leaves(same)), same
        # and the weights' shards are a quarter of the whole, on a mesh where fsdp x tensor = 4
        query = shardings["blocks"]["attention"]["query"]
        assert query.shard_shape((2, 16, 4, 4)) == (2, 8, 2, 4)
