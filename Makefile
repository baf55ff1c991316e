# On a fresh machine, `make train` or `make test` is all: each sets up .venv first, and a second call installs nothing.
# It takes GNU make, Python 3.11 or newer with venv, and a way for pip to reach packages.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)
ACCELERATOR ?= $(firstword $(patsubst $(VENV)/installed-%,%,$(wildcard $(VENV)/installed-*)) cpu)
ifneq ($(words $(ACCELERATOR)) $(filter $(ACCELERATOR),cpu cuda tpu),1 $(ACCELERATOR))
$(error ACCELERATOR is '$(ACCELERATOR)': it must be cpu, cuda or tpu)
endif

STAMP := $(VENV)/installed-$(ACCELERATOR)
EXTRAS := cuda tpu
# requirements.lock holds all of the CPU's packages; an accelerator's lock holds what comes on top.
LOCKS := requirements.lock $(patsubst %,requirements-%.lock,$(filter $(ACCELERATOR),$(EXTRAS)))
LEFT := $(filter-out $(ACCELERATOR),$(patsubst $(VENV)/installed-%,%,$(wildcard $(VENV)/installed-*)))

.DEFAULT_GOAL := help
.PHONY: help env train test test-slow test-faults test-gpu test-aot lint bench bench-peers lock clean FORCE

help:  ## this list
	@echo "make TARGET [PYTHON=python3.12] [ACCELERATOR=cpu|cuda|tpu]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: $(STAMP)  ## set up .venv from the locks; remembers PYTHON and ACCELERATOR until told otherwise

train: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
train: env  ## train the quickstart model on the interpreter's own sources; plots and a sample land in runs/quickstart
	$(BIN)/python train.py quickstart --run runs/quickstart

test: lint  ## lint, types and the test suite
	$(BIN)/python -m pytest

test-slow: env  ## the tests that take minutes each
	$(BIN)/python -m pytest -m "slow and not gpu and not aot and not faults" --timeout 1800

test-faults: env  ## the whole fault matrix, a thousand trials (forty minutes); writes results/faults.md
	$(BIN)/python -m pytest -m "not slow" --timeout 1800 --faults-report results/faults.md \
	  tests/test_faults.py tests/test_faults_outside.py tests/test_faults_processes.py

# Most of its time is compiling: without tuning kernels, by several workers that share the card's memory.
test-gpu: env  ## the tests that need a GPU (after ACCELERATOR=cuda)
	JAX_PLATFORMS=cuda,cpu XLA_FLAGS=--xla_gpu_autotune_level=0 XLA_PYTHON_CLIENT_PREALLOCATE=false \
	  $(BIN)/python -m pytest -n 8 -m gpu --timeout 1800

test-aot: env  ## compile for TPUs that are not there (after ACCELERATOR=tpu; needs no TPU)
	$(BIN)/python -m pytest -n 0 -m aot --timeout 1800

lint: env  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/mypy

bench: env  ## speed and memory of the ops beside their peers; writes results/bench_cpu.md
	$(BIN)/python -m benchmarks.cpu $(if $(MAXTEXT),--maxtext $(MAXTEXT)) $(ARGS)

bench-peers: env  ## install the peers that `make bench` compares with, apart from .venv (tokamax needs Python 3.12)
	$(BIN)/python -m benchmarks.cpu --install-peers

# Pins already in a lock stay unless UPGRADE=--upgrade; --python-version is the oldest that is supported.
COMPILE = uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --only-binary :all: \
	--no-config --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet $(UPGRADE)
LOCKED = $$(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/--no-emit-package \1/p' requirements.lock)

lock:  ## write the locks anew from pyproject.toml (needs uv; UPGRADE=--upgrade takes the newest versions)
	@command -v uv >/dev/null || { echo "make lock needs uv: pip install uv" >&2; exit 1; }
	$(COMPILE) --extra dev --output-file requirements.lock
	@for extra in $(EXTRAS); do echo "... and requirements-$$extra.lock, what it adds"; \
	  $(COMPILE) --extra $$extra --constraint requirements.lock $(LOCKED) --output-file requirements-$$extra.lock \
	  || exit 1; done

clean:  ## remove .venv and every cache; runs/ stays
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './.git/*' -not -path './runs/*' -prune -exec rm -rf {} +

# Another Python than the one in .venv was asked for (or there is none yet).
ifneq ($(shell $(PYTHON) -V 2>/dev/null),$(shell $(BIN)/python -V 2>/dev/null))
$(STAMP): FORCE
endif

# The lock is wheels with hashes; the project itself is built by the lock's setuptools, so nothing comes unpinned.
$(STAMP): pyproject.toml $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	  "$(PYTHON) is $$($(PYTHON) -V 2>&1 | tail -n 1); Python 3.11 or newer is needed: make env PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) for $(ACCELERATOR): about 90 packages, a minute or two the first time"
	@test "$$($(BIN)/python -V 2>&1)" = "$$($(PYTHON) -V 2>&1)" || $(PYTHON) -m venv --clear $(VENV)
	@for left in $(LEFT); do rm -f $(VENV)/installed-$$left; test $$left = cpu || \
	  $(BIN)/python -m pip uninstall --quiet --yes -r requirements-$$left.lock; done
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes $(LOCKS:%=-r %)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
