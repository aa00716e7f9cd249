.DEFAULT_GOAL := help
.PHONY: help run deploy-demo test test-slow bench lint type docs docs-serve clean
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV); this is done once and takes a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(READY) ## the main example: twenty devices on scikit-learn's digits; downloads no data
	$(BIN)/tapfl run --config experiments/configs/digits.toml --engine inprocess --workers 2

deploy-demo: $(READY) ## a test deployment on this machine: a server and two nodes with TLS and registered keys
	$(BIN)/tapfl deploy-demo

test: $(READY) ## run the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## the slow tests, minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout=1800

bench: $(READY) ## measure every goal of docs/benchmarks.md; 26 minutes on two idle cores
	OMP_NUM_THREADS=1 $(BIN)/tapfl bench all --config experiments/configs/bench.toml --out runs/bench

lint: $(READY) ## check style, formatting and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(READY) ## check types with mypy
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY) ## build the documentation into site/; open site/index.html
	$(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(READY) ## serve the documentation at 127.0.0.1:8000, with live reload
	$(BIN)/python -m mkdocs serve

clean: ## remove the environment and the files that tools create; keep runs
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
