"""Hugging Face model folders: config.json and safetensors in, the same out."""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sami_jax.data.tokenizer import TOKENIZER_FILES
from sami_jax.errors import BadDataError, NonFiniteError, SaveFailedError
from sami_jax.model.config import DecoderConfig, config_from_huggingface
from sami_jax.model.decoder import abstract_params
from sami_jax.run_directory import building, read_json, write_json, write_text
from sami_jax.types import Params

_LAYER = "model.layers.{layer}."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Path in our params -> (name on the Hub, number of leading axes that a matrix multiplies away; None: stored as it is).
# A Hub matrix is [out, in]; ours keeps the heads apart: [in..., out...].
_NAMES: dict[tuple[str, ...], tuple[str, int | None]] = {
    ("embedding",): (_EMBEDDING, None),
    ("blocks", "attention_norm"): (_LAYER + "input_layernorm.weight", None),
    ("blocks", "attention", "query"): (_LAYER + "self_attn.q_proj.weight", 1),
    ("blocks", "attention", "key"): (_LAYER + "self_attn.k_proj.weight", 1),
    ("blocks", "attention", "value"): (_LAYER + "self_attn.v_proj.weight", 1),
    ("blocks", "attention", "out"): (_LAYER + "self_attn.o_proj.weight", 2),
    ("blocks", "mlp_norm"): (_LAYER + "post_attention_layernorm.weight", None),
    ("blocks", "mlp", "gate"): (_LAYER + "mlp.gate_proj.weight", 1),
    ("blocks", "mlp", "up"): (_LAYER + "mlp.up_proj.weight", 1),
    ("blocks", "mlp", "down"): (_LAYER + "mlp.down_proj.weight", 1),
    ("final_norm",): ("model.norm.weight", None),
    ("head",): (_HEAD, 1),
}
_BUFFERS = ("rotary_emb.inv_freq",)  # written by old transformers, recomputed from config.json


def read_config(folder: Path) -> DecoderConfig:
    """The shape of the model in a folder. Raises BadDataError where there is none this version can run."""
    if not folder.is_dir():
        raise BadDataError(f"The model folder {folder} does not exist; give a folder with config.json and safetensors.")
    path = folder / "config.json"
    if not path.is_file():
        raise BadDataError(f"{folder} has no config.json, so it is not a Hugging Face model folder.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise BadDataError(f"{path}: expected a JSON object.")
    return config_from_huggingface(config, source=str(path))


def load_params(folder: Path, config: DecoderConfig) -> Params:
    """Reads every weight of a model folder as float32.

    Raises:
      BadDataError: a file is missing or damaged; a weight is missing, unknown or misshapen. All names are listed.
    """
    tensors = _open_tensors(folder)
    if config.tied_embeddings and {_HEAD, _EMBEDDING} <= tensors.keys():
        if not np.array_equal(tensors.pop(_HEAD)(), tensors[_EMBEDDING]()):
            raise BadDataError(f"{folder}: config.json ties the head to the embedding, but {_HEAD} differs from it.")
    shapes, _ = abstract_params(config)
    wanted = {name for path, _ in _leaves(shapes) for name in _layer_names(path, config)}
    unknown = sorted(name for name in tensors.keys() - wanted if not name.endswith(_BUFFERS))
    missing = sorted(wanted - tensors.keys())
    if unknown or missing:
        problems = [
            f"{kind}: {', '.join(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names
        ]
        raise BadDataError(f"{folder}: the weights do not fit config.json ({'; '.join(problems)}).")

    def leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        stacked = path[0] == "blocks"
        slices = np.empty(shape, np.float32)
        for layer, name in enumerate(_layer_names(path, config)):
            target = shape[1:] if stacked else shape
            stored = tensors[name]()
            expected = _stored_shape(path, target)
            if stored.shape != expected:
                raise BadDataError(f"{folder}: {name} has shape {stored.shape}, but config.json implies {expected}.")
            if not np.isfinite(stored).all():
                raise BadDataError(f"{folder}: {name} holds NaN or infinity; download or export the model again.")
            slices[layer if stacked else ...] = _from_stored(path, stored, target)
        return slices

    return _map_leaves(lambda path, spec: leaf(path, spec.shape), shapes)


def save_model(
    folder: Path,
    params: Params,
    config: DecoderConfig,
    *,
    huggingface_config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer_folder: Path,
    card: str,
) -> None:
    """Writes a model folder that any Hugging Face tool serves: built beside its place, then renamed.

    Args:
      folder: must not exist, or be empty.
      params: float32 weights, written as float32.
      config: their shape.
      huggingface_config: config.json, its dtype aside.
      generation_config: generation_config.json.
      tokenizer_folder: whose tokenizer files are copied.
      card: README.md.

    Raises:
      BadDataError: the folder holds something else.
      NonFiniteError: a weight is NaN or infinite.
      SaveFailedError: the disk is full or not writable.
    """
    tensors = {}
    for path, array in _leaves(jax.device_get(params)):
        for layer, name in enumerate(_layer_names(path, config)):
            leaf = array[layer] if path[0] == "blocks" else array
            if not np.isfinite(leaf).all():
                raise NonFiniteError(f"{name} holds NaN or infinity; nothing was written to {folder}.")
            tensors[name] = np.ascontiguousarray(_to_stored(path, leaf))
    with building(folder) as place:
        try:
            save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # what a full disk becomes
            raise SaveFailedError(f"{folder} could not be written ({error}); free some space.") from error
        write_json(place / "config.json", {**huggingface_config, "dtype": "float32"})
        write_json(place / "generation_config.json", generation_config)
        write_text(place / "README.md", card)
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, place / name)


def save_finetuned(folder: Path, params: Params, config: DecoderConfig, *, source: Path, card: str) -> None:
    """`save_model` for weights trained from the model in `source`, whose config and tokenizer they keep."""
    generation = source / "generation_config.json"
    save_model(
        folder,
        params,
        config,
        huggingface_config=read_json(source / "config.json"),
        generation_config=read_json(generation) if generation.is_file() else {},
        tokenizer_folder=source,
        card=card,
    )


def _open_tensors(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Tensor name -> function that reads it, over all safetensors files of the folder."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadDataError(f"{index}: weight_map is missing.")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise BadDataError(f"{index}: weight_map must give a file name for each weight.")
        files = sorted(set(weight_map.values()))
    elif single.is_file():
        files = [single.name]
    else:
        raise BadDataError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for name in files:
        path = folder / name
        if Path(name).name != name or path.resolve().parent != folder.resolve():
            raise BadDataError(f"{index}: {name!r} is not a plain file name inside the folder.")
        try:
            reader = safe_open(path, framework="numpy")
            for key in reader.keys():
                tensors[key] = functools.partial(reader.get_tensor, key)
        except FileNotFoundError:
            raise BadDataError(f"{path} is named in the index but does not exist.") from None
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise BadDataError(f"{path} is damaged or incomplete ({error}); download or export it again.") from error
    return tensors


def _leaves(tree: Params, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _map_leaves(function: Callable[[tuple[str, ...], Any], Any], tree: Params, prefix: tuple[str, ...] = ()) -> Params:
    return {
        key: _map_leaves(function, value, (*prefix, key))
        if isinstance(value, dict)
        else function((*prefix, key), value)
        for key, value in tree.items()
    }


def _layer_names(path: tuple[str, ...], config: DecoderConfig) -> list[str]:
    template = _NAMES[path][0]
    return [template.format(layer=i) for i in range(config.n_layers)] if path[0] == "blocks" else [template]


def _stored_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    n_in = _NAMES[path][1]
    return shape if n_in is None else (math.prod(shape[n_in:]), math.prod(shape[:n_in]))


def _from_stored(path: tuple[str, ...], stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return stored if _NAMES[path][1] is None else stored.T.reshape(shape)


def _to_stored(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    out, into = (_stored_shape(path, array.shape) + (0,))[:2]
    return array if _NAMES[path][1] is None else array.reshape(into, out).T
