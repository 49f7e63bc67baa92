"""State in device memory: the loop of every backend whose steps run on a GPU. Only inputs and logits travel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from famexport.contract import CHUNK_LENGTH, ITEM_BYTES, OPEN_LENGTH, StepContract, TensorSpec, present_name
from famexport.errors import FamExportError, IncompatibleError
from famexport.runtime.backend import STORAGE, Loop
from famexport.runtime.cuda import EXPONENTS, TABLE_ROW, table_entry
from famexport.runtime.enqueue import CudaLayer, Enqueuer
from famexport.runtime.host import is_finite

_ALIGNMENT = 256  # bytes: what cudaMalloc promises, and engines rely on


class DeviceLoop(Loop):
    """As ``HostLoop``, with state that never leaves the device. A call writes only the buffers that are not current, so
    one that fails or is not committed leaves the state as it was.

    ``info`` says whether calls are captured CUDA graphs, and if not, why.
    """

    def __init__(
        self, contract: StepContract, batch: int, engine: Enqueuer, cuda: CudaLayer, *, capture: bool = True
    ) -> None:
        super().__init__(contract, batch)
        self._engine, self._cuda = engine, cuda
        reason = None if capture and engine.capturable else "not asked for" if not capture else "the engine cannot"
        self.info: dict[str, Any] = {"captured": reason is None, "uncaptured_reason": reason}
        self._graphs = {name: contract.graph(name) for name in engine.names}
        self._appends = {io.chunk: name for name, io in self._graphs.items() if io.chunk}
        self._aliased = {name: dict(engine.aliased(name)) for name in self._graphs}
        for name, io in self._graphs.items():
            own = {present_name(spec.name): spec.name for spec in io.new}
            if wrong := {o: i for o, i in self._aliased[name].items() if own.get(o) != i}:
                raise IncompatibleError(f"{name} shares {wrong}; only a state and its own successor can share memory")
        self.current = self.open_current = 0
        self._moved = self._open_moved = self._ready = self._closed = False
        self._captured: dict[tuple[str, int, int], int] = {}
        self._open_names = {spec.name for spec in contract.open_states}
        self._specs = {spec.name: spec for spec in contract.all_states}
        sizes: dict[tuple[Any, ...], int] = {
            ("state", side, spec.name): spec.nbytes(batch) for side in (0, 1) for spec in contract.all_states
        }
        self._state_span = sum(map(_aligned, sizes.values()))
        for name, io in self._graphs.items():
            sizes |= {("in", name, spec.name): spec.nbytes(batch) for spec in io.inputs}
            if io.logits:
                sizes["logits", name] = io.logits.nbytes(batch)
            sizes |= {("table", key): len(io.new) * TABLE_ROW * 8 for key in self._keys(name)}
        sizes["flags",] = 4 * batch
        self._sizes, self._at, total = sizes, {}, 0
        for key, size in sizes.items():
            self._at[key], total = total, total + _aligned(size)
        self._pinned: list[np.ndarray] = []
        cuda.retain()
        self._base = 0
        try:
            with cuda.lock:
                cuda.bind()
                self._base = cuda.malloc(total)
                self._at = {key: self._base + offset for key, offset in self._at.items()}
                self._allocate_host()
                cuda.memset(self._base, 0, total)
                cuda.synchronize()
        except BaseException:
            self.close()
            raise

    def _allocate_host(self) -> None:
        def pinned(shape: Sequence[int], dtype: Any) -> np.ndarray:
            self._pinned.append(self._cuda.pinned(shape, dtype))
            return self._pinned[-1]

        b = self.batch
        self._fed = {
            name: {spec.name: pinned(spec.sized(b), STORAGE[spec.dtype]) for spec in io.inputs}
            for name, io in self._graphs.items()
        }
        self._logits = {n: pinned(io.logits.sized(b), np.float32) for n, io in self._graphs.items() if io.logits}
        self._flags, self._length = pinned((b,), np.int32), pinned((1,), np.int64)
        self._tables = {
            key: pinned((len(self._graphs[name].new), TABLE_ROW), np.uint64)
            for name in self._graphs
            for key in self._keys(name)
        }

    def advance(self, fed: np.ndarray, out: np.ndarray) -> None:
        with self._cuda.lock:
            self._feed("block_step", {self.contract.inputs[0].name: fed})
            self._run("block_step", out)
            self._moved, self._open_moved = True, False

    def append(self, fed: np.ndarray, length: np.ndarray, out: np.ndarray) -> None:
        with self._cuda.lock:
            name = self._appends[fed.shape[1]]
            self._feed(name, {self.contract.inputs[0].name: fed, CHUNK_LENGTH: length})
            self._run(name, out)
            self._moved, self._open_moved = False, True

    def end_block(self) -> None:
        with self._cuda.lock:
            self._feed("commit_block", {})
            self._run("commit_block", None)
            self._moved = self._open_moved = True

    def _feed(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        self._cuda.bind()
        if not self._ready:
            self.warm_up()
        for key, array in arrays.items():
            np.copyto(self._fed[name][key], array)

    def _run(self, name: str, out: np.ndarray | None) -> None:
        key = self._key(name, self.current, self.open_current)
        try:
            if key in self._captured:
                self._cuda.launch(self._captured[key])
            else:
                self._enqueue(key)
        finally:
            self._cuda.synchronize()  # after an error too: what was begun must not write into what comes next
        if out is not None:
            np.copyto(out, self._logits[name])

    def warm_up(self) -> None:
        """Run every graph in every orientation and capture it. The first call does it; the state is as before after."""
        with self._cuda.lock:
            self._cuda.bind()
            self._cuda.prepare()
            saved = self._cuda.malloc(self._state_span)
            try:
                self._cuda.copy(saved, self._base, self._state_span)
                try:
                    self._warm_up_all()
                finally:
                    self._cuda.copy(self._base, saved, self._state_span)
                    self._cuda.synchronize()
            finally:
                self._cuda.free(saved)
            self._ready = True

    def _warm_up_all(self) -> None:
        for key in [key for name in self._graphs for key in self._keys(name)]:
            self._check_addresses(key)
            entries = [table_entry(a, self._row_bytes(spec), spec.dtype) for a, spec in self._checked_states(key)]
            self._tables[key][: len(entries)] = np.array(entries, np.uint64).reshape(-1, TABLE_ROW)
            self._cuda.copy_in(self._at["table", key], self._tables[key])
            for _ in range(2):  # the second time, allocators of the engine have what they need
                self._enqueue(key)
            self._cuda.synchronize()
            if self.info["captured"]:
                self._capture(key)

    def _capture(self, key: tuple[str, int, int]) -> None:
        """Capture one call, and see that its replay gives what the call itself did: an engine that works in another
        stream would leave a graph that computes nothing."""
        cuda, name = self._cuda, key[0]
        before = self._flags.copy(), is_finite(self._logits[name]) if name in self._logits else True
        try:
            self._captured[key] = cuda.capture(lambda: self._enqueue(key))
            for address, spec in self._checked_states(key):
                cuda.memset(address, 0xFF, spec.nbytes(self.batch))  # NaN
            if name in self._logits:
                cuda.memset(self._at["logits", name], 0xFF, self._sizes["logits", name])
            cuda.launch(self._captured[key])
            cuda.synchronize()
            after = self._flags, is_finite(self._logits[name]) if name in self._logits else True
            if not np.array_equal(before[0], after[0]) or before[1] != after[1]:
                raise FamExportError(f"the captured {name} does not compute what it does uncaptured")
        except Exception as exc:  # engines have errors of their own
            self._drop_graphs()
            self.info.update(captured=False, uncaptured_reason=str(exc) or type(exc).__name__)

    def _enqueue(self, key: tuple[str, int, int]) -> None:
        """Inputs in, the engine, the check for NaN, logits and flags out: all in the stream, or in a capture of it."""
        cuda, name, io = self._cuda, key[0], self._graphs[key[0]]
        addresses = self._addresses(key)
        for spec in io.inputs:
            cuda.copy_in(addresses[spec.name], self._fed[name][spec.name])
        for past in self._aliased[name].values():  # the engine works on a copy: the old value stays in its place
            cuda.copy(addresses[past], self._state(past, key), self._specs[past].nbytes(self.batch))
        self._engine.enqueue(name, addresses, cuda.stream)
        flags = self._at["flags",]
        cuda.memset(flags, 0, 4 * self.batch)
        if checked := self._checked_states(key):
            longest = max(self._row_bytes(spec) for _, spec in checked)
            cuda.flag_nonfinite(self._at["table", key], len(checked), self.batch, longest, flags)
        cuda.copy_out(self._flags, flags)
        if io.logits:
            cuda.copy_out(self._logits[name], addresses["logits"])

    def _keys(self, name: str) -> list[tuple[str, int, int]]:
        """A graph, and the sides of the buffers that it reads. ``block_step`` has no open block."""
        opened = (0, 1) if self._open_names and name != "block_step" else (0,)
        return [(name, side, other) for side in (0, 1) for other in opened]

    def _key(self, name: str, side: int, opened: int) -> tuple[str, int, int]:
        return name, side, opened if self._open_names and name != "block_step" else 0

    def _state(self, name: str, key: tuple[str, int, int], new: bool = False) -> int:
        side = key[2] if name in self._open_names else key[1]
        return self._at["state", side ^ new, name]

    def _addresses(self, key: tuple[str, int, int]) -> dict[str, int]:
        name, io = key[0], self._graphs[key[0]]
        found = {spec.name: self._at["in", name, spec.name] for spec in io.inputs}
        found |= {spec.name: self._state(spec.name, key) for spec in io.states}
        found |= {present_name(spec.name): self._state(spec.name, key, True) for spec in io.new}
        if io.logits:
            found["logits"] = self._at["logits", name]
        return found | {past: found[present] for present, past in self._aliased[name].items()}

    def _check_addresses(self, key: tuple[str, int, int]) -> None:
        """Aligned, and apart from each other but for what the engine wants shared."""
        io, addresses, shared = self._graphs[key[0]], self._addresses(key), self._aliased[key[0]]
        spans = sorted((addresses[s.name], s.nbytes(self.batch), s.name) for s in io.taken + io.given)
        spans = [span for span in spans if span[2] not in shared]
        for i, (start, size, name) in enumerate(spans[:-1]):
            after, _, other = spans[i + 1]
            if start % _ALIGNMENT or start + size > after:
                raise FamExportError(f"internal: {name} and {other} of {key[0]} overlap, or are not aligned")

    def _checked_states(self, key: tuple[str, int, int]) -> list[tuple[int, TensorSpec]]:
        new = self._graphs[key[0]].new
        return [(self._state(spec.name, key, True), spec) for spec in new if spec.dtype in EXPONENTS]

    def commit(self, rows: Sequence[int] | None = None) -> None:
        with self._cuda.lock:
            self._cuda.bind()
            if rows is not None:
                key = "", self.current, self.open_current
                stay = list(_runs(set(range(self.batch)) - set(rows)))
                for name, spec in self._specs.items():
                    if self._open_moved if name in self._open_names else self._moved:
                        size = self._row_bytes(spec)
                        old, new = self._state(name, key), self._state(name, key, True)
                        for row, count in stay:
                            self._cuda.copy(new + row * size, old + row * size, count * size)
            self.current ^= self._moved
            self.open_current ^= self._open_moved

    def bad_rows(self, logits: np.ndarray | None = None, lengths: np.ndarray | None = None) -> list[int]:
        bad = set(np.flatnonzero(self._flags).tolist())
        if logits is not None and not is_finite(logits):
            parts = [logits[row] if lengths is None else logits[row, : lengths[row]] for row in range(self.batch)]
            bad |= {row for row, part in enumerate(parts) if not is_finite(part)}
        return sorted(bad)

    def tensor(self, name: str, row: int | None = None) -> np.ndarray:
        spec = self._specs[name]
        copied = np.empty(spec.sized(self.batch) if row is None else (1, *spec.sized(1)[1:]), STORAGE[spec.dtype])
        with self._cuda.lock:
            self._cuda.bind()
            self._cuda.copy_out(copied, self._home(name) + (row or 0) * copied.nbytes)
            self._cuda.synchronize()
        return copied

    def _row_bytes(self, spec: TensorSpec) -> int:
        return spec.nbytes(self.batch) // self.batch  # not nbytes(1): a static batch is not replaced by it

    def _home(self, name: str) -> int:
        return self._state(name, ("", self.current, self.open_current))

    def write(self, state: Mapping[str, np.ndarray], row: int | None = None) -> None:
        with self._cuda.lock:
            self._cuda.bind()
            for name, array in state.items():
                spec = self._specs[name]
                shape = spec.sized(self.batch) if row is None else (1, *spec.sized(1)[1:])
                whole = np.ascontiguousarray(np.broadcast_to(array, shape), STORAGE[spec.dtype])
                self._cuda.copy_in(self._home(name) + (row or 0) * whole.nbytes, whole)
                self._cuda.synchronize()  # before the array may go

    def truncate(self, rows: Iterable[int], length: int) -> None:
        runs = list(_runs(set(rows)))
        with self._cuda.lock:
            self._cuda.bind()
            self._length[0] = length
            for spec in self.contract.open_states:
                size, home = self._row_bytes(spec), self._home(spec.name)
                for row, count in runs:
                    if spec.name == OPEN_LENGTH:
                        for one in range(row, row + count):
                            self._cuda.copy_in(home + one * size, self._length)
                    else:
                        _, heads, positions, *rest = spec.sized(self.batch)
                        item = prod(rest) * ITEM_BYTES[spec.dtype]
                        if left := (positions - length) * item:
                            start = home + row * size + length * item
                            self._cuda.memset_2d(start, positions * item, 0, left, count * heads)
            self._cuda.synchronize()

    def zero(self, rows: Sequence[int] | None) -> None:
        runs = list(_runs(set(range(self.batch) if rows is None else rows)))
        with self._cuda.lock:
            self._cuda.bind()
            for name, spec in self._specs.items():
                size = self._row_bytes(spec)
                for row, count in runs:
                    self._cuda.memset(self._home(name) + row * size, 0, count * size)
            self._cuda.synchronize()

    def _drop_graphs(self) -> None:
        while self._captured:
            self._cuda.drop_graph(self._captured.popitem()[1])

    def close(self) -> None:
        with self._cuda.lock:
            if self._closed:
                return
            self._closed = True
            self._cuda.bind()
            self._drop_graphs()
            self._engine.close()
            for array in self._pinned:
                self._cuda.free_pinned(array)
            self._pinned = []
            if self._base:
                self._cuda.free(self._base)
            self._cuda.close()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _runs(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of neighbouring rows."""
    start = before = None
    for row in sorted(rows):
        if before is not None and row == before + 1:
            before = row
            continue
        if start is not None and before is not None:
            yield start, before - start + 1
        start = before = row
    if start is not None and before is not None:
        yield start, before - start + 1
