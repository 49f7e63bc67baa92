"""State in device memory: the loop of every backend whose steps run on a GPU. Only inputs and logits travel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from famexport.contract import CHUNK_LENGTH, StepContract
from famexport.errors import FamExportError, UsageError
from famexport.runtime.backend import STORAGE, Loop
from famexport.runtime.cuda import TABLE_ROW
from famexport.runtime.device_memory import DeviceMemory, Key
from famexport.runtime.device_state import APPEND, BLOCK, COMMIT, DeviceState, Rows
from famexport.runtime.enqueue import CudaLayer, Enqueuer
from famexport.runtime.host import nonfinite_rows
from famexport.runtime.layout import HOST, START, Layout, plain_layout

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
        self._graphs = dict(layout.graphs)
        self._state = DeviceState(contract, batch, layout, cuda)
        self._memory = DeviceMemory(self._state, {name: dict(engine.aliased(name)) for name in self._graphs})
        self._appends = {io.chunk: n for n, io in self._graphs.items() if io.chunk and not n.endswith(START)}
        self._ready = self._closed = False
        self._blank = True  # all states are zeros
        self._done, self._appended = BLOCK, np.zeros(batch, np.int64)  # what the last call did
        self._starting = False  # and whether it was a graph for any row
        self._captured: dict[Key, int] = {}
        self._events: list[Any] = []
        self._pinned: list[np.ndarray] = []
        cuda.retain()
        self._base = 0
        try:
            with cuda.lock:
                cuda.bind()
                self._base = cuda.malloc(self._memory.nbytes)
                self._memory.place(self._base)
                self._allocate_host()
                cuda.memset(self._base, 0, self._memory.nbytes)
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
            for key in self._memory.keys(name)
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
        self._bind()
        if not self._ready:
            self.warm_up()
        self._blank = False
        self._starting = name + START in self._graphs and not self._state.ready(call, wanted)
        if self._starting:
            name += START
        for spec, array in inputs.items():
            np.copyto(self._fed[name][spec], array)
        self._done, key = call, self._memory.key(name, self._state.turn)
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
            self._bind()
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
                self._submit(self._memory.key(BLOCK, self._state.turn))
                self._state.commit(BLOCK, None, self._appended)
            self._cuda.synchronize()
            return perf_counter() - start

    def warm_up(self) -> None:
        """Run every graph in every orientation and capture it. The first call does it; the state is as before after."""
        with self._cuda.lock:
            self._bind()
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
        for key in [key for name in self._graphs for key in self._memory.keys(name)]:
            self._memory.check(key)
            self._memory.fill_table(key, self._tables[key])
            self._cuda.copy_in(self._memory.table(key), self._tables[key])
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
            for address, stored in self._memory.checked_states(key):
                cuda.memset(address, 0xFF, stored.row_bytes * self.batch)  # NaN
            if name in self._logits:
                cuda.memset(self._memory.addresses(key)["logits"], 0xFF, self._memory.logits_bytes(name))
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
        cuda, memory, name, io = self._cuda, self._memory, key[0], self._graphs[key[0]]
        addresses = memory.addresses(key)
        for spec in io.inputs:
            cuda.copy_in(addresses[spec.name], self._fed[name][spec.name])
        for past in memory.aliased[name].values():  # the engine works on a copy: the old value stays in its place
            source = self._state.addresses(past, key[1])[0]
            cuda.copy(addresses[past], source, self._state.layout.stored[past].row_bytes * self.batch)
        self._engine.enqueue(name, addresses, cuda.stream)
        flags, table = memory.flags, memory.table(key)
        cuda.memset(flags, 0, memory.flags_bytes)
        if checked := memory.checked_states(key):
            longest = max(stored.row_bytes for _, stored in checked)
            cuda.flag_nonfinite(table, len(checked), self.batch, longest, flags)
        if io.logits:  # here too: on the host a look at them takes longer than a step
            last = table + len(io.new) * TABLE_ROW * 8
            row_bytes = memory.logits_bytes(name) // self.batch
            cuda.flag_nonfinite(last, 1, self.batch, row_bytes, flags + 4 * self.batch)
            cuda.copy_out(self._logits[name], addresses["logits"])
        cuda.copy_out(self._flags, flags)

    def commit(self, rows: Sequence[int] | None = None) -> None:
        with self._cuda.lock:
            self._bind()
            self._state.commit(self._done, rows, self._appended, starting=self._starting)

    def bad_rows(self, logits: np.ndarray | None = None, lengths: np.ndarray | None = None) -> list[int]:
        bad = set(np.flatnonzero(self._flags[0] * self._state.concerned(self._done)).tolist())
        if logits is not None and self._flags[1].any():  # in a position that counts?
            bad |= nonfinite_rows(logits, lengths)
        return sorted(bad)

    def tensor(self, name: str, row: int | None = None) -> np.ndarray:
        with self._cuda.lock:
            self._bind()
            return self._state.read(name, row)

    def write(self, state: Mapping[str, np.ndarray], row: int | None = None) -> None:
        with self._cuda.lock:
            self._bind()
            self._blank = False
            for name, array in state.items():
                self._state.write(name, array, row)

    def truncate(self, rows: Iterable[int], length: int) -> None:
        with self._cuda.lock:
            self._bind()
            self._blank = False
            self._state.truncate(rows, length)

    def zero(self, rows: Sequence[int] | None) -> None:
        with self._cuda.lock:
            self._bind()
            self._state.zero(range(self.batch) if rows is None else rows)

    def _drop_graphs(self) -> None:
        while self._captured:
            self._cuda.drop_graph(self._captured.popitem()[1])

    def _bind(self) -> None:
        if self._closed:  # by another thread: its memory may be somebody else's by now
            raise UsageError("the stream was closed meanwhile; open another with session.stream()")
        self._cuda.bind()

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
