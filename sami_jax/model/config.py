"""The shape of a decoder, read from and written to a Hugging Face config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sami_jax.errors import BadDataError

_ARCHITECTURES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
# Keys that change the arithmetic in a way this decoder does not follow, with the values that leave it unchanged.
_MUST_BE = {
    "hidden_act": ("silu",),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "layer_types": (None,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder of the Mistral / Llama family.

    Attributes:
      model_type: "mistral" or "llama", as config.json says it.
      vocab_size: V.
      embed_dim: D.
      n_layers: L.
      n_heads: N.
      n_kv_heads: K; N is a multiple of it.
      head_dim: H.
      mlp_dim: F.
      max_positions: longest sequence, in tokens.
      rope_theta: base of the rotary frequencies.
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
    max_positions: int
    rope_theta: float
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


def config_from_huggingface(config: Mapping[str, Any], *, source: str) -> DecoderConfig:
    """The shape that a Hugging Face config.json describes.

    Args:
      config: the parsed config.json of a Mistral or Llama model, of transformers 4 or 5.
      source: the file's name, for error messages.

    Raises:
      BadDataError: a key is missing, or asks for arithmetic this decoder does not do.
    """
    model_type = config.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise BadDataError(f"{source}: model_type is {model_type!r}; this version runs {sorted(_ARCHITECTURES)} only.")
    for key, allowed in _MUST_BE.items():
        if config.get(key, allowed[0]) not in allowed:
            raise BadDataError(f"{source}: {key} is {config[key]!r}, which this version does not support.")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise BadDataError(f"{source}: rope_type is {rope['rope_type']!r}; this version supports 'default' only.")
    # transformers 5 writes rope_parameters, transformers 4 rope_theta; both leave 10000 unsaid.
    rope_theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    try:
        n_heads = int(config["num_attention_heads"])
        return DecoderConfig(
            model_type=model_type,
            vocab_size=int(config["vocab_size"]),
            embed_dim=int(config["hidden_size"]),
            n_layers=int(config["num_hidden_layers"]),
            n_heads=n_heads,
            n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // n_heads),
            mlp_dim=int(config["intermediate_size"]),
            max_positions=int(config["max_position_embeddings"]),
            rope_theta=float(rope_theta),
            norm_eps=float(config["rms_norm_eps"]),
            # Llama's config has no such key; in Mistral's an explicit null means none, and transformers takes 4096
            # where the key is left out.
            sliding_window=config.get("sliding_window", 4096) if model_type == "mistral" else None,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as missing:
        raise BadDataError(f"{source}: the key {missing} is missing.") from missing
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BadDataError(f"{source}: a size is not a number ({error}).") from error


def config_to_huggingface(config: DecoderConfig, *, bos_token_id: int | None, eos_token_id: int | None) -> dict:
    """The config.json that `config_from_huggingface` and transformers read back as `config`."""
    keys = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_positions,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": "float32",
    }
    if config.model_type == "mistral":
        keys["sliding_window"] = config.sliding_window
    return keys
