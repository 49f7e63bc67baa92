"""Streams over append_step: how pieces are cut within a feed changes nothing, and the open block is part of the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from streaming import random_cuts, random_input, same_state, state_bytes, step_all

from famexport.contract import OPEN_LENGTH
from famexport.errors import ContractError

Sessions = Callable[..., Any]
BACKENDS = ["ort-cpu", "torch"]
# name, rows, and the bundle of the same weights that has block_step alone
KINDS = [("all", 1, "plain"), ("all_rows", 3, "rows"), ("all_dynamic", 2, "dynamic"), ("all_embeds", 2, None)]


def feed(stream: Any, parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(stream.feed(parts)), axis=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "rows", "plain"), KINDS)
def test_cuts_within_a_feed_change_nothing(
    sessions: Sessions, name: str, rows: int, plain: str | None, backend: str
) -> None:
    """Bit for bit; and the same logits as from blocks alone, to rounding."""
    session = sessions(name, backend)
    fed = random_input(session.contract, 77, rows)
    with session.stream(rows) as whole:
        wanted, state = feed(whole, [fed]), whole.state()
        assert (whole.blocks, whole.held) == (9, 5)
        for seed in range(5):
            with session.stream(rows) as stream:
                assert np.array_equal(feed(stream, random_cuts(fed, seed)), wanted)
                assert same_state(stream, whole)
    if plain:
        with sessions(plain, backend).stream(rows) as blocks:
            assert np.allclose(feed(blocks, [fed]), wanted, rtol=1e-4, atol=1e-4)
            assert all(np.allclose(array, state[key], rtol=1e-4, atol=1e-4) for key, array in blocks.state().items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["all", "all_rows", "all_last"])
def test_pieces_at_any_place_of_a_block(sessions: Sessions, name: str, backend: str) -> None:
    """One feed a piece: each position once and now, as blocks give them, to rounding (measured: 3e-6)."""
    session = sessions(name, backend)
    every = session.contract.logits == "all"
    with session.stream() as blocks:
        fed = random_input(session.contract, 64, blocks.batch, seed=1)
        wanted = step_all(blocks, fed)
        for seed in range(4):
            with session.stream() as stream:
                got, at = [], 0
                for piece in random_cuts(fed, seed, longest=11):
                    given = list(stream.feed([piece]))
                    at += piece.shape[1]
                    assert stream.held == at % 8
                    assert stream.blocks == at // 8
                    if every:
                        assert sum(part.shape[1] for part in given) == piece.shape[1]
                    elif piece.shape[1]:
                        assert given[-1].shape[1] == 1
                        assert np.array_equal(given[-1][:, -1], stream.last_logits)
                    got += given
                if every:
                    assert np.allclose(np.concatenate(got, axis=1), wanted, rtol=1e-4, atol=1e-4)
                for key, array in blocks.state().items():
                    assert np.allclose(array, stream.state()[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_open_block_is_part_of_the_state(sessions: Sessions, backend: str) -> None:
    session = sessions("all_rows", backend)
    fed, after = random_input(session.contract, 21, 3, seed=2), random_input(session.contract, 20, 3, seed=3)
    with session.stream() as stream, session.stream() as other:
        feed(stream, [fed])
        state = stream.state()
        assert set(state) == {spec.name for spec in session.contract.all_states}
        assert state[OPEN_LENGTH].tolist() == [5, 5, 5]
        assert state["past_open_key_00"][:, :, :5].all()
        assert not state["past_open_key_00"][:, :, 5:].any()  # what is not filled is zero
        feed(other, [after[:, :9]])
        other.load_state(state)
        assert other.held == 5
        assert np.array_equal(feed(stream, [after]), feed(other, [after]))
        assert same_state(stream, other)
        before = state_bytes(stream)
        for lengths, says in (([5, 4, 5], "in lockstep"), ([8, 8, 8], r"0 to 7 open"), ([-1, -1, -1], "0 to 7 open")):
            with pytest.raises(ContractError, match=says):
                stream.load_state({**state, OPEN_LENGTH: np.array(lengths)})
            assert state_bytes(stream) == before
        with pytest.raises(ContractError, match="missing state past_open_length"):
            stream.load_state({key: array for key, array in state.items() if key != OPEN_LENGTH})


def test_step_and_reset_in_an_open_block(sessions: Sessions) -> None:
    session = sessions("all_rows")
    fed = random_input(session.contract, 24, 3, seed=4)
    with session.stream() as stream, session.stream() as fresh:
        feed(stream, [fed[:, :11]])
        before = state_bytes(stream)
        with pytest.raises(ContractError, match="feed holds 3 of 8 positions"):
            stream.step(fed[:, 11:19].copy())
        with pytest.raises(ContractError, match="a block is open with 3 positions"):
            stream.reset([1])
        assert state_bytes(stream) == before
        stream.reset()
        assert same_state(stream, fresh)
        assert np.array_equal(feed(stream, [fed]), feed(fresh, [fed]))


@pytest.mark.parametrize("name", ["all", "all_rows", "all_last"])
def test_out_is_written_and_nothing_else(sessions: Sessions, name: str) -> None:
    session = sessions(name)
    with session.stream() as stream, session.stream() as other:
        out = np.full(session.contract.outputs[0].sized(stream.batch), np.nan, np.float32)
        fed = random_input(session.contract, 45, stream.batch, seed=5)
        for piece in np.split(fed, [5, 8, 20, 36], axis=1):
            parts = []
            for part in stream.feed([piece], out):
                assert np.shares_memory(part, out)
                parts.append(part.copy())
            assert np.array_equal(np.concatenate(parts, axis=1), feed(other, [piece]))


def test_the_pieces_before_a_wrong_one_count(sessions: Sessions) -> None:
    session = sessions("all")
    fed = random_input(session.contract, 30, seed=6)
    with session.stream() as stream, session.stream() as spared:
        got = []
        with pytest.raises(ContractError, match="token id 96"):
            for part in stream.feed([fed[:, :7], fed[:, 7:13], np.array([[3, 96]]), fed[:, 13:]]):
                got.append(part)
        assert np.array_equal(np.concatenate(got, axis=1), feed(spared, [fed[:, :13]]))
        assert same_state(stream, spared)


def test_the_wider_chunk_is_used(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    from famexport.runtime.ort import OrtLoop

    calls: list[str] = []
    run = OrtLoop._run
    monkeypatch.setattr(OrtLoop, "_run", lambda self, name, out: calls.append(name) or run(self, name, out))
    session = sessions("all")  # chunks of 1 and 3
    with session.stream() as stream:
        feed(stream, [random_input(session.contract, 8 + 5)])
        assert calls == ["block_step", "append_step_c3", "append_step_c3"]  # 3 and 2
        calls.clear()
        feed(stream, [random_input(session.contract, 1)])
        feed(stream, [random_input(session.contract, 2 + 16 + 1)])
        assert calls == ["append_step", "append_step_c3", "commit_block", "block_step", "block_step", "append_step"]


@pytest.mark.parametrize("fails", ["append_step", "commit_block"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_fails_takes_back_all_of_the_piece(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, fails: str, error: type[BaseException]
) -> None:
    """In the second chunk of a piece, and where the piece ends the block."""
    from famexport.runtime.ort import OrtLoop

    session = sessions("all")
    fed = random_input(session.contract, 40, seed=7)
    run, calls = OrtLoop._run, 0

    def failing(self: OrtLoop, name: str, out: np.ndarray | None) -> None:
        nonlocal calls
        calls += 1
        if name == fails and calls > 1:
            raise error("no luck")
        run(self, name, out)

    with session.stream() as stream, session.stream() as spared:
        assert np.array_equal(feed(stream, [fed[:, :12]]), feed(spared, [fed[:, :12]]))
        with monkeypatch.context() as patch:
            patch.setattr(OrtLoop, "_run", failing)
            with pytest.raises(error, match="no luck"):  # 4 positions: a chunk of 3, one of 1, and the end of the block
                list(stream.feed([fed[:, 12:16]]))
        assert calls > 1
        assert same_state(stream, spared)
        assert stream.held == 4
        assert np.array_equal(feed(stream, [fed[:, 12:]]), feed(spared, [fed[:, 12:]]))
        assert same_state(stream, spared)
