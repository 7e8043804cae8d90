"""Hugging Face model folders: config.json and safetensors in, the same out, one tensor at a time."""

import contextlib
import functools
import math
import operator
import shutil
from collections.abc import Mapping
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
from sami_jax.huggingface.families import EMBEDDING, HEAD, LeafPath, config_from_huggingface, stored_leaf, tensor_names
from sami_jax.huggingface.tensors import (
    INDEX,
    hold_the_same,
    load_slice,
    map_leaves,
    named_leaves,
    open_tensors,
    refuse_misfits,
    split_experts,
    stacking,
)
from sami_jax.model.decoder import abstract_params
from sami_jax.model.shape import DecoderConfig
from sami_jax.processes import agreed, is_writer
from sami_jax.sharding import gather
from sami_jax.types import Array, Params

SHARD_BYTES = 5_000_000_000  # what transformers and the Hub take a file to be
_SINGLE = "model.safetensors"
SETTINGS_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)  # read beside the weights
WEIGHT_FILES = (_SINGLE, INDEX)  # the first that is there says where the weights are, as in transformers


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
    index = folder / INDEX
    if (folder / _SINGLE).is_file() or not index.is_file():
        return {_SINGLE: set()}
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadDataError(f"{index}: weight_map is missing; download it again.")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        # Look at the name, not at where it leads: in the Hub's cache every file is a link out of the folder.
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
                    f"{folder} has neither {_SINGLE} nor {INDEX}; convert its weights to safetensors first."
                )
            raise BadDataError(f"{folder / name} is named in {INDEX} but does not exist; download it again.")
    return files


def model_files(folder: Path) -> list[str]:
    """The names of the files that are read of a model folder. Raises BadDataError where its weights are missing."""
    weights = find_weights(folder)
    index = () if _SINGLE in weights else (INDEX,)
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
    tensors = split_experts(open_tensors(folder, find_weights(folder)), config)
    head = tensors.pop(HEAD, None) if config.tied_embeddings else None
    embedding = tensors.setdefault(EMBEDDING, head) if head else None  # either name serves
    shapes, _ = abstract_params(config)
    refuse_misfits(folder, tensors, shapes, config)
    if head and embedding and head is not embedding and not hold_the_same(head, embedding):
        raise BadDataError(f"{folder}: config.json ties the head to the embedding, but {HEAD} differs from it.")

    def load(path: LeafPath, spec: jax.ShapeDtypeStruct, sharding: Sharding) -> Array:
        leaf, names = stored_leaf(path, config), tensor_names(path, config)
        if () in names:
            return load_slice(leaf, tensors[names[()]], spec.shape, dtype, sharding)
        depth = len(next(iter(names)))
        inner = sharding
        if isinstance(sharding, NamedSharding):
            inner = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[depth:]))
        zeros, put = stacking(spec.shape, jnp.dtype(dtype), sharding)
        whole = zeros()
        for index, name in names.items():
            # Wait for the part, and keep no reference to it: its memory is free before the next tensor is read.
            part_of = functools.partial(load_slice, leaf, tensors[name], spec.shape[depth:], dtype, inner)
            whole = jax.block_until_ready(put(whole, part_of(), np.asarray(index, np.int32)))
        return whole

    return map_leaves(load, shapes, shardings)


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
    """Writes a model folder that any Hugging Face tool serves: built beside the folder, then renamed.

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
    itemsize = np.dtype(dtype).itemsize
    parts = {
        name: _Part(path, index, math.prod(leaf.shape[len(index) :]) * itemsize)
        for path, leaf in named_leaves(params)
        for index, name in tensor_names(path, config).items()
    }
    leaves = dict(named_leaves(params))
    split = split_state_dict_into_shards_factory(
        parts,
        get_storage_size=lambda part: part.n_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    with contextlib.ExitStack() as stack:
        with agreed():
            building_at = stack.enter_context(building(folder)) if is_writer() else None
        for file, names in split.filename_to_tensors.items():
            tensors = ((name, _stored(leaves, parts[name], config, dtype=dtype, name=name)) for name in names)
            kept = {name: values for name, values in tensors if building_at}
            with agreed():
                if building_at:
                    _save_file(building_at / file, kept)
        with agreed():
            if building_at:
                if split.is_sharded:
                    weight_map = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                    write_json(building_at / INDEX, weight_map)
                # transformers 5 reads dtype; what is older, and tools that follow it, torch_dtype.
                older = {"torch_dtype": dtype} if "torch_dtype" in huggingface_config else {}
                write_json(building_at / "config.json", {**huggingface_config, "dtype": dtype, **older})
                if generation_config is not None:
                    write_json(building_at / "generation_config.json", generation_config)
                write_text(building_at / "README.md", card)
                for name in TOKENIZER_FILES:
                    if (tokenizer_folder / name).is_file():
                        shutil.copyfile(tokenizer_folder / name, building_at / name)
                stack.close()


class _Part(NamedTuple):
    """The part of a leaf of the params that one stored tensor holds, at an index of its leading axes."""

    path: LeafPath
    at: tuple[int, ...]
    n_bytes: int


def _stored(
    leaves: Mapping[LeafPath, Array], part: _Part, config: DecoderConfig, *, dtype: str, name: str
) -> np.ndarray:
    """The tensor of this name, whole in the host's memory; every process must call it."""
    # One axis at a time: together they would gather every layer of a leaf whose experts are on several devices.
    values = functools.reduce(operator.getitem, part.at, leaves[part.path])
    found = stored_leaf(part.path, config).to_stored(gather(values)).astype(dtype)
    if not np.isfinite(found).all():
        raise NonFiniteError(f"{name} holds NaN or infinity as {dtype}; nothing was written.")
    return np.ascontiguousarray(found)


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
