"""Where arrays live: a device mesh, and the one table from logical axis names to its axes."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sami_jax.config import MeshConfig
from sami_jax.errors import BadConfigError
from sami_jax.types import Params

AXES = ("data", "fsdp", "tensor")
RULES: dict[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,  # a norm's gain is small and read everywhere
}


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of the config over the first devices. Raises BadConfigError where there are too few."""
    sizes = (config.data, config.fsdp, config.tensor)
    needed = config.data * config.fsdp * config.tensor
    devices = jax.devices()
    if needed > len(devices):
        raise BadConfigError(
            f"config.mesh asks for {config.data} x {config.fsdp} x {config.tensor} = {needed} devices, but there are "
            f"{len(devices)}; lower config.mesh, or on CPU set JAX_NUM_CPU_DEVICES={needed}."
        )
    # Auto: the compiler propagates shardings from parameters and batch; make_mesh alone would default to Explicit.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:needed])


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch's leading axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def padded_size(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple of `multiple`, so that few shapes compile.

    Up to 16 multiples there is a shape for each, beyond that eight for every doubling: padding stays below an eighth.
    """
    count = -(-size // multiple)
    unit = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // unit) * unit * multiple


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose leading axis counts examples."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def param_shardings(mesh: Mesh, shapes: Params, axes: Params) -> Params:
    """The sharding of every parameter.

    Args:
      mesh: the devices.
      shapes: tree of `jax.ShapeDtypeStruct`.
      axes: the same tree with tuples of logical axis names, one name per dimension.

    Raises:
      BadConfigError: a dimension does not divide by its mesh axis.
    """

    def sharding(spec: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> NamedSharding:
        for size, name in zip(spec.shape, names, strict=True):
            axis = RULES[name]
            if axis is not None and size % mesh.shape[axis]:
                raise BadConfigError(
                    f"The model's {name} axis has {size} entries, which {axis}={mesh.shape[axis]} devices cannot "
                    f"share evenly; choose config.mesh.{axis} among the divisors of {size}."
                )
        return NamedSharding(mesh, PartitionSpec(*(RULES[name] for name in names)))

    return jax.tree.map(sharding, shapes, axes)


def place(tree: Any, shardings: Any) -> Any:
    """The tree's arrays on the devices, each leaf by its sharding (or all by one)."""
    return jax.device_put(tree, shardings)
