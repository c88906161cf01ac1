"""The golden vectors of the paper's public reference implementation; see tests/data/golden/README.md."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_FOLDER = Path(__file__).parents[1] / "data" / "golden"
CASES = {case["case"]: case for case in json.loads((_FOLDER / "cases.json").read_text())}

# The reference floors what a filter cuts off at -1e8 before it goes on; here it is -inf.
_FLOOR = -1e6


@dataclass(frozen=True)
class Expected:
    """Log-probabilities [3, 1024] and how near to them a result must come."""

    log_p: np.ndarray
    tolerance: float

    def assert_equals(self, result, tolerance=None):
        cut = self.log_p < _FLOOR
        np.testing.assert_array_equal(np.isneginf(result), cut)
        np.testing.assert_allclose(
            result[~cut], self.log_p[~cut], rtol=0, atol=max(self.tolerance, tolerance or 0.0)
        )


def logits(name):
    """Term -> logits float32 [3, 1024] of a case."""
    with np.load(_FOLDER / "vectors.npz") as vectors:
        return {term: vectors[f"{name}/in/{term}"] for term in CASES[name]["terms"]}


def expected(name):
    """What the reference returned for a case."""
    with np.load(_FOLDER / "vectors.npz") as vectors:
        return Expected(vectors[f"{name}/out"], CASES[name]["tolerance"])
