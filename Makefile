# `make demo` trains a model on real data, `make test` runs the tests; each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
OUT ?= bench/results/local
RUN := $(VENV)/bin/python
# Where nvidia-smi or rocm-smi answers, torch's ordinary wheels are right; elsewhere the pinned CPU build.
CONSTRAINTS := $(shell (nvidia-smi || rocm-smi) >/dev/null 2>&1 || echo "-c constraints/cpu.txt")

.PHONY: setup demo test test-full test-gpu lint fuzz bench bench-gpu clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet $(CONSTRAINTS) torch
	$(RUN) -m pip install --quiet $(CONSTRAINTS) -e ".[dev]"
	touch $@

demo: setup
	$(RUN) examples/regression.py

test: setup
	$(RUN) -m pytest -m "not full" -n 2 --durations=15

test-full: setup
	$(RUN) -m pytest -n 2 --durations=30

# Runs with the Python at hand, offline: on a GPU machine the installed torch and triton are the ones to test.
test-gpu:
	$(PYTHON) -m pytest -m gpu -p no:cacheprovider

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

fuzz: setup
	GRADKERNELS_FUZZ_EXAMPLES=2000 $(RUN) -m pytest tests/test_fuzz.py

bench: setup
	$(RUN) -m bench --quick --json $(OUT)/bench.json

bench-gpu:
	$(PYTHON) -m bench --device cuda --quick --json $(OUT)/bench.json

clean:
	rm -rf $(VENV) build dist *.egg-info
