"""Does a run fit: its programs compiled ahead of time, for devices one need not own, by their real compiler."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sami_jax.config.run import RunConfig, check_training
from sami_jax.data.pairs import Pair
from sami_jax.errors import BadConfigError, is_out_of_memory
from sami_jax.flops import count_flops
from sami_jax.model.decoder import Model, make_model, sharded_params
from sami_jax.model.shape import DecoderConfig
from sami_jax.scoring.matrices import shardings_of_rows
from sami_jax.scoring.packed_rows import pack_rows
from sami_jax.sharding import (
    axes_sharding,
    batch_sharding,
    batch_shards,
    cache_sharding,
    make_mesh,
    micro_batch_sharding,
    shared_rows,
)
from sami_jax.stages.score import Scoring, row_limits
from sami_jax.training import abstract_state, make_optimizer, make_train_step
from sami_jax.types import Prompts, Reference, Rows

GIB = 2**30
HBM_GIB = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}  # a chip's, by Google's documentation


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      name: of the program.
      peak_bytes: most memory that a device holds at a time; None where it does not fit.
      refusal: what the compiler says where it does not fit.
      flops: of its matmuls, on all devices together.
      compile_s: seconds that compilation took.
    """

    name: str
    peak_bytes: int | None
    refusal: str
    flops: int
    compile_s: float


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU slice, described by its compiler.

    Args:
      name: kind and shape in chips, for instance "v5e:4x4" or "v5p:2x2x4".

    Raises:
      BadConfigError: there is no such slice, or no compiler for it here.
    """
    from jax.experimental import topologies

    if jax.default_backend() != "tpu":  # else libtpu asks the network what TPU it is on, and complains at length
        words = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
        for key, value in words.items():
            os.environ.setdefault(key, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # of several kinds, by what is missing
        reason = str(error).partition("\n")[0].rstrip(".")
        raise BadConfigError(
            f"No TPU topology {name!r} ({reason}); name one such as v5e:4x4, and on Linux x86-64 "
            "`pip install sami-jax[tpu]` brings the compiler."
        ) from error


def compile_programs(
    config: RunConfig,
    shape: DecoderConfig,
    devices: Sequence[jax.Device],
    *,
    prompt_tokens: int,
    response_tokens: int,
    names: Sequence[str] = ("train step", "prefill", "decode step"),
) -> Iterator[Program]:
    """Compiles what a run of this config executes, one program after another.

    Args:
      config: mesh, optimizer, precision, queries per step and micro-batch, rows sampled together.
      shape: the model's.
      devices: at least as many as config.mesh asks for; none of them is used.
      prompt_tokens: of the longest prompt, padding included.
      response_tokens: of the longest trained response, padding included; sampling has room for
        config.sampling.max_new_tokens.
      names: which programs.

    Raises:
      BadConfigError: the mesh does not fit the devices or the model.
    """
    if "train step" in names:
        check_training(config, iterations=config.iterations)
    mesh = make_mesh(config.mesh, devices)
    chunk = config.train.head_chunk or None
    model = make_model(shape, remat=config.train.remat, mesh=mesh, dtype=config.compute_dtype, head_chunk=chunk)
    count = config.constitutions.count

    def array(spec: PartitionSpec, dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    if "train step" in names:
        state = abstract_state(sharded_params(shape, mesh, config.train.weights_dtype), make_optimizer(config.train))
        longest = Pair(0, (), (), ((0,) * prompt_tokens,) * count, ((0,) * response_tokens,) * count)
        limits = row_limits(model, mesh, Scoring.of(config.train))
        packing = pack_rows([[longest] * config.train.queries_per_step], limits)
        packed = np.concatenate([np.asarray(batch.rows.ends) for batch in packing.micro_batches(0)])
        batch = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            packing.stacked(0),
            shardings_of_rows(mesh, stacked=True),
        )
        reference: Any = None
        if config.train.kl_beta > 0:
            dtype, split = jnp.dtype(config.compute_dtype), micro_batch_sharding(mesh).spec
            head = array(axes_sharding(mesh, ("embed", "vocab")).spec, dtype, shape.embed_dim, shape.vocab_size)
            reference = Reference(array(split, dtype, *batch.at.shape, shape.embed_dim), head)
        step = make_train_step(model.rows, config.train, seed=config.seed).jitted(state)
        yield _compile("train step", mesh, step, state, reference, batch, of_kernel=_of_kernel(model, packed))
    params = sharded_params(shape, mesh, config.compute_dtype)
    asked, parts = shared_rows(config.sampling.slots, mesh), batch_shards(mesh)
    split = batch_sharding(mesh).spec
    cache = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=cache_sharding(mesh)),
        jax.eval_shape(lambda: model.decode.empty(asked, prompt_tokens + config.sampling.max_new_tokens)),
    )
    if "prefill" in names:
        row = max(prompt_tokens, config.sampling.prefill_tokens)
        tokens, most = array(split, jnp.int32, parts, row), max(1, min(asked // parts, row // prompt_tokens))
        prompts = Prompts(Rows(tokens, tokens, tokens), tokens, array(split, jnp.int32, parts, most))
        prefill = jax.jit(model.decode.prefill, donate_argnums=1)
        ends = np.minimum((np.arange(row) // prompt_tokens + 1) * prompt_tokens, row)[None]  # as many as fit
        yield _compile("prefill", mesh, prefill, params, cache, prompts, of_kernel=_of_kernel(model, ends))
    if "decode step" in names:
        decode, each = jax.jit(model.decode.step, donate_argnums=1), array(split, jnp.int32, asked)
        yield _compile("decode step", mesh, decode, params, cache, each, each)


def _of_kernel(model: Model, ends: np.ndarray) -> Callable[[JaxprEqn], int] | None:
    """FLOPs of the kernel of a model's attention, where it has one, on rows of these ends [N, S]."""
    flops_of = model.attention.kernel_flops
    return None if flops_of is None else lambda equation: flops_of(equation, ends)


def _compile(
    name: str, mesh: Mesh, jitted: Any, *args: Any, of_kernel: Callable[[JaxprEqn], int] | None = None
) -> Program:
    flops = count_flops(jitted, *args, platform=mesh.devices.flat[0].platform, of_kernel=of_kernel)
    started = time.monotonic()
    try:
        with jax.set_mesh(mesh):  # without it, Pallas kernels would be lowered for this machine
            compiled = jitted.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        refusal = " ".join(str(error).split("\n")[:2])
        return Program(name, None, refusal, flops, time.monotonic() - started)
    seconds = time.monotonic() - started
    return Program(name, compiled.memory_analysis().peak_memory_in_bytes, "", flops, seconds)
