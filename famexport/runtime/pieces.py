"""Input of any size, checked, and cut where blocks end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from famexport.contract import StepContract
from famexport.errors import ContractError, raise_problems
from famexport.runtime.backend import STORAGE, check_array

_NOTHING = np.zeros((1, 0), np.int64)


class Block(Protocol):
    @property
    def room(self) -> int:
        """Positions until the open block is full."""
        ...


class Pieces:
    """Checks what is fed to ``batch`` rows of a stream: tokens [b, n], or embeddings [b, n, D]."""

    def __init__(self, contract: StepContract, batch: int) -> None:
        self._spec, self._vocab, self.batch = contract.inputs[0], contract.vocab_size, batch
        self._block = (batch, *self._spec.sized(batch)[1:])  # a row of a pool has a batch of its own
        self._dtype = np.dtype(STORAGE[self._spec.dtype])

    def array(self, value: object) -> np.ndarray:
        try:
            return np.asarray(value)
        except (TypeError, ValueError) as exc:
            raise ContractError(f"{self._spec.name} is {type(value).__name__} that is no array: {exc}") from exc

    def whole(self, value: object) -> np.ndarray:
        """``value`` as a block: what ``feed`` would not have to cut.

        Raises:
            ContractError: wrong type, dtype, shape, layout or token id.
        """
        rows = self.array(value)
        if rows.dtype is not self._dtype or rows.shape != self._block or not rows.flags.c_contiguous:
            raise_problems(ContractError, "step", check_array(rows, self._spec, self.batch))
        self.check_ids(rows)
        return rows

    def check(self, piece: object) -> np.ndarray:
        """``piece`` as [b, n] or [b, n, D].

        Raises:
            ContractError: of another kind, dtype or shape, or a token id outside the vocabulary.
        """
        spec, rows = self._spec, self.array(piece)
        if spec.dtype == "int64" and rows.ndim == 1 and self.batch == 1:
            rows = rows[None]
        kind_ok = np.issubdtype(rows.dtype, np.integer) if spec.dtype == "int64" else rows.dtype == STORAGE[spec.dtype]
        if rows.shape == (self.batch, 0):  # no positions: an empty list has no dtype of its own
            return rows.astype(np.int64)
        wanted = self._block
        shape_ok = rows.ndim == len(wanted) and rows.shape[0] == wanted[0] and rows.shape[2:] == wanted[2:]
        if not kind_ok or not shape_ok:
            expected = f"{spec.dtype} [{self.batch}, n{''.join(f', {d}' for d in wanted[2:])}]"
            raise ContractError(f"feed: a piece of {spec.name} is {rows.dtype} {list(rows.shape)}, expected {expected}")
        self.check_ids(rows)
        return rows

    def check_ids(self, ids: np.ndarray) -> None:
        if self._spec.dtype == "int64" and ids.size:
            # Not min and max: right after an engine's call their machinery costs 8 us, that of argmin and argmax 1 us
            low, high = ids.item(ids.argmin()), ids.item(ids.argmax())
            if low < 0 or high >= self._vocab:
                bad = low if low < 0 else high
                raise ContractError(f"token id {bad} is not in the vocabulary; expected 0 to {self._vocab - 1}")

    def regroup(self, pieces: Iterable[np.ndarray], stream: Block) -> Iterator[np.ndarray]:
        """Checked pieces as arrays [b, n] that end where a block ends; only the last is shorter. Each is good until the
        next. Where a piece is wrong, those before it come first and then the error.

        Args:
            stream: whose ``room`` is asked for when an array is begun.
        """
        held, count, free = _NOTHING, 0, 0
        try:
            for piece in pieces:
                rows, at = self.check(piece), 0
                while at < rows.shape[1]:
                    free = free if count else stream.room
                    n = min(free - count, rows.shape[1] - at)
                    if n == free:  # as it lies in the piece
                        at += n
                        yield rows[:, at - n : at]
                        continue
                    if held is _NOTHING:
                        held = np.zeros(self._block, STORAGE[self._spec.dtype])
                    held[:, count : count + n] = rows[:, at : at + n]
                    count, at = count + n, at + n
                    if count == free:
                        count = 0
                        yield held[:, :free]
        except Exception:
            if count:
                yield held[:, :count]
            raise
        if count:
            yield held[:, :count]
