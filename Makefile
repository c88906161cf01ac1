# setup  a working vLLM with this package in .venv/ (idempotent; every other target runs it first)
# demo   the same request plain, prompted and under formulas, side by side
# test   everything that CI runs
# lint   ruff and mypy
# bench  cost and throughput of formulas, measured here

PYTHON := .venv/bin/python

.PHONY: setup demo test lint bench

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
