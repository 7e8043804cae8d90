"""Mixtral's mixture of experts: each token goes to its best few, and none is dropped (Jiang et al. 2024)."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from sami_jax.model.layers import weight
from sami_jax.model.shape import DecoderConfig
from sami_jax.sharding import BATCH_AXES
from sami_jax.types import Array

_MAX_BLOCK = 512  # rows: enough work per expert's weights read that the matmul, not the memory, is the limit
_MIN_BLOCK = 16  # rows: below it reading the weights is the limit, and a few rows of zeros cost less than reading again


class Experts(nnx.Module):
    """E SwiGLU MLPs and the router that chooses among them."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, mesh: Mesh | None):
        c = config
        assert c.n_experts is not None and c.experts_per_token is not None
        self.k, self.mesh = c.experts_per_token, mesh
        wide = (c.n_layers, c.n_experts, c.embed_dim, c.mlp_dim)
        self.router = weight(rngs, (c.n_layers, c.embed_dim, c.n_experts), ("layers", "features", "router"))
        self.gate = weight(rngs, wide, ("layers", "experts", "expert_embed", "mlp"))
        self.up = weight(rngs, wide, ("layers", "experts", "expert_embed", "mlp"))
        self.down = weight(rngs, (*wide[:2], wide[3], wide[2]), ("layers", "experts", "mlp", "expert_embed"))

    def __call__(self, x: Array) -> Array:
        chosen, shares = route(x, self.router[...], k=self.k)
        weights = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        return mixed_experts(x, chosen, shares, *weights, mesh=self.mesh)


def route(x: Array, router: Array, *, k: int) -> tuple[Array, Array]:
    """The experts of each token, and how much each of them counts.

    Args:
      x: [B, T, D].
      router: [D, E].
      k: experts per token.

    Returns:
      chosen: [B, T, k] int32, the likeliest first; of equals the lower id.
      shares: [B, T, k] float32, softmax over all experts, renormalised over the chosen. All of it in float32, since
        in bfloat16 two experts tie often, and rounding would choose.
    """
    logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), router.astype(jnp.float32))
    shares, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), k)
    return chosen, shares / jnp.sum(shares, axis=-1, keepdims=True)


def platform_mlp(rows: Array, sizes: Array, gate: Array, up: Array, down: Array) -> Array:
    """The back-end of the platform that is compiled for: `ragged_mlp` on TPU, `blocked_mlp` elsewhere.

    ragged_dot costs the ideal FLOPs on TPU; elsewhere XLA runs every row through every expert. benchmarks/moe_layer.py
    measures it; on GPU nobody has yet.
    """
    return jax.lax.platform_dependent(rows, sizes, gate, up, down, tpu=ragged_mlp, default=blocked_mlp)


def mixed_experts(
    x: Array,
    chosen: Array,
    shares: Array,
    gate: Array,
    up: Array,
    down: Array,
    *,
    mesh: Mesh | None,
    mlp: Callable[..., Array] = platform_mlp,
) -> Array:
    """Sum over a token's experts of share * expert(token).

    Args:
      x: [B, T, D].
      chosen: [B, T, k] int32 expert ids.
      shares: [B, T, k] float32.
      gate, up: [E, D, F].
      down: [E, F, D].
      mesh: devices to share the work: each sorts its own tokens. Over the "expert" axis tokens are gathered, each
        device runs the experts it holds, and the sums are scattered back; over "tensor" each has a part of F.
      mlp: the back-end, with the arguments of `ragged_mlp`.

    Returns:
      [B, T, D].
    """
    chex.assert_rank([x, chosen, shares, gate, up, down], 3)
    if mesh is None or mesh.size == 1:
        return _local_experts(x, chosen, shares, gate, up, down, first=jnp.zeros((), jnp.int32), mlp=mlp)

    def on_a_device(x: Array, chosen: Array, shares: Array, *weights: Array) -> Array:
        tokens = [jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, chosen, shares)]
        # Each device has its own copy from here on, with its own gradient; the transpose of these casts sums them.
        tokens = [jax.lax.pcast(a, "tensor", to="varying") for a in tokens]
        own = [jax.lax.pcast(w, ("data", "fsdp"), to="varying") for w in weights]
        mixed = _local_experts(*tokens, *own, first=jax.lax.axis_index("expert") * weights[0].shape[0], mlp=mlp)
        return jax.lax.psum_scatter(jax.lax.psum(mixed, "tensor"), "expert", scatter_dimension=0, tiled=True)

    tokens = PartitionSpec(BATCH_AXES)
    wide = PartitionSpec("expert", None, "tensor")
    specs = (tokens, tokens, tokens, wide, wide, PartitionSpec("expert", "tensor"))
    return jax.shard_map(on_a_device, mesh=mesh, in_specs=specs, out_specs=tokens)(x, chosen, shares, gate, up, down)


def _local_experts(
    x: Array,
    chosen: Array,
    shares: Array,
    gate: Array,
    up: Array,
    down: Array,
    *,
    first: Array,
    mlp: Callable[..., Array],
) -> Array:
    """`mixed_experts` of the experts first, first + 1, ... alone."""
    b, t, d = x.shape
    e, k = gate.shape[0], chosen.shape[-1]
    experts = chosen.reshape(-1) - first
    experts = jnp.where((experts >= 0) & (experts < e), experts, e)
    order = jnp.argsort(experts, stable=True)  # (token, choice) pairs by expert, those of other devices last
    tokens = order // k
    sizes = jnp.bincount(experts, length=e).astype(jnp.int32)
    rows = x.reshape(b * t, d)[tokens]
    outs = mlp(rows, sizes, gate, up, down)
    ours = jnp.arange(b * t * k) < jnp.sum(sizes)
    weighted = jnp.where(ours[:, None], outs.astype(jnp.float32) * shares.reshape(-1)[order][:, None], 0.0)
    return jnp.zeros((b * t, d), jnp.float32).at[tokens].add(weighted).astype(x.dtype).reshape(b, t, d)


def ragged_mlp(rows: Array, sizes: Array, gate: Array, up: Array, down: Array) -> Array:
    """SwiGLU of each row by its group's expert, with XLA's grouped matmul.

    Args:
      rows: [M, D], sorted by expert.
      sizes: [E] int32, rows of each expert; rows behind their sum are of no expert.
      gate, up: [E, D, F].
      down: [E, F, D].

    Returns:
      [M, D]; what stands in rows of no expert means nothing.
    """
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    return jax.lax.ragged_dot(hidden, down, sizes)


@jax.custom_vjp
def blocked_mlp(rows: Array, sizes: Array, gate: Array, up: Array, down: Array) -> Array:
    """`ragged_mlp` in plain matmuls: every expert's rows are padded to whole blocks, and blocks are scanned.

    At most E blocks are not full, which with blocks of M / 16 E rows is a sixteenth of the ideal FLOPs (below 256 E
    rows up to 15 rows an expert); empty blocks are skipped. The gradient is written out, since that of a scan adds an
    [E, D, F] array of mostly zeros for each block; it keeps no activations.
    """
    blocks, expert_of_block, slot_of_row = _blocks(rows, sizes)

    def one(_: None, inputs: tuple[Array, Array]) -> tuple[None, Array]:
        x, expert = inputs

        def run() -> Array:
            return _swiglu(x, gate[expert], up[expert], down[expert])

        return None, jax.lax.cond(expert < gate.shape[0], run, lambda: jnp.zeros_like(x))

    _, outs = jax.lax.scan(one, None, (blocks, expert_of_block))
    return _rows_of(outs, slot_of_row)


def _blocked_forward(*inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return blocked_mlp(*inputs), inputs


def _blocked_backward(inputs: tuple[Array, ...], d_outs: Array) -> tuple[Array | None, ...]:
    rows, sizes, *weights = inputs
    blocks, expert_of_block, slot_of_row = _blocks(rows, sizes)
    d_blocks = _in_blocks(d_outs, slot_of_row, blocks.shape)

    def one(totals: list[Array], inputs: tuple[Array, Array, Array]) -> tuple[list[Array], Array]:
        x, d_out, expert = inputs

        def run() -> tuple[list[Array], Array]:
            _, pull = jax.vjp(_swiglu, x, *(w[expert] for w in weights))
            d_x, *d_weights = pull(d_out)
            return [t.at[expert].add(d.astype(t.dtype)) for t, d in zip(totals, d_weights, strict=True)], d_x

        return jax.lax.cond(expert < sizes.shape[0], run, lambda: (totals, jnp.zeros_like(x)))

    start = [jnp.zeros_like(w, dtype=jnp.float32) for w in weights]
    totals, d_x = jax.lax.scan(one, start, (blocks, d_blocks, expert_of_block))
    d_weights = [t.astype(w.dtype) for t, w in zip(totals, weights, strict=True)]
    return _rows_of(d_x, slot_of_row), None, *d_weights


blocked_mlp.defvjp(_blocked_forward, _blocked_backward)


def _swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    return jnp.dot(jax.nn.silu(jnp.dot(x, gate)) * jnp.dot(x, up), down)


def _blocks(rows: Array, sizes: Array) -> tuple[Array, Array, Array]:
    """Rows [M, D] in blocks [n, m, D] of one expert each, the expert of each block [n], and the slot of each row [M].

    Blocks without rows have expert E, rows without expert a slot behind the blocks.
    """
    (m, d), e = rows.shape, sizes.shape[0]
    block = min(_MAX_BLOCK, max(_MIN_BLOCK, m // (16 * e)))
    n_blocks = m // block + e
    blocks_of = -(-sizes // block)  # [E]
    first_block, first_row = jnp.cumsum(blocks_of) - blocks_of, jnp.cumsum(sizes) - sizes
    row = jnp.arange(m)
    expert_of_row = jnp.repeat(jnp.arange(e), sizes, total_repeat_length=m)
    slot_of_row = jnp.where(
        row < jnp.sum(sizes), row + (first_block * block - first_row)[expert_of_row], n_blocks * block
    )
    expert_of_block = jnp.searchsorted(jnp.cumsum(blocks_of), jnp.arange(n_blocks), side="right")
    return _in_blocks(rows, slot_of_row, (n_blocks, block, d)), expert_of_block, slot_of_row


def _in_blocks(rows: Array, slot_of_row: Array, shape: tuple[int, ...]) -> Array:
    n, m, d = shape
    return jnp.zeros((n * m, d), rows.dtype).at[slot_of_row].set(rows, mode="drop").reshape(shape)


def _rows_of(blocks: Array, slot_of_row: Array) -> Array:
    return blocks.reshape(-1, blocks.shape[-1]).at[slot_of_row].get(mode="fill", fill_value=0)
