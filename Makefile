# Every target sets up what it needs: on a fresh machine, `make demo` and `make test` are all there is to type.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all conformance trainers fuzz generate lint types docs docs-serve clean

help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-11s %s\n", $$1, $$2 }'

# The dev extra's exact pins, named first: else pip downloads the newest torch, hundreds of megabytes, to discard it.
PINS = $(shell $(PYTHON) -c "import tomllib; print(*(r for r in tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['dev'] if '==' in r and ';' not in r))")

# Anew whenever pyproject.toml changes.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "normopt needs Python 3.11 or newer: try 'make PYTHON=python3.12 ...'" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check $(PINS) -e ".[dev]"
	touch $@

demo: $(READY) ## Run a quick ablation of the optimizers
	$(BIN)/python -m benchmarks run quick

test: $(READY) ## Run the tests: enough cases that every value of every parameter occurs
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: $(READY) ## Run every case of every test
	$(BIN)/python -m pytest -n 2 --dist loadgroup --all

conformance: $(READY) ## Ask PyTorch's questions of every optimizer; writes docs/conformance.md
	$(BIN)/python -m pytest tests/conformance -n 2 --all --conformance-table docs/conformance.md

trainers: $(READY) ## Train every kind of optimizer in every trainer; writes docs/data/trainers.json
	$(BIN)/python -m pytest tests/frameworks -n 0 --all --trainers-table docs/data/trainers.json

fuzz: $(READY) ## The nightly fuzz tests: 5,000 random lives of an optimizer, and of its memory
	NORMOPT_FUZZ=5000 $(BIN)/python -m pytest tests/test_fuzz.py tests/kernels/test_memory.py::TestHandled

generate: $(READY) ## Write the types and docs of settings anew, after a declaration has changed
	$(BIN)/python docs/hooks/generate.py

lint: $(READY) ## Check style and form
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY) ## Check the types
	$(BIN)/mypy -p normopt -p benchmarks

# The variable silences a notice that mkdocs-material prints about its successor.
docs: $(READY) ## Build the site into site/; runs the tutorials
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(READY) ## Show the site while you edit it; the tutorials run short
	NO_MKDOCS_2_WARNING=1 NORMOPT_DOCS_FAST=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

clean: ## Remove what was built, and the environment
	rm -rf .venv site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find normopt benchmarks tests docs "(" -name __pycache__ -o -name .ruff_cache ")" -type d -prune -exec rm -rf {} +
