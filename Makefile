# make demo | make test: set up .venv and run the main job, or the tests. Nothing else to install.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo demo-devices demo-push demo-all test test-all lint types imports check clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

setup: $(READY) ## Create .venv with everything that demo and test need

$(READY): pyproject.toml constraints.txt clients/linux/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedcore needs Python 3.11 or newer; set PYTHON=...")'
	test -d .venv || $(PYTHON) -m venv .venv
	# torch first and by its exact series: an open range would pull a build with gigabytes of CUDA.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.*"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[server,data,native,dev]" -e clients/linux
	touch $@

demo: $(READY) ## Federate the digits data set: one to three minutes
	$(BIN)/fedcore simulate simulations/scenarios/digits.toml

demo-devices: $(READY) ## Eight device processes with TLS, secure aggregation and DP: two minutes
	$(BIN)/python clients/linux/demo.py

demo-push: $(READY) ## A model is pushed to twenty device processes; bad ones are stopped and taken back: some minutes
	GRPC_VERBOSITY=NONE GRPC_ENABLE_FORK_SUPPORT=0 $(BIN)/python -m simulations.push

demo-all: $(READY) ## Eight watches: QAT, DP and masks, export, a canary release as a delta, predictions; and what each step costs
	GRPC_VERBOSITY=NONE GRPC_ENABLE_FORK_SUPPORT=0 $(BIN)/python -m simulations.all

test: $(READY) ## The test suite
	$(BIN)/pytest -n auto -m "not slow"

test-all: $(READY) ## The test suite with its long parts
	$(BIN)/pytest -n auto

lint: $(READY) ## Style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## Static types
	$(BIN)/mypy

imports: $(READY) ## The import rules of the design
	$(BIN)/lint-imports
	cd clients/linux && ../../$(BIN)/lint-imports

check: lint types imports test ## What CI runs

clean: ## Remove .venv and caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build *.egg-info
