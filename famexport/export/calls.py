"""Single calls of the graphs of an open block, from a random state, against the float32 model: for models of which a
block made of chunks is too expensive, since every chunk reads all weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from famexport.contract import OPEN_LENGTH, GraphIO, StepContract, TensorSpec
from famexport.errors import ParityError
from famexport.export.parity import refused
from famexport.export.source import Source
from famexport.runtime.backend import STORAGE, to_public, to_storage
from famexport.runtime.golden import relative_error
from famexport.runtime.inputs import random_input
from famexport.runtime.ort import OrtCpu

PARITY_BATCH = 2  # where the contract's is dynamic
_FLOATS = ("float32", "float16", "bfloat16")


def compare_calls(
    what: Source, graphs: Mapping[str, Path], weights: Path | None, precision: str, tolerance: float, seed: int
) -> dict[str, float]:
    """One call of each append_step and of commit_block from a random state with full memory, against the float32 model.

    Returns:
        the largest relative error of logits and new states, by graph.
    Raises:
        ParityError: past ``tolerance``, or not finite.
    """
    contract = what.contract
    backend = OrtCpu(contract, precision, graphs, weights)
    loop = backend.open(PARITY_BATCH if contract.batch == "dynamic" else None)
    rng = np.random.default_rng(seed)
    state = _random_state(contract, loop.batch, rng)
    given: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]] = {}
    fed: dict[str, np.ndarray] = {}
    for name in (n for n in contract.graph_names if n != "block_step"):
        io = contract.graph(name)
        loop.write({s.name: _stored(state[s.name], s) for s in contract.all_states} | _opened(contract, io, loop.batch))
        logits = np.zeros(io.logits.sized(loop.batch) if io.logits else 0, np.float32)
        if io.chunk:
            fed[name] = random_input(contract, loop.batch, io.chunk, rng)
            loop.append(fed[name], np.full(loop.batch, io.chunk), logits)
        else:
            loop.end_block()
        loop.commit()
        new = {s.name: to_public(loop.tensor(s.name), s.dtype) for s in io.new if s.dtype in _FLOATS}
        given[name] = logits, new
    loop.close()
    backend.close()
    assert what.model is not None
    model, errors = what.model(), {}
    for name, (logits, new) in given.items():
        io = contract.graph(name)
        past = {k: torch.from_numpy(v) for k, v in (state | _opened(contract, io, loop.batch)).items()}
        with torch.no_grad():
            if io.chunk:
                length = torch.full((len(fed[name]),), io.chunk)
                wanted, wanted_new = model.append(torch.from_numpy(fed[name]), length, past, logits=contract.logits)
            else:
                wanted, wanted_new = torch.zeros(0), model.commit(past)
        found = {key: relative_error(array, wanted_new[key].float().numpy()) for key, array in new.items()}
        if io.logits:
            found["logits"] = relative_error(logits, wanted.numpy())
        worst = max(found, key=lambda key: found[key] if np.isfinite(found[key]) else np.inf)
        if not found[worst] <= tolerance:  # NaN fails too
            raise ParityError(
                f"the exported {name} differs from the float32 torch model: {worst} by {found[worst]:.3g} (relative), "
                f"allowed is {tolerance:.3g}; {refused(found[worst])}"
            )
        errors[name] = found[worst]
    return errors


def _opened(contract: StepContract, io: GraphIO, batch: int) -> dict[str, np.ndarray]:
    """How long the open block is before a call: full for commit_block, else with room for the chunk."""
    size = contract.block_size
    return {OPEN_LENGTH: np.full(batch, size if io.chunk is None else min(size // 2, size - io.chunk))}


def _random_state(contract: StepContract, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Full memory, random FAM, keys and values that the contract's dtypes hold exactly, as float32."""
    full = {"past_count": max(contract.memory_segments, 1), OPEN_LENGTH: 0}
    state = {}
    for spec in contract.all_states:
        if spec.name in full:
            state[spec.name] = np.full(spec.sized(batch), full[spec.name])
        else:
            values = torch.from_numpy(rng.standard_normal(spec.sized(batch), np.float32))
            state[spec.name] = values.to(getattr(torch, spec.dtype)).float().numpy()
    return state


def _stored(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    return to_storage(array, spec) if spec.dtype == "bfloat16" else array.astype(STORAGE[spec.dtype])
