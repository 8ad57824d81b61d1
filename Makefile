# Every target first sets up .venv from requirements.lock (once for each state of the lock), then runs.
#   make demo    make test    make test-all    make parity    make bench    make lint    make format    make lock
#   make jittor    make test-jittor      the second runtime: its own environment, without torch, in .cache/jittor
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A changed lock or package description has another stamp, so that the set-up runs again.
STATE := $(shell cat requirements.lock pyproject.toml | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.ready-$(STATE)
WORKERS ?= 2

# Jittor 1.3.11 needs numpy 1 and must not see torch. Its home, where it compiles, lies beside.
JITTOR := .cache/jittor
JITTOR_STATE := $(shell cat requirements-jittor.lock pyproject.toml | cksum | cut -d ' ' -f 1)
JITTOR_STAMP := $(JITTOR)/venv/.ready-$(JITTOR_STATE)

.PHONY: setup demo test test-all parity bench lint format lock jittor test-jittor

setup: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "segmill needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "Name another one, for example: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.ready-*
	@touch $@

demo: $(STAMP)
	$(BIN)/segmill demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-all: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not jittor"

# Every family against the golden values of its original: logits, windows, losses, gradients.
parity: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "slow or not slow" tests/models/test_parity.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks

jittor: $(JITTOR_STAMP)

$(JITTOR_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Jittor needs Python 3.11 or 3.12; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "Name another one, for example: make jittor PYTHON=python3.11" >&2; exit 2; }
	@command -v g++ > /dev/null || { echo "Jittor compiles its kernels: install g++." >&2; exit 2; }
	$(PYTHON) -m venv $(JITTOR)/venv
	$(JITTOR)/venv/bin/python -m pip install --quiet --require-hashes -r requirements-jittor.lock
	$(JITTOR)/venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@mkdir -p $(JITTOR)/home
	$(JITTOR)/venv/bin/python -m segmill.jittor.environment
	@rm -f $(JITTOR)/venv/.ready-*
	@touch $@

# First in Jittor's own environment, then from torch's, which starts the other one.
test-jittor: $(JITTOR_STAMP) $(STAMP)
	$(JITTOR)/venv/bin/python -m pytest -m "jittor and not slow" tests/jittor_runtime
	$(BIN)/python -m pytest -m jittor tests/test_runtimes.py

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Keeps the pins that still fit; `uv` from the path. Remove a line from the lock to renew it.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header --quiet --extra torch --extra tta --extra export --extra dev \
	  --output-file requirements.lock pyproject.toml
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header --quiet --extra jittor-dev \
	  --output-file requirements-jittor.lock pyproject.toml
