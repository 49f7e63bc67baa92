"""Streams of a pool are as if alone: whoever shares the batch, comes, goes, floods it or is poisoned."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from streaming import random_input

import famexport as fx
from famexport.errors import BackpressureError, ContractError, NonFiniteError, SnapshotError, UsageError
from famexport.runtime.ort import OrtLoop

Sessions = Callable[..., Any]
LENGTHS = [3, 8, 9, 21, 40, 5, 17, 64]  # of texts: less than a block, blocks exactly, and between


def texts(contract: Any, seed: int = 0) -> list[np.ndarray]:
    return [random_input(contract, n, seed=seed + i) for i, n in enumerate(LENGTHS)]


def pieces_of(text: np.ndarray, seed: int) -> list[np.ndarray]:
    cuts = sorted(np.random.default_rng(seed).integers(0, text.shape[1] + 1, 3))
    return np.split(text, cuts, axis=1)


def run(stream: Any, pieces: list[np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One ``feed`` per piece, so that blocks stay open between them."""
    parts = [logits for piece in pieces for logits in stream.feed([piece])]
    return np.concatenate(parts, axis=1), stream.state()


def alone(session: Any, capacity: int, pieces: list[np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    with session.pool(capacity) as pool, pool.open() as stream:
        return run(stream, pieces)


def same(a: tuple[np.ndarray, dict[str, np.ndarray]], b: tuple[np.ndarray, dict[str, np.ndarray]]) -> bool:
    return np.array_equal(a[0], b[0]) and all(np.array_equal(a[1][name], b[1][name]) for name in b[1])


@pytest.mark.parametrize(("name", "capacity"), [("all_dynamic", 4), ("all_rows", 3), ("all_embeds", 5)])
def test_threads_are_as_if_alone(sessions: Sessions, name: str, capacity: int) -> None:
    """More texts than rows, each a thread's: rows are reused, and at any time differ in count and open length."""
    session = sessions(name)
    fed = [pieces_of(text, i) for i, text in enumerate(texts(session.contract))]
    wanted = [alone(session, capacity, pieces) for pieces in fed]
    with session.pool(capacity) as pool:

        def user(pieces: list[np.ndarray]) -> Any:
            with pool.open() as stream:
                return run(stream, pieces)

        with ThreadPoolExecutor(capacity) as threads:
            for _ in range(3):
                assert all(map(same, threads.map(user, fed), wanted))


def test_one_thread_for_all(sessions: Sessions) -> None:
    """``put``, ``run``, ``take``: one call serves whoever is ready, results come in order and every position once."""
    session = sessions("all_dynamic")
    fed = [text[:, :24] for text in texts(session.contract) if text.shape[1] >= 9]
    wanted = [alone(session, 5, [text]) for text in fed]
    with session.pool(5) as pool:
        streams = [pool.open() for _ in fed]
        got: list[list[np.ndarray]] = [[] for _ in fed]
        for stream, text in zip(streams, fed, strict=True):
            stream.put(text)
        assert pool.run() == 5
        assert pool.calls == 1  # five first blocks in one block_step
        while pool.run():
            for results, stream in zip(got, streams, strict=True):
                results += stream.take()
        for results, stream, pair in zip(got, streams, wanted, strict=True):
            results += stream.take()
            assert stream.take() == []
            assert same((np.concatenate(results, axis=1), stream.state()), pair)
        assert pool.run() == 0


def test_a_pool_agrees_with_a_stream(sessions: Sessions) -> None:
    """Another batch rounds otherwise: measured 9e-8 on logits of order 1."""
    session = sessions("all_dynamic")
    for text in texts(session.contract, 100):
        with session.stream() as stream:
            logits, state = run(stream, [text])
        pooled = alone(session, 3, [text])
        assert np.allclose(pooled[0], logits, rtol=1e-5, atol=2e-5)
        assert all(np.allclose(pooled[1][name], array, rtol=1e-5, atol=2e-5) for name, array in state.items())


@pytest.mark.parametrize("policy", ["raise", "skip", "reset"])
def test_poison_and_death_leave_the_others_untouched(sessions: Sessions, policy: str) -> None:
    """8 interleaved streams; one is fed NaN in a block, in an open block and in a block's last piece, one is closed."""
    session = sessions("all_embeds")
    fed = [pieces_of(random_input(session.contract, 40, seed=i), i) for i in range(8)]
    wanted = [alone(session, 8, pieces) for pieces in fed]
    poison = [np.full((1, n, 32), np.nan, np.float32) for n in (8, 3, 8)]
    with session.pool(8, on_nonfinite=policy) as pool:
        streams = [pool.open() for _ in fed]
        parts: list[list[np.ndarray]] = [[] for _ in fed]
        for turn in range(4):
            for i, stream in enumerate(streams):
                if i == 5 and turn == 2:
                    stream.put(fed[5][turn])
                    stream.close()
                elif i == 2 and turn < 3:
                    stream.put(poison[turn])
                elif i not in (2, 5) or (i == 5 and turn < 2):
                    stream.put(fed[i][turn])
            while pool.run():
                pass
            for i, stream in enumerate(streams):
                if i not in (2, 5):
                    parts[i] += stream.take()
            if turn < 3 and policy == "raise":
                with pytest.raises(NonFiniteError, match=r"NaN or infinity in this stream"):
                    streams[2].take()
        assert streams[2].nonfinite == (3 if policy == "raise" else 5)  # of three positions each is a call
        assert not any(array.any() for array in streams[2].state().values())  # it never got anything finite
        for i in (0, 1, 3, 4, 6, 7):
            assert same((np.concatenate(parts[i], axis=1), streams[i].state()), wanted[i]), i


def test_after_the_poison_a_stream_goes_on_as_if_it_had_not_been(sessions: Sessions) -> None:
    session = sessions("all_embeds")
    text = random_input(session.contract, 30, seed=3)
    good = [text[:, :13], text[:, 13:14], text[:, 14:30]]
    wanted = alone(session, 2, good)
    bad = good[0][:, :3].copy()
    bad[0, 0, 5] = np.inf
    with session.pool(2) as pool, pool.open() as stream:
        parts = list(stream.feed([good[0]]))
        for wrong in (bad[:, :1], bad):  # the second would complete the block
            with pytest.raises(NonFiniteError, match="5 positions after 1 blocks"):
                list(stream.feed([wrong]))
        parts += [logits for piece in good[1:] for logits in stream.feed([piece])]
        assert same((np.concatenate(parts, axis=1), stream.state()), wanted)


def test_overflow_in_the_end_of_a_block(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the block's tokens gave was finite, what FAM becomes is not: the call that completed the block goes too."""
    session = sessions("all_dynamic")
    text = random_input(session.contract, 30, seed=4)
    real = OrtLoop.end_block

    def overflow(self: OrtLoop) -> None:
        real(self)
        self.buffers[1 - self.current]["past_fam_00"][0] = np.inf  # of the first row

    with session.pool(2) as pool, pool.open() as stream, pool.open() as other:
        fed = {
            stream: [text[:, :5], text[:, 5:7], text[:, 8:24]],
            other: [text[:, 6:11], text[:, 11:14], text[:, 14:30]],
        }
        parts = {s: list(s.feed(pieces[:1])) for s, pieces in fed.items()}
        with monkeypatch.context() as patch:
            patch.setattr(OrtLoop, "end_block", overflow)
            stream.put(text[:, 5:8])
            other.put(fed[other][1])  # both complete their blocks in the same call
            while pool.run():
                pass
        for s in fed:
            parts[s] += s.take()
        with pytest.raises(NonFiniteError, match="7 positions after 0 blocks"):
            stream.take()
        for s, pieces in fed.items():
            parts[s] += s.feed(pieces[2:])
            assert same((np.concatenate(parts[s], axis=1), s.state()), alone(session, 2, pieces))


def test_backpressure(sessions: Sessions) -> None:
    session = sessions("all_dynamic")
    text = random_input(session.contract, 32, seed=5)
    with session.pool(2, max_queued=16) as pool, pool.open() as stream, pool.open() as other:
        stream.put(text[:, :12])
        with pytest.raises(BackpressureError, match="12 of 16 positions are queued, 5 more do not fit"):
            stream.put(text[:, 12:17])
        stream.put(text[:, 12:16])
        assert stream.queued == 16
        while pool.run():
            pass
        stream.put(text[:, 16:])
        assert pool.run() == 0  # its results are not collected
        other.put(text[:, :3])
        assert pool.run() == 1  # which is not the other's affair
        got = stream.take()
        while pool.run():
            got += stream.take()
        got += stream.take()
        assert np.array_equal(np.concatenate(got, axis=1), alone(session, 2, [text])[0])
        with pytest.raises(BackpressureError, match="all 2 streams of the pool are open"):
            pool.open()
        other.close()
        with pool.open() as third:
            assert not any(array.any() for array in third.state().values())


def test_wrong_calls(sessions: Sessions) -> None:
    session = sessions("all_dynamic")
    with pytest.raises(UsageError, match="max_queued must be at least a block of 8 positions, got 7"):
        session.pool(2, max_queued=7)
    with pytest.raises(UsageError, match="on_nonfinite must be one of raise, skip, reset, got 'ignore'"):
        session.pool(2, on_nonfinite="ignore")
    with pytest.raises(ContractError, match="got batch 2, this bundle was exported for 3"):
        sessions("all_rows").pool(2)
    pool = session.pool(2)
    stream = pool.open()
    with pytest.raises(ContractError, match="token id 96"):
        stream.put([1, 96])
    with pytest.raises(ContractError, match="tokens is float64"):
        stream.put([0.5])
    assert stream.queued == 0
    stream.close()
    stream.close()
    for call in (
        lambda: stream.put([1]),
        lambda: list(stream.feed([[1]])),
        stream.state,
        stream.snapshot,
        stream.reset,
    ):
        with pytest.raises(UsageError, match="the stream is closed"):
            call()
    left = pool.open()
    pool.close()
    pool.close()
    for call in (pool.open, pool.run, lambda: list(left.feed([[1]])), lambda: pool.__enter__()):
        with pytest.raises(UsageError, match="closed"):
            call()


@pytest.mark.parametrize("fails", ["block_step", "append_step", "commit_block"])
def test_an_engine_that_fails_changes_nothing(sessions: Sessions, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    session = sessions("all_dynamic")
    text = random_input(session.contract, 21, seed=6)
    wanted = alone(session, 2, [text[:, :7], text[:, 7:]])
    run_graph = OrtLoop._run

    def failing(self: OrtLoop, name: str, out: np.ndarray | None) -> None:
        if name == fails:
            raise fx.FamExportError("no luck")
        run_graph(self, name, out)

    with session.pool(2) as pool, pool.open() as stream:
        parts = list(stream.feed([text[:, :7]]))
        stream.put(text[:, 7:])
        with monkeypatch.context() as patch:
            patch.setattr(OrtLoop, "_run", failing)
            with pytest.raises(fx.FamExportError, match="no luck"):
                while pool.run():
                    parts += stream.take()
        while pool.run():
            pass
        parts += stream.take()
        assert same((np.concatenate(parts, axis=1), stream.state()), wanted)


def test_reset_and_snapshots_of_one_row(sessions: Sessions) -> None:
    session = sessions("all_rows")
    text, after = random_input(session.contract, 13, seed=7)[:1], random_input(session.contract, 30, seed=8)[:1]
    with session.pool() as pool, pool.open() as stream, pool.open() as other, pool.open() as third:
        list(stream.feed([text]))
        list(third.feed([after]))
        before = third.state()
        saved = stream.snapshot()
        list(other.feed([after[:, :5]]))
        other.put(after)
        other.restore(saved)
        assert other.queued == 0
        a, b = run(stream, [after]), run(other, [after])
        assert same(a, b)  # bit for bit, in another row
        other.reset()
        assert same(run(other, [text, after]), alone(session, 3, [text, after]))
        assert all(np.array_equal(third.state()[name], array) for name, array in before.items())
        with session.stream() as lockstep, pytest.raises(SnapshotError, match="a batch of 1, this stream has 3"):
            lockstep.restore(saved)


def test_last_logits_go_with_the_state(sessions: Sessions) -> None:
    """Or else ``generate`` without a prompt would go on from what is no longer there."""
    session = sessions("all_rows")
    with session.pool() as pool, pool.open() as stream:
        blank = stream.snapshot()
        (*_, logits) = stream.feed([random_input(session.contract, 13, seed=7)])
        saved = stream.snapshot()
        for again in (stream.reset, lambda: stream.restore(blank)):
            stream.restore(saved)
            assert np.array_equal(stream.last_logits, logits[:, -1])
            again()
            assert stream.last_logits is None
            with pytest.raises(ContractError, match="the prompt is empty and nothing was fed before"):
                stream.generate([], 3)


def test_generate_in_a_pool(sessions: Sessions) -> None:
    session = sessions("all_dynamic")
    prompts = [random_input(session.contract, n, seed=n)[0] for n in (1, 7, 8, 20)]
    wanted = []
    for prompt in prompts:
        with session.pool(4) as pool, pool.open() as stream:
            wanted.append(list(stream.generate(prompt, 30)))
    with session.pool(4) as pool, ThreadPoolExecutor(4) as threads:
        streams = [pool.open() for _ in prompts]
        got = list(threads.map(lambda s, p: list(s.generate(p, 30)), streams, prompts))
    assert got == wanted
    with session.stream() as stream:  # rounding has not changed a choice here
        assert list(stream.generate(prompts[3], 30)) == wanted[3]


def test_threads_that_generate_share_calls(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes 50 ms here. 4 threads of 10 tokens and a prompt need 13 calls at best, and 50 if they take turns."""
    run_graph = OrtLoop._run

    def slow(self: OrtLoop, name: str, out: np.ndarray | None) -> None:
        time.sleep(0.05)
        run_graph(self, name, out)

    monkeypatch.setattr(OrtLoop, "_run", slow)
    with sessions("all_dynamic").pool(4) as pool, ThreadPoolExecutor(4) as threads:
        streams = [pool.open() for _ in range(4)]
        made = list(threads.map(lambda s: list(s.generate([1], 10)), streams))
        assert [len(tokens) for tokens in made] == [10] * 4
        assert pool.calls < 25


def test_block_step_alone(sessions: Sessions) -> None:
    """Whole blocks run; the rest waits for its block."""
    session = sessions("rows")
    text = random_input(session.contract, 20, seed=9)[:1]
    with session.pool() as pool, pool.open() as stream, session.stream() as lockstep:
        first = list(stream.feed([text]))
        assert sum(part.shape[1] for part in first) == 16
        assert stream.queued == 4
        second = list(stream.feed([text[:, :4]]))
        whole = np.concatenate([text, text[:, :4]], axis=1)
        wanted = np.concatenate(list(lockstep.feed([np.repeat(whole, 3, 0)])), axis=1)[:1]
        assert np.array_equal(np.concatenate(first + second, axis=1), wanted)


def test_closed_while_another_thread_feeds(sessions: Sessions) -> None:
    session = sessions("all_dynamic")
    fed = random_input(session.contract, 4000, seed=10)
    with session.pool(2) as pool:
        stream, other = pool.open(), pool.open()
        started, errors = threading.Event(), []

        def user() -> None:
            try:
                for _ in stream.feed([fed]):
                    started.set()
            except UsageError as exc:
                errors.append(str(exc))

        thread = threading.Thread(target=user)
        thread.start()
        assert started.wait(30)
        stream.close()
        thread.join(30)
        assert not thread.is_alive()
        assert errors == ["the stream is closed; open another with pool.open()"]
        assert same(run(other, [fed[:, :40]]), alone(session, 2, [fed[:, :40]]))
