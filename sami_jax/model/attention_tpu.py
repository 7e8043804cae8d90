"""Attention among the tokens of rows on TPU: tokamax's splash kernel, which passes over what no query of a block sees.

The kernel is called where tokamax has no stable interface yet, so setup.py names one version of it. What its callers
have to know (tests/tpu):

- The mask is data, so the blocks that are run are found as the program runs: once for all layers, outside their scan.
- Keys and values are repeated for the heads that share them. The kernel adds the gradients of a group's heads up in
  one buffer, which is right only where a row has several blocks of keys.
- A block of queries that sees nothing is never written. Padding sees itself, so that there is none.
- Operands of bfloat16 do not compile where matmuls are asked for in float32, nor are float32 gradients float32 where
  they are not, and the gradient is traced after the model has let go of its own setting: hence `_with_precision`.
- tokamax counts on JAX's own rules of promotion, where its callers may have chosen stricter ones.
- XLA cannot split a kernel over devices: `jax.shard_map` does, whose check of varying axes kernels do not pass.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jax.sharding import Mesh, PartitionSpec

from sami_jax.model.attention import BackEnd, attend, visible
from sami_jax.sharding import BATCH_AXES
from sami_jax.types import Array

_BLOCKS = (512, 256, 128)  # of queries and of keys: the largest that divides the row
_ROWS, _HEADS = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, "tensor")


def splash(mesh: Mesh | None) -> BackEnd:
    """The back-end for a mesh of TPUs. Raises ImportError where tokamax is not installed."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel

    over_rows = functools.partial(_on_each_device, mesh)

    def prepare(positions: Array, ends: Array, window: int | None) -> Any:
        mask = visible(positions, ends, window=window)
        block = _block(mask.shape[1])
        if block is None:
            return mask  # a row that is no multiple of any: no training's, but perhaps a short question's
        config = splash_attention_kernel.SplashConfig(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
        )
        make = functools.partial(
            splash_attention_kernel.make_dynamic_splash_mha,
            config=config,
            mask_value=float(jnp.finfo(jnp.float32).min),
        )
        with _tokamaxs_jax("default"):
            return over_rows(jax.vmap(make), _ROWS, out=_ROWS)(mask)

    def attend_in_blocks(queries: Array, keys: Array, values: Array, seen: Any) -> Array:
        if isinstance(seen, jax.Array):
            return attend(queries, keys, values, seen)
        return over_rows(_attend, _ROWS, _HEADS, _HEADS, _HEADS, out=_HEADS)(seen, queries, keys, values)

    return BackEnd("tokamax's splash kernel", prepare, attend_in_blocks, row_multiple=256, kernel_flops=kernel_flops)


def _block(width: int) -> int | None:
    return next((block for block in _BLOCKS if width % block == 0), None)


def visited_blocks(ends: np.ndarray, block: int) -> np.ndarray:
    """[N] blocks of queries and keys that the kernel runs for each row of ends [N, S], a window left out of account."""
    first = np.arange(ends.shape[1] // block)
    last_end = ends.reshape(len(ends), -1, block).max(axis=2)  # slot before which some key of a block is seen
    return np.sum(-(-last_end // block) - first, axis=1)


def kernel_flops(equation: JaxprEqn, ends: np.ndarray) -> int:
    """FLOPs of one run of the kernel, forward or backward, on a row: the mean over rows of ends [N, S]."""
    operands: list[Any] = equation.invars
    heads, width, head_dim = next(x.aval.shape for x in operands if len(x.aval.shape) == 3)
    block = _block(width)
    assert block is not None
    matmuls = 2 if "fwd" in equation.params["name"] else 5  # backward: the scores again, dp, dv, dk, dq
    blocks = float(visited_blocks(ends, block).mean())
    return round(matmuls * 2 * heads * head_dim * block**2 * blocks)


def _on_each_device(mesh: Mesh | None, function: Callable, *specs: PartitionSpec, out: PartitionSpec) -> Callable:
    if mesh is None or mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


def _attend(kernels: Any, queries: Array, keys: Array, values: Array) -> Array:
    """[B, S, N, H] for the kernels of B rows."""
    group = queries.shape[2] // keys.shape[2]
    keys, values = jnp.repeat(keys, group, axis=2), jnp.repeat(values, group, axis=2)
    scaled = queries * jnp.asarray(queries.shape[-1] ** -0.5, queries.dtype)  # the kernel does not
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (scaled, keys, values)]
    leaves, structure = jax.tree.flatten(kernels)

    def of_rows(leaves: list[Array], *qkv: Array) -> Array:
        return jax.vmap(lambda kernel, *qkv: kernel(*qkv))(jax.tree.unflatten(structure, leaves), *qkv)

    return jnp.swapaxes(_with_precision(of_rows, leaves, *heads_first), 1, 2)


@contextlib.contextmanager
def _tokamaxs_jax(precision: str) -> Iterator[None]:
    with (
        jax.default_matmul_precision(precision),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def _with_precision(function: Callable, fixed: list[Array], *operands: Array) -> Array:
    """function(fixed, *operands), whose matmuls and whose gradient's are those of the operands' dtype."""
    precision = "highest" if operands[0].dtype == jnp.float32 else "default"

    @jax.custom_vjp
    def run(fixed: list[Array], *operands: Array) -> Array:
        with _tokamaxs_jax(precision):
            return function(fixed, *operands)

    def forward(fixed: list[Array], *operands: Array) -> tuple[Array, Any]:
        with _tokamaxs_jax(precision):
            return jax.vjp(functools.partial(function, fixed), *operands)

    def backward(pull: Any, cotangent: Array) -> tuple[Any, ...]:
        with _tokamaxs_jax(precision):
            return None, *pull(cotangent)

    run.defvjp(forward, backward)
    return run(fixed, *operands)
