"""The decoder in Flax NNX, and the pure functions of its parameters that the rest of the house uses."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sami_jax.model.attention import BLOCKED, DENSE, BackEnd
from sami_jax.model.cache import KVCache
from sami_jax.model.layers import MLP, Attention, Mix, rms_norm, scale, weight
from sami_jax.model.moe import Experts
from sami_jax.model.shape import DecoderConfig
from sami_jax.scoring.head import default_chunk
from sami_jax.sharding import axes_sharding, batch_sharding, cache_sharding, param_shardings
from sami_jax.types import Array, DecodeFn, Dtype, Params, Prompts, Remat, RowModel, Rows

_REMAT: dict[Remat, Callable[[Callable], Callable]] = {
    "none": lambda block: block,
    "dots": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
}


class Block(nnx.Module):
    """Pre-norm residual attention, then pre-norm residual MLP or experts."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, mesh: Mesh | None = None):
        self.config = config
        self.attention_norm = scale((config.n_layers, config.embed_dim), ("layers", "features"))
        self.attention = Attention(config, rngs)
        self.mlp_norm = scale((config.n_layers, config.embed_dim), ("layers", "features"))
        self.mlp = MLP(config, rngs) if config.n_experts is None else Experts(config, rngs, mesh=mesh)

    def __call__(self, x: Array, positions: Array, mix: Mix) -> tuple[Array, Any]:
        """See `Attention`."""
        eps = self.config.norm_eps
        mixed, kept = self.attention(rms_norm(x, self.attention_norm[...], eps=eps), positions, mix)
        x = x + mixed
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], eps=eps)), kept


class Decoder(nnx.Module):
    """Embedding, L scanned blocks, final norm, head.

    With a mesh, activations are split over its batch axes, so that weights are gathered and not activations.
    """

    def __init__(
        self,
        config: DecoderConfig,
        rngs: nnx.Rngs,
        *,
        back_end: BackEnd = DENSE,
        places_at_once: int | None = None,
        mesh: Mesh | None = None,
        dtype: Dtype = "float32",
    ):
        self.config, self.back_end, self.mesh, self.dtype = config, back_end, mesh, dtype
        self.places_at_once = places_at_once
        self.embedding = weight(rngs, (config.vocab_size, config.embed_dim), ("vocab", "embed"))
        self.blocks = Block(config, rngs, mesh=mesh)
        self.final_norm = scale((config.embed_dim,), ("features",))
        if not config.tied_embeddings:
            self.head = weight(rngs, (config.embed_dim, config.vocab_size), ("embed", "vocab"))

    def of_rows(self, rows: Rows, *, remat: Remat) -> Array:
        """[N, S, D] final hidden states, normed; `remat`: what of each block the backward pass recomputes."""
        chex.assert_rank(rows, 2)
        graph, stacked = nnx.split(self.blocks)
        among = self._among(rows)

        def block(x: Array, params: nnx.State) -> tuple[Array, None]:
            mixed, _ = nnx.merge(graph, params)(x, rows.positions, lambda *qkv: (among(*qkv), None))
            return self._split(mixed), None

        x, _ = jax.lax.scan(_REMAT[remat](block), self._embed(rows.tokens), stacked)
        return self._norm(x)

    def prefilled(self, prompts: Prompts, cache: KVCache) -> tuple[Array, KVCache]:
        """[G, P, D] final hidden states, normed, behind each prompt, and the cache with them."""
        rows, among = prompts.rows, self._among(prompts.rows)

        def mix(cache: KVCache, layer: Array, *qkv: Array) -> tuple[Array, KVCache]:
            return among(*qkv), cache.written(layer, prompts.slots, rows.positions, *qkv[1:])

        x, cache = self._cached(self._embed(rows.tokens), rows.positions, cache, mix)
        return self._norm(jnp.take_along_axis(x, prompts.last[:, :, None], axis=1)), cache

    def decoded(self, tokens: Array, positions: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """[B, D] final hidden states, normed, of tokens [B] at positions [B] behind those in a cache, and the cache."""
        chex.assert_rank([tokens, positions], 1)
        own = jnp.zeros_like(tokens)[:, None]  # each slot is a part of its own, with one slot

        def mix(cache: KVCache, layer: Array, queries: Array, *new: Array) -> tuple[Array, KVCache]:
            cache = cache.written(layer, own, positions[:, None], *new)
            window = self.config.sliding_window
            mixed = cache.attend(layer, queries[:, 0], positions, window=window, block=self.places_at_once)
            return mixed[:, None], cache

        x, cache = self._cached(self._embed(tokens)[:, None], positions[:, None], cache, mix)
        return self._norm(x[:, 0]), cache

    def _among(self, rows: Rows) -> Callable[[Array, Array, Array], Array]:
        seen = self.back_end.prepare(rows.positions, rows.ends, self.config.sliding_window)
        return lambda queries, keys, values: self.back_end.attend(queries, keys, values, seen)

    def _cached(self, x: Array, positions: Array, cache: KVCache, mix: Callable) -> tuple[Array, KVCache]:
        """Runs the blocks with a `mix` that also takes cache and layer first, and gives the cache back.

        The cache is carried from layer to layer, where each is written in place; scanned over, it would be copied.
        """
        graph, stacked = nnx.split(self.blocks)

        def block(carry: tuple[Array, KVCache], layer: tuple[Array, nnx.State]) -> tuple[tuple[Array, KVCache], None]:
            (x, cache), (number, params) = carry, layer
            x, cache = nnx.merge(graph, params)(x, positions, functools.partial(mix, cache, number))
            return (self._split(x), cache), None

        (x, cache), _ = jax.lax.scan(block, (x, cache), (jnp.arange(self.config.n_layers), stacked))
        return x, cache

    def _embed(self, tokens: Array) -> Array:
        return self._split(jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype))

    def _norm(self, x: Array) -> Array:
        return rms_norm(x, self.final_norm[...], eps=self.config.norm_eps)

    def _split(self, x: Array) -> Array:
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

    def logits(self, hidden: Array) -> Array:
        """[..., D] -> [..., V] float32: rounded to bfloat16, the log-probs of a contrast would be equal too often."""
        head = self.head_weight().astype(self.dtype)
        return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)

    def head_weight(self) -> Array:
        """[D, V] as it is kept."""
        return self.embedding[...].T if self.config.tied_embeddings else self.head[...]


class Model(NamedTuple):
    """A decoder split at the edge: pure functions of one params pytree.

    Attributes:
      config: the decoder's shape.
      attention: the back-end of attention in rows.
      rows: the model for scoring and training.
      decode: the model for sampling.
    """

    config: DecoderConfig
    attention: BackEnd
    rows: RowModel
    decode: DecodeFn


def abstract_params(config: DecoderConfig) -> tuple[Params, Params]:
    """Shapes and dtypes of every parameter, and its logical axes, as two nested dicts of one structure."""
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    axes = jax.tree.map(lambda p: p.logical_axes, state, is_leaf=lambda p: isinstance(p, nnx.Variable))
    return nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def sharded_params(config: DecoderConfig, mesh: Mesh, dtype: Dtype) -> Params:
    """Shape, dtype and sharding of every parameter on a mesh. Raises BadConfigError as `param_shardings` does."""
    shapes, axes = abstract_params(config)
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=sharding),
        shapes,
        param_shardings(mesh, shapes, axes),
    )


def init_params(config: DecoderConfig, key: Array) -> Params:
    """Random parameters: normal(0, 0.02) matrices, norms of one."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key))))


@functools.cache
def _back_end(platform: str, mesh: Mesh | None) -> BackEnd:
    """The back-end of JAX's platform; docs/benchmarks.md has what was measured."""
    if platform == "tpu":
        from sami_jax.model.attention_tpu import splash

        try:
            return splash(mesh)
        except ImportError:
            return DENSE._replace(name=f"{DENSE.name}, since tokamax of sami-jax[tpu] is not installed")
    return BLOCKED


@functools.lru_cache(maxsize=8)  # equal shapes share their functions, so that what jit compiled is used again
def make_model(
    config: DecoderConfig,
    *,
    remat: Remat = "none",
    mesh: Mesh | None = None,
    dtype: Dtype = "float32",
    head_chunk: int | None = None,
) -> Model:
    """The pure functions of a decoder of this shape.

    Args:
      config: the shape.
      remat: what of each layer gradients of `rows` recompute: nothing, all but its matmuls, or all of it.
      mesh: the devices that rows are split over; their number must then be a multiple of `sharding.batch_shards`.
      dtype: of activations, matmuls and cache, whatever the parameters are kept in; "float32" means it on
        accelerators too, whose default for float32 matmuls is less. Logits are float32.
      head_chunk: labels of a device whose logits are in memory at once; None for as many as suit the platform.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    chosen = _back_end(platform, mesh)
    # On a GPU the host counts the rounds of a loop, which takes longer than reading a few empty places.
    how: dict[str, Any] = {
        "back_end": chosen,
        "places_at_once": None if platform == "gpu" else 128,
        "mesh": mesh,
        "dtype": dtype,
    }
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), **how)))

    def exactly(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                return function(*args)

        return run

    @exactly
    def hidden(params: Params, rows: Rows) -> Array:
        return nnx.merge(graph, params).of_rows(rows, remat=remat)

    def head(params: Params) -> Array:
        return nnx.merge(graph, params).head_weight()

    def empty(slots: int, length: int) -> KVCache:
        shape = (config.n_layers, slots, config.n_kv_heads, length, config.head_dim)
        where = None if mesh is None else cache_sharding(mesh)
        return KVCache(*(jnp.zeros(shape, dtype, device=where) for _ in range(2)))

    @exactly
    def prefill(params: Params, cache: KVCache, prompts: Prompts) -> tuple[Array, KVCache]:
        decoder = nnx.merge(graph, params)
        hidden, cache = decoder.prefilled(prompts, cache)
        return decoder.logits(hidden), cache

    @exactly
    def step(params: Params, cache: KVCache, tokens: Array, positions: Array) -> tuple[Array, KVCache]:
        decoder = nnx.merge(graph, params)
        hidden, cache = decoder.decoded(tokens, positions, cache)
        return decoder.logits(hidden), cache

    whole = None if mesh is None else axes_sharding(mesh, ("embed", "vocab"))
    rows = RowModel(hidden, head, head_chunk or default_chunk(config.vocab_size, config.embed_dim, platform), whole)
    return Model(config, chosen, rows, DecodeFn(empty, prefill, step))
