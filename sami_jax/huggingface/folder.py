"""Hugging Face model folders: config.json and safetensors in, the same out, one tensor at a time."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import operator
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sami_jax.data.tokenizer import TOKENIZER_FILES
from sami_jax.errors import BadDataError, NonFiniteError, SaveFailedError
from sami_jax.files import building, content_hash, file_hash, read_json, write_json, write_text
from sami_jax.model.config import DecoderConfig, config_from_huggingface
from sami_jax.model.decoder import abstract_params
from sami_jax.processes import agreed, is_writer
from sami_jax.sharding import gather
from sami_jax.types import Array, Params

_ROWS_BYTES = 1 << 20  # read at a time
SHARD_BYTES = 5_000_000_000  # what transformers and the Hub take a file to be
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
SETTINGS_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)  # read beside the weights
WEIGHT_FILES = (_SINGLE, _INDEX)  # the first that is there says where the weights are, as in transformers
_SHOWN = 4  # tensors, in a message
_DTYPES = ("F32", "BF16", "F16")  # as safetensors calls them

_Keys = tuple[str, ...]  # the way to a leaf of our params


class _Leaf(NamedTuple):
    """How one leaf of our params is stored on the Hub.

    Attributes:
      name: of its tensors; {layer} and {expert} are filled in, one tensor each.
      inputs: leading axes of a slice that a matmul multiplies away, or None where it is stored as it is. A Hub matrix
        is [out, in]; ours keeps the heads apart: [in..., out...].
    """

    name: str
    inputs: int | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor that holds a slice of this shape."""
        n = self.inputs
        return shape if n is None else (math.prod(shape[n:]), math.prod(shape[:n]))

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """A slice as its tensor is stored."""
        n = self.inputs
        if n is None:
            return array
        return array.transpose(*range(n, array.ndim), *range(n)).reshape(self.stored_shape(array.shape))


_LAYER = "model.layers.{layer}."
_MOE, _EXPERT = _LAYER + "block_sparse_moe.", _LAYER + "block_sparse_moe.experts.{expert}."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LEAVES: dict[_Keys, _Leaf] = {
    ("embedding",): _Leaf(_EMBEDDING),
    ("blocks", "attention_norm"): _Leaf(_LAYER + "input_layernorm.weight"),
    ("blocks", "attention", "query"): _Leaf(_LAYER + "self_attn.q_proj.weight", 1),
    ("blocks", "attention", "key"): _Leaf(_LAYER + "self_attn.k_proj.weight", 1),
    ("blocks", "attention", "value"): _Leaf(_LAYER + "self_attn.v_proj.weight", 1),
    ("blocks", "attention", "out"): _Leaf(_LAYER + "self_attn.o_proj.weight", 2),
    ("blocks", "mlp_norm"): _Leaf(_LAYER + "post_attention_layernorm.weight"),
    ("blocks", "mlp", "gate"): _Leaf(_LAYER + "mlp.gate_proj.weight", 1),
    ("blocks", "mlp", "up"): _Leaf(_LAYER + "mlp.up_proj.weight", 1),
    ("blocks", "mlp", "down"): _Leaf(_LAYER + "mlp.down_proj.weight", 1),
    ("final_norm",): _Leaf("model.norm.weight"),
    ("head",): _Leaf(_HEAD, 1),
}
_EXPERT_LEAVES: dict[_Keys, _Leaf] = {
    ("blocks", "mlp", "router"): _Leaf(_MOE + "gate.weight", 1),
    ("blocks", "mlp", "gate"): _Leaf(_EXPERT + "w1.weight", 1),
    ("blocks", "mlp", "up"): _Leaf(_EXPERT + "w3.weight", 1),
    ("blocks", "mlp", "down"): _Leaf(_EXPERT + "w2.weight", 1),
}
# Written by old transformers, recomputed from config.json. Masks are booleans, whatever their names.
_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_VALUE_HEADS = ("v_head.", "value_head.", "reward_head.", "score.")  # of TRL, of transformers' sequence classification


def read_config(folder: Path) -> DecoderConfig:
    """The shape of the model in a folder. Raises BadDataError where there is none this version can run."""
    if not folder.is_dir():
        raise BadDataError(
            f"There is no model folder {folder}; give a folder with config.json and safetensors, or a name on the "
            "Hugging Face Hub."
        )
    path = folder / "config.json"
    if not path.is_file():
        raise BadDataError(f"{folder} has no config.json, so it is not a Hugging Face model folder.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise BadDataError(f"{path}: expected a JSON object.")
    return config_from_huggingface(config, source=str(path))


def read_end_ids(folder: Path, config: DecoderConfig) -> frozenset[int]:
    """The tokens that config.json and generation_config.json name as `eos_token_id`, one or a list: each ends a text.

    Raises:
      BadDataError: one of them is no token of the model.
    """
    end_ids: set[int] = set()
    for path in (folder / "config.json", folder / "generation_config.json"):
        content = read_json(path) if path.is_file() else {}
        if not isinstance(content, dict):
            raise BadDataError(f"{path}: expected a JSON object.")
        named = content.get("eos_token_id")
        for token in named if isinstance(named, list) else [] if named is None else [named]:
            if type(token) is not int or not 0 <= token < config.vocab_size:
                raise BadDataError(
                    f"{path}: eos_token_id names {token!r}, which is no token of the model's vocabulary of "
                    f"{config.vocab_size}; correct it there."
                )
            end_ids.add(token)
    return frozenset(end_ids)


def read_weight_map(folder: Path) -> dict[str, set[str]]:
    """The names of a folder's weight files, each with the tensors that the index wants in it.

    model.safetensors, whatever it holds, before an index, as transformers has it: what else lies there may be older.
    Whether the files that an index names are there is not asked.

    Raises:
      BadDataError: the index is malformed, or names something else than safetensors files inside the folder.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).is_file() or not index.is_file():
        return {_SINGLE: set()}
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadDataError(f"{index}: weight_map is missing; download it again.")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        # The name decides, not where it leads: in the Hub's cache every file is a link out of the folder.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise BadDataError(
                f"{index}: {name!r} is not the plain name of a safetensors file inside the folder; put the file there "
                "and name it alone."
            )
        files.setdefault(name, set()).add(tensor)
    return dict(sorted(files.items()))


def find_weights(folder: Path) -> dict[str, set[str]]:
    """`read_weight_map`, none of whose files is missing. Raises BadDataError where one is."""
    files = read_weight_map(folder)
    for name in files:
        if not (folder / name).is_file():
            if files == {_SINGLE: set()}:
                raise BadDataError(
                    f"{folder} has neither {_SINGLE} nor {_INDEX}; convert its weights to safetensors first."
                )
            raise BadDataError(f"{folder / name} is named in {_INDEX} but does not exist; download it again.")
    return files


def model_files(folder: Path) -> list[str]:
    """The names of the files that are read of a model folder. Raises BadDataError where its weights are missing."""
    weights = find_weights(folder)
    index = () if _SINGLE in weights else (_INDEX,)
    return sorted(name for name in (*SETTINGS_FILES, *index, *weights) if (folder / name).is_file())


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of the files that are read of a model folder.

    Other tools may put more into a folder of the Hub's cache, and change nothing.

    Raises:
      BadDataError: its weights are missing.
    """
    return content_hash([[name, file_hash(folder / name)] for name in model_files(folder)])


def load_params(folder: Path, config: DecoderConfig, *, dtype: Any, shardings: Params) -> Params:
    """Reads every weight of a model folder straight to where it belongs.

    A device's part of a tensor is read by itself, and no more than one tensor is in the host's memory at a time.

    Args:
      folder: safetensors, in one file or several with an index, float32, bfloat16 or float16. Mixtral's experts as the
        Hub has them (w1, w2, w3 of each) or as transformers 5 does (fused); tied weights under either name.
      config: of `read_config`.
      dtype: of the result.
      shardings: tree of shardings, as `sharding.param_shardings` gives it.

    Raises:
      BadDataError: a file is missing or damaged; a weight is missing, unknown, misshapen or of another dtype.
    """
    tensors = _split_experts(_open_tensors(folder), config)
    head = tensors.pop(_HEAD, None) if config.tied_embeddings else None
    embedding = tensors.setdefault(_EMBEDDING, head) if head else None  # either name serves
    shapes, _ = abstract_params(config)
    _refuse_misfits(folder, tensors, shapes, config)
    if head and embedding and head is not embedding and not _equal(head, embedding):
        raise BadDataError(f"{folder}: config.json ties the head to the embedding, but {_HEAD} differs from it.")

    def load(path: _Keys, spec: jax.ShapeDtypeStruct, sharding: Sharding) -> Array:
        leaf, names = _leaf(path, config), _names(path, config)
        if () in names:
            return _load_slice(leaf, tensors[names[()]], spec.shape, dtype, sharding)
        depth = len(next(iter(names)))
        inner = sharding
        if isinstance(sharding, NamedSharding):
            inner = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[depth:]))
        zeros, put = _stacking(spec.shape, jnp.dtype(dtype), sharding)
        whole = zeros()
        for index, name in names.items():
            # Nothing else holds the part, and it is waited for: the next tensor is read when this one is gone.
            part_of = functools.partial(_load_slice, leaf, tensors[name], spec.shape[depth:], dtype, inner)
            whole = jax.block_until_ready(put(whole, part_of(), np.asarray(index, np.int32)))
        return whole

    return _map_leaves(load, shapes, shardings)


def save_model(
    folder: Path,
    params: Params,
    config: DecoderConfig,
    *,
    dtype: str,
    huggingface_config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    tokenizer_folder: Path,
    card: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model folder that any Hugging Face tool serves: built beside its place, then renamed.

    Names and shapes are the Hub's. One file's tensors at most are in the host's memory at a time. Of several processes,
    which must all call this, one writes; the others help to gather the weights, a tensor at a time, and wait.

    Args:
      folder: must not exist, or be empty.
      params: weights.
      config: their shape.
      dtype: "float32", "bfloat16" or "float16", of the written weights.
      huggingface_config: config.json, its dtype aside.
      generation_config: generation_config.json. None writes none, and transformers derives it from config.json; an
        empty one would name no end token.
      tokenizer_folder: whose tokenizer files are copied.
      card: README.md.
      shard_bytes: longest safetensors file; where one is not enough, an index says which has what.

    Raises:
      BadDataError: the folder holds something else.
      NonFiniteError: a weight is NaN or infinite, or becomes so in `dtype`.
      SaveFailedError: the disk is full or not writable.
    """
    stored = np.dtype(dtype)
    places = {
        name: (path, index, math.prod(leaf.shape[len(index) :]) * stored.itemsize)
        for path, leaf in _leaves(params)
        for index, name in _names(path, config).items()
    }
    arrays = dict(_leaves(params))
    split = split_state_dict_into_shards_factory(
        places,
        get_storage_size=lambda place: place[2],
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )

    def tensor(name: str) -> np.ndarray:
        path, index, _ = places[name]
        # One axis at a time: together they would gather every layer of a leaf whose experts are on several devices.
        part = functools.reduce(operator.getitem, index, arrays[path])
        found = _leaf(path, config).to_stored(gather(part)).astype(stored)
        if not np.isfinite(found).all():
            raise NonFiniteError(f"{name} holds NaN or infinity as {dtype}; nothing was written to {folder}.")
        return np.ascontiguousarray(found)

    def write_rest(place: Path) -> None:
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            write_json(place / _INDEX, index)
        # transformers 5 reads dtype; what is older, and tools that follow it, torch_dtype.
        older = {"torch_dtype": dtype} if "torch_dtype" in huggingface_config else {}
        write_json(place / "config.json", {**huggingface_config, "dtype": dtype, **older})
        if generation_config is not None:
            write_json(place / "generation_config.json", generation_config)
        write_text(place / "README.md", card)
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, place / name)

    with contextlib.ExitStack() as stack:
        with agreed():
            place = stack.enter_context(building(folder)) if is_writer() else None
        for file, names in split.filename_to_tensors.items():
            tensors = ((name, tensor(name)) for name in names)
            kept = {name: values for name, values in tensors if place}
            with agreed():
                if place:
                    _save_file(place / file, kept)
        with agreed():
            if place:
                write_rest(place)
                stack.close()


def save_finetuned(folder: Path, params: Params, config: DecoderConfig, *, dtype: str, source: Path, card: str) -> None:
    """`save_model` for weights trained from the model in `source`, whose config and tokenizer they keep."""
    generation = source / "generation_config.json"
    save_model(
        folder,
        params,
        config,
        dtype=dtype,
        huggingface_config=read_json(source / "config.json"),
        generation_config=read_json(generation) if generation.is_file() else None,
        tokenizer_folder=source,
        card=card,
    )


def _save_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what a full disk becomes
        raise SaveFailedError(f"{path} could not be written ({error}); free some space.") from error
    with safe_open(path, framework="numpy") as written:
        for name, values in tensors.items():
            if not np.array_equal(written.get_tensor(name).view(np.uint8), values.view(np.uint8)):
                raise SaveFailedError(
                    f"{path}: {name} was read back with other bytes; look at the disk, then run again."
                )


@dataclasses.dataclass(frozen=True)
class _Tensor:
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


def _open_tensors(folder: Path) -> dict[str, _Tensor]:
    """Every tensor of the folder's safetensors files by its name, none of them read."""
    tensors: dict[str, _Tensor] = {}
    for name, wanted in find_weights(folder).items():
        path, found = folder / name, {}
        try:
            with safe_open(path, framework="numpy") as reader:
                for key in reader.keys():
                    stored = reader.get_slice(key)
                    found[key] = _Tensor(path, key, stored.get_dtype(), tuple(stored.get_shape()))
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise BadDataError(f"{path} is damaged or incomplete ({error}); download or export it again.") from error
        if absent := sorted(wanted - found.keys()):
            raise BadDataError(
                f"{path} does not hold {_listed(absent)}, although {_INDEX} says so; download both again."
            )
        if twice := sorted(found.keys() & tensors.keys()):
            raise BadDataError(f"{path} holds {_listed(twice)}, as another file does; download the folder again.")
        tensors |= found
    return tensors


def _split_experts(tensors: dict[str, _Tensor], config: DecoderConfig) -> dict[str, _Tensor]:
    """Fused experts (transformers 5: gate_up_proj [E, 2 F, D], down_proj [E, D, F]) under the Hub's names."""
    if config.n_experts is None:
        return tensors
    f, found = config.mlp_dim, dict(tensors)
    for layer in range(config.n_layers):
        fused = f"model.layers.{layer}.mlp."
        moe = _MOE.format(layer=layer)
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


def _refuse_misfits(folder: Path, tensors: Mapping[str, _Tensor], shapes: Params, config: DecoderConfig) -> None:
    wanted = {
        name: _leaf(path, config).stored_shape(spec.shape[len(index) :])
        for path, spec in _leaves(shapes)
        for index, name in _names(path, config).items()
    }
    unknown = sorted(name for name in tensors.keys() - wanted if not _is_buffer(name, tensors[name]))
    missing = sorted(wanted.keys() - tensors.keys())
    value_head = [name for name in unknown if name.startswith(_VALUE_HEADS)]
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


def _is_buffer(name: str, tensor: _Tensor) -> bool:
    return name.endswith(_BUFFERS) or tensor.dtype == "BOOL"


def _listed(names: list[str]) -> str:
    """The first names of many: those of a model of another family may be thousands."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _load_slice(leaf: _Leaf, tensor: _Tensor, shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Array:
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


def _equal(a: _Tensor, b: _Tensor) -> bool:
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
def _stacking(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> tuple[Callable, Callable]:
    """Zeros of a shape, and `_put`, compiled for a sharding."""
    zeros = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)
    return zeros, jax.jit(_put, donate_argnums=0, out_shardings=sharding)


def _put(whole: Array, part: Array, index: Array) -> Array:
    """The part at an index of the leading axes, in place where `whole` is donated."""
    lead, rest = index.shape[0], part.ndim
    start = [*index, *[jnp.zeros((), index.dtype)] * rest]
    return jax.lax.dynamic_update_slice(whole, part.reshape((1,) * lead + part.shape), start)


def _leaf(path: _Keys, config: DecoderConfig) -> _Leaf:
    return (_LEAVES if config.n_experts is None else _LEAVES | _EXPERT_LEAVES)[path]


def _names(path: _Keys, config: DecoderConfig) -> dict[tuple[int, ...], str]:
    """Index into the leaf's leading axes -> the name of the tensor that is there."""
    template = _leaf(path, config).name
    if "{expert}" in template:
        indices = itertools.product(range(config.n_layers), range(config.n_experts or 0))
        return {(layer, expert): template.format(layer=layer, expert=expert) for layer, expert in indices}
    if "{layer}" in template:
        return {(layer,): template.format(layer=layer) for layer in range(config.n_layers)}
    return {(): template}


def _leaves(tree: Params, prefix: _Keys = ()) -> Iterator[tuple[_Keys, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _map_leaves(function: Callable[..., Any], tree: Params, other: Params, prefix: _Keys = ()) -> Params:
    """The tree of function(path, leaf, the other tree's leaf)."""
    return {
        key: _map_leaves(function, value, other[key], (*prefix, key))
        if isinstance(value, dict)
        else function((*prefix, key), value, other[key])
        for key, value in tree.items()
    }
