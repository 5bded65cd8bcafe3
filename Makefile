# Everything a person runs. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install serve test test-slow lint format proto bench bench-gateway bundled-model clean

help:  ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): pyproject.toml
	@echo "==> setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	@touch $(STAMP)

install: $(STAMP)  ## create .venv and install Tandem with its tools

serve: $(STAMP)  ## start a local cluster on the bundled model (ARGS="--port 8080 ..." for flags)
	@exec $(BIN)/tandem serve $(ARGS)

test: $(STAMP)  ## run the tests (ARGS="-k name" for pytest's flags)
	@$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: $(STAMP)  ## run the tests that take long
	@$(BIN)/python -m pytest -m "slow" $(ARGS)

lint: $(STAMP)  ## ruff, mypy --strict, import boundaries
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --config pyproject.toml

format: $(STAMP)  ## let ruff rewrite the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

proto: $(STAMP)  ## generate services/tandem/v1 from proto/
	@$(BIN)/python -m grpc_tools.protoc -Iproto \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=services --grpc_python_out=services --mypy_out=quiet:services --mypy_grpc_out=quiet:services \
	  proto/tandem/v1/*.proto

bench: $(STAMP)  ## disaggregated against colocated serving, one table
	@$(BIN)/python -m benchmarks.serving $(ARGS)

bench-gateway: $(STAMP)  ## what the path from a decode worker to a client costs
	@$(BIN)/python -m benchmarks.gateway $(ARGS)

bundled-model: $(STAMP)  ## train the bundled model again (about an hour on two cores)
	@$(BIN)/python -m training.train $(ARGS)

clean:  ## remove the environment and caches
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis benchmarks/.cache
