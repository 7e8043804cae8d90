"""Whether a run fits, with the compiler of the devices at hand; tests/tpu asks the TPU's."""

import dataclasses

import jax
import pytest

from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import RunConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.config.training import TrainConfig
from sami_jax.errors import BadConfigError
from sami_jax.plan import Program, compile_programs
from tiny_models import tiny_config

SHAPE = tiny_config(vocab_size=256, n_layers=2, embed_dim=64, head_dim=16, n_heads=8, n_kv_heads=8, mlp_dim=512)


ALL = ("train step", "prefill", "decode step")


def programs(shape=SHAPE, *, mesh=None, names=ALL, **train) -> dict[str, Program]:
    config = RunConfig(
        mesh=mesh or MeshConfig(),
        train=TrainConfig(**{"queries_per_step": 8} | train),
        sampling=SamplingConfig(max_new_tokens=8, slots=16, prefill_tokens=32),
    )
    found = compile_programs(config, shape, jax.devices(), prompt_tokens=12, response_tokens=4, names=names)
    return {program.name: program for program in found}


def test_every_program_of_a_run_is_compiled_and_shared_devices_hold_less():
    one, eight = programs(rows_per_device=16), programs(mesh=MeshConfig(fsdp=8))
    assert list(one) == list(eight) == list(ALL)
    for name, program in one.items():
        assert not program.refusal and program.compile_s > 0
        # Of all devices together: each reads a row of prompts, and has room for as many labels as the one with most.
        rows = 8 if name == "prefill" else 1
        assert 0 < 0.95 * rows * program.flops < eight[name].flops < 1.05 * rows * program.flops
        assert 0 < eight[name].peak_bytes < program.peak_bytes


def test_flops_are_those_of_the_batch():
    """Linear in layers and queries, which a count of a scan's body alone is not."""
    shapes = [dataclasses.replace(SHAPE, n_layers=n) for n in (1, 3)]
    shallow, deep = (programs(shape, names=["train step"], remat="none") for shape in shapes)
    # Packs of 12 - 1 + 2 x 4 = 19 tokens: three to a row of 64, and so three queries to two rows.
    tokens = 3 * 2 * 64
    matmuls = 64 * 8 * 16 * 2 + 64 * 8 * 16 * 2 + 3 * 64 * 512
    attention = 2 * 2 * 8 * 16 * 64  # scores and mixing, for each token
    a_layer = 3 * tokens * (2 * matmuls + attention)
    assert deep["train step"].flops - shallow["train step"].flops == 2 * a_layer


def test_bfloat16_weights_take_less_and_a_reference_takes_its_head_alone():
    sizes = [
        programs(names=["train step"], **changes)["train step"].peak_bytes
        for changes in ({"kl_beta": 0.1}, {}, {"weights": "bfloat16_stochastic"})
    ]
    weights = 4 * 2 * (4 * 64 * 8 * 16 + 3 * 64 * 512)
    head, hidden = 4 * SHAPE.embed_dim * SHAPE.vocab_size, 4 * SHAPE.embed_dim * 8 * 16
    assert head + hidden < sizes[0] - sizes[1] < head + 2 * hidden + 0.05 * weights
    assert sizes[1] > sizes[2] + 1.2 * weights  # weights and two moments, each half as large


def test_a_mesh_larger_than_the_devices_is_refused():
    with pytest.raises(BadConfigError, match="fsdp=16 .* = 16 devices, but there are 8"):
        programs(mesh=MeshConfig(fsdp=16), queries_per_step=16)
