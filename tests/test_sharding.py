"""Meshes and shardings: refusals that name the remedy, and a train step that eight devices do as one does."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import doubles
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.training import TrainConfig
from sami_jax.errors import BadConfigError
from sami_jax.model.decoder import abstract_params, make_model
from sami_jax.model.shape import DecoderConfig
from sami_jax.scoring.matrices import all_logits, shardings_of_rows
from sami_jax.sharding import (
    AXES,
    RULES,
    batch_sharding,
    batch_shards,
    from_hosts,
    make_mesh,
    micro_batch_sharding,
    padded_size,
    param_shardings,
    put_on_devices,
    replicated,
    to_hosts,
)
from sami_jax.training import init_state, make_optimizer, make_train_step, round_to_dtypes
from tiny_models import FAMILIES, random_params, tiny_config

LAYOUTS = {
    "fsdp": MeshConfig(fsdp=8),
    "data, fsdp, tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp, expert, tensor": MeshConfig(fsdp=2, expert=2, tensor=2),
    "data, expert": MeshConfig(data=2, expert=4),
}


class TestMesh:
    def test_axes_and_sizes(self):
        mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
        assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 1, "tensor": 4}
        assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}

    def test_a_smaller_mesh_takes_the_first_devices(self):
        assert make_mesh(MeshConfig(data=2)).devices.ravel().tolist() == jax.devices()[:2]

    def test_too_many_devices_names_numbers_and_remedy(self):
        with pytest.raises(
            BadConfigError, match=r"data=2 x fsdp=4 x expert=1 x tensor=2 = 16 devices.* are 8; .*DEVICES=16"
        ):
            make_mesh(MeshConfig(data=2, fsdp=4, tensor=2))

    @pytest.mark.parametrize("third", ["fsdp", "expert"])
    def test_batches_are_split_over_all_axes_but_tensor(self, third):
        mesh = make_mesh(MeshConfig(data=2, tensor=2, **{third: 2}))
        assert batch_shards(mesh) == 4
        placed = put_on_devices(np.zeros((4, 3)), batch_sharding(mesh))
        assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 3)}
        assert put_on_devices(np.zeros(3), replicated(mesh)).is_fully_replicated


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
        shapes = {"w": jax.ShapeDtypeStruct((3, 6, 8), jnp.float32), "gain": jax.ShapeDtypeStruct((16,), jnp.float32)}
        axes = {"w": ("layers", "embed", "mlp"), "gain": ("features",)}
        assert param_shardings(self.mesh, shapes, axes) == {
            "w": NamedSharding(self.mesh, PartitionSpec(None, ("fsdp", "expert"), "tensor")),
            "gain": NamedSharding(self.mesh, PartitionSpec(("fsdp", "expert", "tensor"))),
        }

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocab_size": 30}, r"vocab axis has 30 entries, which 4 devices .* config.mesh.tensor .* divisors of 30"),
            ({"embed_dim": 15}, r"embed axis has 15 entries, which 2 devices .* config.mesh.fsdp x .* divisors of 15"),
            ({"n_kv_heads": 2}, r"kv_heads axis has 2 entries, which 4 devices"),
            ({"mlp_dim": 22}, r"mlp axis has 22 entries"),
        ],
    )
    def test_an_axis_that_cannot_be_shared_is_named_with_the_remedy(self, changes, message):
        sound = {"vocab_size": 32, "embed_dim": 16, "n_heads": 4, "n_kv_heads": 4, "head_dim": 4, "mlp_dim": 24}
        param_shardings(self.mesh, *abstract_params(tiny_config(**sound)))
        with pytest.raises(BadConfigError, match=message):
            param_shardings(self.mesh, *abstract_params(tiny_config(**sound | changes)))

    def test_one_mesh_axis_for_two_dimensions_is_refused(self):
        shapes = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
        with pytest.raises(ValueError, match=r"one mesh axis to two of the axes \('heads', 'mlp'\)"):
            param_shardings(self.mesh, shapes, {"w": ("heads", "mlp")})

    def test_every_axis_of_the_decoders_has_a_rule_and_every_rule_an_axis(self):
        all_axes = [abstract_params(shape)[1] for shape in FAMILIES.values()]
        leaves = jax.tree.leaves(all_axes, is_leaf=lambda x: isinstance(x, tuple))
        assert {name for leaf in leaves for name in leaf} == set(RULES)


def unshared_leaves(config: DecoderConfig, mesh_config: MeshConfig) -> list[str]:
    """Weights from 64 KiB up of which a device holds over 1.1 times its even share."""
    shapes, axes = abstract_params(config)
    mesh = make_mesh(mesh_config)
    shardings = jax.tree.leaves(param_shardings(mesh, shapes, axes))
    found = []
    for (path, spec), sharding in zip(jax.tree.leaves_with_path(shapes), shardings, strict=True):
        held, share = math.prod(sharding.shard_shape(spec.shape)), spec.size * mesh_config.data / mesh.size
        if spec.size * spec.dtype.itemsize >= 65536 and held > 1.1 * share:
            found.append(jax.tree_util.keystr(path))
    return found


REAL_SIZE = {"vocab_size": 32000, "embed_dim": 4096, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "mlp_dim": 14336}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_is_kept_whole(family, layout, monkeypatch):
    config = dataclasses.replace(FAMILIES[family], n_layers=32, **REAL_SIZE)
    assert unshared_leaves(config, LAYOUTS[layout]) == []
    for name in RULES:
        monkeypatch.setitem(RULES, name, ())
    every = [path for path, spec in jax.tree.leaves_with_path(abstract_params(config)[0]) if spec.size >= 16384]
    assert len(unshared_leaves(config, LAYOUTS[layout])) == len(every) > 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stochastic_rounding_is_that_of_one_device(layout):
    mesh = make_mesh(LAYOUTS[layout])
    shape = FAMILIES["mixtral"]
    exact = random_params(shape)
    like = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    rounded = jax.jit(round_to_dtypes)
    shardings = param_shardings(mesh, *abstract_params(shape))
    spread = rounded(put_on_devices(exact, shardings), put_on_devices(like, shardings), jax.random.key(5))
    assert doubles.same_bits(spread, rounded(exact, like, jax.random.key(5)))


class TestHosts:
    def test_an_array_comes_back_as_it_left_and_equal_parts_are_kept_once(self):
        mesh = make_mesh(MeshConfig(data=2, tensor=4))
        x = put_on_devices(np.arange(24, dtype=np.float32).reshape(1, 4, 6), micro_batch_sharding(mesh))
        left = to_hosts(x)
        assert left.host_bytes == x.nbytes  # four devices hold each half
        back = from_hosts(left)
        assert doubles.same_bits(back, x) and back.sharding == x.sharding

    def test_it_takes_no_memory_of_the_devices(self):
        x = jnp.arange(6.0)
        left = to_hosts(x)
        x.delete()
        np.testing.assert_array_equal(from_hosts(left), np.arange(6))


SETTINGS = TrainConfig(
    learning_rate=1e-2, eps=1e-3, kl_beta=0.5, queries_per_step=16
)  # eps: updates that feel the gradient's size


@functools.cache
def two_steps(family: str, layout: str | None):
    """The states after two steps of 16 queries in 16 rows, and their metrics; None is one device."""
    shape, mesh = FAMILIES[family], make_mesh(LAYOUTS[layout] if layout else MeshConfig())
    shardings = param_shardings(mesh, *abstract_params(shape))
    policy, reference = (put_on_devices(random_params(shape, seed=seed), shardings) for seed in (0, 1))
    state = init_state(policy, make_optimizer(SETTINGS))
    state = jax.tree.map(lambda x: x if x.ndim else put_on_devices(x, replicated(mesh)), state)
    pairs = doubles.random_pairs(16, vocab=shape.vocab_size, seed=5)
    shards = batch_shards(mesh)
    packing = doubles.packing(pairs, shards=shards, rows=16 // shards, widest=16)
    batch = put_on_devices(packing.stacked(0), shardings_of_rows(mesh, stacked=True))
    # One trace of policy and reference: the step's outputs are its next inputs, sharded as they are.
    chex.clear_trace_counter()
    model = make_model(shape, mesh=mesh).rows
    model = model._replace(hidden=chex.assert_max_traces(model.hidden, n=2))
    train_step, base = make_train_step(model, SETTINGS), doubles.reference(model, reference, batch)
    states, seen = [], []
    for _ in range(2):
        state, metrics = train_step(state, base, batch)
        states.append((jax.tree.map(np.array, state), jax.tree.map(lambda x: x.sharding, state)))
        seen.append(jax.device_get(metrics))
    return states, seen, shardings


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
class TestEightDevices:
    def test_logits_are_those_of_one_device(self, family, layout):
        shape, params = FAMILIES[family], random_params(FAMILIES[family])
        tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (8, 11)).astype(np.int32)
        logits = []
        for mesh in (make_mesh(MeshConfig()), make_mesh(LAYOUTS[layout])):
            placed = put_on_devices(params, param_shardings(mesh, *abstract_params(shape)))
            of = jax.jit(functools.partial(all_logits, make_model(shape, mesh=mesh).rows))
            logits.append(np.asarray(of(placed, put_on_devices(tokens, batch_sharding(mesh)))))
        # Logits of size 5 from sums in another order.
        np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=2e-5)

    def test_the_first_loss_is_that_of_one_device(self, family, layout):
        ones, eights = two_steps(family, None)[1][0], two_steps(family, layout)[1][0]
        # The promise D1: 1e-6 relative in float32.
        np.testing.assert_allclose(eights.loss, ones.loss, rtol=1e-6)
        np.testing.assert_allclose(eights.query_losses, ones.query_losses, rtol=1e-5)

    def test_gradients_and_updates_are_those_of_one_device(self, family, layout):
        (ones, _), (eights, _) = two_steps(family, None)[0][0], two_steps(family, layout)[0][0]
        # The first moment is 0.1 x the gradient. Sums of a few hundred float32 terms in another order: 1e-6 of the
        # gradient's own size, which is that of its largest entry.
        for one, eight in zip(jax.tree.leaves(ones.opt_state), jax.tree.leaves(eights.opt_state), strict=True):
            np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())
        for one, eight in zip(jax.tree.leaves(ones.params), jax.tree.leaves(eights.params), strict=True):
            # An update is 1e-2 x g / (|g| + 1e-3) and so feels an error of 1e-6 in g a thousandfold x 1e-2.
            np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5)
            assert np.abs(one).max() > 0
        one, eight = two_steps(family, None)[1][0], two_steps(family, layout)[1][0]
        np.testing.assert_allclose(eight.grad_norm, one.grad_norm, rtol=1e-5)

    def test_the_second_step_is_that_of_one_device(self, family, layout):
        for name, one in two_steps(family, None)[1][1]._asdict().items():
            eight = getattr(two_steps(family, layout)[1][1], name)
            np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-5, err_msg=name)

    def test_the_step_moves_the_weights(self, family, layout):
        _, seen, _ = two_steps(family, layout)
        assert seen[1].loss < seen[0].loss and seen[0].share_changed > 0.5

    def test_outputs_are_sharded_like_the_inputs(self, family, layout):
        states, _, shardings = two_steps(family, layout)
        for values, placed in states:
            for tree in (placed.params, placed.opt_state[0].mu, placed.opt_state[0].nu):
                same = jax.tree.map(
                    lambda actual, expected, x: actual.is_equivalent_to(expected, x.ndim),
                    tree,
                    shardings,
                    values.params,
                )
                assert all(jax.tree.leaves(same)), same
