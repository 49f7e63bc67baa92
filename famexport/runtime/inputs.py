"""Random input that fits a step."""

from __future__ import annotations

import numpy as np

from famexport.contract import StepContract
from famexport.runtime.backend import STORAGE


def random_input(contract: StepContract, batch: int, positions: int, rng: np.random.Generator) -> np.ndarray:
    """Token ids int64 [b, n], or embeddings [b, n, D] of a standard normal distribution."""
    spec = contract.inputs[0]
    if spec.dtype == "int64":
        return rng.integers(0, contract.vocab_size, (batch, positions), dtype=np.int64)
    shape = batch, positions, *spec.sized(batch)[2:]
    return np.asarray(rng.standard_normal(shape), STORAGE[spec.dtype])
