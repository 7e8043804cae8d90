"""What KL to the base needs of it: its hidden states where labels are predicted, computed once, kept by the hosts."""

import dataclasses
import functools

import jax
from jax.sharding import Mesh

from sami_jax.scoring.matrices import label_hidden, shardings_of_rows
from sami_jax.scoring.packed_rows import Packing
from sami_jax.sharding import HostArray, from_hosts, micro_batch_sharding, put_on_devices, to_hosts
from sami_jax.types import Array, ContrastiveRows, Params, Reference, RowModel


@functools.partial(jax.jit, static_argnames="model")
def reference_hidden(model: RowModel, params: Params, batch: ContrastiveRows) -> Array:
    """[M, G, L, D] hidden states that predict the labels of M micro-batches."""
    return jax.lax.map(functools.partial(label_hidden, model, params), batch)


@dataclasses.dataclass(frozen=True)
class KeptReference:
    """The base model at the labels of every group of a packing.

    Attributes:
      head: [D, V], on the devices.
      hidden: by group, [M, G, L, D]; each host has what its own devices need.
    """

    head: Array
    hidden: dict[int, HostArray]

    def of(self, group: int) -> Reference:
        """The reference of a group's micro-batches, on the devices."""
        return Reference(from_hosts(self.hidden[group]), self.head)

    @property
    def host_bytes(self) -> int:
        """What this host keeps."""
        return sum(array.host_bytes for array in self.hidden.values())


def head_of(model: RowModel, params: Params) -> Array:
    """The head alone, so that the other weights may go."""
    return jax.jit(model.head, out_shardings=model.head_sharding)(params)


def group_hidden(model: RowModel, params: Params, packing: Packing, group: int, mesh: Mesh) -> HostArray:
    """The hidden states of a group's micro-batches, in the memory of the hosts."""
    batch = put_on_devices(packing.stacked(group), shardings_of_rows(mesh, stacked=True))
    hidden = reference_hidden(model, params, batch)
    return to_hosts(put_on_devices(hidden, micro_batch_sharding(mesh)))
