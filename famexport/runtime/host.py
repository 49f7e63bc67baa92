"""State in host memory: the loop of every backend whose steps run on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, prod

import numpy as np

from famexport.contract import ITEM_BYTES, OPEN_LENGTH, StepContract, TensorSpec
from famexport.runtime.backend import STORAGE, Arrays, Loop

_FLOAT32 = np.dtype(np.float32)
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class HostLoop(Loop):
    """A loop whose state lives in host memory. Block-boundary state and open block each have two buffers that take
    turns: nothing is allocated per call."""

    def __init__(self, contract: StepContract, batch: int) -> None:
        super().__init__(contract, batch)
        states, opened = (
            [allocate(specs, batch) for _ in range(2)] for specs in (contract.states, contract.open_states)
        )
        self.buffers, self.open_buffers = [pair[0] for pair in states], [pair[0] for pair in opened]
        self._flats, self._open_flats = [pair[1] for pair in states], [pair[1] for pair in opened]
        self.current = self.open_current = 0
        self._moved = self._open_moved = False  # which of the two the last call computed anew

    def _computed(self, states: bool, opened: bool) -> None:
        """For subclasses: say after a call what it computed anew."""
        self._moved, self._open_moved = states, opened

    def commit(self, rows: Sequence[int] | None = None) -> None:
        if rows is not None:
            for old, new in self._pairs():
                for row in sorted(set(range(self.batch)) - set(rows)):
                    for name in new:
                        new[name][row] = old[name][row]
        self.current ^= self._moved
        self.open_current ^= self._open_moved

    def _pairs(self) -> list[tuple[Arrays, Arrays]]:
        """(current, computed) buffers of what the last call computed."""
        a, b = self.current, self.open_current
        found = [(self.buffers[a], self.buffers[1 - a])] if self._moved else []
        return found + ([(self.open_buffers[b], self.open_buffers[1 - b])] if self._open_moved else [])

    def bad_rows(self, logits: np.ndarray | None = None, lengths: np.ndarray | None = None) -> list[int]:
        if (logits is None or is_finite(logits)) and self._state_is_finite():
            return []
        bad = set() if logits is None else nonfinite_rows(logits, lengths)
        for row in set(range(self.batch)) - bad:
            if not all(is_finite(array[row]) for _, new in self._pairs() for array in new.values()):
                bad.add(row)
        return sorted(bad)

    def _state_is_finite(self) -> bool:
        """Of all that the last call computed, in one pass each."""
        if self._moved:
            for flat in self._flats[1 - self.current]:
                if not is_finite(flat):
                    return False
        if self._open_moved:
            for flat in self._open_flats[1 - self.open_current]:
                if not is_finite(flat):
                    return False
        return True

    def _home(self, name: str) -> np.ndarray:
        buffers = self.buffers[self.current]
        return buffers[name] if name in buffers else self.open_buffers[self.open_current][name]

    def tensor(self, name: str, row: int | None = None) -> np.ndarray:
        copied: np.ndarray = self._home(name)[slice(None) if row is None else slice(row, row + 1)].copy()
        return copied

    def write(self, state: Mapping[str, np.ndarray], row: int | None = None) -> None:
        for name, array in state.items():
            np.copyto(self._home(name)[slice(None) if row is None else slice(row, row + 1)], array)

    def truncate(self, rows: Iterable[int], length: int) -> None:
        index = list(rows)
        for name, array in self.open_buffers[self.open_current].items():
            if name == OPEN_LENGTH:
                array[index] = length
            else:
                array[index, :, length:] = 0

    def zero(self, rows: Sequence[int] | None) -> None:
        index = slice(None) if rows is None else list(rows)
        for spec in self.contract.all_states:
            self._home(spec.name)[index] = 0


def allocate(specs: Sequence[TensorSpec], batch: int) -> tuple[Arrays, list[np.ndarray]]:
    """Zeroed arrays by name, and for each floating dtype one flat view over all: one pass looks at a whole state.

    Arrays start at multiples of 64 bytes, what lies between stays zero.
    """
    arrays: Arrays = {}
    flats = []
    for dtype in dict.fromkeys(spec.dtype for spec in specs):
        group, item = [spec for spec in specs if spec.dtype == dtype], ITEM_BYTES[dtype]
        sizes = [-(-spec.nbytes(batch) // _ALIGNMENT) * _ALIGNMENT // item for spec in group]
        raw = np.zeros(sum(sizes) * item + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        flat = raw[start : start + sum(sizes) * item].view(STORAGE[dtype])
        for spec, size, end in zip(group, sizes, np.cumsum(sizes), strict=True):
            arrays[spec.name] = flat[end - size :][: prod(spec.sized(batch))].reshape(spec.sized(batch))
        if dtype in ("float32", "float16", "bfloat16"):
            flats.append(flat)
    return arrays, flats


def nonfinite_rows(logits: np.ndarray, lengths: np.ndarray | None) -> set[int]:
    """Rows of logits [b, n, V] with NaN or infinity, in the first ``lengths`` positions of each where that is given."""
    parts = [logits[row] if lengths is None else logits[row, : lengths[row]] for row in range(len(logits))]
    return {row for row, part in enumerate(parts) if not is_finite(part)}


def is_finite(array: np.ndarray) -> bool:
    """Whether ``array``, in a storage dtype, is free of NaN and infinity; nothing is allocated."""
    # A sum of squares is finite only where every term is, and takes a third of the time of two comparisons; one beyond
    # 1e38 says nothing. vdot warns of neither, as dot would.
    if array.dtype is _FLOAT32 and array.flags.c_contiguous and isfinite(np.vdot(array, array)):
        return True
    if not array.size or array.dtype.kind in "ib":
        return True
    if array.dtype == np.float32:
        return isfinite(array.max()) and isfinite(array.min())  # a NaN becomes both
    # The bits of 16-bit floats are in the order of their values: as signed numbers the positive ones, as unsigned the
    # negative ones. numpy compares them far faster than half-precision values.
    infinity = 0x7C00 if array.dtype == np.float16 else 0x7F80
    return int(array.view(np.int16).max()) < infinity and int(array.view(np.uint16).max()) < infinity + 0x8000
