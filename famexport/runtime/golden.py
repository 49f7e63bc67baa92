"""A golden rollout: the float32 reference's first blocks, recorded at export, replayed on the device by ``verify``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from famexport.contract import StepContract
from famexport.errors import BundleError, ParityError
from famexport.runtime.backend import Arrays, Loop, to_public

GOLDEN_BLOCKS = 8


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """||got - wanted|| / ||wanted|| in float64; infinite where ``got`` is not finite and ``wanted`` is."""
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    if not np.isfinite(a).all():
        return float("inf")
    scale = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / scale if scale else float(np.linalg.norm(a))


class Golden:
    """Inputs and last-row logits of each block, and the state after the last: FAM and count whole, keys and values of
    the newest position only, since a full memory would be larger than many models."""

    def __init__(self, contract: StepContract) -> None:
        self.contract = contract
        self.inputs: list[np.ndarray] = []
        self.logits: list[np.ndarray] = []
        self.state: Arrays = {}

    def record(self, fed: np.ndarray, logits: np.ndarray, state: Mapping[str, np.ndarray]) -> None:
        self.inputs.append(fed.copy())
        self.logits.append(logits[:, -1].copy())
        self.state = {name: condensed(name, array) for name, array in state.items()}

    def to_bytes(self) -> bytes:
        from safetensors.numpy import save

        arrays = {"inputs": np.stack(self.inputs), "logits": np.stack(self.logits)}
        data: bytes = save({**arrays, **{f"state.{name}": array for name, array in self.state.items()}})
        return data


def condensed(name: str, array: np.ndarray) -> np.ndarray:
    """What a golden rollout keeps of a state tensor, in float32 or int64."""
    memory = name.startswith(("past_key_", "past_value_")) and array.ndim == 4  # a module of one's own may differ
    kept = array[:, :, -1] if memory else array
    return np.array(kept, np.int64 if kept.dtype == np.int64 else np.float32, order="C")  # a copy: the state goes on


@dataclass(frozen=True)
class Replay:
    """Relative errors of a replayed golden rollout; the curve has one value per block."""

    blocks: int
    logits_error: list[float]
    state_error: float
    tolerance: float

    @property
    def worst(self) -> float:
        return max(*self.logits_error, self.state_error)


def replay(
    data: bytes,
    loop: Loop,
    tolerance: float,
    *,
    advance: Callable[[np.ndarray, np.ndarray], None] | None = None,
    blocks: int | None = None,
) -> Replay:
    """Run a recorded rollout through ``loop`` from a fresh state and compare.

    Args:
        advance: how ``loop`` takes a block; ``loop.advance`` unless given.
        blocks: at most this many; only a whole recording tells the error of the state.
    Raises:
        BundleError: the recording does not fit the contract.
        ParityError: past ``tolerance`` on this device.
    """
    from safetensors.numpy import load

    contract = loop.contract
    try:
        arrays = load(data)
        inputs, logits = arrays["inputs"], arrays["logits"]
        states = {s.name: arrays[f"state.{s.name}"] for s in contract.states}
        shapes_fit = inputs.shape[1:] == contract.inputs[0].sized(loop.batch)
        shapes_fit &= logits.shape == (len(inputs), loop.batch, contract.vocab_size)
        for name, recorded in states.items():
            shapes_fit &= recorded.shape == condensed(name, loop.tensor(name)).shape
    except Exception as exc:  # the safetensors package raises its own and built-in errors
        raise BundleError(f"golden rollout cannot be read: {exc}") from exc
    if not shapes_fit or not len(inputs):
        raise BundleError(f"golden rollout has inputs {list(inputs.shape)}, which do not fit a batch of {loop.batch}")
    loop.zero(None)
    advance, whole = advance or loop.advance, len(inputs) <= (blocks or len(inputs))
    out = np.empty(contract.outputs[0].sized(loop.batch), np.float32)
    errors = []
    for fed, wanted in list(zip(inputs, logits, strict=True))[:blocks]:
        advance(np.ascontiguousarray(fed), out)
        loop.commit()
        errors.append(relative_error(out[:, -1], wanted))
    state = loop.read()
    state_errors = [
        relative_error(condensed(s.name, to_public(state[s.name], s.dtype)), states[s.name]) for s in contract.states
    ]
    result = Replay(len(errors), errors, max(state_errors) if whole else 0.0, tolerance)
    if not result.worst <= tolerance:
        raise ParityError(
            f"golden rollout differs on this device by {result.worst:.3g} (relative), allowed is {tolerance:.3g}"
        )
    return result
