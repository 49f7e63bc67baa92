"""What the stream tests share: random input, cuts, and the slow path that every fast path must equal bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def random_input(contract: Any, positions: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    """Tokens int64 [b, n] or embeddings float32 [b, n, D]."""
    rng, spec = np.random.default_rng(seed), contract.inputs[0]
    if spec.name == "tokens":
        return rng.integers(0, contract.vocab_size, (batch, positions), dtype=np.int64)
    return rng.standard_normal((batch, positions, *spec.shape[2:])).astype(np.float32)


def blocks_of(contract: Any, fed: np.ndarray) -> Iterator[np.ndarray]:
    """The whole blocks in ``fed``, each a contiguous array of its own."""
    size = contract.block_size
    for start in range(0, fed.shape[1] - size + 1, size):
        yield np.ascontiguousarray(fed[:, start : start + size])


def step_all(stream: Any, fed: np.ndarray) -> np.ndarray:
    """Logits of ``fed``, whole blocks, one ``step`` after the other: [b, n, V], or one row a block where only the last
    is given."""
    return np.concatenate([stream.step(block) for block in blocks_of(stream.contract, fed)], axis=1)


def random_cuts(fed: np.ndarray, seed: int, longest: int = 30) -> list[np.ndarray]:
    """``fed`` in random pieces along axis 1, some of them empty."""
    rng, pieces, at = np.random.default_rng(seed), [], 0
    while at < fed.shape[1]:
        n = int(rng.integers(0, longest + 1))
        pieces.append(fed[:, at : at + n])
        at += n
    return pieces


def state_bytes(stream: Any) -> dict[str, bytes]:
    """The state as it is stored, bit for bit."""
    return {name: array.tobytes() for name, array in stream._loop.read().items()}


def same_state(a: Any, b: Any) -> bool:
    return state_bytes(a) == state_bytes(b)


def digests(stream: Any, pieces: list[np.ndarray]) -> list[str]:
    """SHA-256 of the logits of ``pieces``, each fed alone, and of the state after them."""
    logits = hashlib.sha256()
    for piece in pieces:
        for part in stream.feed([piece]):
            logits.update(np.ascontiguousarray(part).data)
    state = hashlib.sha256(b"".join(state_bytes(stream).values()))
    return [logits.hexdigest(), state.hexdigest()]
