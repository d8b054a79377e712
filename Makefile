# Two commands: `make demo` trains, distils and samples; `make test` checks. Each makes its own environment on first use.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV   ?= .venv
PIP_FLAGS ?= --disable-pip-version-check
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Packages are compiled when they are first imported. An environment that forbids to keep the result would pay for it in every process.
export PYTHONDONTWRITEBYTECODE :=
.PHONY: demo test test-slow lint clean
demo: $(STAMP)
	@$(BIN)/dit demo $(DEMO)

test: $(STAMP) lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m slow --timeout=3000

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python >= 3.11 is needed, this is {sys.version.split()[0]}; say make PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "making the environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing pinned packages into $(VENV) (2 to 4 minutes, once)"
	@(while sleep 15; do echo "  still installing"; done) & ticker=$$!; trap "kill $$ticker" EXIT; \
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-compile --progress-bar off -c constraints.txt -e '.[dev]' | sed -u -n -e 's/^\(Collecting .*\)/  \1/p' -e 's/^\(Installing .*\)/  \1/p' -e 's/^\(Building .*\)/  \1/p'
	@$(BIN)/python -c 'import torch, deepspeed' 2>/dev/null || { echo "the environment in $(VENV) is incomplete: run make clean and try again"; exit 1; }
	@touch $(STAMP)

clean:
	rm -rf $(VENV)
