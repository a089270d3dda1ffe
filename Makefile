# make quickstart | test | test-slow | lint | benchmark     (make with no target says what there is)
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
RUN := runs/quickstart

.PHONY: help venv quickstart test test-slow lint format benchmark

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

venv: $(DEVELOPED)  ## make .venv and install koff-prune with its development tools

# The stamp is written last, so an interrupted install is done again and a finished one costs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "koff-prune needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(INSTALLED)  ## recipe to bundle, report and one generated line per domain (20 minutes on 2 cores)
	$(BIN)/koff-prune apply --resume recipes/smollm2/quickstart.yaml --out $(RUN)
	@say() { printf '\n%s: %s' "$$1" "$$2"; \
	  $(BIN)/koff-run $(RUN)/bundle --memory "$$1" --prompt "$$2" --max-new-tokens 24 | tr -s '\n' ' '; echo; }; \
	say python 'def fibonacci(n):'; \
	say math 'The sum of the first ten odd numbers is'; \
	say medicine 'The first-line treatment of type 2 diabetes mellitus is'

test: venv  ## everything CI runs (8 minutes on 2 cores)
	tests/install-chromium.sh
	tests/install-javascript.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: venv  ## what takes longer; the result is kept in tests/slow-result.txt
	tests/install-chromium.sh
	tests/install-javascript.sh
	{ echo '$$ make test-slow'; $(BIN)/python -m pytest -m slow --timeout 7200 --durations 0; } 2>&1 \
	  | tee tests/slow-result.txt

lint: venv  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: venv  ## what learning costs beside plain PEFT LoRA training, and how it grows (needs a quiet machine)
	$(BIN)/python benchmarks/learn_cost.py
