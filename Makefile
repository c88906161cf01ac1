# setup  a working vLLM with this package in .venv/ (idempotent; every other target runs it first)
# demo   the same request plain, prompted and under formulas, side by side
# test   everything that CI runs
# test-ray  formulas over several engines and nodes, with the tests that are too long for `test`
# test-random  hypothesis's tests on other examples than `test` has, others every time
# lint   ruff and mypy
# bench  cost and throughput of formulas, and of the kernels alone, measured here
# eval   what formulas do to texts, measured here, with a report; EVAL_ARGS=--quick for a sixth of the texts
# fuzz   hostile requests by the hundred thousand (FUZZ_ARGS)
# soak   a server under mixed load, aborts and preemption, every answer checked (SOAK_ARGS)
# check-vllm  the ledger of touched vLLM symbols against VLLM, wheels or the word `installed`

PYTHON := .venv/bin/python

.PHONY: setup demo test test-ray test-random lint bench eval fuzz soak check-vllm

setup:
	@scripts/setup

demo: setup
	@.venv/bin/marith demo

# A file's tests share an engine, so whole files are given to the processes.
TEST_PROCESSES ?= 2
test: setup
	@$(PYTHON) -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

test-ray: setup
	@$(PYTHON) -m pytest --several tests/distributed $(PYTEST_ARGS)

test-random: setup
	@$(PYTHON) -m pytest -n $(TEST_PROCESSES) --dist loadfile --hypothesis-profile random $(PYTEST_ARGS)

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

bench: setup
	@.venv/bin/marith bench $(BENCH_ARGS)
	@$(PYTHON) scripts/bench_kernels.py

eval: setup
	@.venv/bin/marith eval $(EVAL_ARGS)

FUZZ_ARGS ?= --guided 300000
fuzz: setup
	@$(PYTHON) scripts/fuzz.py $(FUZZ_ARGS)

soak: setup
	@$(PYTHON) scripts/soak.py $(SOAK_ARGS)

VLLM ?= installed
check-vllm: setup
	@$(PYTHON) scripts/check_vllm.py $(VLLM)
