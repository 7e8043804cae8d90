"""Small random torch models of every family, for the goldens and the live comparisons; the only module with torch."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, MistralConfig, MixtralConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

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


def seen(model: PreTrainedModel, names: Iterable[str], tokens: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Input and output of each named module while `model` reads tokens [B, T]."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def note(name: str, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        out = output[0] if isinstance(output, tuple) else output
        found[name] = (given.numpy().copy(), out.numpy().copy())

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, name=name: note(name, args, kwargs, output), with_kwargs=True
        )
        for name in names
    ]
    with torch.no_grad():
        model(torch.tensor(tokens))
    for hook in hooks:
        hook.remove()
    return found


def turned(model: PreTrainedModel, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [B, T, N, H] with the model's rotary embedding at positions [B, T]."""
    cos, sin = model.model.rotary_emb(torch.tensor(x), torch.tensor(positions))
    return apply_rotary_pos_emb(*[torch.tensor(x).transpose(1, 2)] * 2, cos, sin)[0].transpose(1, 2).numpy()


def routed(model: PreTrainedModel, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each token of x [..., D], and their shares: [tokens, k] both."""
    with torch.no_grad():
        _, shares, chosen = model.model.layers[layer].mlp.gate(torch.tensor(x))
    return chosen.numpy(), shares.numpy()
