"""Closed-loop parity: the exported step and the float32 torch step each run free on their own state, and are compared.

An error that a single step hides (a state fed back wrongly, a rounding that accumulates) shows here. Past the tolerance
the export fails; nothing is published.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from famexport.contract import StepContract
from famexport.errors import FamExportError, ParityError
from famexport.export.source import Reference
from famexport.runtime.backend import STORAGE, Loop, to_public
from famexport.runtime.chunks import chunk_plan
from famexport.runtime.golden import GOLDEN_BLOCKS, Golden, relative_error
from famexport.runtime.inputs import random_input

# Largest relative error ||a - b|| / ||b|| of one block's logits or of one state tensor, by precision
TOLERANCES = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1.5e-1, "int8": 0.4, "int4": 0.9}
FULL_BLOCKS = 256
FLOP_BUDGET = 1.5e12  # of the float32 reference: about ten seconds on two CPU cores
BYTE_BUDGET = 1e11  # of weights read by append_step: about ten seconds at 10 GB/s
GROWTH_LIMIT = 2.0


@dataclass
class Parity:
    """What the comparison measured; curves have one value per block."""

    blocks: int
    batch: int
    tolerance: float
    seed: int
    logits_error: list[float] = field(default_factory=list)
    state_error: list[float] = field(default_factory=list)
    fam_norm: list[float] = field(default_factory=list)
    argmax_agreement: float = 0.0
    fam_growth: float | None = None

    @property
    def worst(self) -> float:
        return max(*self.logits_error, *self.state_error)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def growth_note(parity: Mapping[str, Any]) -> str | None:
    """One line where FAM's norm grew through the roll-out: such a state loses what it holds, and overflows in time."""
    growth = parity["fam_growth"]
    if growth is None or growth < GROWTH_LIMIT:
        return None
    last, blocks = parity["fam_norm"][-1], parity["blocks"]
    return (
        f"FAM's norm grew {growth:.1f}x over {blocks} blocks of random tokens, to {last:.3g}: the state does not settle"
    )


def default_blocks(flops_per_block: int | None) -> int:
    """Blocks to compare: 256 for small models, fewer where the reference would take long, never fewer than 2."""
    if not flops_per_block:
        return FULL_BLOCKS
    return int(min(FULL_BLOCKS, max(2, FLOP_BUDGET // flops_per_block)))


def append_blocks(weight_bytes: int | None, contract: StepContract) -> int:
    """Blocks to compare when they are made of chunks: each chunk reads all weights."""
    read = len(chunk_plan(contract)) * (weight_bytes or 1)
    return int(min(FULL_BLOCKS, max(2, BYTE_BUDGET // read)))


def check_parity(
    loop: Loop,
    reference: Reference,
    *,
    blocks: int,
    tolerance: float,
    seed: int = 0,
    release: Callable[[], None] = lambda: None,
    folder: Path | None = None,
    advance: Callable[[np.ndarray, np.ndarray], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Parity, Golden]:
    """Run ``loop``, then ``reference``, over the same random input, and compare logits and state after every block.

    One after the other, with the loop's results in an unnamed temporary file between: a large model's two steps would
    not fit in memory together. Where the batch has several rows, the last is reset a third of the way through, so that
    rows are out of step.

    Args:
        release: called when ``loop`` has done its part, to give back its memory.
        folder: where the temporary file goes.
        advance: how ``loop`` takes a block; ``loop.advance`` unless given.
    Returns:
        the measured curves, and the reference's first blocks as a golden rollout.
    Raises:
        ParityError: past ``tolerance`` or not finite, naming the block and the tensor.
    """
    contract, batch = loop.contract, loop.batch
    report = Parity(blocks, batch, tolerance, seed)
    reset_at = max(1, blocks // 3) if batch > 1 else blocks
    step, advance = progress or (lambda done, total: None), advance or loop.advance
    with tempfile.TemporaryFile(dir=folder) as spool:
        inputs = np.random.default_rng(seed)
        out = np.empty(contract.outputs[0].sized(batch), np.float32)
        for block in range(blocks):
            if block == reset_at:
                loop.zero([batch - 1])
            advance(random_input(contract, batch, contract.block_size, inputs), out)
            loop.commit()
            spool.write(out.data)
            report.fam_norm.append(_spool_state(loop, spool))
            step(block + 1, 2 * blocks)
        release()
        spool.seek(0)
        inputs = np.random.default_rng(seed)
        state = {s.name: torch.zeros(s.sized(batch), dtype=_wide(s.dtype)) for s in contract.states}
        golden, same = Golden(contract), 0
        for block in range(blocks):
            if block == reset_at:
                for tensor in state.values():
                    tensor[batch - 1] = 0
            fed = random_input(contract, batch, contract.block_size, inputs)
            with torch.no_grad():
                logits, state = reference(torch.from_numpy(fed), state)
            wanted = logits.numpy()
            _fill(out, spool)
            errors = {"logits": relative_error(out, wanted), **_state_errors(contract, batch, spool, state)}
            report.logits_error.append(errors["logits"])
            report.state_error.append(max(error for name, error in errors.items() if name != "logits"))
            same += int((out.argmax(-1) == wanted.argmax(-1)).sum())
            if block < min(GOLDEN_BLOCKS, reset_at):  # a recording has no resets
                golden.record(fed, wanted, {name: tensor.numpy() for name, tensor in state.items()})
            _require(errors, tolerance, block)
            step(blocks + block + 1, 2 * blocks)
    report.argmax_agreement = same / (blocks * batch * out.shape[1])
    report.fam_growth = _growth(report.fam_norm) if contract.fam_length else None
    return report, golden


def _require(errors: dict[str, float], tolerance: float, block: int) -> None:
    worst = max(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)
    if not errors[worst] <= tolerance:  # NaN fails too
        raise ParityError(
            f"the exported step differs from the float32 torch step at block {block}: {worst} by {errors[worst]:.3g} "
            f"(relative), allowed is {tolerance:.3g}; {refused(errors[worst])}"
        )


def refused(error: float) -> str:
    """How the message of a ParityError ends: what to type."""
    more = ", or with a larger --tolerance if that will do" if np.isfinite(error) else ""
    return f"nothing was published; export with a higher --precision{more}"


def _spool_state(loop: Loop, spool: IO[bytes]) -> float:
    """Append the state, one tensor in memory at a time; the mean length of its FAM vectors, 0 where there are none."""
    norms = []
    for spec in loop.contract.states:
        array = loop.tensor(spec.name)
        spool.write(np.ascontiguousarray(array).data)
        if spec.name.startswith("past_fam"):
            norms.append(np.linalg.norm(to_public(array, spec.dtype).astype(np.float32), axis=-1).mean())
    return float(np.mean(norms)) if norms else 0.0


def _state_errors(contract: StepContract, batch: int, spool: IO[bytes], state: dict[str, Tensor]) -> dict[str, float]:
    errors = {}
    for spec in contract.states:
        array = np.empty(spec.sized(batch), STORAGE[spec.dtype])
        _fill(array, spool)
        errors[spec.name] = relative_error(to_public(array, spec.dtype), state[spec.name].numpy())
    return errors


def _fill(array: np.ndarray, spool: IO[bytes]) -> None:
    read = spool.readinto(array.data.cast("B"))  # type: ignore[attr-defined]  # every binary file has it
    if read != array.nbytes:  # else what the array held before would be compared
        raise FamExportError(
            f"the parity check's temporary file gave {read} bytes, expected {array.nbytes}; is its disk full?"
        )


def _growth(norms: list[float]) -> float | None:
    """Mean norm of the last eighth over that of the second: near 1 where the state has settled."""
    eighth = len(norms) // 8
    if not eighth:
        return None
    return float(np.mean(norms[-eighth:]) / max(np.mean(norms[eighth : 2 * eighth]), 1e-12))


def _wide(dtype: str) -> torch.dtype:
    return torch.float32 if dtype in ("float32", "float16", "bfloat16") else getattr(torch, dtype)
