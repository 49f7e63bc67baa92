"""Blocks made of chunks: which widths to take, and the block step that append_step and commit_block amount to."""

from __future__ import annotations

import numpy as np

from famexport.contract import StepContract
from famexport.runtime.backend import STORAGE, Loop


def chunk_width(contract: StepContract, positions: int) -> int:
    """The narrowest chunk that holds ``positions``, or else the widest there is."""
    return next((c for c in contract.chunks if c >= positions), contract.chunks[-1])


def chunk_plan(contract: StepContract) -> list[tuple[int, int]]:
    """A whole block in chunks, as (width, positions that count): every width once, then as few as possible."""
    plan, left = [], contract.block_size
    for i, width in enumerate(contract.chunks):
        n = min(width, left - len(contract.chunks[i + 1 :]))  # at least a position for each of the others
        plan.append((width, n))
        left -= n
    while left:
        width = chunk_width(contract, left)
        plan.append((width, min(width, left)))
        left -= plan[-1][1]
    return plan


def advance_by_chunks(loop: Loop, fed: np.ndarray, out: np.ndarray) -> None:
    """What ``loop.advance`` does, by append_step and commit_block. All but the last call are committed on the way.

    Args:
        fed: a whole block, of a loop whose open blocks are empty.
        out: logits [b, T, V], or [b, 1, V] where the contract gives the last row only.
    """
    contract, at = loop.contract, 0
    spec = contract.inputs[0]
    for width, count in chunk_plan(contract):
        chunk = np.zeros((loop.batch, width, *fed.shape[2:]), STORAGE[spec.dtype])
        chunk[:, :count] = fed[:, at : at + count]
        rows = width if contract.logits == "all" else 1
        logits = np.empty((loop.batch, rows, contract.vocab_size), np.float32)
        loop.append(chunk, np.full(loop.batch, count), logits)
        loop.commit()
        if contract.logits == "all":
            out[:, at : at + count] = logits[:, :count]
        else:
            out[...] = logits
        at += count
    loop.end_block()
