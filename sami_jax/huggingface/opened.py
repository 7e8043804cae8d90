"""A model folder on a device mesh: opened, then loaded."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from sami_jax.config.mesh import MeshConfig
from sami_jax.data.tokenizer import Tokenizer, load_tokenizer
from sami_jax.errors import BadDataError, enough_memory
from sami_jax.huggingface.folder import load_params, read_config, read_end_ids
from sami_jax.model.decoder import Model, make_model, sharded_params
from sami_jax.processes import agreed, is_writer
from sami_jax.sharding import device_bytes, make_mesh, more_devices
from sami_jax.stage_folder import check_sealed
from sami_jax.types import Dtype, Params, Remat


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model folder, its weights still on disk.

    Attributes:
      folder: where it is.
      model: the pure functions.
      tokenizer: text to ids.
      end_ids: tokens that end a text: the tokenizer's own, and those of config.json and generation_config.json.
      mesh: the devices.
    """

    folder: Path
    model: Model
    tokenizer: Tokenizer
    end_ids: frozenset[int]
    mesh: jax.sharding.Mesh

    def abstract_params(self, dtype: Dtype) -> Params:
        """Shape, dtype and sharding of the weights."""
        return sharded_params(self.model.config, self.mesh, dtype)

    @agreed()
    def load(self, dtype: Dtype) -> Params:
        """Reads the weights onto the mesh. Raises BadDataError where they do not fit config.json."""
        specs = self.abstract_params(dtype)
        shardings = jax.tree.map(lambda spec: spec.sharding, specs)
        with enough_memory(
            f"loading {self.folder}, whose weights take {device_bytes(specs) / 1e9:.1f} GB of each device",
            more_devices(self.mesh),
        ):
            return load_params(self.folder, self.model.config, dtype=jnp.dtype(dtype), shardings=shardings)

    def loaded(self, dtype: Dtype) -> "LoadedModel":
        """The model with its weights in memory. Raises BadDataError as `load` does."""
        return LoadedModel(self.folder, self.model, self.tokenizer, self.end_ids, self.mesh, self.load(dtype))


@dataclasses.dataclass(frozen=True)
class LoadedModel(OpenModel):
    """A model folder in memory.

    Attributes:
      params: the weights, on the mesh.
    """

    params: Params


@agreed()
def open_model(
    folder: Path, mesh: MeshConfig, dtype: Dtype, *, remat: Remat = "none", head_chunk: int | None = None
) -> OpenModel:
    """A Hugging Face folder's model on a mesh.

    Args:
      folder: with config.json, safetensors and tokenizer.
      mesh: how many devices share what.
      dtype: of activations and matmuls.
      remat: what gradients recompute; whoever takes none leaves it out.
      head_chunk: labels of a device whose logits are in memory at once; None for as many as suit the platform.

    Raises:
      BadConfigError: there are fewer devices.
      BadDataError: the folder cannot be used.
    """
    shape = read_config(folder)
    if is_writer():  # one process for all: the bytes are the same, and reading them may take minutes
        check_sealed(folder)
    devices = make_mesh(mesh)
    model = make_model(shape, remat=remat, mesh=devices, dtype=dtype, head_chunk=head_chunk)
    tokenizer = load_tokenizer(folder)
    end_ids = read_end_ids(folder, shape)
    if tokenizer.eos_id is not None:
        if tokenizer.eos_id >= shape.vocab_size:
            raise BadDataError(
                f"{folder}: the tokenizer's end token has the id {tokenizer.eos_id}, beyond the model's vocabulary of "
                f"{shape.vocab_size}; the tokenizer and the weights do not belong together."
            )
        end_ids |= {tokenizer.eos_id}
    return OpenModel(folder, model, tokenizer, end_ids, devices)


def load_model(folder: Path, mesh: MeshConfig, dtype: Dtype) -> LoadedModel:
    """`open_model`, and its weights in memory, in the dtype they are computed in."""
    return open_model(folder, mesh, dtype).loaded(dtype)
