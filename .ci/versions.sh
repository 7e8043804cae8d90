#!/usr/bin/env bash
# The loss, statistics, the tokenizer and loading on other versions than those of constraints.txt: `lowest` takes what
# setup.py admits at least, `newest` what the index has today, on a newer Python where there is one. Needs a network (or
# a mirror).
set -euo pipefail

which="${1:?lowest or newest}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
resolution=lowest-direct
if [[ "$which" == newest ]]; then
    resolution=highest
    for newer in python3.14 python3.13 python3.12; do
        if "$newer" -c '' 2>/dev/null; then
            python="$newer"
            break
        fi
    done
    if [[ "$python" == "${PYTHON:-python3}" ]]; then
        echo "versions: no newer Python here (python3.12 to python3.14); nothing was tried"
        exit 0
    fi
fi
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

"$python" -m venv "$scratch/uv"
"$scratch/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv
uv="$scratch/uv/bin/uv"
"$uv" venv --quiet --python "$("$python" -c 'import sys; print(sys.executable)')" "$scratch/venv"
# Not editable, and without building in the checkout: the tests take the package from there all the same.
mkdir "$scratch/source"
cp -r "$root/setup.py" "$root/pyproject.toml" "$root/README.md" "$root/sami_jax" "$scratch/source"
"$uv" pip install --quiet --python "$scratch/venv/bin/python" --resolution "$resolution" "$scratch/source[train,test]"
"$uv" pip list --quiet --python "$scratch/venv/bin/python" --format=freeze |
    grep -E '^(jax|flax|numpy|chex|openai|transformers|tokenizers|safetensors|huggingface.hub|scipy|statsmodels|pandas)==' | paste -sd ' ' -
cd "$root"
# Each operation compiled by itself says nothing about versions, and takes most of the time.
"$scratch/venv/bin/python" -m pytest -p no:cacheprovider -n 2 -m "not slow" -k "not without_jit" \
    tests/test_losses.py tests/test_tokenizer.py tests/test_huggingface.py tests/test_chat_client.py \
    tests/test_statistics.py
echo "versions: $which passed on $("$python" --version)"
