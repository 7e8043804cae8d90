"""The decoder against transformers on torch, rung by rung: norm, rope, attention, MLP, layer, logits, folders."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

from sami_jax.model.decoder import Block, Decoder, make_model
from sami_jax.model.huggingface import read_config, save_finetuned
from sami_jax.model.layers import rms_norm, rope_frequencies, rotate
from sami_jax.types import Params
from tiny_models import load_float32

# Both sides are float32, which rounds at 6e-8 relative. Hidden states and logits are of size 1 to 5 here, and two
# layers of sums in another order leave 4e-6.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
assert_logits_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # not 32 / 4
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,  # so that attention is far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
ROPE_LLAMA3 = {  # waves of each kind: some stay, some are stretched, some are between
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, rope_parameters=ROPE, sliding_window=None)),
    "mistral_window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, rope_parameters=ROPE, sliding_window=5)),
    "mistral_tied": lambda: MistralForCausalLM(
        MistralConfig(**SHAPE, rope_parameters=ROPE, sliding_window=None, tie_word_embeddings=True)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=ROPE)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=ROPE_LLAMA3, tie_word_embeddings=True)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, rope_parameters=ROPE, num_local_experts=4)),
    "mixtral_window": lambda: MixtralForCausalLM(
        MixtralConfig(**SHAPE, rope_parameters=ROPE, num_local_experts=5, num_experts_per_tok=3, sliding_window=5)
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 97, (3, 17))


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # born as ones, which would hide a gain that is not applied
                parameter.add_(0.3 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder) -> torch.nn.Module:
    return torch_model(folder)


def torch_model(folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def our_logits(folder: Path) -> np.ndarray:
    config = read_config(folder)
    at = jnp.broadcast_to(jnp.arange(TOKENS.shape[1])[None], TOKENS.shape)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    return np.asarray(make_model(config, remat=False).score(load_float32(folder, config), tokens, at))


def our_block(folder: Path, params: Params, layer: int) -> Block:
    decoder = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Decoder(read_config(folder), nnx.Rngs(0)))), params)
    graph, stacked = nnx.split(decoder.blocks)
    return nnx.merge(graph, jax.tree.map(lambda x: x[layer], stacked))


def seen(model: torch.nn.Module, names: tuple[str, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Input and output of each named module while `model` reads TOKENS."""
    found, hooks = {}, []

    def note(module, args, kwargs, output, *, name):
        given = args[0] if args else kwargs["hidden_states"]
        out = output[0] if isinstance(output, tuple) else output
        found[name] = (given.detach().numpy().copy(), out.detach().numpy().copy())

    for name in names:
        hook = functools.partial(note, name=name)
        hooks.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    torch_logits(model)
    for hook in hooks:
        hook.remove()
    return found


def test_rope():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 9, 3, 12)).astype(np.float32), rng.integers(0, 128, (2, 9))
    config = MistralConfig(**SHAPE, rope_parameters=ROPE)
    cos, sin = MistralForCausalLM(config).model.rotary_emb(torch.tensor(x), torch.tensor(positions))
    expected, _ = apply_rotary_pos_emb(*[torch.tensor(x).transpose(1, 2)] * 2, cos, sin)
    actual = rotate(jnp.asarray(x), jnp.asarray(positions, jnp.int32), rope_frequencies(12, theta=500.0, scaling=None))
    # Angles reach 127 radians, where float32 is exact to 4e-6 (half a unit in the last place).
    np.testing.assert_allclose(actual, expected.transpose(1, 2), rtol=0, atol=5e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_ladder(folder, theirs, layer):
    config = read_config(folder)
    params = jax.tree.map(jnp.asarray, load_float32(folder, config))
    block = our_block(folder, params, layer)
    prefix = f"model.layers.{layer}"
    rungs = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    found = seen(theirs, (*(f"{prefix}.{rung}" for rung in rungs), prefix, "model.norm"))
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1])[None], TOKENS.shape)
    eps = config.norm_eps
    ours = {
        "input_layernorm": lambda x: rms_norm(x, block.attention_norm[...], eps=eps),
        "self_attn": lambda x: block.attention(x, positions, None)[0],
        "post_attention_layernorm": lambda x: rms_norm(x, block.mlp_norm[...], eps=eps),
        "mlp": block.mlp,
    }
    for rung, function in ours.items():
        given, expected = found[f"{prefix}.{rung}"]
        assert_close(function(jnp.asarray(given)), expected, err_msg=rung)
    given, expected = found[prefix]
    assert_close(block(jnp.asarray(given), positions, None)[0], expected, err_msg="layer")
    given, expected = found["model.norm"]
    assert_close(rms_norm(jnp.asarray(given), params["final_norm"], eps=eps), expected, err_msg="final norm")


def test_logits(folder, theirs):
    ours, expected = our_logits(folder), torch_logits(theirs)
    print(f"logits up to {np.abs(expected).max():.1f}; largest difference {np.abs(ours - expected).max():.2e}")
    assert_logits_close(ours, expected)


def test_the_window_is_felt():
    """That the two agree on a windowed model says something only if the window changes the logits."""
    torch.manual_seed(0)
    windowed = MODELS["mistral_window"]().eval()
    torch.manual_seed(0)
    full = MODELS["mistral"]().eval()
    difference = np.abs(torch_logits(windowed) - torch_logits(full)).max(axis=(0, 2))
    assert (difference[:5] < 1e-4).all() and (difference[5:] > 0.1).all()


def test_our_folder_in_transformers(folder, theirs, tmp_path):
    config = read_config(folder)
    out = tmp_path / "tuned"
    save_finetuned(out, load_float32(folder, config), config, dtype="float32", source=folder, card="# A model\n")
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (
            after[name].dtype,
            after[name].shape,
            after[name].tobytes(),
        )
    again = torch_model(out)
    assert again.config.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict() | {"_name_or_path": ""}
    np.testing.assert_array_equal(torch_logits(again), torch_logits(theirs))
    assert_logits_close(our_logits(out), torch_logits(theirs))


def test_folders_of_bfloat16_shards_and_old_configs(folder, theirs, tmp_path):
    """What the Hub holds: bfloat16, several shards with an index, and rope_theta where transformers 4 put it."""
    torch_model(folder).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(config))
    expected = torch_logits(torch_model(tmp_path))
    assert np.abs(expected - torch_logits(theirs)).max() > 1e-3  # the weights were rounded
    assert_logits_close(our_logits(tmp_path), expected)
