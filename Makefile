# Everything here sets itself up: Python >= 3.11, git and make are all a machine needs.
#   make quickstart [ARGS="key=value"]    train, improve and report on this machine
#   make test [WORKERS=2] [TORCH=]        every check; TORCH= skips the torch parity tests
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
WORKERS ?= 2
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

# Huge pages spare the CPU backend page faults on its large, short-lived buffers.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1
# Compiled programs are kept between runs of the tests.
CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
PYTEST := $(HUGE_PAGES) $(CACHE) $(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)

.PHONY: help quickstart test test-slow lint format types imports clean

help:
	@sed -n 's/^#   //p' Makefile; echo "make test-slow | lint | format | types | imports | clean"

# --- set-up, each step done once and again only when pyproject.toml changes ----------------------

$(VENV)/.created:
	@python=""; for candidate in python3.12 python3.11 python3.13 python3 python; do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	    >/dev/null 2>&1; then python="$$candidate"; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "make: no Python >= 3.11 with its venv module was found on PATH" \
	    "(python3 is: $$(python3 --version 2>&1 || true))." \
	    "Install one, for example python3.12 and python3.12-venv." >&2; exit 1; fi; \
	if ! $(PIP) --version >/dev/null 2>&1; then \
	  echo "making $(VENV) with $$($$python --version)"; "$$python" -m venv $(VENV); fi; \
	touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	@echo "installing tw-jax into $(VENV) (about 1 GB; a minute or two)"
	@$(PIP) install -qq --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.created
	@echo "installing tw-jax[dev] into $(VENV) (about 1.3 GB; a minute or two)"
	@$(PIP) install -qq --editable ".[dev]"
	@touch $(VENV)/.installed $@

# Best effort, tried once: parity with the PyTorch implementation is tested where a CPU build of
# torch is at hand. Builds that drag gigabytes of CUDA along are left alone.
$(VENV)/.torch-tried: | $(VENV)/.installed-dev
	@if [ -z "$(TORCH)" ] || $(BIN)/python -c 'import torch' 2>/dev/null; then exit 0; fi; \
	plan="$$(timeout 300 $(PIP) install --dry-run $(TORCH) 2>&1 | grep 'Would install' || true)"; \
	if [ -z "$$plan" ]; then echo "$(TORCH) is not to be had here: parity tests will be skipped"; \
	elif [[ "$$plan" == *nvidia* ]]; then \
	  echo "$(TORCH) would bring CUDA along: parity tests will be skipped" \
	    "(install a CPU build into $(VENV) to run them)"; \
	else echo "installing $(TORCH) for the parity tests"; \
	  timeout 600 $(PIP) install -qq $(TORCH) || echo "failed: parity tests will be skipped"; fi
	@touch $@

# --- what people ask for ------------------------------------------------------------------------

quickstart: $(VENV)/.installed
	@$(HUGE_PAGES) $(CACHE) $(BIN)/tw-jax quickstart configs/quickstart.yaml $(ARGS)

test: $(VENV)/.installed-dev $(VENV)/.torch-tried
	@$(MAKE) lint types imports
	@$(PYTEST) -m "not slow"

# Status 5 is pytest's "no tests collected".
test-slow: $(VENV)/.installed-dev $(VENV)/.torch-tried
	@$(PYTEST) -m slow || [ $$? -eq 5 ]

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

types: $(VENV)/.installed-dev
	@$(BIN)/pyright

imports: $(VENV)/.installed-dev
	@$(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
