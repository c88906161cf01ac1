# setup  a working vLLM with this package in .venv/ (idempotent; every other target runs it first)
# demo   the same request plain, prompted and under formulas, side by side
# test   everything that CI runs
# lint   ruff and mypy
# bench  cost and throughput of formulas, and of the kernels alone, measured here
# check-vllm  the ledger of touched vLLM symbols against VLLM, wheels or the word `installed`

PYTHON := .venv/bin/python

.PHONY: setup demo test lint bench check-vllm

setup:
	@scripts/setup

demo: setup
	@.venv/bin/marith demo

test: setup
	@$(PYTHON) -m pytest $(PYTEST_ARGS)

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

bench: setup
	@.venv/bin/marith bench $(BENCH_ARGS)
	@$(PYTHON) scripts/bench_kernels.py

VLLM ?= installed
check-vllm: setup
	@$(PYTHON) scripts/check_vllm.py $(VLLM)
