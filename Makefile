# make help lists what there is. The first call makes $(VENV) and installs into it; later calls reuse it.
# Works with GNU make 3.81 (macOS). Another Python: make PYTHON=python3.12 VENV=.venv312 test

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?=
ARGS ?=
# Tests run in two processes where there are two cores, a thread each; a file's tests in one of them.
PROCESSES ?= --numprocesses auto --maxprocesses 2 --dist loadfile --no-loadscope-reorder
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# Of `make fuzz`: files tried for every door, and the seed that repeats them.
INPUTS ?= 2000
SEED ?= $(shell date +%s)

.PHONY: demo test test-fast fuzz lint docs clean help
.DEFAULT_GOAL := help

demo: $(STAMP)  ## data from the MNI152 template, then fit, predict, evaluate and a picture; ARGS="..." is passed on
	$(VENV)/bin/sitreg-lumir demo $(ARGS)

test: $(STAMP)  ## pytest, without the tests that need a GPU; ARGS="-k name" is passed on
	$(VENV)/bin/python -m pytest $(PROCESSES) $(ARGS)

test-fast: $(STAMP)  ## those of the tests that are not marked slow: for every change, before all of them
	$(VENV)/bin/python -m pytest $(PROCESSES) -m "not gpu and not slow" $(ARGS)

fuzz: $(STAMP)  ## thousands of damaged files through every door: INPUTS=2000 SEED=1 (printed), ARGS="-k name"
	@echo "INPUTS=$(INPUTS) SEED=$(SEED)"
	FUZZ_INPUTS=$(INPUTS) $(VENV)/bin/python -m pytest tests/fuzz -s --timeout 100000 --hypothesis-seed=$(SEED) $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(STAMP)  ## the documentation, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

clean:  ## remove what builds and checks leave (not the virtual environment, nor runs/)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find sitreg_lumir tests -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1   /p' Makefile

# Where there is no NVIDIA GPU, PyTorch's CPU build ("2.13.0+cpu") is taken if pip's settings offer it: the default build
# for Linux brings several gigabytes of CUDA. With a GPU, and on macOS, the default build is the right one.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if [ ! -x "$(VENV)/bin/python" ]; then \
	  python="$(PYTHON)"; \
	  for each in python3.11 python3.12 python3; do \
	    if [ -z "$$python" ] && $$each -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
	    then python=$$each; fi; \
	  done; \
	  if [ -z "$$python" ]; then echo "No Python 3.11 to 3.13 found: install one, or name it with PYTHON=..." >&2; exit 2; fi; \
	  echo "Making $(VENV) with $$python"; \
	  "$$python" -m venv "$(VENV)"; \
	fi; \
	torch=$$(sed -n 's/^torch==//p' constraints.txt); \
	if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 && \
	   ! $(PIP) install "torch==$$torch+cpu"; then \
	  echo "pip's settings offer no CPU build of torch $$torch: taking the default build, which brings CUDA (gigabytes)." >&2; \
	fi
	$(PIP) install --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@
