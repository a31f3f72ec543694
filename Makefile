# make demo   three passkey grids on the bundled checkpoint, from a bare machine
# make test   lint, types, documentation and tests, as CI runs them
#
# PYTHON=python3.12         another interpreter (3.11 or newer)
# CONSTRAINTS=my-pins.txt   other versions than those CI runs; CONSTRAINTS= for none
# ARGS="--lengths 1k,4k"    handed to `widefield demo` or to pytest
# JOBS=8                    processes that share the tests, one thread each

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PINS := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# Of torch and transformers a twentieth is ever imported: that is compiled at its first import.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PINS)
unexport PYTHONDONTWRITEBYTECODE
# A stamp per constraints file, so that changing the pins installs again and nothing else does.
PINS_NAME := $(or $(notdir $(CONSTRAINTS)),unpinned)
RUN := $(VENV)/.installed-run-$(PINS_NAME)
DEV := $(VENV)/.installed-dev-$(PINS_NAME)

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test lint types docs pytest interpreted format clean

demo: $(RUN)
	$(BIN)/widefield demo $(ARGS)

test: lint types docs pytest interpreted

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(DEV)
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(DEV)
	$(BIN)/mkdocs build --strict --quiet

pytest: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# The tests marked triton, without a GPU. Triton takes its choice when kernels are imported, so they
# run in a process of their own.
interpreted: $(DEV)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton -n $(JOBS) --dist worksteal tests/ops

format: $(DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("widefield needs Python 3.11 or newer, $(PYTHON) is %d.%d: say make PYTHON=python3.11 or the like" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing into $(VENV), a few minutes the first time"
	$(INSTALL) -e .
	@touch $@

$(DEV): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing into $(VENV), a few minutes the first time"
	$(INSTALL) -e '.[dev,docs]'
	@touch $(RUN) $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis
