# Every target first sets up .venv from requirements.lock (once for each state of the lock), then runs.
#   make demo    make test    make test-all    make parity    make bench    make lint    make format    make lock
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A changed lock or package description has another stamp, so that the set-up runs again.
STATE := $(shell cat requirements.lock pyproject.toml | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.ready-$(STATE)
WORKERS ?= 2

.PHONY: setup demo test test-all parity bench lint format lock

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
