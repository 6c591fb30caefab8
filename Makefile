# Every target first sets up what it needs: a virtual environment in .venv with the versions of requirements.lock (and the
# CUDA libraries that torch pins, if pip installs a torch with CUDA).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: setup demo stack stack-down test lint bench lock

setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 is needed; install it or give PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --requirement requirements.lock
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

demo: setup
	$(BIN)/python pipelines/demo.py

# Starts real servers on this machine, without containers. STACK gives options: STACK="--database postgresql --workers 3".
stack: setup
	$(BIN)/python -m infra.local_stack up $(STACK)

stack-down: setup
	$(BIN)/python -m infra.local_stack down

# Runs all tests; `make test PYTEST="-m 'not slow'"` runs the quick part. Three run at a time, because most tests wait. The
# waiting threads of one must then not spin (OMP_WAIT_POLICY), because they would take the cores of the others.
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 3 --no-loadscope-reorder $(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.model
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.training

# Locks the newest versions that fit pyproject.toml; look at the difference before you commit it.
lock: setup
	$(BIN)/pip install --disable-pip-version-check --quiet --upgrade --upgrade-strategy eager --editable .[dev]
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock
