"""Where everything that an engine's calls touch lies in device memory: one region, planned before it is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from famexport.errors import FamExportError, IncompatibleError
from famexport.runtime.cuda import EXPONENTS, TABLE_ROW, table_entry
from famexport.runtime.device_state import ALIGNMENT, DeviceState, Turn, aligned
from famexport.runtime.layout import Stored

Key = tuple[str, Turn]  # a graph, and where the rings stand that it reads


class DeviceMemory:
    """The region's ``nbytes``: the state, then inputs, logits, tables of what is checked for NaN, and flags.

    ``flags``: int32 [2, b], of new states and of logits.

    Raises:
        IncompatibleError: an engine wants shared what cannot share memory.
    """

    def __init__(self, state: DeviceState, aliased: Mapping[str, Mapping[str, str]]) -> None:
        self._state, self.aliased = state, aliased
        self._graphs, self._stored, self._batch = state.layout.graphs, state.layout.stored, state.batch
        for name, io in self._graphs.items():
            own = {self._stored[s.name].new: s.name for s in io.new if len(self._stored[s.name].names) == 1}
            if wrong := {o: i for o, i in aliased[name].items() if own.get(o) != i}:
                raise IncompatibleError(f"{name} shares {wrong}; only a state and its own successor can share memory")
        sizes: dict[tuple[Any, ...], int] = {}
        for name, io in self._graphs.items():
            sizes |= {("in", name, spec.name): spec.nbytes(self._batch) for spec in io.inputs}
            if io.logits:
                sizes["logits", name] = io.logits.nbytes(self._batch)
            sizes |= {("table", key): (len(io.new) + 1) * TABLE_ROW * 8 for key in self.keys(name)}
        self.flags_bytes = sizes["flags",] = 2 * 4 * self._batch
        self._at, self.nbytes = {}, state.span
        for what, size in sizes.items():
            self._at[what], self.nbytes = self.nbytes, self.nbytes + aligned(size)
        self._known: dict[Key, dict[str, int]] = {}
        self._checked: dict[Key, list[tuple[int, Stored]]] = {}

    def place(self, base: int) -> None:
        """Once: where the region lies."""
        self._at = {what: base + offset for what, offset in self._at.items()}

    @property
    def flags(self) -> int:
        return self._at["flags",]

    def table(self, key: Key) -> int:
        return self._at["table", key]

    def logits_bytes(self, name: str) -> int:
        """0 for a graph without logits."""
        io = self._graphs[name].logits
        return io.nbytes(self._batch) if io else 0

    def keys(self, name: str) -> list[Key]:
        return sorted({self.key(name, turn) for turn in self._state.turns})

    def key(self, name: str, turn: Turn) -> Key:
        """``block_step`` has no open block."""
        return name, turn if self._state.contract.chunks and not name.startswith("block_step") else (turn[0], 0)

    def addresses(self, key: Key) -> dict[str, int]:
        """By the engine's names; found out once, since an engine may be called some thousand times a second."""
        if key not in self._known:
            self._known[key] = self._find_addresses(key)
        return self._known[key]

    def _find_addresses(self, key: Key) -> dict[str, int]:
        name, io = key[0], self._graphs[key[0]]
        found = {spec.name: self._at["in", name, spec.name] for spec in io.inputs}
        for spec in io.states:
            found.update(zip(self._stored[spec.name].names, self._state.addresses(spec.name, key[1]), strict=False))
        for spec in io.new:
            found[self._stored[spec.name].new] = self._state.addresses(spec.name, key[1])[-1]
        if io.logits:
            found["logits"] = self._at["logits", name]
        return found | {past: found[present] for present, past in self.aliased[name].items()}

    def check(self, key: Key) -> None:
        """Buffers are aligned, and apart from each other but for what the engine wants shared."""
        io, shared = self._graphs[key[0]], self.aliased[key[0]]
        sizes = {spec.name: spec.nbytes(self._batch) for spec in (*io.inputs, *([io.logits] if io.logits else []))}
        for spec in (*io.states, *io.new):
            stored = self._stored[spec.name]
            sizes |= dict.fromkeys((*stored.names, stored.new), stored.row_bytes * self._batch)
        spans = sorted((a, sizes[n], n) for n, a in self.addresses(key).items() if n not in shared)
        crooked = [name for start, _, name in spans if start % ALIGNMENT]
        crooked += [a for (start, size, a), (after, *_) in pairwise(spans) if start + size > after]
        if crooked:
            raise FamExportError(f"internal: buffers of {key[0]} overlap, or are not aligned: {', '.join(crooked)}")

    def checked_states(self, key: Key) -> list[tuple[int, Stored]]:
        """New states that may hold NaN, and their addresses."""
        if key not in self._checked:
            new = [self._stored[spec.name] for spec in self._graphs[key[0]].new if spec.dtype in EXPONENTS]
            self._checked[key] = [(self.addresses(key)[stored.new], stored) for stored in new]
        return self._checked[key]

    def fill_table(self, key: Key, table: np.ndarray) -> None:
        """What ``flag_nonfinite`` looks at, uint64 [states + 1, TABLE_ROW]: checked states first, logits last."""
        for row, (address, stored) in zip(table, self.checked_states(key), strict=False):
            row[:] = table_entry(address, stored.row_bytes, stored.spec.dtype)
        if io := self._graphs[key[0]].logits:
            table[-1] = table_entry(self.addresses(key)["logits"], io.nbytes(self._batch) // self._batch, io.dtype)
