# Two commands: `make serve` and `make test`. Everything they need, they install.
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8080
SOAK_TESTS ?= tests/faults/test_fault_matrix.py tests/faults/test_ledger_oracle.py tests/admission/test_budget_race.py \
	tests/admission/test_idempotency.py tests/crash/test_kill.py tests/edge/test_slow_clients.py tests/deploy/test_rolling.py \
	tests/local_engine/test_primitives.py tests/local_engine/test_engine_leaks.py
JUDGES ?= .bench/judges
VLLM   ?= .bench/vllm
LLAMACPP ?= .bench/llamacpp
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: serve install test check fmt judges bench bench-client bench-gateway bench-engine bench-reasoning bench-routing demo soak clean

serve: install ## Run the gateway on 127.0.0.1:8080 with embedded defaults
	$(BIN)/leadline serve --port $(PORT)

install: $(STAMP) ## Make .venv and install everything

# torch comes first and by its exact version: installed by name, as a dependency of another package, it would be the
# newest build with several gigabytes of CUDA. On a GPU host, install the build you want into $(VENV) beforehand.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Leadline needs Python >= 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[server,otel,local,train,dev]'
	touch $(STAMP)

PROCESSES ?= 2
test: install ## Lint, types, import contracts, all tests (real Redis, PostgreSQL, Chromium)
	sh scripts/ensure_services.sh
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: install
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

MINUTES ?= 30
soak: install ## Mixed traffic for MINUTES, then the long sizes of tests, in proportion to MINUTES (30: some hours)
	sh scripts/ensure_services.sh
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)
	$(BIN)/python -m pytest --soak $(MINUTES) $(SOAK_TESTS)

judges: install $(JUDGES)/.installed $(VLLM)/.installed $(LLAMACPP)/.installed ## schemathesis and langchain-tests on us, and we before a real vLLM and llama.cpp
	$(BIN)/python -m tests.judges $(JUDGES)
	$(BIN)/python -m tests.judges.vllm_engine $(VLLM)
	$(BIN)/python -m tests.judges.llamacpp_engine $(LLAMACPP)

$(VLLM)/.installed: scripts/install_vllm.sh constraints.txt
	PYTHON=$(PYTHON) sh scripts/install_vllm.sh $(VLLM)

$(LLAMACPP)/.installed: scripts/install_llamacpp.sh
	PYTHON=$(PYTHON) sh scripts/install_llamacpp.sh $(LLAMACPP)

$(JUDGES)/.installed: tests/judges/requirements.txt
	test -x $(JUDGES)/bin/python || $(PYTHON) -m venv $(JUDGES)
	$(JUDGES)/bin/python -m pip --disable-pip-version-check -q install -r tests/judges/requirements.txt
	touch $@

demo: install ## Real GSM8K questions through a running gateway, with a proof of every nano-dollar
	$(BIN)/python benchmarks/demo.py

bench: bench-client bench-gateway bench-routing

bench-client: install ## One call to an upstream: our HTTP client beside aiohttp's and pyreqwest's
	sh scripts/ensure_services.sh nginx
	$(BIN)/python benchmarks/bench_client.py

bench-gateway: install ## Speed, streams, memory, start, scaling, beside nginx, a bare aiohttp proxy and LiteLLM
	sh scripts/ensure_services.sh nginx wrk redis-server postgresql
	$(BIN)/python benchmarks/bench_gateway.py

bench-engine: install ## The local engine beside the machine's bound, transformers, and vLLM where it is installed
	$(PIP) install accelerate==1.15.0
	$(BIN)/python benchmarks/bench_engine.py

bench-reasoning: install ## Drafted steps, cascades, exits and votes beside leaving them off (synthetic arithmetic)
	$(BIN)/python benchmarks/bench_reasoning.py

bench-routing: install ## Routing beside every baseline on the tables of LEADLINE_DATA (or ../shared/data)
	$(BIN)/python benchmarks/bench_routing.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
