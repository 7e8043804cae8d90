"""The rungs of the parity ladder: parts of our decoder under transformers' names, each a function of its input."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sami_jax.model.decoder import Decoder
from sami_jax.model.layers import rms_norm
from sami_jax.model.shape import DecoderConfig
from sami_jax.types import Array, Params


def rungs(config: DecoderConfig, params: Params, *, tokens: int) -> dict[str, Callable[[Array], Array]]:
    """Norms, attention and MLP of each layer, the layer, and the final norm, for [B, tokens, D] from position 0 on."""
    decoder = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))), params)
    graph, stacked = nnx.split(decoder.blocks)
    found = {"model.norm": lambda x: rms_norm(x, decoder.final_norm[...], eps=config.norm_eps)}

    def positions(x: Array) -> Array:
        return jnp.broadcast_to(jnp.arange(tokens)[None], (x.shape[0], tokens))

    def mix(*qkv: Array) -> tuple[Array, None]:
        rows = len(qkv[0])
        at = jnp.broadcast_to(jnp.arange(tokens)[None], (rows, tokens))
        seen = decoder.back_end.prepare(at, jnp.full((rows, tokens), tokens), config.sliding_window)
        return decoder.back_end.attend(*qkv, seen), None

    for layer in range(config.n_layers):
        block = nnx.merge(graph, jax.tree.map(lambda x, layer=layer: x[layer], stacked))
        parts = {
            "": lambda x, block=block: block(x, positions(x), mix)[0],
            ".input_layernorm": lambda x, block=block: rms_norm(x, block.attention_norm[...], eps=config.norm_eps),
            ".self_attn": lambda x, block=block: block.attention(x, positions(x), mix)[0],
            ".post_attention_layernorm": lambda x, block=block: rms_norm(x, block.mlp_norm[...], eps=config.norm_eps),
            ".mlp": block.mlp,
        }
        found |= {f"model.layers.{layer}{name}": part for name, part in parts.items()}
    return found
