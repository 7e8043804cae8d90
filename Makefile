# Each target makes the environment it needs, once: a virtual environment here, with a stamp per set of extras.
# After that nothing touches the network.

PYTHON ?= python3
# Further options for pip, for instance another index with CPU-only wheels of torch: make parity PIP_FLAGS=...
PIP_FLAGS ?=
# Further options for pytest: make test PYTEST_FLAGS="-k losses"
PYTEST_FLAGS ?=
# Further extras of setup.py for the demo: make demo EXTRAS=gpu
EXTRAS ?=
WORKERS ?= 2

VENV := .venv
# transformers imports torch wherever it finds it, JAX the TPU compiler, and neither demo nor tests may lean on that.
VENV_PARITY := .venv-parity

comma := ,
DEMO_SET := train$(if $(EXTRAS),$(comma)$(EXTRAS))
PINS := setup.py constraints.txt
SCRIPTS := $(wildcard launch/*.sh launch/*.sbatch launch/*/*.sh .ci/*.sh) .ci/run
# Whole files go to a worker; tests/conftest.py puts the slow ones first, so that none of them is left alone at the end.
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Two makes at once take turns at installing, where the system has flock.
LOCK := $(if $(shell command -v flock 2>/dev/null),flock .venv.lock)

# $(call install,folder,extras): the environment `folder` with `extras` of setup.py, at the versions of constraints.txt.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "sami_jax needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -n 1 | grep -E '^Python [0-9]' || echo 'not a Python that runs here'): name another with 'make $(or $(firstword $(MAKECMDGOALS)),demo) PYTHON=python3.12'." >&2; exit 1; }
@echo "Installing sami-jax[$(2)] into $(1) (once; a minute or more)"
@$(LOCK) sh -ec '\
	$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1); \
	$(1)/bin/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[$(2)]"'
@touch $@
endef

.DEFAULT_GOAL := help
.PHONY: help demo test lint parity fit fit-all clean
# -j is welcome, but pip must not run twice in one environment.
.NOTPARALLEL:

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-$(DEMO_SET) ## Run SAMI in miniature, from pretraining to the report, in runs/miniature.
	$(VENV)/bin/sami run --config=configs/miniature.py --workdir=runs/miniature

test: $(VENV)/.installed-train,test ## Run the tests (no GPU, no torch, no network).
	$(VENV)/bin/python $(PYTEST) tests --ignore=tests/parity --ignore=tests/tpu $(PYTEST_FLAGS)

lint: $(VENV)/.installed-train,test,lint ## Check style, types and scripts.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck -x $(SCRIPTS)

parity: $(VENV_PARITY)/.installed-train,test,parity ## Compare the numbers with torch's.
	$(VENV_PARITY)/bin/python $(PYTEST) tests/parity $(PYTEST_FLAGS)

fit: $(VENV_PARITY)/.installed-train,test,tpu ## Ask the TPU compiler whether a 7B run compiles and fits (Linux x86-64).
	$(VENV_PARITY)/bin/python -m pytest tests/tpu -m "not minutes" $(PYTEST_FLAGS)

fit-all: $(VENV_PARITY)/.installed-train,test,tpu ## The same for Mixtral 8x7B and Llama 3 70B; ten minutes or more.
	$(VENV_PARITY)/bin/python -m pytest tests/tpu $(PYTEST_FLAGS)

clean: ## Remove the environments and caches; runs/ stays.
	rm -rf $(VENV) $(VENV_PARITY) .venv.lock .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

$(VENV)/.installed-%: $(PINS)
	$(call install,$(VENV),$*)

$(VENV_PARITY)/.installed-%: $(PINS)
	$(call install,$(VENV_PARITY),$*)
