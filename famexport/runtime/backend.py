"""What a backend is: something that advances a stream's state by one block. Base classes check, backends compute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from famexport.contract import StepContract, TensorSpec
from famexport.errors import ContractError, FamExportError, raise_problems

MAX_BATCH = 2**20  # rows; no device holds as many
Arrays = dict[str, np.ndarray]

# numpy has no bfloat16: its bits are kept as uint16, and shown to the outside as float32, which holds them exactly
STORAGE: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


def to_public(array: np.ndarray, dtype: str) -> np.ndarray:
    """A copy as users see it: bfloat16 bits become float32, which is exact."""
    if dtype == "bfloat16":
        wide: np.ndarray = (array.astype(np.uint32) << 16).view(np.float32)
        return wide
    copied: np.ndarray = array.copy()
    return copied


def to_storage(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """The inverse of ``to_public``. float32 values that bfloat16 cannot hold are an error, not a rounding."""
    if spec.dtype != "bfloat16":
        return array
    bits = array.view(np.uint32)
    if np.any(bits & 0xFFFF):
        raise ContractError(f"{spec.name} is a bfloat16 state; it was given float32 values that bfloat16 cannot hold")
    return np.asarray(bits >> 16, np.uint16)


def check_array(array: object, spec: TensorSpec, batch: int, dtype: Any = None) -> list[str]:
    """What is wrong with ``array`` against ``spec``: kind, dtype, shape, contiguity."""
    wanted = np.dtype(dtype or STORAGE[spec.dtype])
    if not isinstance(array, np.ndarray):
        return [f"{spec.name} is {type(array).__name__}, expected a numpy array"]
    found = []
    if array.dtype != wanted:
        found.append(f"{spec.name} is {array.dtype}, expected {wanted}")
    if array.shape != spec.sized(batch):
        found.append(f"{spec.name} has shape {list(array.shape)}, expected {list(spec.sized(batch))}")
    if not found and not array.flags.c_contiguous:
        found.append(f"{spec.name} is not contiguous; pass np.ascontiguousarray(...)")
    return found


class Loop(ABC):
    """The state of one batch of streams on a backend.

    ``advance``, ``append`` and ``end_block`` read it and compute a new one aside; ``commit`` makes that the current.
    """

    def __init__(self, contract: StepContract, batch: int) -> None:
        self.contract, self.batch = contract, batch

    @abstractmethod
    def advance(self, fed: np.ndarray, out: np.ndarray, rows: Sequence[int] | None = None) -> None:
        """``block_step``: a block, logits into ``out``. Arrays are checked before, here and below.

        Args:
            rows: whose results are wanted; None: of all.
        """

    @abstractmethod
    def append(self, fed: np.ndarray, length: np.ndarray, out: np.ndarray) -> None:
        """``append_step``: a chunk [b, c] of which ``length`` [b] positions count in each row, logits into ``out``."""

    @abstractmethod
    def end_block(self) -> None:
        """``commit_block``: rows whose open block is full go on to the next."""

    @abstractmethod
    def commit(self, rows: Sequence[int] | None = None) -> None:
        """Make what the last call computed the current state, in all rows, or in ``rows`` while others stay."""

    @abstractmethod
    def bad_rows(self, logits: np.ndarray | None = None, lengths: np.ndarray | None = None) -> list[int]:
        """Rows in which the last call computed NaN or infinity (R8): in the new state, or in ``logits`` [b, n, V], of
        which ``lengths`` positions count in each row where that is given."""

    @abstractmethod
    def tensor(self, name: str, row: int | None = None) -> np.ndarray:
        """A copy of one tensor of the current state, or of one row of it ([1, ...]), in its storage dtype."""

    def read(self, row: int | None = None) -> Arrays:
        """Copies of the current state, by contract name, in storage dtypes."""
        return {spec.name: self.tensor(spec.name, row) for spec in self.contract.all_states}

    @abstractmethod
    def write(self, state: Mapping[str, np.ndarray], row: int | None = None) -> None:
        """Replace the current state, or one row of it. The arrays are checked."""

    @abstractmethod
    def zero(self, rows: Sequence[int] | None) -> None:
        """Zero the current state of some rows, or all: they are fresh streams then."""

    @abstractmethod
    def truncate(self, rows: Iterable[int], length: int) -> None:
        """Take the open block of some rows back to its first ``length`` positions, as if no more had been appended."""

    _device_ms: float | None = None
    device_total_ms = 0.0  # of all timed calls: a step of a stream can be several

    @property
    def device_ms(self) -> float | None:
        """What the last call took on a GPU, by events; None unless it is timed."""
        return self._device_ms

    @device_ms.setter
    def device_ms(self, taken: float) -> None:
        self._device_ms = taken
        self.device_total_ms += taken

    def time_device(self) -> None:  # noqa: B027 - optional for subclasses
        """From now on set ``device_ms`` with each call, where the steps run on a GPU."""

    def back_to_back(self, fed: np.ndarray, blocks: int) -> float | None:
        """Seconds for ``blocks`` times ``block_step`` on the same input, each committed, with no wait but for the last:
        throughput, where ``advance`` has latency. None where the backend waits in each call anyway."""
        return None

    def close(self) -> None:  # noqa: B027 - optional for subclasses
        """Give back what the loop holds."""

    def state_problems(self, state: Mapping[str, Any]) -> list[str]:
        specs = self.contract.all_states
        names = {spec.name for spec in specs}
        found = [f"missing state {name}" for name in sorted(names - set(state))]
        found += [f"unknown state {name}" for name in sorted(set(state) - names)]
        for spec in specs:
            if spec.name in state:
                public = np.float32 if spec.dtype == "bfloat16" else None
                found += check_array(state[spec.name], spec, self.batch, public)
        return found


class Backend(ABC):
    """A loaded step: weights once, any number of loops over it."""

    name: str
    provider: str
    device: str
    kernels: str | None = None  # "fused", or why they are not, where a bundle has graphs made for CUDA
    engines: Mapping[str, str] = {}  # SHA-256 of what was built for a machine and is run in place of graphs, by name

    def __init__(self, contract: StepContract, precision: str) -> None:
        self.contract, self.precision = contract, precision

    def open(self, batch: int | None = None) -> Loop:
        """A new loop with all-zero state. ``batch`` may be given only where the contract's is dynamic."""
        fixed = self.contract.batch
        problems = []
        if batch is not None and (not isinstance(batch, int | np.integer) or isinstance(batch, bool)):
            problems.append(f"batch must be a number of rows, got {batch!r:.80}")
        elif fixed == "dynamic":
            if batch is not None and not 1 <= batch <= MAX_BATCH:
                problems.append(f"batch must be from 1 to {MAX_BATCH}, got {batch}")
        elif batch not in (None, fixed):
            problems.append(f"got batch {batch}, this bundle was exported for {fixed}; export with --batch dynamic")
        raise_problems(ContractError, "cannot open a stream", problems)
        rows = int(batch or (fixed if isinstance(fixed, int) else 1))
        try:
            return self._open(rows)
        except MemoryError as exc:
            raise FamExportError(
                f"there is no memory for {rows} rows, whose state takes {self.contract.state_bytes(rows)} bytes twice; "
                "open a smaller batch"
            ) from exc

    @abstractmethod
    def _open(self, batch: int) -> Loop: ...

    def close(self) -> None:  # noqa: B027 - optional for subclasses
        """Give back what the backend holds."""
