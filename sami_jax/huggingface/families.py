"""The model families, each in one place: its config.json, what is refused of it, and the names of its tensors."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sami_jax.errors import BadDataError
from sami_jax.model.shape import DecoderConfig, RopeScaling


class _Family(NamedTuple):
    """The values that transformers takes for a model type where config.json leaves them out."""

    architecture: str
    rope_theta: float = 10_000.0
    sliding_window: int | None = None  # Llama's config has no such key


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM"),
    "mistral": _Family("MistralForCausalLM", sliding_window=4096),
    "mixtral": _Family("MixtralForCausalLM", rope_theta=1_000_000.0),
}
# Keys that change the arithmetic in a way this decoder does not follow, with the values that leave it unchanged.
_MUST_BE = {
    "hidden_act": ("silu",),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "attention_dropout": (None, 0),
    "router_jitter_noise": (None, 0),
    "quantization_config": (None,),
    "layer_types": (None,),
    "transformers_weights": (None,),  # another file than model.safetensors and its index
}
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# RopeScaling field -> its key in config.json
_LLAMA3_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}

LeafPath = tuple[str, ...]  # the way to a leaf of our params


class StoredLeaf(NamedTuple):
    """How one leaf of our params is stored on the Hub.

    Attributes:
      name: of its tensors; {layer} and {expert} are filled in, one tensor each.
      inputs: leading axes of a slice that a matmul multiplies away, or None where it is stored as it is. A Hub matrix
        is [out, in]; ours keeps the heads apart: [in..., out...].
    """

    name: str
    inputs: int | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor that holds a slice of this shape."""
        n = self.inputs
        return shape if n is None else (math.prod(shape[n:]), math.prod(shape[:n]))

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """A slice as its tensor is stored."""
        n = self.inputs
        if n is None:
            return array
        return array.transpose(*range(n, array.ndim), *range(n)).reshape(self.stored_shape(array.shape))


_LAYER = "model.layers.{layer}."
MOE, _EXPERT = _LAYER + "block_sparse_moe.", _LAYER + "block_sparse_moe.experts.{expert}."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LEAVES: dict[LeafPath, StoredLeaf] = {
    ("embedding",): StoredLeaf(EMBEDDING),
    ("blocks", "attention_norm"): StoredLeaf(_LAYER + "input_layernorm.weight"),
    ("blocks", "attention", "query"): StoredLeaf(_LAYER + "self_attn.q_proj.weight", 1),
    ("blocks", "attention", "key"): StoredLeaf(_LAYER + "self_attn.k_proj.weight", 1),
    ("blocks", "attention", "value"): StoredLeaf(_LAYER + "self_attn.v_proj.weight", 1),
    ("blocks", "attention", "out"): StoredLeaf(_LAYER + "self_attn.o_proj.weight", 2),
    ("blocks", "mlp_norm"): StoredLeaf(_LAYER + "post_attention_layernorm.weight"),
    ("blocks", "mlp", "gate"): StoredLeaf(_LAYER + "mlp.gate_proj.weight", 1),
    ("blocks", "mlp", "up"): StoredLeaf(_LAYER + "mlp.up_proj.weight", 1),
    ("blocks", "mlp", "down"): StoredLeaf(_LAYER + "mlp.down_proj.weight", 1),
    ("final_norm",): StoredLeaf("model.norm.weight"),
    ("head",): StoredLeaf(HEAD, 1),
}
_EXPERT_LEAVES: dict[LeafPath, StoredLeaf] = {
    ("blocks", "mlp", "router"): StoredLeaf(MOE + "gate.weight", 1),
    ("blocks", "mlp", "gate"): StoredLeaf(_EXPERT + "w1.weight", 1),
    ("blocks", "mlp", "up"): StoredLeaf(_EXPERT + "w3.weight", 1),
    ("blocks", "mlp", "down"): StoredLeaf(_EXPERT + "w2.weight", 1),
}
# Written by old transformers, recomputed from config.json. Masks are booleans, whatever their names.
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
VALUE_HEADS = ("v_head.", "value_head.", "reward_head.", "score.")  # of TRL, of transformers' sequence classification


def config_from_huggingface(config: Mapping[str, Any], *, source: str) -> DecoderConfig:
    """The shape that a Hugging Face config.json describes.

    Args:
      config: the parsed config.json of a Llama, Mistral or Mixtral model, of transformers 4 or 5.
      source: the file's name, for error messages.

    Raises:
      BadDataError: a key is missing, or asks for arithmetic this decoder does not do.
    """
    try:
        return _decoder_config(config)
    except BadDataError as error:
        raise BadDataError(f"{source}: {error}") from error
    except KeyError as missing:
        raise BadDataError(f"{source}: the key {missing} is missing.") from missing


def _whole(value: Any, key: str) -> int:
    """A size: a whole number that an int32 index reaches."""
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 < value < 2**31:
        raise BadDataError(f"{key} is {value!r}; it must be a whole number from 1 to 2147483647.")
    return value


def _number(value: Any, key: str) -> float:
    if type(value) not in (int, float) or not 0 < value < 2.0**63:
        raise BadDataError(f"{key} is {value!r}; it must be a number above 0.")
    return float(value)


def _decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise BadDataError(
            f"model_type is {model_type!r}; choose one of the families this version runs: {', '.join(_FAMILIES)}."
        )
    for key, allowed in _MUST_BE.items():
        if config.get(key, allowed[0]) not in allowed:
            raise BadDataError(f"{key} is {config[key]!r}, which this version does not support.")
    family = _FAMILIES[model_type]
    # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling; both may leave them unsaid.
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), dict | None):
            raise BadDataError(f"{key} is {config[key]!r}; it must be an object or null.")
        rope |= config.get(key) or {}

    def size(key: str, default: int | None = None) -> int:
        value = config[key] if default is None else config.get(key)
        return default if default is not None and value is None else _whole(value, key)

    embed_dim, n_heads = size("hidden_size"), size("num_attention_heads")
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise BadDataError(f"tie_word_embeddings is {tied!r}; it must be true or false.")
    # An explicit null means no window. Where the key is left out, transformers' default differs by family.
    window = config.get("sliding_window", family.sliding_window) if model_type != "llama" else None
    return DecoderConfig(
        model_type=model_type,
        vocab_size=size("vocab_size"),
        embed_dim=embed_dim,
        n_layers=size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=size("num_key_value_heads", n_heads),
        head_dim=size("head_dim", embed_dim // n_heads),
        mlp_dim=size("intermediate_size"),
        n_experts=size("num_local_experts") if model_type == "mixtral" else None,
        experts_per_token=size("num_experts_per_tok") if model_type == "mixtral" else None,
        max_positions=size("max_position_embeddings"),
        rope_theta=_number(rope.get("rope_theta") or config.get("rope_theta") or family.rope_theta, "rope_theta"),
        rope_scaling=_rope_scaling(rope),
        norm_eps=_number(config["rms_norm_eps"], "rms_norm_eps"),
        sliding_window=None if window is None else _whole(window, "sliding_window"),
        tied_embeddings=tied,
    )


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise BadDataError(f"rope_type is {kind!r}; this version supports 'default' and 'llama3'.")
    known = _ROPE_KEYS | (set(_LLAMA3_KEYS.values()) if kind == "llama3" else set())
    for key in rope:
        if key not in known or (key == "partial_rotary_factor" and rope[key] != 1):
            raise BadDataError(f"the rope setting {key}={rope[key]!r} is not supported with {kind!r}.")
    if kind == "default":
        return None
    factors = {field: _number(rope[key], key) for field, key in _LLAMA3_KEYS.items() if field != "original_positions"}
    positions = _LLAMA3_KEYS["original_positions"]
    return RopeScaling(**factors, original_positions=_whole(rope[positions], positions))


def config_to_huggingface(config: DecoderConfig, *, bos_token_id: int | None, eos_token_id: int | None) -> dict:
    """The config.json that `config_from_huggingface` and transformers read back as `config`."""
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope["rope_type"] = "llama3"
        rope |= {key: getattr(config.rope_scaling, field) for field, key in _LLAMA3_KEYS.items()}
    keys: dict[str, Any] = {
        "architectures": [_FAMILIES[config.model_type].architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_positions,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": "float32",
    }
    if config.model_type != "llama":
        keys["sliding_window"] = config.sliding_window
    if config.n_experts is not None:
        keys |= {"num_local_experts": config.n_experts, "num_experts_per_tok": config.experts_per_token}
    return keys


def stored_leaf(path: LeafPath, config: DecoderConfig) -> StoredLeaf:
    return (_LEAVES if config.n_experts is None else _LEAVES | _EXPERT_LEAVES)[path]


def tensor_names(path: LeafPath, config: DecoderConfig) -> dict[tuple[int, ...], str]:
    """Index into the leaf's leading axes -> the name of the tensor that is there."""
    template = stored_leaf(path, config).name
    if "{expert}" in template:
        indices = itertools.product(range(config.n_layers), range(config.n_experts or 0))
        return {(layer, expert): template.format(layer=layer, expert=expert) for layer, expert in indices}
    if "{layer}" in template:
        return {(layer,): template.format(layer=layer) for layer in range(config.n_layers)}
    return {(): template}
