# `make demo` trains a model on real data, `make test` runs the tests; each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
# Where a benchmark run writes; {device} stands for the name of the device.
OUT ?= bench/results/{device}
RUN := $(VENV)/bin/python
# Where nvidia-smi or rocm-smi answers, torch's ordinary wheels are right; elsewhere the pinned CPU build.
CONSTRAINTS := $(shell (nvidia-smi || rocm-smi) >/dev/null 2>&1 || echo "-c constraints/cpu.txt")

.PHONY: setup demo test test-full test-processors test-host test-ttir test-gpu mutants docs hub lint fuzz bench bench-gpu clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet $(CONSTRAINTS) torch
	$(RUN) -m pip install --quiet $(CONSTRAINTS) -e ".[dev]"
	touch $@

demo: setup
	$(RUN) examples/regression.py

# `make test ARGS="-k mse_loss"` runs what pytest's arguments select.
test: setup
	$(RUN) -m pytest -m "not full" -n 2 --durations=15 $(ARGS)

test-full: setup
	$(RUN) -m pytest -n 2 --durations=30

# What could rest on a processor's rounding, under fewer instructions and with one and two threads; long.
test-processors: setup
	$(RUN) -m tests.processors

# Every op, dtype, layout and class of shapes through Triton's own launcher, over a stand-in for libcuda; then with torch's
# CUDA build, of which the first run downloads about 0.7 GB (`python tests/host/cuda_build.py --help`). Long.
test-host: setup
	$(RUN) -m pytest tests/host -n 2
	$(RUN) tests/host/cuda_build.py

# Values of every kernel as Triton's compiler has it, run by ttsem, in an environment of its own from a Python 3.12 or
# later; its first run downloads about 0.7 GB (`python -m tests.ttir --help`).
test-ttir: setup
	$(RUN) -m tests.ttir

# Runs with the Python at hand, offline: on a GPU machine the installed torch and triton are the ones to test.
# Ends within eight minutes; the last line says what was left out.
test-gpu: build/here/gradkernels
	PYTHONPATH="$(CURDIR)/build/here" $(PYTHON) -m tests.gpu $(ARGS)

mutants: setup
	$(RUN) -m tests.mutants

# The site, in build/site; a warning is an error.
docs: setup build/here/gradkernels
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# The repository for Hugging Face's kernel hub, in build/hub; needs no package.
hub:
	$(PYTHON) hub.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

fuzz: setup
	GRADKERNELS_FUZZ_EXAMPLES=2000 $(RUN) -m pytest -n 2 tests/ops/test_fuzz.py tests/ops/test_shapes.py

# About four minutes on two cores: every result checked, then timed; writes bench.json, bench.csv, the report.
bench: setup
	$(RUN) -m bench --quick --scale --out "$(OUT)"

# Offline, with the Python at hand; without matplotlib there, `python -m bench report` draws the report elsewhere.
# Ends within eight minutes; the last line says what was left out.
bench-gpu: build/here/gradkernels
	PYTHONPATH="$(CURDIR)/build/here" $(PYTHON) -m bench --device cuda --quick --scale --budget 400 --out "$(OUT)" $(ARGS)

# The folder under the name that it is imported by, for a Python into which nothing may be installed.
build/here/gradkernels:
	mkdir -p build/here
	ln -sfn ../../kernels $@

clean:
	rm -rf $(VENV) build dist *.egg-info
