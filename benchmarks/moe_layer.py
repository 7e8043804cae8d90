"""The mixture of experts with each back-end: FLOPs against the ideal, and times against a dense peer.

    python benchmarks/moe_layer.py

Runs where JAX runs, CPU, GPU or TPU; with torch and transformers installed their Mixtral block runs beside ours, on the
same kind of device. For each shape all layers must give the same expert ids, outputs and gradients first, or nothing is
measured. Then, for each:

- FLOPs / ideal, as written: of the layer's matmuls, counted from the jaxpr (`sami_jax.flops`). The ideal is the
  router, and three matrices for each of a token's experts.
- FLOPs / ideal, compiled: what XLA's cost analysis says of the optimised program, elementwise work included. It
  takes the body of a loop once and is left out where there is one.
- time / dense: median of --runs interleaved runs (A B C, C B A, ...), over the median of the dense peer, which runs
  every token through every expert.

Below, in the same unit, a single matmul of the ideal's size in JAX and in torch, which have different matrix libraries.
"""

import argparse
import functools
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sami_jax.flops import count_flops
from sami_jax.model.moe import blocked_mlp, mixed_experts, ragged_mlp, route
from sami_jax.types import Array

PEER = "dense"


class Shape(NamedTuple):
    """Sizes of a layer, and its number of tokens."""

    tokens: int
    experts: int
    k: int
    embed: int
    mlp: int


# Mixtral 8x7B is 4096 by 14336.
SHAPES = {
    "small": Shape(512, 8, 2, 128, 448),
    "eighth": Shape(2048, 8, 2, 512, 1792),
    "decode": Shape(32, 8, 2, 512, 1792),
    "full": Shape(4096, 8, 2, 4096, 14336),
}
# Of an array's largest entry: sums of a few thousand terms in another order.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


class Inputs(NamedTuple):
    """What every layer gets, and the gradient of the outputs.

    Attributes:
      x, d_out: [1, T, D].
      router: [D, E].
      gate, up: [E, D, F].
      down: [E, F, D].
    """

    x: np.ndarray
    router: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    d_out: np.ndarray


class Layer(NamedTuple):
    """One line of the table.

    Attributes:
      forward: runs and waits; (outputs, expert ids).
      both: runs forward and backward and waits; gradients of x, router, gate, up, down.
      flops: of `forward` and `both` over the ideal: as written, and compiled, where known.
    """

    forward: Callable[[], Sequence[Any]]
    both: Callable[[], Sequence[Any]]
    flops: tuple[str, ...] = ("", "", "", "")


def main() -> None:
    """Checks, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "eighth", "decode"])
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--runs", type=int, default=9, help="of each, at least 7")
    arguments = parser.parse_args()
    if arguments.runs < 7:
        parser.error("--runs: a median of fewer than 7 says little")
    if arguments.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # no TF32 or bfloat16 in disguise
    device = jax.devices()[0]
    print(f"{device.device_kind}, {os.cpu_count()} CPU cores, jax {jax.__version__}, {arguments.dtype}")
    for name in arguments.shapes:
        shape = SHAPES[name]
        print(f"\n**{name}**: {', '.join(f'{field} {size}' for field, size in shape._asdict().items())}\n")
        inputs = random_inputs(shape)
        layers = jax_layers(shape, inputs, arguments.dtype)
        rows, matrix = np.ones((shape.tokens * shape.k, shape.embed)), np.ones((shape.embed, 3 * shape.mlp))
        matmuls = {"JAX": jax_matmul(rows, matrix, arguments.dtype)}
        if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            layers |= torch_layers(shape, inputs, arguments.dtype)
            matmuls["torch"] = torch_matmul(rows, matrix, arguments.dtype)
        check(layers, arguments.dtype)
        print_table(layers, matmuls, arguments.runs)


def random_inputs(shape: Shape) -> Inputs:
    """Weights that keep the size of what they multiply."""
    rng = np.random.default_rng(0)
    t, e, _, d, f = shape
    sizes = [(1, t, d), (d, e), (e, d, f), (e, d, f), (e, f, d), (1, t, d)]
    scales = [1.0, d**-0.5, d**-0.5, d**-0.5, f**-0.5, 1.0]
    return Inputs(
        *(rng.standard_normal(size, np.float32) * np.float32(c) for size, c in zip(sizes, scales, strict=True))
    )


def dense_experts(x: Array, chosen: Array, shares: Array, gate: Array, up: Array, down: Array) -> Array:
    """`mixed_experts` by the definition: every token through every expert, most of them with a share of 0."""
    share = jnp.sum(shares[..., None] * jax.nn.one_hot(chosen, gate.shape[0]), axis=2)  # [B, T, E]
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    outs = jnp.einsum("btef,efd->bted", hidden, down)
    return jnp.sum(outs.astype(jnp.float32) * share[..., None], axis=2).astype(x.dtype)


BACK_ENDS: dict[str, Callable[..., Array]] = {
    PEER: dense_experts,
    "ragged_mlp": functools.partial(mixed_experts, mesh=None, mlp=ragged_mlp),
    "blocked_mlp": functools.partial(mixed_experts, mesh=None, mlp=blocked_mlp),
}


def jax_layers(shape: Shape, inputs: Inputs, dtype: str) -> dict[str, Layer]:
    """The back-ends, and one matmul of the ideal's size."""
    *arrays, d_out = (jnp.asarray(array, dtype) for array in inputs)

    def layer(experts: Callable[..., Array]) -> Layer:
        def forward(x: Array, router: Array, *weights: Array) -> tuple[Array, Array]:
            chosen, shares = route(x, router, k=shape.k)
            return experts(x, chosen, shares, *weights), chosen

        def both(d_out: Array, *arrays: Array) -> tuple[Array, ...]:
            _, pull, _ = jax.vjp(forward, *arrays, has_aux=True)
            return pull(d_out)

        ideal = 2 * shape.tokens * shape.embed * (shape.experts + 3 * shape.k * shape.mlp)
        runs, flops = [], []
        for function, given, passes in ((forward, arrays, 1), (both, [d_out, *arrays], 3)):
            program: Any = jax.jit(function).lower(*given).compile()
            runs.append(lambda program=program, given=given: jax.block_until_ready(program(*given)))
            looped = " while(" in program.as_text()
            flops.append(f"{count_flops(function, *given) / ideal / passes:.3f}")
            flops.append("loop" if looped else f"{program.cost_analysis()['flops'] / ideal / passes:.3f}")
        return Layer(runs[0], runs[1], tuple(flops))

    return {name: layer(experts) for name, experts in BACK_ENDS.items()}


def jax_matmul(rows: np.ndarray, matrix: np.ndarray, dtype: str) -> Callable[[], Any]:
    """Multiplies and waits."""
    given = jnp.asarray(rows, dtype), jnp.asarray(matrix, dtype)
    program = jax.jit(jnp.dot).lower(*given).compile()
    return lambda: program(*given).block_until_ready()


def torch_matmul(rows: np.ndarray, matrix: np.ndarray, dtype: str) -> Callable[[], Any]:
    """Multiplies and waits."""
    given = [torch_tensor(array, dtype) for array in (rows, matrix)]
    return lambda: torch_wait(given[0] @ given[1])


def torch_tensor(array: np.ndarray, dtype: str) -> Any:
    """On the kind of device that JAX runs on."""
    import torch

    return torch.tensor(array, dtype=getattr(torch, dtype), device="cuda" if jax.default_backend() == "gpu" else "cpu")


def torch_wait(result: Any) -> Any:
    """The result, once it is there."""
    import torch

    if jax.default_backend() == "gpu":
        torch.cuda.synchronize()
    return result


def torch_layers(shape: Shape, inputs: Inputs, dtype: str) -> dict[str, Layer]:
    """transformers' Mixtral block, with its loop over experts and with torch's grouped matmul."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    x, router, gate, up, down, d_out = (torch_tensor(array, dtype) for array in inputs)
    x.requires_grad_()

    def layer(implementation: str) -> Layer:
        settings: dict[str, Any] = {
            "hidden_size": shape.embed,
            "intermediate_size": shape.mlp,
            "num_local_experts": shape.experts,
            "num_experts_per_tok": shape.k,
            "experts_implementation": implementation,
        }
        block = MixtralSparseMoeBlock(MixtralConfig(**settings)).to(x)
        parameters = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
        with torch.no_grad():
            for parameter, value in zip(parameters, (router.T, torch.cat([gate, up], 2).mT, down.mT), strict=True):
                parameter.copy_(value)

        def forward() -> Sequence[Any]:
            with torch.no_grad():
                return torch_wait((block(x), block.gate(x)[2].reshape(1, -1, shape.k)))

        def both() -> Sequence[Any]:
            d_x, d_router, d_gate_up, d_down = torch_wait(torch.autograd.grad(block(x), (x, *parameters), d_out))
            return d_x, d_router.T, *d_gate_up.mT.chunk(2, 2), d_down.mT

        return Layer(forward, both)

    return {f"transformers, {name}": layer(name) for name in ("eager", "grouped_mm")}


def check(layers: dict[str, Layer], dtype: str) -> None:
    """Ends the program unless all layers choose the same experts, and outputs and gradients agree."""

    def outcome(layer: Layer) -> dict[str, np.ndarray]:
        arrays = (*layer.forward(), *layer.both())
        names = ("outputs", "expert ids", "d x", "d router", "d gate", "d up", "d down")
        return {name: as_numpy(array) for name, array in zip(names, arrays, strict=True)}

    expected = outcome(layers[PEER])
    for name, layer in layers.items():
        for what, array in outcome(layer).items():
            allowed = 0.0 if what == "expert ids" else TOLERANCE[dtype] * np.abs(expected[what]).max()
            difference = np.abs(array - expected[what]).max()
            if not difference <= allowed:
                sys.exit(
                    f"{name}: {what} differ by up to {difference:.1e} from the dense peer's; allowed {allowed:.1e}"
                )
    print(f"All {len(layers)} layers agree: expert ids, outputs, gradients.\n")


def as_numpy(array: Any) -> np.ndarray:
    """Of JAX's or torch's."""
    return np.asarray(array.float().cpu() if hasattr(array, "cpu") else array, np.float64)


def print_table(layers: dict[str, Layer], matmuls: dict[str, Callable[[], Any]], runs: int) -> None:
    """Times everything, interleaved, and prints a line for each layer."""
    timed = {(name, way): getattr(layer, way) for name, layer in layers.items() for way in ("forward", "both")}
    timed |= {(name, "matmul"): matmul for name, matmul in matmuls.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for run in range(runs):
        for key in list(timed)[:: 1 if run % 2 == 0 else -1]:
            start = time.perf_counter()
            timed[key]()
            seconds[key].append(time.perf_counter() - start)

    def ratio(name: str, way: str, to: str) -> str:
        return f"{statistics.median(seconds[name, way]) / statistics.median(seconds[PEER, to]):.2f}"

    columns = "FLOPs / ideal, written | compiled | time / dense"
    print(f"| layer | forward: {columns} | and backward: {columns} |\n{'|---' * 7}|")
    for name, layer in layers.items():
        cells = *layer.flops[:2], ratio(name, "forward", "forward"), *layer.flops[2:], ratio(name, "both", "both")
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nA matmul of the ideal's size / dense, forward:", end=" ")
    print(", ".join(f"{name} {ratio(name, 'matmul', 'forward')}" for name in matmuls))


if __name__ == "__main__":
    main()
