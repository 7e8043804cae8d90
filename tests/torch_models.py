"""Small random torch models of every family, for the goldens and the live comparisons; the only module with torch."""

from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig, MixtralConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

_SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not 24 / 4
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,  # so that attention is far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,  # and no pad_token_id: torch would freeze that token's embedding
    "attn_implementation": "eager",
}
_ROPE = {"rope_type": "default", "rope_theta": 100.0}
FAMILIES = {
    # Windows are shorter than prompt and response.
    "mistral": (MistralConfig, {"sliding_window": 9, "rope_parameters": _ROPE}),
    "mistral_full": (MistralConfig, {"sliding_window": None, "rope_parameters": _ROPE}),
    "llama2": (LlamaConfig, {"num_key_value_heads": 4, "rope_parameters": _ROPE}),
    "llama3": (
        LlamaConfig,
        {
            "tie_word_embeddings": True,
            "rope_parameters": {  # of the four waves one stays, two are between, one is stretched
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _ROPE}),
    "mixtral_window": (
        MixtralConfig,
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 9, "rope_parameters": _ROPE},
    ),
}


def torch_model(family: str, *, seed: int = 404, **changes: Any) -> PreTrainedModel:
    """A random model in float32, its norms' gains unlike one, which would hide a gain that is not applied."""
    config, settings = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(**_SHAPE | settings | changes)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
