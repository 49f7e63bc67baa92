"""A stream's states in device memory: where each lies, and reading and writing them by the contract's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod

import numpy as np

from famexport.contract import ITEM_BYTES, OPEN_LENGTH, StepContract, TensorSpec
from famexport.runtime.backend import STORAGE
from famexport.runtime.enqueue import CudaLayer
from famexport.runtime.layout import COUNT, HOST, Layout

ALIGNMENT = 256  # bytes: what cudaMalloc promises, and engines rely on
BLOCK, APPEND, COMMIT = "block_step", "append_step", "commit_block"  # what a call does, whatever graph does it
Rows = slice | list[int] | np.ndarray  # an index of some rows; bool [b] where it is an array
Turn = tuple[int, int]  # how far the rings of block states and of open states have turned


class DeviceState:
    """The state of ``batch`` rows in a region of ``span`` bytes. The caller holds the CUDA lock.

    A call of the engine reads the current slots and writes new ones beside them; ``commit`` turns the rings.
    """

    def __init__(self, contract: StepContract, batch: int, layout: Layout, cuda: CudaLayer) -> None:
        self.contract, self.batch, self.layout, self._cuda = contract, batch, layout, cuda
        self.turn: Turn = (0, 0)
        self._open = {spec.name for spec in contract.open_states}
        self._at: dict[tuple[str, int], int] = {}
        self.span = 0
        for name, stored in layout.stored.items():
            if not self._on_host(name):
                for position in range(self._positions(name)):
                    self._at[name, position] = self.span
                    self.span += aligned(stored.row_bytes * batch)
        self.base = 0
        # What the host keeps where the layout is counted: blocks seen, positions of the open block, and whether its
        # slot has FAM's keys and values
        self.kept = {name: np.zeros(batch, np.int64) for name in HOST}
        self._has_fam = np.zeros(batch, bool)
        self._length = np.zeros(1, np.int64)

    def place(self, base: int, kept: dict[str, np.ndarray], length: np.ndarray) -> None:
        """Where the region lies, and pinned memory: for ``kept``, and [1]."""
        self.base, self.kept, self._length = base, kept, length

    def ready(self, call: str, wanted: Rows) -> bool:
        """Whether the ``wanted`` rows are past what only a start graph does right. What a call computes of the others
        is thrown away."""
        past = self.kept[COUNT] >= self._most
        if call == APPEND and self.contract.fam_length:
            past &= self._has_fam
        return bool(past[wanted].all())

    def concerned(self, call: str) -> np.ndarray:
        """Which rows take over what ``call`` computes, bool [b]: commit_block those whose open block is full."""
        if self.layout.counted and call == COMMIT:
            full: np.ndarray = self.kept[OPEN_LENGTH] == self.contract.block_size
            return full
        return np.ones(self.batch, bool)

    @property
    def _most(self) -> int:
        return max(self.contract.memory_segments, 1)

    @property
    def turns(self) -> list[Turn]:
        opened = range(2 if self._open else 1)
        return [(block, other) for block in range(self.layout.positions) for other in opened]

    def addresses(self, name: str, turn: Turn) -> list[int]:
        """Of the current slots of a state, oldest first, and of the new one."""
        slots, positions = len(self.layout.stored[name].names), self._positions(name)
        first = turn[name in self._open] + positions - 1 - slots
        return [self.base + self._at[name, (first + i) % positions] for i in range(slots + 1)]

    def commit(self, call: str, rows: Sequence[int] | None, appended: np.ndarray, *, starting: bool = False) -> None:
        """Make what ``call`` computed current, in ``rows`` alone where given.

        Args:
            appended: positions [b] of APPEND.
            starting: by a start graph, which puts FAM's keys and values into the open slot of every row.
        """
        going = np.ones(self.batch, bool)
        if rows is not None:
            going = np.isin(np.arange(self.batch), list(rows))
        if not self.layout.counted:
            self._turn(call != APPEND, call != BLOCK, going)
            return
        count, length = self.kept[COUNT], self.kept[OPEN_LENGTH]
        if call == APPEND:
            self._turn(False, True, going)
            length[going] += appended[going]
            if starting:
                self._has_fam |= going
            return
        if call == COMMIT:
            going &= length == self.contract.block_size
            length[going] = 0
        if going.any():
            self._turn(True, False, going)
        count[going] = np.minimum(count[going] + 1, self._most)
        self._has_fam &= ~going

    def _turn(self, moved: bool, open_moved: bool, going: np.ndarray) -> None:
        """Turn the rings. A row that does not go on takes its slots along, each to where its newer neighbour lay."""
        stay = list(_runs(np.flatnonzero(~going).tolist()))
        for name, stored in self.layout.stored.items() if stay else ():
            if (open_moved if name in self._open else moved) and not self._on_host(name):
                places, size = self.addresses(name, self.turn), stored.row_bytes
                for row, count in stay:
                    for source, target in reversed(list(pairwise(places))):
                        self._cuda.copy(target + row * size, source + row * size, count * size)
        self.turn = (self.turn[0] + moved) % self.layout.positions, (self.turn[1] + open_moved) % 2

    def read(self, name: str, row: int | None) -> np.ndarray:
        """A copy of one state, or of one row of it, in its storage dtype."""
        stored, rows = self.layout.stored[name], self.batch if row is None else 1
        if self._on_host(name):
            return np.array(self.kept[name] if row is None else self.kept[name][row : row + 1])
        slots = [np.empty((rows, *stored.shape), STORAGE[stored.spec.dtype]) for _ in stored.names]
        for address, slot in zip(self.addresses(name, self.turn), slots, strict=False):
            self._cuda.copy_out(slot, address + (row or 0) * stored.row_bytes)
        self._cuda.synchronize()
        whole: np.ndarray = np.array(stored.public(slots), order="C")
        if self.layout.counted and name in self._open:  # what lies past a row's end is not its
            for i, length in enumerate(self.kept[OPEN_LENGTH][slice(None) if row is None else slice(row, row + 1)]):
                whole[i, :, length:] = 0
        return whole

    def write(self, name: str, array: np.ndarray, row: int | None) -> None:
        stored = self.layout.stored[name]
        shape = stored.spec.sized(self.batch)[1:]
        whole = np.ascontiguousarray(np.broadcast_to(array, (self.batch if row is None else 1, *shape)))
        which = slice(None) if row is None else slice(row, row + 1)
        self._has_fam[which] = False
        if self._on_host(name):
            self.kept[name][which] = whole
            return
        slots = stored.slots(whole.astype(STORAGE[stored.spec.dtype], copy=False))
        for address, slot in zip(self.addresses(name, self.turn), slots, strict=False):
            self._cuda.copy_in(address + (row or 0) * stored.row_bytes, np.ascontiguousarray(slot))
            self._cuda.synchronize()  # before the array may go

    def zero(self, rows: Iterable[int]) -> None:
        rows = list(rows)
        self._has_fam[rows] = False
        for kept in self.kept.values():
            kept[rows] = 0
        for name, stored in self.layout.stored.items():
            if not self._on_host(name):
                for address in self.addresses(name, self.turn)[:-1]:
                    for row, count in _runs(rows):
                        self._cuda.memset(address + row * stored.row_bytes, 0, count * stored.row_bytes)
        self._cuda.synchronize()

    def truncate(self, rows: Iterable[int], length: int) -> None:
        """Take the open block of some rows back to its first ``length`` positions."""
        if self.layout.counted:
            self.kept[OPEN_LENGTH][list(rows)] = length
            return
        runs = list(_runs(rows))
        self._length[0] = length
        for spec in self.contract.open_states:
            for row, count in runs:
                self._truncate(spec, row, count, length)
        self._cuda.synchronize()

    def _truncate(self, spec: TensorSpec, row: int, count: int, length: int) -> None:
        size, home = self.layout.stored[spec.name].row_bytes, self.addresses(spec.name, self.turn)[0]
        if spec.name == OPEN_LENGTH:
            for one in range(row, row + count):
                self._cuda.copy_in(home + one * size, self._length)
            return
        _, heads, positions, *rest = spec.sized(self.batch)
        item = prod(rest) * ITEM_BYTES[spec.dtype]
        if left := (positions - length) * item:
            self._cuda.memset_2d(home + row * size + length * item, positions * item, 0, left, count * heads)

    def _positions(self, name: str) -> int:
        return 2 if name in self._open else self.layout.positions

    def _on_host(self, name: str) -> bool:
        return self.layout.counted and name in HOST


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _runs(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of neighbouring rows."""
    start = before = None
    for row in sorted(set(rows)):
        if before is not None and row == before + 1:
            before = row
            continue
        if start is not None and before is not None:
            yield start, before - start + 1
        start = before = row
    if start is not None and before is not None:
        yield start, before - start + 1
