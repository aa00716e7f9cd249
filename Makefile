.DEFAULT_GOAL := help
.PHONY: help run deploy-demo test test-slow bench lint type docs docs-serve clean
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV); this happens once and takes a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(READY) ## the main job: what sharing is worth to twenty devices on the embedded digits, no download
	$(BIN)/tapfl run --config experiments/configs/digits.toml --engine inprocess --workers 2

deploy-demo: $(READY) ## server and two nodes over TLS with registered keys, on this machine, checked
	$(BIN)/tapfl deploy-demo

test: $(READY) ## the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## the long tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout=1800

bench: $(READY) ## every goal of docs/benchmarks.md beside what is measured; 25 minutes on two cores at rest
	OMP_NUM_THREADS=1 $(BIN)/tapfl bench all --config experiments/configs/bench.toml --out runs/bench

lint: $(READY) ## style, and which package may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(READY) ## types
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY) ## the documentation, into site/: open site/index.html
	$(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(READY) ## the documentation while it is being written, at 127.0.0.1:8000
	$(BIN)/python -m mkdocs serve

clean: ## remove the environment and what tools left behind; runs stay
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
