# `make run` and `make test` do all the set-up; both work again when run twice.
# A Python >= 3.11 and a C++ compiler are all they need. PYTHON=... picks the interpreter.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help run test test-oldest test-gpu test-clients lint format golden docs clean

find_python = for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done
PYTHON ?= $(shell $(find_python))

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# tests in two processes: more threads in each would only fight
TEST_ENV := OMP_NUM_THREADS=1

help:
	@echo "make run       tune kernels for this machine, train an lmKAN on handwritten digits"
	@echo "make test      lint, types, whole test suite"
	@echo "make test-oldest  the command line and a short tune with the oldest versions that may be installed"
	@echo "make test-gpu  only the tests that need an NVIDIA GPU"
	@echo "make test-clients  libraries that users combine with lmkan-gen, from PyPI: not part of CI"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff rewrite the sources"
	@echo "make golden    write generated/ (shipped kernels) and tuning/schema.json anew"
	@echo "make docs      the documentation as a site, in site/"
	@echo "make clean     remove .venv, caches and build outputs"

# The stamp is touched last: an interrupted installation starts over.
$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "No Python >= 3.11 found; set PYTHON=/path/to/python3" >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,nvcc]'
	@touch $@

run: $(READY)
	$(BIN)/python examples/digits.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

# in an environment of its own, .venv-oldest; the oldest torch comes with 3 GB of CUDA libraries
test-oldest:
	@if [ -z "$(PYTHON)" ]; then echo "No Python >= 3.11 found; set PYTHON=/path/to/python3" >&2; exit 1; fi
	$(TEST_ENV) $(PYTHON) tests/oldest.py

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# in an environment of its own, .venv-clients; make test-clients ARGS="--markdown docs/pytorch.md"
test-clients:
	@if [ -z "$(PYTHON)" ]; then echo "No Python >= 3.11 found; set PYTHON=/path/to/python3" >&2; exit 1; fi
	$(PYTHON) tests/clients/run.py $(ARGS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(READY)
	$(BIN)/python -m lmkan_gen.golden
	$(BIN)/python -m lmkan_gen.tuning_schema

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site .venv-clients .venv-oldest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
