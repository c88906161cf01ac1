#!/usr/bin/env bash
# Check and time the Triton kernels on a machine with a GPU; it needs python, torch and triton, nothing else.
# Where vLLM and pytest can be imported too, formulas in an engine are checked afterwards (tests/gpu).
#
#     scripts/gpu_check.sh                    all of it, about 8 minutes
#     scripts/gpu_check.sh --seconds 120      less of the sweep
#     scripts/gpu_check.sh --only correctness
#
# Prints what it finds and writes benchmarks/results/<date>-<device>.json. Exit code 1: a kernel is wrong.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python
unset TRITON_INTERPRET
export TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$python" scripts/bench_gpu.py "$@"
if "$python" -c 'import pytest, torch, vllm; assert torch.cuda.is_available()' 2>/dev/null; then
  exec "$python" -m pytest tests/gpu -q
fi
echo "gpu_check: the engine was not checked: no vLLM, no pytest or no CUDA device here" >&2
