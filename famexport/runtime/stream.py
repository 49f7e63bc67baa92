"""The loop: positions in, logits out, state fed back. Memory use does not depend on how long it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import numpy as np

from famexport.contract import StepContract
from famexport.errors import ContractError, NonFiniteError, UsageError, raise_problems
from famexport.interrupts import uninterrupted
from famexport.runtime.backend import Arrays, Loop, check_array, to_public, to_storage
from famexport.runtime.generate import Sampler, generate
from famexport.runtime.host import is_finite
from famexport.runtime.pieces import Pieces
from famexport.runtime.snapshot import Origin, Snapshot

_FLOAT32 = np.dtype(np.float32)  # one object, unless bytes are swapped
NONFINITE = ("raise", "skip", "reset")
_Self = TypeVar("_Self", bound="TokenStream")


def check_policy(on_nonfinite: str) -> None:
    """Raise UsageError unless it is one of the policies for results that are not finite."""
    if on_nonfinite not in NONFINITE:
        raise UsageError(f"on_nonfinite must be one of {', '.join(NONFINITE)}, got {on_nonfinite!r}")


class TokenStream(ABC):
    """What every stream can do, whether it has a batch of its own or is a row of a pool."""

    contract: StepContract
    batch: int

    @abstractmethod
    def feed(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]: ...

    @property
    @abstractmethod
    def last_logits(self) -> np.ndarray | None:
        """Logits of the last position that was fed, float32 [b, V], good until the next; None on a fresh stream."""

    @property
    @abstractmethod
    def closed(self) -> bool: ...

    @abstractmethod
    def close(self) -> None: ...

    def generate(
        self,
        prompt: object,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Collection[int] = (),
    ) -> Generator[int, None, int | None]:
        """Feed ``prompt``, then yield token ids as they are chosen, each fed back in turn.

        Once the iterator has ended or was closed, every token that it gave is in the state, and so is the token of
        ``stop`` that ended it, which it does not give. So the next prompt goes on from there.

        Args:
            prompt: token ids [n]; empty to go on from what was fed before.
            temperature, top_k, top_p, seed: as in ``Sampler``; a temperature of 0 takes the most likely token.
            stop: token ids that end the text.
        Returns:
            an iterator of token ids; as a generator it returns the token of ``stop`` that ended it, or None.
        Raises:
            UsageError: options out of range, or a bundle or stream that cannot generate.
            ContractError: no token to begin with, or ids outside the vocabulary.
        """
        return generate(self, prompt, max_new_tokens, Sampler(temperature, top_k, top_p, seed), stop)

    def __enter__(self: _Self) -> _Self:
        if self.closed:
            raise UsageError("the stream is closed; open another with session.stream()")
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Stream(TokenStream):
    """One batch of streams in lockstep over a loaded bundle. Use it as a context manager; it holds the only mutable
    state there is.

    A *position* is one row of the inputs: a token, or an embedding where the step takes ``inputs_embeds``.
    A block is *open* while it has fewer positions than ``block_size``. FAM and memory move when it is full.

    A call that computes NaN or infinity never enters the state (R8). ``on_nonfinite`` says what happens then: ``raise``
    a NonFiniteError; ``skip`` what was fed, as if it had not been; ``reset`` the rows concerned to fresh streams. Rows
    of a batch are taken one by one where no block is open; within one they must stay in lockstep, so a batch raises.
    """

    def __init__(self, loop: Loop, origin: Origin, on_nonfinite: str = "raise") -> None:
        check_policy(on_nonfinite)
        self._loop: Loop | None = loop
        self._origin, self.on_nonfinite = origin, on_nonfinite
        self.contract, self.batch = loop.contract, loop.batch
        self.blocks = 0  # committed since the stream was opened or reset
        self.nonfinite = 0  # calls whose result was not finite
        self.held = 0  # positions in the open block
        self._pieces = Pieces(self.contract, self.batch)
        self._logits_spec = self.contract.outputs[0]
        self._logits_shape = self._logits_spec.sized(self.batch)
        self._last = np.zeros((self.batch, self.contract.vocab_size), np.float32)
        self._has_last = False

    @property
    def closed(self) -> bool:
        return self._loop is None

    @property
    def loop(self) -> Loop:
        """The state on its backend, for those who measure it: what they run there, the stream does not know of."""
        return self._live()

    @property
    def room(self) -> int:
        """Positions until the open block is full."""
        return self.contract.block_size - self.held

    @property
    def last_logits(self) -> np.ndarray | None:
        return self._last if self._has_last else None

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
            NonFiniteError: the result is not finite; the state is unchanged.
        """
        loop = self._live()
        if self.held:
            raise ContractError(
                f"feed holds {self.held} of {self.contract.block_size} positions of an open block; "
                "complete it with feed, or call reset, before step"
            )
        if out is not None and not self._fits(out):
            problems = check_array(self._pieces.array(inputs), self.contract.inputs[0], self.batch)
            raise_problems(ContractError, "step", problems + self._out_problems(out))
        return self._whole_block(loop, self._pieces.whole(inputs), self._new_logits() if out is None else out)

    def feed(self, pieces: Iterable[np.ndarray], out: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Stream pieces of any length; yields logits [b, n, V] for every position, once and in order.

        Pieces are joined up to the end of a block, so how they are cut changes nothing. A last, incomplete block stays
        open: its logits are given, FAM and memory do not move, and a later ``feed`` goes on in the middle of it.

        Args:
            pieces: integer token ids [n] (where b = 1) or [b, n], or embeddings [b, n, D].
            out: a logits buffer as in ``step``. Each array yielded is then a view of it, good until the next.
        """
        self._live()
        raise_problems(ContractError, "feed", self._out_problems(out))
        for rows in self.regroup(pieces):
            logits = self.add(rows, out)
            if logits.shape[1]:
                yield logits

    def regroup(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Checked pieces, cut where this stream's blocks end, for ``add``."""
        return self._pieces.regroup(pieces, self)

    @abstractmethod
    def add(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Run 1 to ``room`` checked positions [b, n] now: what ``feed`` does with each array that ``regroup`` gives.

        Returns:
            logits [b, n, V]. Where the bundle gives last rows only: [b, 1, V], or [b, 0, V] when no graph ends there.
        """

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
            if len(set(rows)) < self.batch:
                if self.held:
                    raise ContractError(
                        f"reset: a block is open with {self.held} positions; reset all rows, or complete it"
                    )
                loop.zero(rows)
                self._last[rows] = 0
                return
        self._begin_again(loop)

    def _begin_again(self, loop: Loop) -> None:
        with uninterrupted():
            self.held = self.blocks = 0
            self._has_last = False
            loop.zero(None)

    def state(self) -> Arrays:
        """Copies of the state, by contract name; bfloat16 comes as float32, exactly.

        Without ``append_step`` this is the state at the last block boundary; with it, the open block is part of it.
        """
        stored = self._live().read()
        return {spec.name: to_public(stored[spec.name], spec.dtype) for spec in self.contract.all_states}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace the state with one that ``state`` gave.

        Raises:
            ContractError: names every tensor that is missing, unknown, of the wrong dtype, shape or layout, or not
                finite; the state is unchanged then.
            FamExportError: the engine failed; the stream is a fresh one.
        """
        loop = self._live()
        raise_problems(ContractError, "load_state", loop.state_problems(state))
        stored = {s.name: to_storage(state[s.name], s) for s in self.contract.all_states}
        bad = [name for name, array in stored.items() if not is_finite(array)]
        raise_problems(ContractError, "load_state", [f"{name} has NaN or infinity" for name in bad])
        held = self._held_in(stored)
        with uninterrupted(), self._fresh_after_failure(loop):
            loop.write(stored)
            self.held, self._has_last = held, False

    @contextmanager
    def _fresh_after_failure(self, loop: Loop) -> Iterator[None]:
        """What writes a state in parts: where it ends half-way, the stream is a fresh one and not a mixture."""
        try:
            yield
        except BaseException:
            self._begin_again(loop)
            raise

    def snapshot(self) -> Snapshot:
        """A deep copy of all that the stream is: save it, or ``restore`` it, here or in another process."""
        last = self._last.copy() if self._has_last else None
        return Snapshot(self._origin, self.batch, self.blocks, self._live().read(), self._open_inputs(), last)

    def restore(self, saved: Snapshot, *, any_engine: bool = False) -> None:
        """Go on from a snapshot: bit for bit as the stream that it was taken from, where the engine is the same (fused
        kernels of ort-cuda: where no block is open).

        Args:
            any_engine: accept one that another backend, or other graphs of the same model, computed.
        Raises:
            SnapshotError: another model, batch, or (unless ``any_engine``) engine; the state is unchanged.
            FamExportError: the engine failed; the stream is a fresh one.
        """
        loop = self._live()
        saved.check(self._origin, self.batch, any_engine)
        with uninterrupted():
            held = self._load_open(saved)
            with self._fresh_after_failure(loop):
                loop.zero(None)
                loop.write({name: array for name, array in saved.state.items() if name in self._state_names()})
                self.held, self.blocks, self._has_last = held, saved.blocks, saved.last_logits is not None
                if saved.last_logits is not None:
                    np.copyto(self._last, saved.last_logits)

    def close(self) -> None:
        """Give back the stream's memory. Closing twice does nothing."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    @abstractmethod
    def _held_in(self, stored: Arrays) -> int:
        """Positions in the open block of a state."""

    @abstractmethod
    def _open_inputs(self) -> np.ndarray | None:
        """A copy of the open block's inputs, where it is kept as inputs."""

    @abstractmethod
    def _load_open(self, saved: Snapshot) -> int:
        """Take over a snapshot's open block as far as it is not state; the positions it has."""

    def _state_names(self) -> set[str]:
        return {spec.name for spec in self.contract.all_states}

    def _whole_block(self, loop: Loop, inputs: np.ndarray, out: np.ndarray) -> np.ndarray:
        loop.advance(inputs, out)
        bad = loop.bad_rows(out)
        if not bad:
            loop.commit()
        if not bad or self._refuse(loop, bad, parting=not self.held):
            self.held, self.blocks = 0, self.blocks + 1
            self._keep_last(out[:, -1], bad)
        return out

    def _refuse(self, loop: Loop, bad: Sequence[int], *, parting: bool = False) -> bool:
        """Do as ``on_nonfinite`` says about a call that is not committed.

        Args:
            parting: whether the other rows may go on alone: at a block boundary, where none falls out of step.
        Returns:
            whether they did.
        """
        self.nonfinite += 1
        together = self.batch > 1 and not parting
        if self.on_nonfinite == "raise" or together:
            why = "; within an open block the rows of a batch cannot part: use session.pool()" if together else ""
            raise NonFiniteError(
                f"NaN or infinity in row {', '.join(map(str, bad))}, {self.held} positions after {self.blocks} blocks; "
                f'the state is as it was before: feed something else, or open the stream with on_nonfinite="skip"{why}'
            )
        good = sorted(set(range(self.batch)) - set(bad)) if parting else []
        if good:
            loop.commit(good)
        if self.on_nonfinite == "reset":
            loop.zero(bad)
            if not good:
                self.held, self.blocks, self._has_last = 0, 0, False
        return bool(good)

    def _keep_last(self, logits: np.ndarray, bad: Sequence[int] = ()) -> None:
        """Remember the logits [b, V] of the last position; rows in ``bad`` keep theirs, or get zeros by a reset."""
        before = self._last[list(bad)] if bad else None
        self._last[...] = logits
        if bad:
            self._last[list(bad)] = before if self.on_nonfinite == "skip" else 0
        self._has_last = True

    def _live(self) -> Loop:
        if self._loop is None:
            raise UsageError("the stream is closed; open another with session.stream()")
        return self._loop

    def _new_logits(self) -> np.ndarray:
        return np.empty(self._logits_shape, np.float32)

    def _fits(self, out: object) -> bool:
        """Whether logits can be written to ``out``: in the loop, where ``_out_problems`` takes too long to say why."""
        return (
            isinstance(out, np.ndarray)
            and out.dtype is _FLOAT32
            and out.shape == self._logits_shape
            and out.flags.carray
        )

    def _out_problems(self, out: np.ndarray | None) -> list[str]:
        if out is None:
            return []
        found = check_array(out, self._logits_spec, self.batch)
        return found or ([] if out.flags.writeable else ["logits: out is read-only"])
