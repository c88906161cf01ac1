"""vLLM's n-gram proposer, as formulas use it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numba import njit
from vllm.v1.spec_decode import ngram_proposer

from vllm_marith.engine.worker.speculation.rounds_v1 import compile_ngrams


def test_ngrams_are_compiled_before_anybody_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = njit(parallel=True)(ngram_proposer.batch_propose_numba.py_func)
    monkeypatch.setattr(ngram_proposer, "batch_propose_numba", compiled)
    config: Any = SimpleNamespace(
        speculative_config=SimpleNamespace(
            method="ngram", num_speculative_tokens=4, prompt_lookup_min=1, prompt_lookup_max=4
        ),
        model_config=SimpleNamespace(max_model_len=64),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    compile_ngrams(config)
    (signature,) = compiled.signatures
    table = np.array([[5, 6, 7, 8, 5, 6, 0, 0], [1, 2, 3, 4, 0, 0, 0, 0]], np.int32)
    proposer = ngram_proposer.NgramProposer(config)
    assert proposer.propose(2, [[0]] * 2, np.array([6, 4], np.int32), table) == [[7, 8], []]
    assert compiled.signatures == [signature]
    compile_ngrams(SimpleNamespace(speculative_config=None))
    compile_ngrams(SimpleNamespace(speculative_config=SimpleNamespace(method="suffix")))
