"""Where arrays live: a device mesh, and the one table from logical axis names to its axes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from sami_jax.config.mesh import MeshConfig
from sami_jax.errors import BadConfigError
from sami_jax.processes import process_count, process_index
from sami_jax.types import Params, Platform

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # examples are split over these
# Every weight is split over fsdp x expert x tensor devices, whatever its axes: no device keeps a large one whole.
RULES: dict[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "expert_embed": ("fsdp",),
    "router": (),
    "features": ("fsdp", "expert", "tensor"),  # of norms and routers
}


def use_platform(platform: Platform) -> None:
    """Has JAX compute on a platform; called before anything is computed.

    Raises:
      BadConfigError: JAX finds another one, or devices of processes that `jax.distributed` does not hold together.
    """
    named = getattr(jax.config, "jax_platforms", None)
    if platform == "cpu" and not named:
        jax.config.update("jax_platforms", "cpu")
    try:
        found = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names what does not start
        raise BadConfigError(f"JAX starts no platform here ({str(error).partition(chr(10))[0]}).") from error
    if platform not in ("any", found):
        raise BadConfigError(
            f"config.platform is {platform}, but JAX finds {found} here (JAX_PLATFORMS: {named or 'not set'}); install "
            f"what JAX needs for {platform}, name the platform that is there, or set config.platform=any."
        )
    if jax.process_count() != process_count():
        raise BadConfigError(
            f"These devices belong to {jax.process_count()} processes; start `sami run --distributed=auto` on "
            "every host."
        )


def place_of_process(mesh: Mesh) -> str:
    """Says which process this is, which devices it has, and what the mesh is."""
    return (
        f"process {process_index()} of {process_count()}, {jax.local_device_count()} of {jax.device_count()} devices, "
        f"{jax.default_backend()}, mesh {' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}"
    )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the config over the first devices, all of JAX's or others.

    Raises:
      BadConfigError: there are too few, or a process has none of them.
    """
    sizes = tuple(getattr(config, axis) for axis in AXES)
    ours = devices is None
    devices = jax.devices() if devices is None else devices
    needed = math.prod(sizes)
    if needed > len(devices):
        raise BadConfigError(
            f"config.mesh asks for {' x '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes, strict=True))} = "
            f"{needed} devices, but there are {len(devices)}; lower config.mesh, or on CPU set "
            f"JAX_NUM_CPU_DEVICES={needed}."
        )
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[:needed]}
    if ours and idle:
        raise BadConfigError(
            f"config.mesh asks for {needed} of {len(devices)} devices, and leaves none to process {min(idle)}; raise "
            "config.mesh, or start fewer processes."
        )
    # Auto: the compiler propagates shardings from parameters and batch; make_mesh alone would default to Explicit.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed])


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that a batch's leading axis is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shared_rows(rows: int, mesh: Mesh) -> int:
    """`rows` rounded up to a number that the mesh shares evenly."""
    shards = batch_shards(mesh)
    return -(-rows // shards) * shards


def padded_size(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple of `multiple`, so that few shapes compile.

    Up to 16 multiples there is a shape for each, beyond that eight for every doubling: padding stays below an eighth.
    """
    count = -(-size // multiple)
    unit = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // unit) * unit * multiple


def more_devices(mesh: Mesh) -> str:
    """The remedy for a model too large for the mesh, to be said in a sentence."""
    return f"share the weights between more devices by config.mesh.fsdp, now {mesh.shape['fsdp']}"


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose leading axis counts examples."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def micro_batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose leading axes count micro-batches and their examples."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a cache [L, B, K, S, H]: slots as examples are, heads as those of the weights."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, RULES["kv_heads"]))


def axes_sharding(mesh: Mesh, names: Sequence[str]) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[name] or None for name in names)))


def param_shardings(mesh: Mesh, shapes: Params, axes: Params) -> Params:
    """The sharding of every parameter.

    Args:
      mesh: the devices.
      shapes: tree of `jax.ShapeDtypeStruct`.
      axes: the same tree with tuples of logical axis names, one name per dimension.

    Raises:
      BadConfigError: a dimension does not divide by its mesh axes.
      ValueError: RULES map two dimensions of a parameter to one mesh axis.
    """

    def sharding(spec: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> NamedSharding:
        used = [axis for name in names for axis in RULES[name]]
        if len(used) > len(set(used)):
            raise ValueError(f"The rules give one mesh axis to two of the axes {names}.")
        for size, name in zip(spec.shape, names, strict=True):
            share = math.prod(mesh.shape[axis] for axis in RULES[name])
            if size % share:
                axes = " x ".join(f"config.mesh.{axis}" for axis in RULES[name])
                raise BadConfigError(
                    f"The model's {name} axis has {size} entries, which {share} devices cannot share evenly; choose "
                    f"{axes} among the divisors of {size}."
                )
        return axes_sharding(mesh, names)

    return jax.tree.map(sharding, shapes, axes)


def device_bytes(specs: Any) -> int:
    """Bytes that the tree's arrays, given by shape, dtype and sharding, take on one device."""
    return sum(
        math.prod(spec.sharding.shard_shape(spec.shape)) * spec.dtype.itemsize for spec in jax.tree.leaves(specs)
    )


def put_on_devices(tree: Any, shardings: Any) -> Any:
    """Puts the tree's arrays on the devices, each leaf by its sharding (or all by one).

    Values in the host's memory must be the same in every process; JAX compares them, and raises where they are not.
    """
    return jax.device_put(tree, shardings)


class HostArray(NamedTuple):
    """An array that left the devices: every host has the parts that its own devices held, each part once.

    Attributes:
      shape: of the whole.
      sharding: where it comes back to.
      parts: (device, its part) for every device of this host; devices with equal parts share one.
    """

    shape: tuple[int, ...]
    sharding: Sharding
    parts: tuple[tuple[jax.Device, np.ndarray], ...]

    @property
    def host_bytes(self) -> int:
        """What this host keeps."""
        return sum({id(part): part.nbytes for _, part in self.parts}.values())


def to_hosts(x: jax.Array) -> HostArray:
    """Brings an array into the memory of the hosts; nothing travels between them."""
    found: dict[str, np.ndarray] = {}
    for shard in x.addressable_shards:
        if str(shard.index) not in found:
            found[str(shard.index)] = np.asarray(shard.data)
    parts = tuple((shard.device, found[str(shard.index)]) for shard in x.addressable_shards)
    return HostArray(x.shape, x.sharding, parts)


def from_hosts(x: HostArray) -> jax.Array:
    """Puts an array back on the devices that it came from."""
    parts = [jax.device_put(part, device) for device, part in x.parts]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def gather(tree: Any) -> Any:
    """Brings the tree's arrays whole into every host's memory, whoever holds their parts; every process calls it."""

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)
