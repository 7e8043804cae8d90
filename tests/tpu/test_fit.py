"""What the real TPU compiler says, for chips that nobody here owns: does a run fit, and does every part compile."""

import dataclasses
import pathlib

import pytest

from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import RunConfig, load_config
from sami_jax.config.training import TrainConfig
from sami_jax.errors import BadConfigError
from sami_jax.huggingface.folder import read_config
from sami_jax.plan import GIB, HBM_GIB, compile_programs, topology_devices

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TINY = {"n_layers": 2, "embed_dim": 256, "mlp_dim": 512, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 512}


def shape_of(file: str, **changes):
    return dataclasses.replace(read_config(CONFIGS / "models" / load_config(str(CONFIGS / file)).model), **changes)


# The paper's models: slice, and the GiB of a chip that each program takes at most, a twentieth more than when this was
# written (docs/models.md has the figures). What takes more than a chip has, the compiler itself refuses.
FITS = {
    "mistral_7b.py": ("v5e:4x4", {"train step": 11.4, "prefill": 3.72, "decode step": 3.34}),
    "mixtral_8x7b.py": ("v5p:2x2x4", {"train step": 56.7, "prefill": 8.45, "decode step": 8.82}),
    "llama3_70b.py": ("v5p:4x4x4", {"train step": 25.6, "prefill": 6.92, "decode step": 6.92}),
}


BIG = [pytest.param(name, marks=pytest.mark.minutes) for name in ("mixtral_8x7b.py", "llama3_70b.py")]


@pytest.mark.parametrize("file", ["mistral_7b.py", *BIG])
def test_the_papers_models_fit(file):
    """128 queries x 2 x 2, packs of 1375 tokens, float32 weights and optimizer state; 128 rows sampled at once."""
    config, shape = load_config(str(CONFIGS / file)), shape_of(file)
    topology, limits = FITS[file]
    devices = topology_devices(topology)
    sizes = {"prompt_tokens": 672, "response_tokens": 352}
    programs = {program.name: program for program in compile_programs(config, shape, devices, **sizes)}
    assert list(programs) == list(limits)
    for name, limit in limits.items():
        peak = programs[name].peak_bytes
        assert peak is not None, programs[name].refusal
        assert peak < limit * GIB < HBM_GIB[devices[0].device_kind] * GIB, (name, peak / GIB)
    if shape.n_experts is None:
        # Weights and two moments, gradients beside them: of the 7B 6.75 GiB a chip.
        moments = {"adamw": 2, "rmsprop": 1}[config.train.optimizer]
        assert programs["train step"].peak_bytes > (2 + moments) * 4 * weights(shape) / len(devices)
        # 2 FLOPs a weight and token forward, once more when recomputed (but a layer's last matmul), 4 backward; the
        # rest is attention and head.
        last = shape.n_layers * shape.mlp_dim * shape.embed_dim
        tokens = 128 * 2816  # two packs a row, of the next multiple of 256
        assert 1.0 < programs["train step"].flops / ((8 * layer_weights(shape) - 2 * last) * tokens) < 1.1


def layer_weights(shape) -> int:
    """Of the matrices of all layers."""
    attention = 2 * shape.n_heads * shape.head_dim + 2 * shape.n_kv_heads * shape.head_dim
    return shape.n_layers * shape.embed_dim * (attention + 3 * shape.mlp_dim)


def weights(shape) -> int:
    return layer_weights(shape) + 2 * shape.vocab_size * shape.embed_dim


@pytest.mark.parametrize(
    ("file", "topology", "mesh", "compute_dtype"),
    [
        ("llama3_70b.py", "v5e:2x2", MeshConfig(data=2, fsdp=2), "bfloat16"),
        ("mixtral_8x7b.py", "v5p:2x2x1", MeshConfig(fsdp=4), "bfloat16"),
        ("mixtral_8x7b.py", "v6e:2x2", MeshConfig(expert=2, tensor=2), "float32"),
    ],
)
def test_every_program_compiles(file, topology, mesh, compute_dtype):
    """The families' shapes made small; experts run as XLA's grouped matmul, attention as tokamax's kernel, which no
    other platform here compiles."""
    config = RunConfig(mesh=mesh, compute_dtype=compute_dtype, train=TrainConfig(queries_per_step=8, kl_beta=0.1))
    sizes = {"prompt_tokens": 96, "response_tokens": 32}
    programs = list(compile_programs(config, shape_of(file, **TINY), topology_devices(topology), **sizes))
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
