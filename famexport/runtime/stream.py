"""The loop: blocks in, logits out, state fed back. Memory use does not depend on how long it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType

import numpy as np

from famexport.contract import StepContract
from famexport.errors import ContractError, UsageError, raise_problems
from famexport.runtime.backend import STORAGE, Arrays, Loop, check_array, to_public, to_storage


class Stream:
    """One batch of streams over a loaded step. Use it as a context manager; it holds the only mutable state there is.

    A *position* is one row of the inputs: a token, or an embedding where the step takes ``inputs_embeds``.
    A block is *open* while ``feed`` holds fewer positions than a block has: the state is then that of its start.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop: Loop | None = loop
        self.contract: StepContract = loop.contract
        self.batch = loop.batch
        self.blocks = 0  # committed since the stream was opened or reset
        self._fed_spec, self._logits_spec = self.contract.inputs[0], self.contract.outputs[0]
        self._open = np.zeros(self._fed_spec.sized(self.batch), STORAGE[self._fed_spec.dtype])
        self._held = 0  # positions in the open block
        self._given = 0  # positions of the open block whose logits were given already

    def step(self, inputs: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Run one whole block and advance the state.

        Args:
            inputs: ``tokens`` int64 [b, T], or ``inputs_embeds`` float32 [b, T, D].
            out: float32 [b, T, V] ([b, 1, V] where the step gives the last row only) to write to; nothing is
                allocated then.
        Returns:
            logits, in ``out`` or in a new array that is the caller's.
        Raises:
            ContractError: wrong type, dtype, shape, layout or token id; the state is unchanged.
        """
        loop = self._live()
        if self._held:
            raise ContractError(
                f"feed holds {self._held} of {self.contract.block_size} positions of an open block; "
                "complete it with feed, or call reset, before step"
            )
        inputs = self._array(inputs)
        problems = check_array(inputs, self._fed_spec, self.batch) + self._out_problems(out)
        raise_problems(ContractError, "step", problems)
        self._check_ids(inputs)
        out = self._new_logits() if out is None else out
        self._run(loop, inputs, out)
        return out

    def feed(self, pieces: Iterable[np.ndarray], out: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Stream pieces of any length; yields logits [b, n, V] for every position, once and in order.

        A last, incomplete block stays open: its logits are given, the state does not move (FAM is updated when a block
        is complete), and a later ``feed`` goes on in the middle of it.

        Args:
            pieces: integer token ids [n] (where b = 1) or [b, n], or embeddings [b, n, D].
            out: a logits buffer as in ``step``. Each array yielded is then a view of it, good until the next.
        """
        self._live()
        raise_problems(ContractError, "feed", self._out_problems(out))
        size = self.contract.block_size
        for piece in pieces:
            rows = self._piece(piece)
            at = 0
            while at < rows.shape[1]:
                loop = self._live()  # the stream may have been closed while the caller held an array
                n = min(size - self._held, rows.shape[1] - at)
                self._open[:, self._held : self._held + n] = rows[:, at : at + n]
                self._held, at = self._held + n, at + n
                if self._held == size:
                    logits = self._new_logits() if out is None else out
                    self._run(loop, self._open, logits)
                    given, self._held, self._given = self._given, 0, 0
                    yield logits[:, given:] if self.contract.logits == "all" else logits
        if self._held > self._given and self.contract.logits == "all":
            yield self._peek(self._live(), out)

    def _peek(self, loop: Loop, out: np.ndarray | None) -> np.ndarray:
        """Logits of the open block's positions not given yet: causal, so what pads the block cannot reach them."""
        self._open[:, self._held :] = 0
        logits = self._new_logits() if out is None else out
        loop.advance(self._open, logits)  # never committed
        given, self._given = self._given, self._held
        return logits[:, given : self._held]

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Make ``rows`` of the batch fresh streams, or all of them, dropping the open block.

        Raises:
            ContractError: a row that is not in the batch, or some rows while a block is open for all.
        """
        loop = self._live()
        if rows is not None:
            rows = list(rows)
            kinds = (int, np.integer)  # a list of bools would be taken for a mask
            if bad := [r for r in rows if not isinstance(r, kinds) or isinstance(r, bool) or not 0 <= r < self.batch]:
                raise ContractError(f"reset: rows {bad} are not in the batch; expected 0 to {self.batch - 1}")
            if self._held:
                raise ContractError(
                    f"reset: a block is open with {self._held} positions; reset all rows, or complete it"
                )
        else:
            self._held = self._given = self.blocks = 0
        loop.zero(rows)

    def state(self) -> Arrays:
        """Copies of the state at the last block boundary, by contract name; bfloat16 comes as float32, exactly."""
        stored = self._live().read()
        return {spec.name: to_public(stored[spec.name], spec.dtype) for spec in self.contract.states}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace the state with one that ``state`` gave, dropping the open block.

        Raises:
            ContractError: names every tensor that is missing, unknown or of the wrong dtype, shape or layout; the state
                is unchanged then.
        """
        loop = self._live()
        raise_problems(ContractError, "load_state", loop.state_problems(state))
        loop.write({s.name: to_storage(state[s.name], s) for s in self.contract.states})
        self._held = self._given = 0

    def close(self) -> None:
        """Give back the stream's memory. Closing twice does nothing."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def __enter__(self) -> Stream:
        self._live()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run(self, loop: Loop, inputs: np.ndarray, out: np.ndarray) -> None:
        loop.advance(inputs, out)
        loop.commit()
        self.blocks += 1

    def _live(self) -> Loop:
        if self._loop is None:
            raise UsageError("the stream is closed; open another with session.stream()")
        return self._loop

    def _new_logits(self) -> np.ndarray:
        return np.empty(self._logits_spec.sized(self.batch), np.float32)

    def _out_problems(self, out: np.ndarray | None) -> list[str]:
        if out is None:
            return []
        found = check_array(out, self._logits_spec, self.batch)
        return found or ([] if out.flags.writeable else ["logits: out is read-only"])

    def _array(self, value: object) -> np.ndarray:
        try:
            return np.asarray(value)
        except (TypeError, ValueError) as exc:
            raise ContractError(f"{self._fed_spec.name} is {type(value).__name__} that is no array: {exc}") from exc

    def _piece(self, piece: np.ndarray) -> np.ndarray:
        """A piece for ``feed`` as [b, n] or [b, n, D], checked."""
        spec = self._fed_spec
        rows = self._array(piece)
        if spec.dtype == "int64" and rows.ndim == 1 and self.batch == 1:
            rows = rows[None]
        kind_ok = np.issubdtype(rows.dtype, np.integer) if spec.dtype == "int64" else rows.dtype == STORAGE[spec.dtype]
        if rows.shape == (self.batch, 0):  # no positions: an empty list has no dtype of its own
            return rows.astype(np.int64)
        wanted = spec.sized(self.batch)
        shape_ok = rows.ndim == len(wanted) and rows.shape[0] == wanted[0] and rows.shape[2:] == wanted[2:]
        if not kind_ok or not shape_ok:
            expected = f"{spec.dtype} [{self.batch}, n{''.join(f', {d}' for d in wanted[2:])}]"
            raise ContractError(f"feed: a piece of {spec.name} is {rows.dtype} {list(rows.shape)}, expected {expected}")
        self._check_ids(rows)
        return rows

    def _check_ids(self, ids: np.ndarray) -> None:
        if self._fed_spec.dtype == "int64" and ids.size:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.contract.vocab_size:
                bad = low if low < 0 else high
                raise ContractError(
                    f"token id {bad} is not in the vocabulary; expected 0 to {self.contract.vocab_size - 1}"
                )
