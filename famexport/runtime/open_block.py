"""The two ways of being in the middle of a block: as keys and values, or, without ``append_step``, as inputs."""

from __future__ import annotations

from math import prod

import numpy as np

from famexport.contract import OPEN_LENGTH
from famexport.errors import ContractError, NonFiniteError, SnapshotError
from famexport.interrupts import uninterrupted
from famexport.runtime.backend import STORAGE, Arrays, Loop
from famexport.runtime.chunks import chunk_width
from famexport.runtime.host import is_finite
from famexport.runtime.snapshot import Origin, Snapshot
from famexport.runtime.stream import Stream


class AppendStream(Stream):
    """A stream over a bundle with ``append_step`` and ``commit_block``: each position is computed once."""

    def __init__(self, loop: Loop, origin: Origin, on_nonfinite: str = "raise") -> None:
        super().__init__(loop, origin, on_nonfinite)
        spec = self.contract.inputs[0]
        dtype, width = STORAGE[spec.dtype], spec.sized(self.batch)[2:]
        rows = (lambda c: c) if self.contract.logits == "all" else (lambda c: 1)
        self._length = np.zeros(self.batch, np.int64)
        self._chunks = {c: np.zeros((self.batch, c, *width), dtype) for c in self.contract.chunks}
        self._logits = {c: np.empty((self.batch, rows(c), self.contract.vocab_size), np.float32) for c in self._chunks}

    def add(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """See ``Stream.add``. A whole block at a boundary is one ``block_step``; of anything else, all is taken or
        nothing."""
        loop, count, every = self._live(), rows.shape[1], self.contract.logits == "all"
        if count == self.contract.block_size and not self.held:
            return self._whole_block(loop, rows, self._new_logits() if out is None else out)
        shape = self.batch, count if every else 1, self.contract.vocab_size
        given = np.empty(shape, np.float32) if out is None else out.reshape(-1)[: prod(shape)].reshape(shape)
        start, blocks = self.held, self.blocks
        try:
            bad = self._append_all(loop, rows, given)
            if not bad and not self.room:
                with uninterrupted():
                    loop.commit()  # of the block's end
                    self.held, self.blocks = 0, self.blocks + 1
                    self._keep_last(given[:, -1])
        except BaseException:  # the engine failed, or someone pressed Ctrl-C
            if self.blocks == blocks:
                self._take_back(loop, start)
            raise
        if bad:
            self._take_back(loop, start)
            self._refuse(loop, bad)
            return given
        if self.held:
            self._keep_last(given[:, -1])
        return given

    def _take_back(self, loop: Loop, held: int) -> None:
        self.held = held
        loop.truncate(range(self.batch), held)

    def _append_all(self, loop: Loop, rows: np.ndarray, given: np.ndarray) -> list[int]:
        """Chunk by chunk, and the block's end if it is there, which is left to be committed. The rows that went bad;
        logits from there on are NaN."""
        at, count, every = 0, rows.shape[1], self.contract.logits == "all"
        while at < count:
            width = chunk_width(self.contract, count - at)
            n = min(width, count - at)
            chunk, logits = self._chunks[width], self._logits[width]
            chunk[:, :n], chunk[:, n:], self._length[:] = rows[:, at : at + n], 0, n
            loop.append(chunk, self._length, logits)
            bad = loop.bad_rows(logits[:, : n if every else 1])
            if not bad:
                loop.commit()
                self.held += n
                np.copyto(given[:, at : at + n] if every else given, logits[:, :n])
                if not self.room:
                    loop.end_block()
                    bad = loop.bad_rows()
            if bad:
                given[:, at if every else 0 :] = np.nan
                return bad
            at += n
        return []

    def _held_in(self, stored: Arrays) -> int:
        lengths = stored[OPEN_LENGTH]
        if (lengths != lengths[0]).any() or not 0 <= lengths[0] < self.contract.block_size:
            raise ContractError(
                f"{OPEN_LENGTH} is {lengths.tolist()}; the rows of a stream are in lockstep, each with 0 to "
                f"{self.contract.block_size - 1} open positions: use session.pool() for rows that are not"
            )
        return int(lengths[0])

    def _open_inputs(self) -> None:
        return None

    def _load_open(self, saved: Snapshot) -> int:
        held = 0 if saved.open_inputs is None else saved.open_inputs.shape[1]
        if held:
            raise SnapshotError(
                f"the snapshot has an open block of {held} positions as inputs, this bundle keeps keys and values; "
                "take it at the end of a block, or go on with the bundle it was taken with"
            )
        return self._held_in(saved.state) if OPEN_LENGTH in saved.state else 0


class PaddedStream(Stream):
    """A stream over ``block_step`` alone. Logits within a block come from a padded one that is never committed: it is
    causal, so they are exact, and each ``feed`` that ends within a block costs a whole one.

    Where the bundle gives last rows only, nothing of a block is computed before its end: one that is not finite there
    goes as a whole.
    """

    def __init__(self, loop: Loop, origin: Origin, on_nonfinite: str = "raise") -> None:
        super().__init__(loop, origin, on_nonfinite)
        spec = self.contract.inputs[0]
        self._inputs = np.zeros(spec.sized(self.batch), STORAGE[spec.dtype])

    def add(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """See ``Stream.add``."""
        loop, before, blocks = self._live(), self.held, self.blocks
        end, every = before + rows.shape[1], self.contract.logits == "all"
        logits = self._new_logits() if out is None else out
        if rows.shape[1] < self.contract.block_size:
            self._inputs[:, before:end] = rows
            rows = self._inputs
        if end == self.contract.block_size:
            self.held = before if every else 0
            try:
                self._whole_block(loop, rows, logits)
            except NonFiniteError:
                raise
            except BaseException:
                if self.blocks == blocks:
                    self.held = before
                raise
            return logits[:, before:] if every and before else logits
        if not every:
            self.held = end
            return logits[:, :0]
        self._inputs[:, end:] = 0
        loop.advance(self._inputs, logits)
        given = logits[:, before:end]
        if bad := [row for row in range(self.batch) if not is_finite(given[row])]:
            self._refuse(loop, bad)
        else:
            self.held = end
            self._keep_last(given[:, -1])
        return given

    def _held_in(self, stored: Arrays) -> int:
        return 0

    def _open_inputs(self) -> np.ndarray:
        inputs: np.ndarray = self._inputs[:, : self.held].copy()
        return inputs

    def _load_open(self, saved: Snapshot) -> int:
        held = int(saved.state[OPEN_LENGTH].max()) if OPEN_LENGTH in saved.state else 0
        if held:
            raise SnapshotError(
                f"the snapshot has an open block of {held} positions as keys and values, this bundle has block_step "
                "alone; export it with --graphs all, or take the snapshot at a block's end"
            )
        if saved.open_inputs is None:
            return 0
        held = int(saved.open_inputs.shape[1])
        self._inputs[:, :held] = saved.open_inputs
        return held
