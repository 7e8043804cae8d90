"""How many FLOPs of matrix multiplication a JAX function asks for, counted from its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

# Primitives that run the jaxpr they hold once.
_CALLS = {"jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call"}
# Matrix multiplications that the formulas below do not cover.
_FOREIGN = {
    "conv_general_dilated",
    "dot_product_attention_bwd_wrapper",
    "dot_product_attention_fwd_wrapper",
    "ffi_call",
    "scaled_matmul_wrapper",
}


def count_flops(
    function: Callable[..., Any],
    *args: Any,
    platform: str | None = None,
    of_kernel: Callable[[JaxprEqn], int] | None = None,
) -> int:
    """FLOPs of the matrix multiplications in `function(*args)`, on all devices together.

    [m, k] times [k, n] counts 2 m k n. Elementwise work, reductions, sorts and gathers count nothing, as is the custom
    in MFU, not even where an einsum writes them as a dot_general. The jaxpr is counted as it is written: what
    `jax.checkpoint` computes again is in the number, and so is what XLA drops later because nobody reads it. (XLA's own
    `cost_analysis()` takes the body of a loop once, and a Pallas kernel for nothing.)

    - scan: length x body. Pallas kernel: grid x body.
    - shard_map: devices x body, whether their work differs or not.
    - cond and switch: the dearest branch; of `jax.lax.platform_dependent`, the branch of `platform`.
    - ragged_dot: each row meets one group's matrix, whatever the sizes, which are data. That is the ideal; what a
      platform makes of it may be dearer.

    Args:
      function: what to count; it is traced, and not run.
      *args: its arguments; `jax.ShapeDtypeStruct` will do for arrays.
      platform: "cpu", "cuda", "rocm" or "tpu"; None for `jax.default_backend()`, a GPU being taken for "cuda".
      of_kernel: FLOPs of a Pallas kernel whose grid is data, from its equation.

    Raises:
      ValueError: matrices are multiplied in a loop without a static length, or in a primitive without a formula here,
        convolutions, cuDNN's attention and foreign kernels among them, or Pallas kernels whose grid is data.
    """
    backend = jax.default_backend()
    platform = platform or {"gpu": "cuda"}.get(backend, backend)
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, platform, of_kernel)


def _of_jaxpr(jaxpr: Jaxpr, platform: str, of_kernel: Callable[[JaxprEqn], int] | None) -> int:
    return sum(_of_equation(equation, platform, of_kernel) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn, platform: str, of_kernel: Callable[[JaxprEqn], int] | None) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_matmul(equation.invars[:2], params["dimension_numbers"])
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        return _of_matmul(equation.invars[:2], numbers.dot_dimension_numbers, groups=numbers.rhs_group_dimensions)
    inner = [_of_jaxpr(jaxpr, platform, of_kernel) for jaxpr in jaxprs_in_params(params)]
    if name == "cond":
        platforms = params.get("branches_platforms") or [()] * len(inner)
        chosen = [flops for flops, of in zip(inner, platforms, strict=True) if of is None or platform in of]
        return chosen[0] if chosen else max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        if all(isinstance(size, int) for size in grid):
            return math.prod(grid) * sum(inner)
        if of_kernel is not None:
            return of_kernel(equation)
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
    if name in (*_FOREIGN, "pallas_call") or (any(inner) and name not in _CALLS):
        raise ValueError(
            f"Cannot count the matrix multiplications of '{name}'. A loop needs a static length (scan, or fori_loop "
            "with static bounds), a Pallas kernel whose grid is data `of_kernel`; any other primitive needs a formula "
            "in sami_jax/flops.py."
        )
    return sum(inner)


def _of_matmul(operands: list[Any], numbers: Any, *, groups: tuple[int, ...] = ()) -> int:
    left, right = (operand.aval.shape for operand in operands)
    (left_contracted, contracted), (_, batch) = numbers
    free = set(range(len(right))) - {*contracted, *batch, *groups}
    if not contracted or not (free or len(left) > len(left_contracted) + len(batch)):
        return 0  # a product without a sum, or a sum of products for each batch entry
    return 2 * math.prod(left) * math.prod(right[axis] for axis in free)
