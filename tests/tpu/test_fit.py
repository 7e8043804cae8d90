"""What the real TPU compiler says, for chips that nobody here owns: does a run fit, and does every part compile."""

import dataclasses
import pathlib

import pytest

from sami_jax.config import MeshConfig, RunConfig, TrainConfig, load_config
from sami_jax.errors import BadConfigError
from sami_jax.model.huggingface import read_config
from sami_jax.plan import GIB, HBM_GIB, compile_programs, topology_devices

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TINY = {"n_layers": 2, "embed_dim": 512, "mlp_dim": 1024, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 2048}


def shape_of(file: str, **changes):
    return dataclasses.replace(read_config(CONFIGS / "models" / load_config(str(CONFIGS / file)).model), **changes)


def test_mistral_7b_trains_on_sixteen_v5e():
    """128 queries x 2 x 2, sequences of 1024 tokens, float32 weights and AdamW."""
    config, shape = load_config(str(CONFIGS / "mistral_7b.py")), shape_of("mistral_7b.py")
    devices = topology_devices("v5e:4x4")
    assert HBM_GIB[devices[0].device_kind] == 16
    sizes = {"prompt_tokens": 672, "response_tokens": 352}
    [program] = compile_programs(config, shape, devices, **sizes, names=["train step"])
    assert program.peak_bytes is not None, program.refusal
    # Weights and two moments are 5.06 GiB, gradients 1.69; 11.92 in all when this was written, and no more.
    assert 6 * GIB < program.peak_bytes < 12.5 * GIB
    # 2 FLOPs a weight and token forward, once more when recomputed (but a layer's last matmul), 4 backward; the rest
    # is attention and head.
    layers = (
        shape.n_layers
        * shape.embed_dim
        * (2 * shape.n_heads * shape.head_dim + 2 * shape.n_kv_heads * shape.head_dim + 3 * shape.mlp_dim)
    )
    last = shape.n_layers * shape.mlp_dim * shape.embed_dim
    tokens = 128 * 2 * 2 * 1024
    assert 1.0 < program.flops / ((8 * layers - 2 * last) * tokens) < 1.1


@pytest.mark.parametrize(
    ("file", "mesh", "compute_dtype"),
    [
        ("llama3_70b.py", MeshConfig(data=2, fsdp=2), "bfloat16"),
        ("mixtral_8x7b.py", MeshConfig(fsdp=4), "bfloat16"),
        ("mixtral_8x7b.py", MeshConfig(expert=2, tensor=2), "float32"),
    ],
)
def test_every_program_compiles(file, mesh, compute_dtype):
    """The families' shapes made small; experts run as XLA's grouped matmul, which no other platform here compiles."""
    config = RunConfig(mesh=mesh, compute_dtype=compute_dtype, train=TrainConfig(queries_per_step=8, kl_beta=0.1))
    sizes = {"prompt_tokens": 96, "response_tokens": 32}
    programs = list(compile_programs(config, shape_of(file, **TINY), topology_devices("v5e:2x2"), **sizes))
    assert [program.name for program in programs] == ["train step", "prefill", "decode step"]
    assert all(program.peak_bytes and program.flops for program in programs)


def test_what_does_not_fit_is_said_and_what_comes_after_it_not_tried():
    huge = shape_of("mistral_7b.py", n_layers=1, mlp_dim=1 << 20)
    config = RunConfig(mesh=MeshConfig(fsdp=4), compute_dtype="bfloat16", train=TrainConfig(queries_per_step=4))
    sizes = {"prompt_tokens": 96, "response_tokens": 32}
    train, *_ = compile_programs(config, huge, topology_devices("v5e:2x2"), **sizes)
    assert train.peak_bytes is None and "memory" in train.refusal


@pytest.mark.parametrize("name", ["v5e", "v5e:3x9x", "nothing"])
def test_an_unknown_topology_is_refused_with_an_example(name):
    with pytest.raises(BadConfigError, match=f"No TPU topology '{name}' .* name one such as v5e:4x4"):
        topology_devices(name)


def test_a_mesh_larger_than_the_slice_is_refused():
    config = RunConfig(mesh=MeshConfig(fsdp=16))
    with pytest.raises(BadConfigError, match="fsdp=16 .* = 16 devices, but there are 4"):
        next(
            compile_programs(
                config, shape_of("mistral_7b.py"), topology_devices("v5e:2x2"), prompt_tokens=96, response_tokens=32
            )
        )
