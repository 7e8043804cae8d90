"""`pip install sami-jax` without extras gives other stacks the loss: it may need jax, chex and numpy, nothing else.

The real installation, in a fresh environment and therefore with a network, is .ci/core_install.sh.
"""

import ast
import os
import pathlib
import re
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parents[1]

NOT_IN_THE_CORE = (
    "datasets",
    "flax",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "ml_collections",
    "openai",
    "optax",
    "orbax",
    "rich",
    "safetensors",
    "scipy.stats",  # jax itself needs scipy, its statistics belong to the evaluation
    "statsmodels",
    "tokenizers",
    "torch",
    "transformers",
)

# Runs in a fresh interpreter whose imports of the packages above fail as if they were not installed.
CORE_ONLY = """
import importlib.abc
import math
import sys

BLOCKED = {blocked!r}


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if any(fullname == name or fullname.startswith(name + ".") for name in BLOCKED):
            raise ModuleNotFoundError(f"{{fullname}} is not in the core installation", name=fullname)


sys.meta_path.insert(0, Blocker())
for name in BLOCKED:
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        assert "not in the core" in str(error), error
    else:
        raise AssertionError(f"{{name}} was loaded before it could be blocked")

import jax.numpy as jnp

from sami_jax import losses

logps = jnp.log(jnp.array([[0.6, 0.2], [0.3, 0.3]]))
print(losses.sami_loss(logps).loss, losses.mi_lower_bound(logps))
"""


def install_requires() -> list[str]:
    """What setup.py passes to setup() as install_requires, read without running it."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    (keyword,) = (node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "install_requires")
    return ast.literal_eval(keyword.value)


def test_core_requires_jax_chex_and_numpy_only():
    names = [re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in install_requires()]
    assert sorted(name.group() for name in names if name) == ["chex", "jax", "numpy"]


def test_losses_import_and_run_without_the_extras():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", CORE_ONLY.format(blocked=NOT_IN_THE_CORE)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    loss, mi_nats = map(float, result.stdout.split())
    # Over responses 3/4 and 1/2, over constitutions 2/3 and 3/5, as in test_losses.py: -log(0.15) / 4 and
    # log 2 + log(0.4) / 2; printed with some 7 digits.
    assert abs(loss - 0.4742800) < 1e-5
    assert abs(mi_nats - 0.2350018) < 1e-5
