"""Ctrl-C, failures and closes at the worst moment: a stream is as it was, or as it would be, or fresh; never a mixture."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import random_input, same_state

import famexport as fx
from famexport.errors import UsageError
from famexport.interrupts import uninterrupted
from famexport.runtime.host import HostLoop
from famexport.runtime.ort import OrtLoop

Sessions = Callable[..., Any]


def state_bytes(stream: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in stream.state().items()}


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_comes_after_the_block() -> None:
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), uninterrupted() as waiting:
        interrupt()
        done.append(len(waiting))
        interrupt()
        done.append(len(waiting))
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before
    with uninterrupted() as waiting:
        pass
    assert not waiting


def test_a_handler_that_is_set_within_stays() -> None:
    before, later = signal.getsignal(signal.SIGINT), signal.Handlers.SIG_IGN
    try:
        with uninterrupted():
            signal.signal(signal.SIGINT, later)
        assert signal.getsignal(signal.SIGINT) == later
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_not_lost_to_an_error() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, uninterrupted():
        interrupt()
        raise ValueError("no luck")
    assert isinstance(caught.value.__context__, ValueError)


def test_who_ignores_interrupts_is_left_alone_and_threads_too() -> None:
    def in_a_thread() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    before, seen = signal.getsignal(signal.SIGINT), list[Any]()
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            interrupt()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [before]


@pytest.mark.parametrize("place", ["_run", "commit", "bad_rows", "_computed"])
@pytest.mark.parametrize("count", [8, 5, 13])
def test_an_interrupted_round_is_told_of(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, place: str, count: int
) -> None:
    """Whatever it was interrupted in: each position is in the state once, and its logits are there to be taken."""
    session = sessions("all_dynamic")
    fed = random_input(session.contract, 8 + count, seed=3)
    with session.pool(2) as pool, session.pool(2) as spared:
        stream, other = pool.open(), spared.open()
        wanted = [*other.feed([fed[:, :8]]), *other.feed([fed[:, 8:]])]
        got = list(stream.feed([fed[:, :8]]))
        stream.put(fed[0, 8:])
        real, calls = getattr(OrtLoop, place), list[int]()

        def hit(*args: Any, **options: Any) -> Any:
            found = real(*args, **options)
            calls.append(1)
            if len(calls) == 1:
                interrupt()
            return found

        with monkeypatch.context() as patch:
            patch.setattr(OrtLoop, place, hit)
            with pytest.raises(KeyboardInterrupt):
                pool.run()
        while pool.run():
            pass
        got += stream.take()
        assert np.array_equal(np.concatenate(got, axis=1), np.concatenate(wanted, axis=1))
        assert (stream.blocks, stream.held) == (other.blocks, other.held)
        assert state_bytes(stream) == state_bytes(other)


@pytest.mark.parametrize("raises", [True, False], ids=["one that raises", "one that does not"])
def test_an_interrupt_in_a_wait_for_another_thread(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, raises: bool
) -> None:
    """Whoever waits while another thread is at the engine is not deaf; he waits on if the handler has it so (asyncio's
    does), and the pool goes on in any case."""
    session = sessions("all_dynamic")
    fed = random_input(session.contract, 8)
    entered, go_on, real = threading.Event(), threading.Event(), OrtLoop._run

    def slow(self: OrtLoop, name: str, out: Any) -> None:
        entered.set()
        assert go_on.wait(30)
        real(self, name, out)

    with session.pool(2) as pool:
        stream, other = pool.open(), pool.open()
        monkeypatch.setattr(OrtLoop, "_run", slow)
        thread = threading.Thread(target=lambda: list(other.feed([fed])))
        thread.start()
        assert entered.wait(30)
        threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        if raises:
            with pytest.raises(KeyboardInterrupt):
                list(stream.feed([fed]))
            go_on.set()
            pool.run()
            assert stream.take()
        else:
            before = signal.signal(signal.SIGINT, lambda *_: go_on.set())
            try:
                assert np.concatenate(list(stream.feed([fed])), axis=1).shape[1] == 8
            finally:
                signal.signal(signal.SIGINT, before)
        thread.join(30)
        assert not thread.is_alive()
        assert stream.blocks == other.blocks == 1


def test_an_interrupt_before_a_blocks_end_is_committed(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is computed then, and the piece is taken back with it."""
    session = sessions("all")
    fed = random_input(session.contract, 16)
    with session.stream() as stream, session.stream() as spared:
        wanted = list(spared.feed([fed[:, :5], fed[:, 5:]]))
        list(stream.feed([fed[:, :5]]))
        with monkeypatch.context() as patch:
            patch.setattr("famexport.runtime.open_block.uninterrupted", interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(stream.feed([fed[:, 5:8]]))
        assert (stream.held, stream.blocks) == (5, 0)
        got = np.concatenate(list(stream.feed([fed[:, 5:]])), axis=1)
        assert np.allclose(got, np.concatenate(wanted, axis=1)[:, 5:], atol=1e-4)


@pytest.mark.parametrize("name", ["text", "last"])
def test_a_failure_after_the_commit_of_a_padded_block(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its positions are in the state, and are not held as well."""
    session = sessions(name)
    fed = random_input(session.contract, 16)
    with session.stream() as stream, session.stream() as spared:
        list(spared.feed([fed[:, :8]]))
        list(stream.feed([fed[:, :3]]))
        with monkeypatch.context() as patch:
            patch.setattr(stream, "_keep_last", lambda *_: interrupt())
            with pytest.raises(KeyboardInterrupt):
                list(stream.feed([fed[:, 3:8]]))
        assert (stream.held, stream.blocks) == (0, 1)
        assert same_state(stream, spared)


@pytest.mark.parametrize("late", [False, True], ids=["before it", "after it"])
def test_the_commit_of_a_blocks_end_fails(sessions: Sessions, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """An engine that fails takes back the piece; an interrupt comes after the block is told of."""
    session = sessions("all")
    fed = random_input(session.contract, 19)
    with session.stream() as stream, session.stream() as spared:
        list(stream.feed([fed[:, :5]]))
        list(spared.feed([fed[:, :5]]))
        kept, real = state_bytes(stream), HostLoop.commit

        def commit(self: HostLoop, rows: Any = None) -> None:
            if not self._moved:  # a chunk's
                return real(self, rows)
            if not late:
                raise fx.FamExportError("no luck")
            real(self, rows)
            interrupt()

        with monkeypatch.context() as patch:
            patch.setattr(HostLoop, "commit", commit)
            with pytest.raises(KeyboardInterrupt if late else fx.FamExportError):
                list(stream.feed([fed[:, 5:8]]))
        assert (stream.held, stream.blocks) == ((0, 1) if late else (5, 0))
        if not late:
            assert state_bytes(stream) == kept
            list(stream.feed([fed[:, 5:8]]))
        list(spared.feed([fed[:, 5:8]]))
        assert same_state(stream, spared)
        assert np.array_equal(*(np.concatenate(list(s.feed([fed[:, 8:]])), axis=1) for s in (stream, spared)))


@pytest.mark.parametrize(
    ("kind", "place"),
    [("stream", "zero"), ("stream", "write"), ("row", "zero"), ("row", "write"), ("load_state", "write")],
)
def test_a_restore_that_fails_leaves_a_fresh_stream(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    session = sessions("all_dynamic")
    fed = random_input(session.contract, 24, seed=2)
    pool = session.pool(2)
    with pool.open() if kind == "row" else session.stream() as stream:
        wanted = list(stream.feed([fed]))
        list(stream.feed([fed[:, :3]]))
        saved = stream.state() if kind == "load_state" else stream.snapshot()
        real, calls = getattr(HostLoop, place), list[int]()

        def fail(self: HostLoop, *args: Any) -> None:
            calls.append(1)
            real(self, *args)
            if len(calls) == 1:
                raise fx.FamExportError("no luck")

        with monkeypatch.context() as patch:
            patch.setattr(HostLoop, place, fail)
            with pytest.raises(fx.FamExportError, match="no luck"):
                stream.load_state(saved) if kind == "load_state" else stream.restore(saved)
        assert (stream.held, stream.blocks, stream.last_logits) == (0, 0, None)
        assert not any(array.any() for array in stream.state().values())
        assert all(map(np.array_equal, stream.feed([fed]), wanted))
    pool.close()


def test_a_close_in_another_thread_takes_nothing_from_a_step(bundles: Callable[[str], Path]) -> None:
    """Weights are unmapped when nobody reads them any more, and not before."""
    session = fx.load(bundles("all"), "ort-cpu", threads=1)
    stream, alive = session.stream(), list[bool]()
    weight = weakref.ref(next(iter(session.backend.weights.values()))[0])

    class Closing:
        """A session that is closed by the time it runs."""

        def __init__(self, session: Any) -> None:
            self.io_binding, self._run = session.io_binding, session.run_with_iobinding

        def run_with_iobinding(self, binding: Any) -> None:
            stream.close()
            session.close()
            gc.collect()
            alive.append(weight() is not None)
            self._run(binding)

    stream.loop._sessions["block_step"] = Closing(stream.loop._sessions["block_step"])
    stream.step(random_input(session.contract, 8))
    gc.collect()
    assert (alive, weight()) == ([True], None)


def test_a_close_before_a_step_is_bound(bundles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    session, real = fx.load(bundles("all"), "ort-cpu", threads=1), OrtLoop._bind
    stream = session.stream()

    def bind(self: OrtLoop, name: str) -> Any:
        stream.close()
        session.close()
        return real(self, name)

    monkeypatch.setattr(OrtLoop, "_bind", bind)
    with pytest.raises(UsageError, match="closed meanwhile; open another"):
        stream.step(random_input(session.contract, 8))
