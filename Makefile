# Farebox. Any GNU make from 3.81 on.
#
#   make run     install what is needed into .venv and start, with a database and a demo upstream of its own
#                (make run FAREBOX_DEMO=0: with the real upstreams of config/upstreams.yaml)
#   make test    every check: format, lint, types, import contracts, tests
#   make chaos   hours of kills and restarts, with a table of what was tried and found (CHAOS_OPTIONS="--kills 1000 ...")
#   make soak    SOAK_MINUTES (60) of 500 streams: memory, descriptors, threads, holds
#   make bench   measurements of the ledger and the gateway
#   make fmt     format the code
#   make schema  write the ledger's schema snapshot anew
#   make lock    resolve the dependencies anew (needs uv)

FAREBOX_DEMO ?= 1
BIN = .venv/bin
WORKERS ?= auto
SOAK_MINUTES ?= 60
CHAOS_OPTIONS ?=

ifeq ($(FAREBOX_DEMO),0)
DEMO_OPTIONS = --real-upstreams
endif

.PHONY: run test chaos soak lint fmt bench schema lock install install-dev

# exec: the server is make's own child, gets its signals, and ends with it (--with-parent).
run: install
	@exec $(BIN)/farebox demo --with-parent $(DEMO_OPTIONS)

test: lint
	scripts/clean-env $(BIN)/python -m pytest -n $(WORKERS) -m "not bench" -q

chaos: install-dev
	scripts/clean-env $(BIN)/python -m tests.faults.chaos $(CHAOS_OPTIONS)

soak: install-dev
	scripts/clean-env $(BIN)/python -m tests.faults.soak --minutes $(SOAK_MINUTES)

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install-dev
	scripts/clean-env $(BIN)/python -m pytest -m bench -s -q tests/bench

schema: install-dev
	scripts/clean-env $(BIN)/python -m tests.ledger.snapshot

lock:
	scripts/lock

install:
	@scripts/install requirements.lock

install-dev:
	@scripts/install requirements-dev.lock
