"""A CUDA layer over host memory: the same calls as ``famexport.runtime.cuda.Cuda``, done at once, or recorded while
capturing and done at each launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from threading import RLock
from time import perf_counter
from typing import Any

import numpy as np


def view(address: int, dtype: Any, shape: Sequence[int]) -> np.ndarray:
    """The memory at an address as an array."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype).reshape(shape)


class FakeCuda:
    stream = 7

    def __init__(self) -> None:
        self.lock = RLock()
        self.calls: list[str] = []
        self.mallocs = self.owners = self.events = 0
        self.live: dict[int, np.ndarray] = {}
        self.host: dict[int, np.ndarray] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.closed = False
        self.owners = 1

    def submit(self, work: Callable[[], None]) -> None:
        """What goes into the stream."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def bind(self) -> None: ...

    def prepare(self) -> None: ...

    def malloc(self, nbytes: int) -> int:
        assert self.recording is None
        self.mallocs += 1
        raw = np.full(nbytes + 256, 0xAB, np.uint8)
        address = raw.ctypes.data + -raw.ctypes.data % 256
        self.live[address] = raw
        return address

    def free(self, address: int) -> None:
        del self.live[address]

    def pinned(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        self.mallocs += 1
        array = np.zeros(shape, dtype)
        self.host[array.ctypes.data] = array
        return array

    def free_pinned(self, array: np.ndarray) -> None:
        del self.host[array.ctypes.data]

    def _move(self, kind: str, target: int, source: int, nbytes: int) -> None:
        self.calls.append(kind)
        self.submit(lambda: ctypes.memmove(target, source, nbytes) and None)

    def copy_in(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._move("in", address, array.ctypes.data, array.nbytes)

    def copy_out(self, array: np.ndarray, address: int) -> None:
        self._move("out", array.ctypes.data, address, array.nbytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._move("copy", target, source, nbytes)

    def memset(self, address: int, value: int, nbytes: int) -> None:
        self.submit(lambda: ctypes.memset(address, value, nbytes) and None)

    def memset_2d(self, address: int, pitch: int, value: int, width: int, height: int) -> None:
        for i in range(height):
            self.memset(address + i * pitch, value, width)

    def synchronize(self) -> None:
        assert self.recording is None, "synchronised while capturing"

    def capture(self, call: Callable[[], None]) -> int:
        self.recording = []
        try:
            call()
        finally:
            recorded, self.recording = self.recording, None
        key = len(self.calls) + 1000 + len(self.graphs)
        self.graphs[key] = recorded
        return key

    def launch(self, graph: int) -> None:
        self.calls.append("launch")
        for work in self.graphs[graph]:
            work()

    def drop_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def flag_nonfinite(self, table: int, tensors: int, rows: int, row_bytes: int, flags: int) -> None:
        def work() -> None:
            out = view(flags, np.int32, (rows,))
            for address, size, masks in view(table, np.uint64, (tensors, 3)).tolist():
                low, high = masks & 0xFFFFFFFF, masks >> 32
                kind, mask = (np.uint32, low) if low == high else (np.uint16, low)
                bits = view(address, kind, (rows, size // np.dtype(kind).itemsize))
                out |= ((bits & mask) == mask).any(axis=1)

        self.submit(work)

    def event(self) -> list[float]:
        self.events += 1
        return [0.0]

    def record(self, event: list[float]) -> None:
        event[0] = perf_counter()

    def elapsed_ms(self, start: list[float], end: list[float]) -> float:
        return (end[0] - start[0]) * 1e3

    def drop_event(self, event: list[float]) -> None:
        self.events -= 1

    def retain(self) -> None:
        self.owners += 1

    def close(self) -> None:
        self.owners -= 1
        self.closed = self.owners == 0
