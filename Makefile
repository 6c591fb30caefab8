# Every target sets up what it needs: a virtual environment in .venv with the versions of requirements.lock (and the CUDA
# libraries that torch pins, where pip takes a torch with CUDA).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: setup demo stack stack-down test lint bench lock

setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; install it or give PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --requirement requirements.lock
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

demo: setup
	$(BIN)/python pipelines/demo.py

# Real servers on this machine, without containers; STACK="--database postgresql --workers 3" and the like.
stack: setup
	$(BIN)/python -m infra.local_stack up $(STACK)

stack-down: setup
	$(BIN)/python -m infra.local_stack down

# Everything; `make test PYTEST="-m 'not slow'"` for the quick part. Two at a time, because most of it waits; threads of
# one that wait must not spin then, for they would take the other's cores.
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder $(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.model
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.training

# Newest versions that fit pyproject.toml; look at the difference before you commit it.
lock: setup
	$(BIN)/pip install --disable-pip-version-check --quiet --upgrade --upgrade-strategy eager --editable .[dev]
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock
