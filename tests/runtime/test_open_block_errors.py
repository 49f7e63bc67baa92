"""What goes wrong in the middle of a block: an engine that fails, a saved state that cannot be, calls that cannot work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import random_cuts, random_input, same_state, state_bytes

import famexport as fx
from famexport.contract import OPEN_LENGTH
from famexport.errors import ContractError, SnapshotError, UsageError
from famexport.runtime.golden import relative_error
from famexport.runtime.host import is_finite
from famexport.runtime.open_block import PaddedStream
from famexport.runtime.ort import OrtLoop
from famexport.runtime.pool_stream import PoolStream

Sessions = Callable[..., Any]


def feed(stream: Any, *parts: np.ndarray) -> np.ndarray:
    return np.concatenate([logits for part in parts for logits in stream.feed([part])], axis=1)


def row_bytes(stream: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in stream.state().items()}


# -- an engine that fails


def fail_at(patch: pytest.MonkeyPatch, graph: str, call: int = 1) -> list[str]:
    """Have the n-th call of ``graph`` fail, once; gives the list of calls made."""
    real, calls = OrtLoop._run, list[str]()

    def run(self: OrtLoop, name: str, out: np.ndarray | None) -> None:
        calls.append(name)
        real(self, name, out)  # so that something was computed
        if name == graph and calls.count(graph) == call:
            raise fx.FamExportError("no luck")

    patch.setattr(OrtLoop, "_run", run)
    return calls


@pytest.mark.parametrize(
    ("graph", "call", "held", "count"),
    [
        ("append_step_c3", 1, 1, 5),
        ("append_step_c3", 2, 1, 5),  # the chunk before it is taken back
        ("append_step", 1, 4, 4),
        ("commit_block", 1, 5, 3),
        ("commit_block", 1, 1, 7),
        ("block_step", 1, 0, 8),
    ],
)
def test_an_engine_that_fails_changes_nothing(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, graph: str, call: int, held: int, count: int
) -> None:
    """Wherever in a piece: all of it is in the state or nothing, and the piece can be fed again."""
    session = sessions("all_rows")
    fed = random_input(session.contract, 40, 3, seed=1)
    before, piece, after = np.split(fed, [8 + held, 8 + held + count], axis=1)
    with session.stream() as stream, session.stream() as spared:
        assert np.array_equal(feed(stream, before), feed(spared, before))
        kept, last = state_bytes(stream), stream.last_logits.copy()
        with monkeypatch.context() as patch:
            calls = fail_at(patch, graph, call)
            with pytest.raises(fx.FamExportError, match="no luck"):
                feed(stream, piece)
            assert calls.count(graph) == call
        assert state_bytes(stream) == kept
        assert (stream.held, stream.blocks) == (held, 1)
        assert np.array_equal(stream.last_logits, last)
        assert np.array_equal(feed(stream, piece, after), feed(spared, piece, after))
        assert same_state(stream, spared)


@pytest.mark.parametrize("graph", ["append_step", "commit_block", "block_step"])
def test_an_engine_that_fails_leaves_all_rows_of_a_pool(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    """One row completes its block, one is inside its own, one begins one with a whole block; all of it can run again."""
    session = sessions("all_dynamic")
    texts = [random_input(session.contract, 24, seed=i)[0] for i in range(3)]
    first, second = (7, 3, 0), (8, 5, 8)  # positions after the first feed, and after what is queued

    def run(failing: bool) -> list[Any]:
        with session.pool(3) as pool:
            streams = [pool.open() for _ in texts]
            for stream, text, n in zip(streams, texts, first, strict=True):
                list(stream.feed([text[:n]]))
            for stream, text, a, b in zip(streams, texts, first, second, strict=True):
                stream.put(text[a:b])
            if failing:
                kept, queued = [row_bytes(s) for s in streams], [s.queued for s in streams]
                with monkeypatch.context() as patch:
                    fail_at(patch, graph)
                    with pytest.raises(fx.FamExportError, match="no luck"):
                        pool.run()
                for i, stream in enumerate(streams):
                    if i == 2 and graph != "block_step":
                        continue  # its call had been made
                    assert row_bytes(stream) == kept[i]
                    assert (stream.queued, stream.held, stream.blocks) == (queued[i], first[i], 0)
            while pool.run():
                pass
            return [[np.concatenate(s.take(), axis=1).tobytes(), row_bytes(s), s.held, s.blocks] for s in streams]

    assert run(failing=True) == run(failing=False)


# -- half precision, and rows that part


def test_bfloat16_in_the_middle_of_a_block_on_both_backends(sessions: Sessions) -> None:
    """Measured, relative: 7e-3 over six blocks."""
    ort, torch = sessions("all_bf16"), sessions("all_bf16", "torch")
    fed = random_input(ort.contract, 53, seed=2)
    with ort.stream() as a, torch.stream() as b:
        for piece in random_cuts(fed, 3, longest=9):
            if piece.shape[1]:
                assert relative_error(feed(a, piece), feed(b, piece)) < 5e-2
        assert a.held == b.held == 5
        state = b.state()
        assert {spec.dtype for spec in ort.contract.open_states} == {"int64", "bfloat16"}
        assert max(relative_error(array, state[key]) for key, array in a.state().items()) < 5e-2
        with torch.stream() as other:
            other.load_state(state)
            assert np.array_equal(feed(b, fed), feed(other, fed))


def test_rows_of_padded_blocks_stay_together_within_a_block(sessions: Sessions) -> None:
    """Without append_step too: a bad row would lose the positions that were taken before, and the others would not."""
    session = sessions("all_embeds")
    fed = random_input(session.contract, 16, 3, seed=3)
    bad = fed[:, 3:8].copy()
    bad[1, 2, 0] = np.nan
    for policy in ("skip", "reset"):
        stream, spared = (PaddedStream(session.backend.open(3), session._origin(3), policy) for _ in range(2))
        for s in (stream, spared):
            feed(s, fed[:, :3])
        with pytest.raises(fx.errors.NonFiniteError, match=r"in row 1.*use session\.pool\(\)"):
            feed(stream, bad)
        assert same_state(stream, spared)
        assert np.array_equal(feed(stream, fed[:, 3:]), feed(spared, fed[:, 3:]))


def test_last_logits_of_a_row_that_was_skipped_are_as_before(sessions: Sessions) -> None:
    session = sessions("all_embeds")
    fed, bad = random_input(session.contract, 8, 3, seed=4), random_input(session.contract, 8, 3, seed=5)
    bad[1, 2, 0] = np.nan
    with session.stream(3, on_nonfinite="skip") as stream:
        feed(stream, fed)
        before = stream.last_logits.copy()
        feed(stream, bad)
        assert np.array_equal(stream.last_logits[1], before[1])
        assert not np.array_equal(stream.last_logits[0], before[0])
        assert np.isfinite(stream.snapshot().last_logits).all()


def test_bools_are_finite() -> None:
    """A module of one's own may have a state of them."""
    assert is_finite(np.array([True, False, True]))
    assert is_finite(np.zeros((3, 5), bool))


# -- saved states


def flipped(data: bytes, place: int, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def same_snapshot(a: fx.Snapshot, b: fx.Snapshot) -> bool:
    if (a.origin, a.batch, a.blocks, a.state.keys()) != (b.origin, b.batch, b.blocks, b.state.keys()):
        return False
    pairs = [(a.state[key], b.state[key]) for key in a.state]
    pairs += [(a.last_logits, b.last_logits), (a.open_inputs, b.open_inputs)]
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", ["all", "plain"])
def test_a_damaged_header_is_refused_or_says_the_same(sessions: Sessions, tmp_path: Path, name: str) -> None:
    """What it says of model, engine, contract and blocks, too: no checksum over tensors covers those."""
    with sessions(name).stream() as stream:
        feed(stream, random_input(stream.contract, 21, seed=1))
        saved = stream.snapshot()
    data, rng = saved.save(tmp_path / "state").read_bytes(), np.random.default_rng(0)
    assert same_snapshot(fx.Snapshot.load(tmp_path / "state"), saved)
    accepted = []
    for place in rng.choice(8 + int.from_bytes(data[:8], "little"), 300, replace=False):
        (tmp_path / "state").write_bytes(flipped(data, place, int(rng.integers(8))))
        try:
            loaded = fx.Snapshot.load(tmp_path / "state")
        except SnapshotError:
            continue
        if not same_snapshot(loaded, saved):
            accepted.append(data[max(place - 24, 0) : place + 1].decode())
    assert accepted == []


@pytest.mark.parametrize("length", [-1, 8, 9])
@pytest.mark.parametrize("where", ["stream", "pool"])
def test_an_open_block_that_cannot_be(sessions: Sessions, tmp_path: Path, where: str, length: int) -> None:
    """With no room in it, a stream would wait for ever; one row of a pool would also run into its checks."""
    session = sessions("all_dynamic")
    with session.pool(1) as pool, pool.open() if where == "pool" else session.stream() as stream:
        list(stream.feed([np.arange(13)]))
        saved, kept = stream.snapshot(), row_bytes(stream)
        wrong = replace(saved, state={**saved.state, OPEN_LENGTH: np.array([length])})
        with pytest.raises(SnapshotError, match=OPEN_LENGTH):
            stream.restore(fx.Snapshot.load(wrong.save(tmp_path / "state")))
        assert row_bytes(stream) == kept
        assert stream.held == 5


@pytest.mark.parametrize("inputs", [np.zeros((1, 8), np.int64), np.zeros((1, 3, 32), np.float32)])
def test_open_inputs_that_cannot_be(sessions: Sessions, inputs: np.ndarray) -> None:
    """A whole block, and embeddings: tied weights have the same digest in a bundle that takes those."""
    with sessions("plain").stream() as stream, sessions("plain").stream() as spared:
        feed(stream, np.arange(19)), feed(spared, np.arange(19))
        with pytest.raises(SnapshotError):
            stream.restore(replace(stream.snapshot(), open_inputs=inputs))
        assert np.array_equal(feed(stream, np.arange(9)), feed(spared, np.arange(9)))


# -- calls that cannot work


def test_generation_in_a_pool_needs_append_step(sessions: Sessions) -> None:
    """Without it a row's open block waits in the queue, and its last logits are those of the block before."""
    with sessions("plain").pool() as pool, pool.open() as stream, pytest.raises(UsageError, match="--graphs all"):
        stream.generate(np.arange(11), 6)


def test_a_prompt_that_is_no_array(sessions: Sessions) -> None:
    with sessions("all").stream() as stream, sessions("all").stream() as untouched:
        for prompt in ([[1], [1, 2]], "text", [1.5], [[1, 2], [3, 4]], {1}):
            with pytest.raises(ContractError):
                stream.generate(prompt, 3)
        assert same_state(stream, untouched)


def test_nothing_is_taken_from_a_closed_stream(sessions: Sessions) -> None:
    """Or else a thread that waits for results would wait for ever."""
    with sessions("all_dynamic").pool(2) as pool:
        stream = pool.open()
        stream.put([1, 2])
        pool.run()
        stream.close()
        with pytest.raises(UsageError, match="the stream is closed"):
            stream.take()


@pytest.mark.parametrize("call", [1, 2])
def test_a_feed_says_so_whenever_it_is_closed(sessions: Sessions, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Another thread may close the stream just after results were looked for: none that is due may be lost silently."""
    real, calls = PoolStream.take, list[int]()

    def take(self: PoolStream) -> list[np.ndarray]:
        found = real(self)
        calls.append(len(found))
        if len(calls) == call:
            self.close()
        return found

    with sessions("all_dynamic").pool(2) as pool:
        stream = pool.open()
        monkeypatch.setattr(PoolStream, "take", take)
        with pytest.raises(UsageError, match="the stream is closed"):
            list(stream.feed([np.arange(3)]))


def test_feed_makes_room_for_itself(sessions: Sessions) -> None:
    """It runs rounds anyway: a full queue of this very stream is no reason to fail."""
    session, fed = sessions("all_dynamic"), np.arange(16)
    with session.pool(2, max_queued=8) as pool, pool.open() as stream, pool.open() as other:
        wanted = feed(other, fed)
        stream.put(fed[:8])
        assert np.array_equal(feed(stream, fed[8:]), wanted)
