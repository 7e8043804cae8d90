#!/usr/bin/env bash
# Installs the package without extras into a fresh environment and computes a loss there: what another stack gets from
# `pip install sami-jax`. Needs a network (or a pip cache or mirror). PYTHON names the interpreter, default python3.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# From a copy, because building in the checkout would leave build/ and *.egg-info behind, and could pick up old ones.
mkdir "$scratch/source"
git -C "$root" ls-files -z --cached --others --exclude-standard |
    tar --create --directory="$root" --null --files-from=- |
    tar --extract --directory="$scratch/source"

"${PYTHON:-python3}" -m venv "$scratch/venv"
python="$scratch/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt" "$scratch/source"

# Out of the checkout, so that what is imported is what was installed.
cd "$scratch"
installed="$("$python" -m pip list --disable-pip-version-check --format=freeze | sed 's/==.*//' | tr '[:upper:]_' '[:lower:]-')"
for extra in flax jinja2 matplotlib ml-collections openai optax orbax-checkpoint rich safetensors statsmodels tokenizers torch transformers; do
    if grep --quiet --line-regexp --fixed-strings "$extra" <<<"$installed"; then
        echo "core_install: $extra came with the core installation; it belongs to an extra in setup.py" >&2
        exit 1
    fi
done

JAX_PLATFORMS=cpu "$python" - <<'PYTHON'
import math
import pathlib
import sys

import jax.numpy as jnp

from sami_jax import losses

assert pathlib.Path(losses.__file__).is_relative_to(sys.prefix), losses.__file__
result = losses.sami_loss(jnp.log(jnp.array([[0.6, 0.2], [0.3, 0.3]])))
# Over responses 0.6 / 0.8 and 0.3 / 0.6, over constitutions 0.6 / 0.9 and 0.3 / 0.5.
expected = -math.log(3 / 4 * 1 / 2 * 2 / 3 * 3 / 5) / 4
assert abs(float(result.loss) - expected) < 1e-6, (result, expected)
PYTHON
echo "core_install: sami_jax.losses runs on $(wc -w <<<"$installed") packages, none of them from an extra"
