"""The tensors of safetensors files, read one at a time, each device's part by itself."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from sami_jax.errors import BadDataError
from sami_jax.huggingface.families import BUFFERS, MOE, VALUE_HEADS, LeafPath, StoredLeaf, stored_leaf, tensor_names
from sami_jax.model.shape import DecoderConfig
from sami_jax.types import Array, Params

INDEX = "model.safetensors.index.json"
_ROWS_BYTES = 1 << 20  # read at a time
_SHOWN = 4  # tensors, in a message
_DTYPES = ("F32", "BF16", "F16")  # as safetensors calls them


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A stored tensor, or the part `inside` of one, read from the file only when asked.

    Attributes:
      file: safetensors.
      key: name in the file.
      dtype: as safetensors calls it.
      shape: of the part.
      inside: one index or slice per leading axis of the stored tensor.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    inside: tuple[int | slice, ...] = ()

    def read(self, *index: slice) -> Iterator[tuple[int, np.ndarray]]:
        """The part's entries at a slice per axis, in the stored dtype, some rows at a time: (first row, rows).

        Some at a time, since safetensors copies what it reads more than once.
        """
        sizes = [len(range(*part.indices(size))) for part, size in zip(index, self.shape, strict=True)]
        axes = list(self.inside)
        kept = [i for i, part in enumerate(axes) if isinstance(part, slice)]
        kept += range(len(axes), len(axes) + len(self.shape) - len(kept))
        axes += [slice(None)] * (max(kept, default=-1) + 1 - len(axes))
        for axis, size, part in zip(kept, self.shape, index, strict=True):
            start, stop, _ = part.indices(size)
            offset = axes[axis].start or 0  # type: ignore[union-attr]
            axes[axis] = slice(offset + start, offset + stop)
        rows = axes[kept[0]]
        assert isinstance(rows, slice)
        step = max(1, _ROWS_BYTES // max(1, 4 * math.prod(sizes[1:])))
        # Opened anew for each tensor: an open file's pages stay in memory as long as it is mapped.
        with safe_open(self.file, framework="numpy") as reader:
            stored = reader.get_slice(self.key)
            for start in range(rows.start, rows.stop, step):
                axes[kept[0]] = slice(start, min(start + step, rows.stop))
                yield start - rows.start, stored[tuple(axes)]


def open_tensors(folder: Path, files: Mapping[str, set[str]]) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files by its name, none of them read."""
    tensors: dict[str, StoredTensor] = {}
    for name, wanted in files.items():
        path, found = folder / name, {}
        try:
            with safe_open(path, framework="numpy") as reader:
                for key in reader.keys():
                    stored = reader.get_slice(key)
                    found[key] = StoredTensor(path, key, stored.get_dtype(), tuple(stored.get_shape()))
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise BadDataError(f"{path} is damaged or incomplete ({error}); download or export it again.") from error
        if absent := sorted(wanted - found.keys()):
            raise BadDataError(
                f"{path} does not hold {_listed(absent)}, although {INDEX} says so; download both again."
            )
        if twice := sorted(found.keys() & tensors.keys()):
            raise BadDataError(f"{path} holds {_listed(twice)}, as another file does; download the folder again.")
        tensors |= found
    return tensors


def split_experts(tensors: dict[str, StoredTensor], config: DecoderConfig) -> dict[str, StoredTensor]:
    """Fused experts (transformers 5: gate_up_proj [E, 2 F, D], down_proj [E, D, F]) under the Hub's names."""
    if config.n_experts is None:
        return tensors
    f, found = config.mlp_dim, dict(tensors)
    for layer in range(config.n_layers):
        fused = f"model.layers.{layer}.mlp."
        moe = MOE.format(layer=layer)
        if fused + "gate.weight" in found:
            found[moe + "gate.weight"] = found.pop(fused + "gate.weight")
        gate_up, down = (found.pop(fused + f"experts.{name}_proj", None) for name in ("gate_up", "down"))
        for expert in range(config.n_experts):
            parts = [("w1", gate_up, slice(0, f)), ("w3", gate_up, slice(f, None)), ("w2", down, slice(None))]
            for name, whole, rows in parts:
                if whole is not None and len(whole.shape) == 3 and expert < whole.shape[0]:
                    size = len(range(*rows.indices(whole.shape[1])))
                    part = dataclasses.replace(whole, shape=(size, whole.shape[2]), inside=(expert, rows))
                    found[f"{moe}experts.{expert}.{name}.weight"] = part
    return found


def refuse_misfits(folder: Path, tensors: Mapping[str, StoredTensor], shapes: Params, config: DecoderConfig) -> None:
    wanted = {
        name: stored_leaf(path, config).stored_shape(spec.shape[len(index) :])
        for path, spec in named_leaves(shapes)
        for index, name in tensor_names(path, config).items()
    }
    unknown = sorted(name for name in tensors.keys() - wanted if not _is_buffer(name, tensors[name]))
    missing = sorted(wanted.keys() - tensors.keys())
    value_head = [name for name in unknown if name.startswith(VALUE_HEADS)]
    if value_head:
        raise BadDataError(
            f"{folder}: {_listed(value_head)} belong to a value head, which SAMI has no use for; drop them: save the "
            "language model alone (of a TRL model, its `pretrained_model`), and give that folder."
        )
    if unknown or missing:
        problems = [
            f"{kind}: {_listed(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names
        ]
        raise BadDataError(
            f"{folder}: the weights do not fit config.json ({'; '.join(problems)}); take both from one model."
        )
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise BadDataError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}, but only float32, bfloat16 and float16 are read; "
                "convert the weights to one of them."
            )
        if tensor.shape != shape:
            raise BadDataError(
                f"{tensor.file}: {name} has shape {tensor.shape}, but config.json implies {shape}; take both from one "
                "model."
            )


def _is_buffer(name: str, tensor: StoredTensor) -> bool:
    return name.endswith(BUFFERS) or tensor.dtype == "BOOL"


def _listed(names: list[str]) -> str:
    """The first names of many: those of a model of another family may be thousands."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def load_slice(leaf: StoredLeaf, tensor: StoredTensor, shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Array:
    """One stored tensor as one of ours, each device's part read by itself."""

    def read(index: Any) -> np.ndarray:  # a slice per axis
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], dtype)
        n = leaf.inputs
        if n is None:
            stored, parts = out, [slice(*bound) for bound in bounds]
        else:
            stored = out.reshape(math.prod(out.shape[:n]), -1).T
            parts = [_flat(bounds[n:], shape[n:]), _flat(bounds[:n], shape[:n])]
        for first, rows in tensor.read(*parts):
            if not np.isfinite(rows).all():
                raise BadDataError(f"{tensor.file}: {tensor.key} holds NaN or infinity; download or export it again.")
            stored[first : first + len(rows)] = rows
        return out

    return jax.make_array_from_callback(shape, sharding, read)


def hold_the_same(a: StoredTensor, b: StoredTensor) -> bool:
    if a.shape != b.shape:
        return False
    pairs = zip(a.read(slice(None), slice(None)), b.read(slice(None), slice(None)), strict=True)
    return all(np.array_equal(mine, other) for (_, mine), (_, other) in pairs)


def _flat(bounds: list[tuple[int, int]], shape: tuple[int, ...]) -> slice:
    """The slice of the flattened axes; only the first axis may be cut."""
    if any(bound != (0, size) for bound, size in zip(bounds[1:], shape[1:], strict=True)):
        raise ValueError(f"head_dim cannot be sharded: a stored matrix has it inside its heads ({bounds} of {shape}).")
    inner = math.prod(shape[1:])
    return slice(bounds[0][0] * inner, bounds[0][1] * inner)


@functools.lru_cache(maxsize=256)  # the functions, so that another folder of this shape compiles nothing
def stacking(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> tuple[Callable, Callable]:
    """Zeros of a shape, and `_put`, compiled for a sharding."""
    zeros = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)
    return zeros, jax.jit(_put, donate_argnums=0, out_shardings=sharding)


def _put(whole: Array, part: Array, index: Array) -> Array:
    """The part at an index of the leading axes, in place where `whole` is donated."""
    lead, rest = index.shape[0], part.ndim
    start = [*index, *[jnp.zeros((), index.dtype)] * rest]
    return jax.lax.dynamic_update_slice(whole, part.reshape((1,) * lead + part.shape), start)


def named_leaves(tree: Params, prefix: LeafPath = ()) -> Iterator[tuple[LeafPath, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from named_leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def map_leaves(function: Callable[..., Any], tree: Params, other: Params, prefix: LeafPath = ()) -> Params:
    """The tree of function(path, leaf, the other tree's leaf)."""
    return {
        key: map_leaves(function, value, other[key], (*prefix, key))
        if isinstance(value, dict)
        else function((*prefix, key), value, other[key])
        for key, value in tree.items()
    }
