"""The shape of a decoder, read from and written to a Hugging Face config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from sami_jax.errors import BadDataError


class _Family(NamedTuple):
    """What transformers does for a model type where config.json says nothing."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's rotary frequencies for contexts longer than those of pretraining (`rope_type` "llama3").

    Attributes:
      factor: what the frequencies of the longest waves are divided by.
      low_freq_factor: waves longer than original_positions / low_freq_factor are divided by `factor`.
      high_freq_factor: waves shorter than original_positions / high_freq_factor stay; between the two it is a blend.
      original_positions: longest sequence of pretraining, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder of the Llama, Mistral or Mixtral family.

    Attributes:
      model_type: "llama", "mistral" or "mixtral", as config.json says it.
      vocab_size: V.
      embed_dim: D.
      n_layers: L.
      n_heads: N.
      n_kv_heads: K; N is a multiple of it.
      head_dim: H.
      mlp_dim: F; with experts, of each.
      n_experts: E, or None for one dense MLP.
      experts_per_token: experts that a token is sent to, or None.
      max_positions: longest sequence, in tokens.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how they are stretched, or None.
      norm_eps: added to the mean square in RMSNorm.
      sliding_window: tokens a query sees, itself included; None for all.
      tied_embeddings: the output head is the embedding.
    """

    model_type: str
    vocab_size: int
    embed_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_dim: int
    n_experts: int | None
    experts_per_token: int | None
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    sliding_window: int | None
    tied_embeddings: bool

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) in (int, float) and value <= 0:
                raise BadDataError(f"The model's {field.name} is {value}; it must be positive.")
        if self.n_heads % self.n_kv_heads:
            raise BadDataError(f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly.")
        if self.head_dim % 2:
            raise BadDataError(f"head_dim is {self.head_dim}, but rotary positions need an even one.")
        if (self.n_experts or 0) < (self.experts_per_token or 0):
            raise BadDataError(f"A token cannot be sent to {self.experts_per_token} of {self.n_experts} experts.")


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
    """A size; what no device's memory is indexed by is none."""
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
    # An explicit null means none; what transformers takes where the key is left out differs by family.
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
