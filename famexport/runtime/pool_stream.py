"""One stream of a pool, as its user sees it: a queue in front, results behind, and a row of the pool's state."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from famexport.contract import OPEN_LENGTH
from famexport.errors import BackpressureError, NonFiniteError, SnapshotError, UsageError
from famexport.interrupts import uninterrupted
from famexport.runtime.backend import Arrays, Loop, to_public
from famexport.runtime.pieces import Pieces
from famexport.runtime.snapshot import Snapshot
from famexport.runtime.stream import TokenStream

if TYPE_CHECKING:
    from famexport.runtime.pool import Pool


class PoolStream(TokenStream):
    """One stream of a pool: it starts, pauses, resets and ends on its own."""

    def __init__(self, pool: Pool, row: int) -> None:
        self._pool, self.row = pool, row
        self.contract, self.batch = pool.contract, 1
        self.blocks = self.nonfinite = self.held = self.queued = 0
        self._pieces = Pieces(self.contract, 1)
        self._queue: deque[np.ndarray] = deque()
        self._results: deque[np.ndarray] = deque()
        self._uncollected = 0  # positions in the results
        self._error: Exception | None = None
        self._last: np.ndarray | None = None
        self._open = True

    @property
    def closed(self) -> bool:
        return not self._open

    @property
    def room(self) -> int:
        """Positions until the open block is full."""
        return self.contract.block_size - self.held

    @property
    def last_logits(self) -> np.ndarray | None:
        return self._last

    def put(self, piece: np.ndarray) -> None:
        """Queue token ids [n], or embeddings [1, n, D], to be run by the pool's next rounds.

        Raises:
            ContractError: a wrong piece.
            BackpressureError: it does not fit ``max_queued``; nothing of it was queued.
        """
        self._live()
        rows = np.array(self._pieces.check(piece))  # a copy
        with self._pool._queues:
            if self.queued + rows.shape[1] > self._pool.max_queued:
                raise BackpressureError(
                    f"{self.queued} of {self._pool.max_queued} positions are queued, {rows.shape[1]} more do not fit; "
                    "run the pool and take the results, or queue less at once"
                )
            if rows.shape[1]:
                self._queue.append(rows[0])
                self.queued += rows.shape[1]
                self._pool._queues.notify_all()

    def take(self) -> list[np.ndarray]:
        """The results that are ready, [1, n, V] each, in order (the last row of each where the bundle gives no more).

        Raises:
            NonFiniteError: what was queued gave NaN or infinity. The state is as it was before, the queue is empty;
                results before that come first.
        """
        with self._pool._queues:
            self._live()
            found = list(self._results)
            self._results.clear()
            self._uncollected = 0
            if self._error is not None and not found:
                error, self._error = self._error, None
                raise error
        return found

    def feed(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """As ``Stream.feed``, running rounds of the pool until this stream's results are there. Without ``append_step``
        the positions of an incomplete block stay queued until it is complete."""
        self._live()
        for rows in self._pieces.regroup(pieces, _Ahead(self)):
            if self.queued + rows.shape[1] > self._pool.max_queued:
                yield from self._wait()
            self.put(rows)
            yield from self._wait()

    def generate(self, prompt: object, max_new_tokens: int, **options: Any) -> Generator[int, None, int | None]:
        """See ``TokenStream.generate``."""
        if not self.contract.chunks:
            raise UsageError("in a pool, generation needs append_step; export with --graphs all")
        return super().generate(prompt, max_new_tokens, **options)

    def _wait(self) -> Iterator[np.ndarray]:
        while True:
            yield from self.take()
            if self._error is None and not self.queued:
                self._live()  # it may have been closed meanwhile
                return
            self._pool._serve(self)
            if self.queued and not self._has_something():
                return  # an incomplete block, and no graph for it

    def reset(self) -> None:
        """Make this a fresh stream; what is queued or uncollected is dropped."""
        with uninterrupted(), self._pool._exclusive(), self._pool._queues:
            self._live()
            self._begin_again(self._pool._live())

    def _begin_again(self, loop: Loop) -> None:
        self._clear()
        self.held = self.blocks = 0
        self._last = None
        loop.zero([self.row])

    def state(self) -> Arrays:
        """Copies of this row's state, [1, ...] by contract name; bfloat16 comes as float32, exactly."""
        with self._pool._exclusive():
            self._live()
            stored = self._pool._live().read(self.row)
        return {spec.name: to_public(stored[spec.name], spec.dtype) for spec in self.contract.all_states}

    def snapshot(self) -> Snapshot:
        """A deep copy of what was run so far; what is queued is no part of it."""
        with self._pool._exclusive():
            self._live()
            last = None if self._last is None else self._last.copy()
            return Snapshot(self._pool._origin, 1, self.blocks, self._pool._live().read(self.row), None, last)

    def restore(self, saved: Snapshot, *, any_engine: bool = False) -> None:
        """As ``Stream.restore``; what is queued or uncollected is dropped."""
        with uninterrupted(), self._pool._exclusive(), self._pool._queues:
            self._live()
            saved.check(self._pool._origin, 1, any_engine)
            held = int(saved.state[OPEN_LENGTH][0]) if OPEN_LENGTH in saved.state else 0
            if (saved.open_inputs is not None and saved.open_inputs.shape[1]) or (held and not self.contract.chunks):
                raise SnapshotError("the snapshot has an open block of another kind; take it at the end of a block")
            loop, names = self._pool._live(), {spec.name for spec in self.contract.all_states}
            try:
                self._begin_again(loop)
                loop.write({name: array for name, array in saved.state.items() if name in names}, self.row)
                self.held, self.blocks = held, saved.blocks
                self._last = None if saved.last_logits is None else saved.last_logits.copy()
            except BaseException:  # half of it is there
                self._begin_again(loop)
                raise

    def close(self) -> None:
        """End the stream, also in the middle of something: its row is free. Closing twice does nothing."""
        self._pool._release(self)

    def _live(self) -> None:
        if not self._open:
            raise UsageError("the stream is closed; open another with pool.open()")

    def _ready(self) -> bool:
        return self.queued > 0 and self._error is None and self._uncollected < self._pool.max_queued

    def _has_something(self) -> bool:
        """A result, an error, or the news that the stream is closed."""
        return bool(self._results) or self._error is not None or not self._open

    def _idle(self) -> bool:
        """Open, and not asking for anything."""
        return self._open and not self.queued

    def _copy_head(self, target: np.ndarray) -> None:
        at = 0
        for part in self._queue:
            n = min(len(part), len(target) - at)
            target[at : at + n] = part[:n]
            at += n
            if at == len(target):
                return

    def _drop_head(self, count: int) -> None:
        self.queued -= count
        while count:
            if len(self._queue[0]) > count:
                self._queue[0] = self._queue[0][count:]
                return
            count -= len(self._queue.popleft())

    def _done(self, loop: Loop, logits: np.ndarray, count: int, bad: bool, *, ended: bool) -> None:
        """What a call gave this row, by whoever holds the engine and the queues."""
        if not self._open or not count:
            return
        self._drop_head(count)
        every = self.contract.logits == "all"
        if bad:
            self.nonfinite += 1
            if self._pool.on_nonfinite == "raise":
                self._queue.clear()
                self.queued = 0
                self._error = NonFiniteError(
                    f"NaN or infinity in this stream, {self.held} positions after {self.blocks} blocks; its state is "
                    'as it was before: feed something else, or open the pool with on_nonfinite="skip"'
                )
                return
            if self._pool.on_nonfinite == "reset":
                loop.zero([self.row])
                self.held = self.blocks = 0
                self._last = None
        else:
            self.held = 0 if ended else self.held + count
            self.blocks += ended
            self._last = logits[self.row, count - 1 if every else 0][None].copy()
        self._results.append(logits[self.row, : count if every else 1][None].copy())
        self._uncollected += count

    def _clear(self) -> None:
        self._queue.clear()
        self._results.clear()
        self.queued = self._uncollected = 0
        self._error = None

    def _drop(self) -> None:
        self._open = False
        self._pool._queues.notify_all()
        self._clear()
        self._last = None


class _Ahead:
    """Where a stream's block ends, counted from what is queued already."""

    def __init__(self, stream: PoolStream) -> None:
        self._stream = stream

    @property
    def room(self) -> int:
        size = self._stream.contract.block_size
        return size - (self._stream.held + self._stream.queued) % size
