# Every target works from a fresh clone and does nothing twice. Stamps inside the environment say what is installed
# in it. A stamp is out of date when pyproject.toml is newer.

PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/digits
TRAIN_ARGS ?=
DISTRIBUTED_DIR ?= runs/distributed
DISTRIBUTED_ARGS ?= --local-processes 2
KILLS ?= 100
KILL_SEED ?= 0
PYTEST_ARGS ?=
DEVICE ?=
PORTABILITY_ARGS ?=
BENCH_ARGS ?=
FUZZ ?= 20000
NOTEBOOKS ?=
JUPYTER_ARGS ?=
TORCH := torch==2.13.0

BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The environment is rebuilt if its Python does not run, if an installation in it was interrupted, or if it was made
# for a clone in another place.
SOUND := $(shell cd $(VENV) 2>/dev/null && test ! -e .installing && test "$$(cat .made)" = "$(CURDIR)" \
	&& bin/python -c 'import pip' 2>/dev/null && echo yes)

# With two --quiet, pip prints only errors.
define install
@touch $(VENV)/.installing
@$(BIN)/python -m pip install --quiet --quiet $(1)
@touch $@
@rm $(VENV)/.installing
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup train train-distributed port test test-device kill-campaign fuzz portability notebooks pictures bench lint build clean FORCE

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.torch $(VENV)/.extra-dev $(VENV)/.extra-notebooks ## make .venv with what tests, linters, examples and notebooks need
	@echo "setup: $(VENV) is ready"

train: $(VENV)/.extra-examples ## train a small network on handwritten digits, and write to runs/digits
	@echo "train: writing to $(RUN_DIR)"
	@$(BIN)/python examples/train_digits.py --output "$(RUN_DIR)" --resume $(TRAIN_ARGS)

train-distributed: $(VENV)/.extra-examples ## the same in two processes on this machine, and write to runs/distributed
	@echo "train-distributed: writing to $(DISTRIBUTED_DIR)"
	@$(BIN)/python examples/train_distributed.py --output "$(DISTRIBUTED_DIR)" --resume $(DISTRIBUTED_ARGS)

port: $(VENV)/.torch $(VENV)/.extra-examples ## move a training run from PyTorch to JAX and back, and compare
	@$(BIN)/python examples/port_from_torch.py

test: $(VENV)/.torch $(VENV)/.extra-tests $(VENV)/.extra-notebooks ## run the tests, including those against PyTorch
	@echo "test: running pytest"
	@$(BIN)/python -m pytest -m "not notebook and not script" --numprocesses auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

# The folder for compiled programs makes the tests compile them as users do: see tests/conftest.py.
test-device: $(VENV)/.extra-tests ## run the tests for a GPU or a TPU; DEVICE=cpu tries them without one
	@$(if $(DEVICE),JAX_PLATFORMS=$(DEVICE)) $(BIN)/python tests/test_device.py "$(DEVICE)"
	@cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && export JAX_COMPILATION_CACHE_DIR="$$cache" \
	&& $(if $(DEVICE),JAX_PLATFORMS=$(DEVICE)) $(BIN)/python -m pytest -m "device and not script" $(PYTEST_ARGS)

fuzz: $(VENV)/.torch $(VENV)/.extra-tests ## read files of other libraries that are changed at random; FUZZ=20000 is their number for each source
	@echo "fuzz: $(FUZZ) changed files for each source"
	@FUZZ=$(FUZZ) $(BIN)/python -m pytest -m "not notebook" -p no:cacheprovider --numprocesses auto --maxprocesses 4 tests/test_reading.py $(PYTEST_ARGS)

kill-campaign: $(VENV)/.extra-tests ## kill processes of a run at random moments, and compare its end; KILLS=100 is their number
	@$(BIN)/python tests/kill_campaign.py --kills $(KILLS) --seed $(KILL_SEED)

portability: $(VENV)/.torch $(VENV)/.extra-tests $(VENV)/.extra-notebooks ## run notebooks and tests as other processors would
	@$(BIN)/python tests/portability.py $(PORTABILITY_ARGS)

notebooks: $(VENV)/.torch $(VENV)/.extra-jupyter ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks $(JUPYTER_ARGS)

pictures: $(VENV)/.torch $(VENV)/.extra-notebooks ## run all notebooks in place, and write the pictures for the pages
	@$(BIN)/python notebooks/execute.py $(NOTEBOOKS)

bench: $(VENV)/.torch $(VENV)/.extra-benchmarks ## measure speed and memory against Optax, PyTorch and Keras, and write to benchmarks/results
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

lint: $(VENV)/.extra-dev ## check style, formatting and types
	@echo "lint: ruff check"
	@$(BIN)/ruff check .
	@echo "lint: ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "lint: mypy"
	@$(BIN)/mypy

build: $(VENV)/.extra-dev ## build sdist and wheel in dist/, and import the wheel in an empty environment
	@echo "build: making dist/"
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist >$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@ls dist/*
	@echo "build: importing the wheel in an empty environment"
	@empty=$$(mktemp -d) && trap 'rm -rf "$$empty"' EXIT && wheel=$$(ls "$(CURDIR)"/dist/*.whl) && cd "$$empty" \
	&& "$(CURDIR)/$(BIN)/python" -m venv . && bin/python -m pip install --quiet --quiet "$$wheel" \
	&& bin/python -I -c 'import rmsprop_jax; print("build:", rmsprop_jax.__name__, rmsprop_jax.__version__, "imports")'

clean: ## remove the environment, build outputs and caches, but keep runs/
	@echo "clean: removing $(VENV), dist, build and caches"
	@rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path "./.git/*" -prune -exec rm -rf {} +

$(VENV)/.made: $(if $(SOUND),,FORCE)
	@echo "setup: making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "$(CURDIR)" > $@

# Installed separately and with exactly this version: a range of versions may bring CUDA with it.
$(VENV)/.torch: $(VENV)/.made
	@echo "setup: installing $(TORCH)"
	$(call install,$(TORCH))

$(VENV)/.extra-%: $(VENV)/.made pyproject.toml
	@echo "setup: installing rmsprop_jax[$*]"
	$(call install,--editable '.[$*]')
