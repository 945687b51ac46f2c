# `make demo` and `make test` need nothing but Python 3.10 or newer: they create .venv, install the tested set there once, and run.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Where PyTorch's CPU build is wanted, a tenth of the download: make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# Of `make gpu`
MINUTES ?= 6
OUT ?= build/gpu

# Settings of an active conda or user environment must not leak into ours.
unexport PYTHONPATH PYTHONHOME
export PIP_USER := 0

# Other arithmetic than any processor's own choice, and bounds that must hold with room to spare: what rounds differently elsewhere shows here.
OTHER_ARITHMETIC := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 RLKERN_TEST_HEADROOM=1.5
PYTEST := $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadgroup

.PHONY: help demo pipeline test fuzz mutants arithmetic lint docs hub bench gpu clean

help:
	@echo "make demo    watch a small language model learn sums by GRPO (2 minutes on 2 CPU cores)"
	@echo "make pipeline    a reward model from preferences, then PPO against it (2 minutes on 2 CPU cores)"
	@echo "make test    style, types and tests (9 minutes on 2 CPU cores)"
	@echo "make fuzz    random inputs, extreme ones among them, against the float64 reference; 10 minutes on 2 CPU cores"
	@echo "make mutants faults put into a copy of the library, one at a time: is each noticed by a test? a quarter of an hour"
	@echo "make arithmetic    the tests under seven settings of the processor's arithmetic (half an hour)"
	@echo "make lint    style and types only"
	@echo "make docs    the documentation as a site, in site/"
	@echo "make hub     the functions as a repository for Hugging Face's kernel hub, in dist/hub"
	@echo "make bench   benchmarks against PyTorch, TRL and Liger: 3 minutes on 2 CPU cores; on a GPU where there is one"
	@echo "make gpu     on a GPU machine, in 6 minutes: every kernel, the headline benchmarks, the memory checker, the tests"
	@echo "make clean   remove .venv and caches"

demo: $(INSTALLED)
	$(BIN)/python -m rlkern grpo

pipeline: $(INSTALLED)
	$(BIN)/python examples/rlhf.py

test: lint
	$(PYTEST)
	$(OTHER_ARITHMETIC) $(PYTEST) -m "arithmetic and not interpreted"

# Examples of each kind; another number: make fuzz FUZZ=100
FUZZ ?= 8000
fuzz: $(INSTALLED)
	RLKERN_FUZZ=$(FUZZ) $(PYTEST) tests/test_fuzz.py

mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants --write

arithmetic: $(INSTALLED)
	$(BIN)/python -m tests.arithmetic

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(BIN)/mkdocs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

hub: $(INSTALLED)
	$(BIN)/python docs/hub.py dist/hub

bench: $(INSTALLED)
	$(BIN)/python -m bench --quick

gpu: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m bench.gpu --minutes $(MINUTES) --out $(OUT)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "rlkern needs Python 3.10 or newer as $(PYTHON); for another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "$(PYTHON) cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@if command -v nvidia-smi >/dev/null && ! { command -v cc || command -v gcc || command -v clang; } >/dev/null; then \
		echo "Triton needs a C compiler and Python's headers to launch kernels; on Debian and Ubuntu: apt install gcc python3-dev" >&2; exit 1; fi
	@$(PYTHON) -m venv --clear .venv

$(INSTALLED): requirements.txt pyproject.toml setup.py | $(BIN)/python
	@echo "Installing the packages of requirements.txt into .venv; this takes a few minutes, once."
	@$(PIP) --version >/dev/null || $(BIN)/python -m ensurepip
	@$(if $(TORCH_INDEX),$(PIP) install --no-deps --index-url $(TORCH_INDEX) $(shell grep ^torch== requirements.txt))
	@$(PIP) install -r requirements.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(BIN)/mkdocs: requirements-docs.txt $(INSTALLED)
	@$(PIP) install -r requirements.txt -r requirements-docs.txt
	@touch $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
