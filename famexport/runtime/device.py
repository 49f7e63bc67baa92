"""State in device memory: the loop of every backend whose steps run on a GPU. Only inputs and logits travel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from famexport.contract import CHUNK_LENGTH, StepContract
from famexport.errors import FamExportError, IncompatibleError
from famexport.runtime.backend import STORAGE, Loop
from famexport.runtime.cuda import EXPONENTS, TABLE_ROW, table_entry
from famexport.runtime.device_state import ALIGNMENT, APPEND, BLOCK, COMMIT, DeviceState, Rows, Turn, aligned
from famexport.runtime.enqueue import CudaLayer, Enqueuer
from famexport.runtime.host import nonfinite_rows
from famexport.runtime.layout import HOST, START, Layout, Stored, plain_layout

Key = tuple[str, Turn]
_ALL = slice(None)


class DeviceLoop(Loop):
    """As ``HostLoop``, with state that never leaves the device. A call writes only the buffers that are not current, so
    one that fails or is not committed leaves the state as it was.

    ``info`` says whether calls are captured CUDA graphs, and if not, why.
    """

    def __init__(
        self,
        contract: StepContract,
        batch: int,
        engine: Enqueuer,
        cuda: CudaLayer,
        *,
        layout: Layout | None = None,
        capture: bool = True,
    ) -> None:
        super().__init__(contract, batch)
        self._engine, self._cuda = engine, cuda
        reason = None if capture and engine.capturable else "not asked for" if not capture else "the engine cannot"
        self._captures = reason is None
        self.info: dict[str, Any] = {"captured": self._captures, "uncaptured_reason": reason}
        layout = layout or plain_layout(contract, engine.names)
        self._graphs, self._stored = dict(layout.graphs), layout.stored
        self._state = DeviceState(contract, batch, layout, cuda)
        self._appends = {io.chunk: n for n, io in self._graphs.items() if io.chunk and not n.endswith(START)}
        self._aliased = {name: dict(engine.aliased(name)) for name in self._graphs}
        for name, io in self._graphs.items():
            own = {self._stored[s.name].new: s.name for s in io.new if len(self._stored[s.name].names) == 1}
            if wrong := {o: i for o, i in self._aliased[name].items() if own.get(o) != i}:
                raise IncompatibleError(f"{name} shares {wrong}; only a state and its own successor can share memory")
        self._ready = self._closed = False
        self._blank = True  # all states are zeros
        self._done, self._appended = BLOCK, np.zeros(batch, np.int64)  # what the last call did
        self._starting = False  # and whether it was a graph for any row
        self._captured: dict[Key, int] = {}
        self._known: dict[Key, dict[str, int]] = {}  # addresses
        self._checked: dict[Key, list[tuple[int, Stored]]] = {}
        self._events: list[Any] = []
        sizes: dict[tuple[Any, ...], int] = {}
        for name, io in self._graphs.items():
            sizes |= {("in", name, spec.name): spec.nbytes(batch) for spec in io.inputs}
            if io.logits:
                sizes["logits", name] = io.logits.nbytes(batch)
            sizes |= {("table", key): (len(io.new) + 1) * TABLE_ROW * 8 for key in self._keys(name)}
        sizes["flags",] = 2 * 4 * batch  # of states, and of logits
        self._sizes, self._at, total = sizes, {}, self._state.span
        for key, size in sizes.items():
            self._at[key], total = total, total + aligned(size)
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
        kept = {name: pinned((b,), np.int64) for name in HOST}
        self._state.place(self._base, kept, pinned((1,), np.int64))
        self._fed = {
            name: {
                spec.name: kept[spec.name] if spec.name in HOST else pinned(spec.sized(b), STORAGE[spec.dtype])
                for spec in io.inputs
            }
            for name, io in self._graphs.items()
        }
        self._logits = {n: pinned(io.logits.sized(b), np.float32) for n, io in self._graphs.items() if io.logits}
        self._flags = pinned((2, b), np.int32)
        self._tables = {
            key: pinned((len(self._graphs[name].new) + 1, TABLE_ROW), np.uint64)
            for name in self._graphs
            for key in self._keys(name)
        }

    def advance(self, fed: np.ndarray, out: np.ndarray, rows: Sequence[int] | None = None) -> None:
        with self._cuda.lock:
            self._call(BLOCK, BLOCK, _ALL if rows is None else list(rows), {self.contract.inputs[0].name: fed}, out)

    def append(self, fed: np.ndarray, length: np.ndarray, out: np.ndarray) -> None:
        with self._cuda.lock:
            self._appended[...] = length
            inputs = {self.contract.inputs[0].name: fed, CHUNK_LENGTH: length}
            self._call(APPEND, self._appends[fed.shape[1]], length > 0, inputs, out)

    def end_block(self) -> None:
        with self._cuda.lock:
            self._call(COMMIT, COMMIT, self._state.concerned(COMMIT), {}, None)

    def _call(
        self, call: str, name: str, wanted: Rows, inputs: Mapping[str, np.ndarray], out: np.ndarray | None
    ) -> None:
        """``wanted``: rows whose results will be looked at."""
        self._cuda.bind()
        if not self._ready:
            self.warm_up()
        self._blank = False
        self._starting = name + START in self._graphs and not self._state.ready(call, wanted)
        if self._starting:
            name += START
        for spec, array in inputs.items():
            np.copyto(self._fed[name][spec], array)
        self._done, key = call, self._key(name, self._state.turn)
        try:
            if self._events:
                self._cuda.record(self._events[0])
            self._submit(key)
            if self._events:
                self._cuda.record(self._events[1])
        finally:
            self._cuda.synchronize()  # after an error too: what was begun must not write into what comes next
        if self._events:
            self.device_ms = self._cuda.elapsed_ms(*self._events)
        if out is not None:
            np.copyto(out, self._logits[name])

    def _submit(self, key: Key) -> None:
        if key in self._captured:
            self._cuda.launch(self._captured[key])
        else:
            self._enqueue(key)

    def time_device(self) -> None:
        with self._cuda.lock:
            self._cuda.bind()
            self._events = self._events or [self._cuda.event(), self._cuda.event()]

    def back_to_back(self, fed: np.ndarray, blocks: int) -> float | None:
        # Without capture the engine waits in each call; counts that the host keeps must not run ahead of their copies
        if not self._captures or self._state.layout.counted:
            return None
        with self._cuda.lock:
            self._call(BLOCK, BLOCK, _ALL, {self.contract.inputs[0].name: fed}, None)
            self._state.commit(BLOCK, None, self._appended)
            start = perf_counter()
            for _ in range(blocks):
                self._submit(self._key(BLOCK, self._state.turn))
                self._state.commit(BLOCK, None, self._appended)
            self._cuda.synchronize()
            return perf_counter() - start

    def warm_up(self) -> None:
        """Run every graph in every orientation and capture it. The first call does it; the state is as before after."""
        with self._cuda.lock:
            self._cuda.bind()
            self._drop_graphs()
            self._cuda.prepare()
            with self._kept_state():
                self._warm_up_all()
            self._ready = True

    @contextmanager
    def _kept_state(self) -> Iterator[None]:
        """State is in the end what it was: from a copy, which would be what a loop needs most memory for, or zeros."""
        cuda, span = self._cuda, self._state.span
        saved = 0 if self._blank else cuda.malloc(span)
        try:
            if saved:
                cuda.copy(saved, self._base, span)
            try:
                yield
            finally:
                if saved:
                    cuda.copy(self._base, saved, span)
                else:
                    cuda.memset(self._base, 0, span)
                cuda.synchronize()
        finally:
            if saved:
                cuda.free(saved)

    def _warm_up_all(self) -> None:
        for key in [key for name in self._graphs for key in self._keys(name)]:
            self._check_addresses(key)
            entries = [table_entry(a, stored.row_bytes, stored.spec.dtype) for a, stored in self._checked_states(key)]
            if io := self._graphs[key[0]].logits:
                row_bytes = io.nbytes(self.batch) // self.batch
                self._tables[key][-1] = table_entry(self._at["logits", key[0]], row_bytes, io.dtype)
            self._tables[key][: len(entries)] = np.array(entries, np.uint64).reshape(-1, TABLE_ROW)
            self._cuda.copy_in(self._at["table", key], self._tables[key])
            for _ in range(2):  # the second time, allocators of the engine have what they need
                self._enqueue(key)
            self._cuda.synchronize()
            if self._captures:
                self._capture(key)

    def _capture(self, key: Key) -> None:
        """Capture one call, and see that its replay gives what the call itself did: an engine that works in another
        stream would leave a graph that computes nothing."""
        cuda, name = self._cuda, key[0]
        before = self._flags.copy()
        try:
            self._captured[key] = cuda.capture(lambda: self._enqueue(key))
            for address, stored in self._checked_states(key):
                cuda.memset(address, 0xFF, stored.row_bytes * self.batch)  # NaN
            if name in self._logits:
                cuda.memset(self._at["logits", name], 0xFF, self._sizes["logits", name])
            cuda.launch(self._captured[key])
            cuda.synchronize()
            if not np.array_equal(before, self._flags):
                raise FamExportError(f"the captured {name} does not compute what it does uncaptured")
        except Exception as exc:  # engines have errors of their own
            self._drop_graphs()
            self._captures = False
            self.info.update(captured=False, uncaptured_reason=str(exc) or type(exc).__name__)

    def _enqueue(self, key: Key) -> None:
        """Inputs in, the engine, the check for NaN, logits and flags out: all in the stream, or in a capture of it."""
        cuda, name, io = self._cuda, key[0], self._graphs[key[0]]
        addresses = self._addresses(key)
        for spec in io.inputs:
            cuda.copy_in(addresses[spec.name], self._fed[name][spec.name])
        for past in self._aliased[name].values():  # the engine works on a copy: the old value stays in its place
            source = self._state.addresses(past, key[1])[0]
            cuda.copy(addresses[past], source, self._stored[past].row_bytes * self.batch)
        self._engine.enqueue(name, addresses, cuda.stream)
        flags, table = self._at["flags",], self._at["table", key]
        cuda.memset(flags, 0, self._sizes["flags",])
        if checked := self._checked_states(key):
            longest = max(stored.row_bytes for _, stored in checked)
            cuda.flag_nonfinite(table, len(checked), self.batch, longest, flags)
        if io.logits:  # here too: on the host a look at them takes longer than a step
            last = table + len(io.new) * TABLE_ROW * 8
            row_bytes = io.logits.nbytes(self.batch) // self.batch
            cuda.flag_nonfinite(last, 1, self.batch, row_bytes, flags + 4 * self.batch)
            cuda.copy_out(self._logits[name], addresses["logits"])
        cuda.copy_out(self._flags, flags)

    def _keys(self, name: str) -> list[Key]:
        return sorted({self._key(name, turn) for turn in self._state.turns})

    def _key(self, name: str, turn: Turn) -> Key:
        """A graph, and where the rings stand that it reads. ``block_step`` has no open block."""
        return name, turn if self.contract.chunks and not name.startswith("block_step") else (turn[0], 0)

    def _addresses(self, key: Key) -> dict[str, int]:
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
        return found | {past: found[present] for present, past in self._aliased[name].items()}

    def _check_addresses(self, key: Key) -> None:
        """Aligned, and apart from each other but for what the engine wants shared."""
        io, shared = self._graphs[key[0]], self._aliased[key[0]]
        sizes = {spec.name: spec.nbytes(self.batch) for spec in (*io.inputs, *([io.logits] if io.logits else []))}
        for spec in (*io.states, *io.new):
            stored = self._stored[spec.name]
            sizes |= dict.fromkeys((*stored.names, stored.new), stored.row_bytes * self.batch)
        spans = sorted((a, sizes[n], n) for n, a in self._addresses(key).items() if n not in shared)
        for i, (start, size, name) in enumerate(spans[:-1]):
            after, _, other = spans[i + 1]
            if start % ALIGNMENT or start + size > after:
                raise FamExportError(f"internal: {name} and {other} of {key[0]} overlap, or are not aligned")

    def _checked_states(self, key: Key) -> list[tuple[int, Stored]]:
        if key not in self._checked:
            new = [self._stored[spec.name] for spec in self._graphs[key[0]].new if spec.dtype in EXPONENTS]
            self._checked[key] = [(self._addresses(key)[stored.new], stored) for stored in new]
        return self._checked[key]

    def commit(self, rows: Sequence[int] | None = None) -> None:
        with self._cuda.lock:
            self._cuda.bind()
            self._state.commit(self._done, rows, self._appended, starting=self._starting)

    def bad_rows(self, logits: np.ndarray | None = None, lengths: np.ndarray | None = None) -> list[int]:
        bad = set(np.flatnonzero(self._flags[0] * self._state.concerned(self._done)).tolist())
        if logits is not None and self._flags[1].any():  # in a position that counts?
            bad |= nonfinite_rows(logits, lengths)
        return sorted(bad)

    def tensor(self, name: str, row: int | None = None) -> np.ndarray:
        with self._cuda.lock:
            self._cuda.bind()
            return self._state.read(name, row)

    def write(self, state: Mapping[str, np.ndarray], row: int | None = None) -> None:
        with self._cuda.lock:
            self._cuda.bind()
            self._blank = False
            for name, array in state.items():
                self._state.write(name, array, row)

    def truncate(self, rows: Iterable[int], length: int) -> None:
        with self._cuda.lock:
            self._cuda.bind()
            self._blank = False
            self._state.truncate(rows, length)

    def zero(self, rows: Sequence[int] | None) -> None:
        with self._cuda.lock:
            self._cuda.bind()
            self._state.zero(range(self.batch) if rows is None else rows)

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
            while self._events:
                self._cuda.drop_event(self._events.pop())
            for array in self._pinned:
                self._cuda.free_pinned(array)
            self._pinned = []
            if self._base:
                self._cuda.free(self._base)
            self._cuda.close()
