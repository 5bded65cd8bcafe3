# Everything a person runs. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install serve test test-slow test-triton lint format proto bench bench-peers bench-cluster bench-gateway bench-stages bench-links bench-scheduling bench-shared-prefix bench-micro bench-startup bench-gpu bench-simulator bench-prediction fuzz-kernels bundled-model clean

help:  ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): pyproject.toml setup.py $(wildcard kernels/tandem_kernels/cpu/native/*)
	@echo "==> setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	@$(BIN)/python -c "import tandem_kernels; print('==> CPU kernels:', tandem_kernels.implementation('cpu'))"
	@touch $(STAMP)

install: $(STAMP)  ## create .venv and install Tandem with its tools

serve: $(STAMP)  ## start a local cluster on the bundled model (ARGS="--port 8080 ..." for flags)
	@exec $(BIN)/tandem serve $(ARGS)

test: $(STAMP)  ## run the tests (ARGS="-k name" for pytest's flags)
	@$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: $(STAMP)  ## run the tests that take long
	@$(BIN)/python -m pytest -m "slow" $(ARGS)

test-triton: $(STAMP)  ## the Triton kernels on their interpreter (installs triton, 1 GB on disk)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,gpu]'
	@$(BIN)/python -m pytest -m "not slow" tests/kernels/triton $(ARGS)

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

BENCH_STAMP := $(VENV)/.installed-bench
$(BENCH_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,bench]'
	@touch $(BENCH_STAMP)

bench-peers: $(BENCH_STAMP)  ## Tandem and other engines in turn, installs them (ARGS="--only tandem,vllm")
	@$(BIN)/python -m benchmarks.peers.run $(ARGS)

bench-cluster: $(BENCH_STAMP)  ## serving systems under a sweep of load (ARGS="--only tandem --seconds 80")
	@$(BIN)/python -m benchmarks.cluster.run $(ARGS)

bench-gateway: $(STAMP)  ## what the path from a decode worker to a client costs
	@$(BIN)/python -m benchmarks.gateway $(ARGS)

bench-links: $(STAMP)  ## what a KV link makes of the wire, against bare gloo and memcpy
	@$(BIN)/python -m benchmarks.links $(ARGS)

bench-stages: $(STAMP)  ## where the time of a request goes before its tokens flow, from traces
	@$(BIN)/python -m benchmarks.stages $(ARGS)

bench-gpu: $(STAMP)  ## check and measure everything that needs a GPU; see docs/gpu-results.md
	@$(BIN)/python benchmarks/gpu/run.py $(ARGS)

bench-simulator: $(STAMP)  ## simulate 1,000 workers and 1,000,000 requests (ARGS="--requests 100000")
	@$(BIN)/python -m benchmarks.simulator $(ARGS)

bench-prediction: $(STAMP)  ## what the simulator predicts against what the cluster does (ARGS="--model qwen")
	@$(BIN)/python -m benchmarks.prediction $(ARGS)

bench-shared-prefix: $(STAMP)  ## simulate prompts that begin alike: hit rate, time to first token, evenness
	@$(BIN)/python -m benchmarks.shared_prefix $(ARGS)

bench-scheduling: $(STAMP)  ## what an iteration's scheduling and a routing decision cost
	@$(BIN)/python -m benchmarks.scheduling $(ARGS)

bench-micro: $(STAMP)  ## every CPU kernel against its bound, and the engine against the reference
	@$(BIN)/python -m benchmarks.micro $(ARGS)

bench-startup: $(STAMP)  ## where the time goes from `tandem serve` to the first answer
	@$(BIN)/python -m benchmarks.startup $(ARGS)

fuzz-kernels: $(STAMP)  ## random calls of the C++ kernels under AddressSanitizer (CASES=500 SEED=1)
	@TANDEM_FUZZ_CASES=$(or $(CASES),500) TANDEM_FUZZ_SEED=$(or $(SEED),1) \
	  $(BIN)/python -m pytest -m slow tests/kernels/test_cpu_fuzz.py $(ARGS)

bundled-model: $(STAMP)  ## train the bundled model again (about an hour on two cores)
	@$(BIN)/python -m training.train $(ARGS)

clean:  ## remove the environment and caches
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis benchmarks/.cache
