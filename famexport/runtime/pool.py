"""Many streams over one batch: whatever is ready goes into one call, and each stream gets its own results in order.

Every stream is a row of one batched state. A round takes from each row that has something queued: whole blocks at a
boundary go into one ``block_step``, all else into one ``append_step`` for each chunk width; other rows take no part. A
call always has all rows of the pool, so what it computes does not depend on who shares the batch, but for rounding on
ort-cuda, where a row that begins may bring other graphs. An idle row costs as much as a busy one: give a pool the
capacity that it needs.

Streams may be driven from any number of threads: one of those that wait for a result runs a round for all, and first
waits a moment for the streams of the last round that are about to ask again. Or one thread does everything: it fills
the queues with ``put``, calls ``run``, and collects with ``take``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Condition, Lock
from time import monotonic
from types import TracebackType

import numpy as np

from famexport.errors import BackpressureError, UsageError
from famexport.interrupts import uninterrupted
from famexport.runtime.backend import STORAGE, Loop
from famexport.runtime.chunks import chunk_width
from famexport.runtime.pool_stream import PoolStream
from famexport.runtime.snapshot import Origin
from famexport.runtime.stream import check_policy

_LINGER_S = 5e-4  # what a thread needs to take a result and ask again
_LOOK_S = 0.1  # how often one that waits looks whether it was interrupted


class Pool:
    """Rows of one batch, handed out as streams. Made by ``session.pool``; use it as a context manager.

    Args:
        max_queued: positions that a stream may have waiting, and results that it may leave uncollected.
        on_nonfinite: as for ``Stream``; here it concerns the one row only.
    """

    def __init__(self, loop: Loop, origin: Origin, max_queued: int | None = None, on_nonfinite: str = "raise") -> None:
        size = loop.contract.block_size
        max_queued = 4 * size if max_queued is None else max_queued
        check_policy(on_nonfinite)
        if max_queued < size:
            raise UsageError(f"max_queued must be at least a block of {size} positions, got {max_queued}")
        self.contract, self.capacity = loop.contract, loop.batch
        self.max_queued, self.on_nonfinite = max_queued, on_nonfinite
        self.calls = 0  # of the engine
        self._loop: Loop | None = loop
        self._origin = origin
        self._rows: list[PoolStream | None] = [None] * loop.batch
        self._engine, self._queues = Lock(), Condition()  # who waits for the first holds nothing; a call holds it only
        self._served: list[PoolStream] = []  # in the last round
        self._round_s = 0.0  # that it took
        fed = self.contract.inputs[0]
        widths = (size, *self.contract.chunks)
        self._fed = {
            w: np.zeros((loop.batch, w, *fed.sized(loop.batch)[2:]), STORAGE[fed.dtype]) for w in dict.fromkeys(widths)
        }
        every = self.contract.logits == "all"
        self._logits = {
            w: np.empty((loop.batch, w if every else 1, self.contract.vocab_size), np.float32) for w in self._fed
        }

    def open(self) -> PoolStream:
        """A fresh stream.

        Raises:
            BackpressureError: all rows are taken.
        """
        with self._exclusive(), self._queues:
            loop = self._live()
            for row, taken in enumerate(self._rows):
                if taken is None:
                    loop.zero([row])
                    stream = PoolStream(self, row)
                    self._rows[row] = stream
                    return stream
        raise BackpressureError(f"all {self.capacity} streams of the pool are open; close one, or make a larger pool")

    def run(self) -> int:
        """One round: at most one block or chunk of every stream that has something queued and room for the result.

        Ctrl-C comes after it: every result is in its stream then.

        Returns:
            how many streams it served; 0 where nothing is ready.
        Raises:
            FamExportError: the engine failed in one of the calls of the round. The streams of that call are as they
                were and what they queued is still there; those of calls before it have their results.
        """
        with uninterrupted(), self._exclusive():
            return self._round()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The engine to oneself; those who wait for it, or for what it gave, are told in the end."""
        try:
            with self._engine:
                yield
        finally:
            with self._queues:
                self._queues.notify_all()

    def _serve(self, stream: PoolStream) -> None:
        """Return when there is something for ``stream``, or a round has been run: by this thread if nobody else is at
        the engine, or else by whoever is."""
        while not self._wait_or_run(stream):
            pass  # it was interrupted, by a handler that lets it go on

    def _wait_or_run(self, stream: PoolStream) -> bool:
        """``_serve``; False where an interrupt came first. Its handler has run then."""
        with uninterrupted() as interrupts:
            with self._queues:
                while True:
                    if stream._has_something():
                        return True
                    if interrupts:
                        return False
                    if self._engine.acquire(blocking=False):
                        break
                    self._queues.wait(_LOOK_S)
            try:
                self._live()
                self._gather()
                self._round()
                return True
            finally:
                self._engine.release()
                with self._queues:
                    self._queues.notify_all()

    def _gather(self) -> None:
        """Before a round, by whoever holds the engine: let the streams of the last one ask again, or else threads that
        generate would take turns and never share a call. As soon as all have, or after a tenth of a round."""
        until = monotonic() + _LINGER_S + self._round_s / 10
        with self._queues:
            while any(s._idle() for s in self._served) and (left := until - monotonic()) > 0:
                self._queues.wait(left)

    def close(self) -> None:
        """Close all streams and give back the memory. Closing twice does nothing."""
        with self._exclusive(), self._queues:
            for stream in self._rows:
                if stream is not None:
                    stream._drop()
            self._rows = [None] * self.capacity
            if self._loop is not None:
                self._loop.close()
                self._loop = None

    def __enter__(self) -> Pool:
        self._live()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _live(self) -> Loop:
        if self._loop is None:
            raise UsageError("the pool is closed; open another with session.pool()")
        return self._loop

    def _round(self) -> int:
        """``run``, by whoever holds the engine."""
        loop, size = self._live(), self.contract.block_size
        with self._queues:
            ready = [s for s in self._rows if s is not None and s._ready()]
            blocks = [s for s in ready if not s.held and s.queued >= size]
            chunks = [s for s in ready if s not in blocks] if self.contract.chunks else []
        started = monotonic()
        if blocks:
            self._block(loop, blocks)
        groups: dict[int, list[PoolStream]] = {}
        for s in chunks:
            groups.setdefault(chunk_width(self.contract, min(s.queued, s.room)), []).append(s)
        for width, streams in groups.items():
            self._chunk(loop, streams, width)
        self._served, self._round_s = blocks + chunks, monotonic() - started
        return len(self._served)

    def _block(self, loop: Loop, streams: Sequence[PoolStream]) -> None:
        size = self.contract.block_size
        lengths = self._fill(size, {s: size for s in streams})
        logits = self._logits[size]
        rows = [s.row for s in streams]
        loop.advance(self._fed[size], logits, rows)
        self.calls += 1
        bad = set(loop.bad_rows(logits))
        loop.commit([row for row in rows if row not in bad])
        with self._queues:
            for s in streams:
                s._done(loop, logits, int(lengths[s.row]), s.row in bad, ended=True)

    def _chunk(self, loop: Loop, streams: Sequence[PoolStream], width: int) -> None:
        lengths = self._fill(width, {s: min(s.queued, s.room, width) for s in streams})
        logits = self._logits[width]
        loop.append(self._fed[width], lengths, logits)
        self.calls += 1
        bad = set(loop.bad_rows(logits, lengths if self.contract.logits == "all" else None))
        loop.commit([row for row in range(self.capacity) if row not in bad] if bad else None)
        full = [s for s in streams if s.row not in bad and s.room == lengths[s.row]]
        if full:
            try:
                loop.end_block()
            except BaseException:  # nobody was told of the chunk: it is still queued
                for s in streams:
                    loop.truncate([s.row], s.held)
                raise
            self.calls += 1
            if spoilt := set(loop.bad_rows()):
                loop.commit([row for row in range(self.capacity) if row not in spoilt])
                for s in full:
                    if s.row in spoilt:  # the chunk that completed the block goes as well
                        loop.truncate([s.row], s.held)
                bad |= spoilt
            else:
                loop.commit()
        with self._queues:
            for s in streams:
                s._done(loop, logits, int(lengths[s.row]), s.row in bad, ended=s in full)

    def _fill(self, width: int, takes: dict[PoolStream, int]) -> np.ndarray:
        """Copy the head of each queue into the batch; the positions of each row, 0 where it takes no part."""
        fed, lengths = self._fed[width], np.zeros(self.capacity, np.int64)
        fed[...] = 0
        with self._queues:
            for s, n in takes.items():
                s._copy_head(fed[s.row, :n])
                lengths[s.row] = n
        return lengths

    def _release(self, stream: PoolStream) -> None:
        with self._exclusive(), self._queues:
            if self._loop is not None and self._rows[stream.row] is stream:
                self._loop.zero([stream.row])
                self._rows[stream.row] = None
            stream._drop()
