"""Streaming in any pieces is the same as block by block, bit for bit; rows and streams do not know of each other."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import blocks_of, random_cuts, random_input, same_state, state_bytes, step_all

import famexport as fx
from famexport.errors import ContractError, UsageError

Sessions = Callable[..., Any]
BACKENDS = ["ort-cpu", "torch"]
# every kind of bundle, with the batch its streams are opened with (None: the bundle's own)
KINDS = [
    ("plain", None, 1),
    ("rows", None, 3),
    ("dynamic", 3, 3),
    ("dynamic", None, 1),
    ("embeds", None, 1),
    ("no_fam", None, 1),
    ("no_memory", None, 1),
    ("fp16", None, 1),
    ("bf16", None, 1),
]


@pytest.mark.parametrize(("name", "batch", "rows"), KINDS)
def test_feed_in_any_pieces_equals_step(sessions: Sessions, name: str, batch: int | None, rows: int) -> None:
    session = sessions(name)
    size = session.contract.block_size
    fed = random_input(session.contract, 9 * size, rows)
    with session.stream(batch) as reference:
        wanted = step_all(reference, fed)
        for seed in range(6):
            with session.stream(batch) as stream:
                parts = list(stream.feed(random_cuts(fed, seed)))
                assert np.array_equal(np.concatenate(parts, axis=1), wanted)
                assert all(part.dtype == np.float32 and 0 < part.shape[1] <= size for part in parts)
                assert same_state(stream, reference)
                assert stream.blocks == reference.blocks == 9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "rows", "embeds", "bf16"])
def test_feed_goes_on_in_the_middle_of_a_block(sessions: Sessions, name: str, backend: str) -> None:
    """One piece a call, so that nearly every call leaves a block open: every position once, in order."""
    session = sessions(name, backend)
    size, rows = session.contract.block_size, session.stream().batch
    fed = random_input(session.contract, 5 * size + 3, rows, seed=1)
    whole = np.concatenate([fed, fed[:, : size - 3]], axis=1)
    wanted = step_all(session.stream(), whole)[:, : fed.shape[1]]
    for seed in range(3):
        with session.stream() as stream:
            got = []
            for piece in random_cuts(fed, seed, longest=11):
                given = [part for part in stream.feed([piece])]
                assert sum(part.shape[1] for part in given) == piece.shape[1]  # all of them now, none later
                got += given
            assert np.array_equal(np.concatenate(got, axis=1), wanted)
            assert stream.blocks == 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "no_fam", "no_memory", "fp16", "bf16", "embeds"])
def test_logits_of_an_open_block_are_those_of_the_whole(sessions: Sessions, name: str, backend: str) -> None:
    session = sessions(name, backend)
    size = session.contract.block_size
    fed = random_input(session.contract, 4 * size, seed=2)
    blocks = list(blocks_of(session.contract, fed))
    for n in range(1, size):
        with session.stream() as stream, session.stream() as whole:
            for block in blocks[:-1]:
                stream.step(block)
                whole.step(block)
            before = state_bytes(stream)
            (tail,) = stream.feed([blocks[-1][:, :n]])
            assert state_bytes(stream) == before  # an open block does not move the state
            wanted = whole.step(blocks[-1])
            assert np.array_equal(tail, wanted[:, :n])
            (rest,) = stream.feed([blocks[-1][:, n:]])
            assert np.array_equal(rest, wanted[:, n:])
            assert same_state(stream, whole)


def test_nothing_fed_gives_nothing(sessions: Sessions) -> None:
    with sessions("plain").stream() as stream:
        empty = [[], np.zeros(0, np.int64), np.zeros((1, 0), np.int64), np.zeros((1, 0))]
        assert list(stream.feed(empty)) == list(stream.feed([])) == []
        assert stream.blocks == 0
        (tail,) = stream.feed([np.array([5, 6])])
        assert tail.shape == (1, 2, 96)
        assert list(stream.feed([])) == []  # given already
    with sessions("embeds").stream() as stream:
        assert list(stream.feed([np.zeros((1, 0, 32), np.float32)])) == []
    with sessions("rows").stream() as stream:
        assert list(stream.feed([np.zeros((3, 0), np.int64)])) == []


def test_feed_takes_any_integers(sessions: Sessions) -> None:
    session = sessions("plain")
    fed = random_input(session.contract, 20)[0]
    wanted = np.concatenate(list(session.stream().feed([fed])), axis=1)
    kinds = [fed.astype(kind) for kind in ("int32", "uint8", "uint64", ">i4")]
    for piece in (*kinds, fed.tolist(), fed[None], np.asfortranarray(fed[None]), np.stack([fed, fed], 1)[:, 0]):
        assert np.array_equal(np.concatenate(list(session.stream().feed([piece])), axis=1), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_and_nothing_else(sessions: Sessions, backend: str) -> None:
    session = sessions("plain", backend)
    fed = random_input(session.contract, 43)
    out = np.full((1, 8, 96), np.nan, np.float32)
    with session.stream() as a, session.stream() as b:
        for block in blocks_of(session.contract, fed):
            got = a.step(block, out)
            assert got is out
            assert np.array_equal(got, b.step(block))
    wanted = np.concatenate(list(session.stream().feed([fed])), axis=1)
    with session.stream() as stream:
        parts = []
        for part in stream.feed(random_cuts(fed, 3), out):
            assert np.shares_memory(part, out)
            parts.append(part.copy())
        assert np.array_equal(np.concatenate(parts, axis=1), wanted)


def test_without_out_the_logits_are_the_callers(sessions: Sessions) -> None:
    session = sessions("plain")
    with session.stream() as stream:
        first = stream.step(np.zeros((1, 8), np.int64))
        kept = first.copy()
        state = stream.state()
        stream.step(np.ones((1, 8), np.int64))
        assert np.array_equal(first, kept)
        assert not np.array_equal(state["past_fam_00"], stream.state()["past_fam_00"])  # a copy, not a view
        fed = list(stream.feed([random_input(session.contract, 30)]))
        assert not any(np.shares_memory(a, b) for i, a in enumerate(fed) for b in fed[:i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "batch"), [("rows", None), ("dynamic", 3)])
def test_rows_are_streams_of_their_own(sessions: Sessions, name: str, batch: int | None, backend: str) -> None:
    """The same tokens give a row the same bits whatever the other rows get, and wherever in the batch it is."""
    session = sessions(name, backend)
    fed = random_input(session.contract, 48, 3, seed=4)
    with session.stream(batch) as a, session.stream(batch) as b:
        first = step_all(a, fed)
        turned = step_all(b, np.roll(fed, 1, axis=0))
        assert np.array_equal(np.roll(first, 1, axis=0), turned)
        for one, other in zip(a.state().values(), b.state().values(), strict=True):
            assert np.array_equal(np.roll(one, 1, axis=0), other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "batch"), [("rows", None), ("dynamic", 3)])
@pytest.mark.parametrize("rows", [[1], [0, 2], [2, 2], (0, 1, 2), []])
def test_reset_of_rows(sessions: Sessions, name: str, batch: int | None, rows: list[int], backend: str) -> None:
    session = sessions(name, backend)
    before = random_input(session.contract, 40, 3, seed=5)
    after = random_input(session.contract, 40, 3, seed=6)
    with session.stream(batch) as stream, session.stream(batch) as on, session.stream(batch) as fresh:
        step_all(stream, before)
        step_all(on, before)
        stream.reset(rows)
        got, going, new = step_all(stream, after), step_all(on, after), step_all(fresh, after)
        for row in range(3):
            assert np.array_equal(got[row], (new if row in rows else going)[row])
            assert not np.array_equal(new[row], going[row])  # or else the reset would show nothing
        for name_, array in stream.state().items():
            for row in range(3):
                assert np.array_equal(array[row], (fresh if row in rows else on).state()[name_][row])


@pytest.mark.parametrize("name", ["plain", "rows", "bf16"])
def test_reset_of_all_is_a_fresh_stream(sessions: Sessions, name: str) -> None:
    session = sessions(name)
    with session.stream() as stream, session.stream() as fresh:
        fed = random_input(session.contract, 32, stream.batch, seed=7)
        for leave_open in (0, 3):
            step_all(stream, fed)
            list(stream.feed([fed[:, :leave_open]]))
            stream.reset()
            assert stream.blocks == 0
            assert same_state(stream, fresh)
            assert not any(array.any() for array in stream.state().values())
        assert np.array_equal(step_all(stream, fed), step_all(fresh, fed))


@pytest.mark.parametrize("rows", [[0, 1, 2], (2, 0, 1, 0)])
def test_reset_of_all_rows_by_name_is_a_reset_of_all(sessions: Sessions, rows: Any) -> None:
    with sessions("rows").stream() as stream, sessions("rows").stream() as fresh:
        list(stream.feed([random_input(stream.contract, 11, 3)]))
        stream.reset(rows)
        assert (stream.blocks, stream.held, stream.last_logits) == (0, 0, None)
        assert same_state(stream, fresh)


def test_rows_that_are_reset_have_no_last_logits(sessions: Sessions) -> None:
    with sessions("rows").stream() as stream:
        step_all(stream, random_input(stream.contract, 16, 3))
        last = stream.last_logits.copy()
        assert last.any(axis=1).all()
        stream.reset([1])
        assert np.array_equal(stream.last_logits, last * [[1], [0], [1]])
        stream.load_state(stream.state())  # which says nothing of logits
        assert stream.last_logits is None


def test_rows_come_in_any_form(sessions: Sessions) -> None:
    for rows in ([1], iter([1]), range(1, 2), np.array([1]), (np.int64(1),)):
        with sessions("rows").stream() as stream:
            step_all(stream, random_input(stream.contract, 16, 3))
            stream.reset(rows)
            assert stream.state()["past_count"].tolist() == [2, 0, 2]


def test_reset_of_rows_that_are_not_there(sessions: Sessions) -> None:
    with sessions("rows").stream() as stream:
        fed = random_input(stream.contract, 16, 3)
        step_all(stream, fed)
        before = state_bytes(stream)
        for rows in ([3], [0, -1], [0.0], [True, False, False], ["0"]):
            with pytest.raises(ContractError, match=r"reset: rows .* expected 0 to 2"):
                stream.reset(rows)
        list(stream.feed([fed[:, :2]]))
        with pytest.raises(ContractError, match="a block is open with 2 positions"):
            stream.reset([0])
        assert state_bytes(stream) == before


def test_step_in_an_open_block_is_refused(sessions: Sessions) -> None:
    session = sessions("plain")
    fed = random_input(session.contract, 24, seed=8)
    wanted = step_all(session.stream(), fed)
    with session.stream() as stream:
        got = list(stream.feed([fed[:, :11]]))
        with pytest.raises(ContractError, match="feed holds 3 of 8 positions"):
            stream.step(fed[:, 8:16])
        got += stream.feed([fed[:, 11:16]])
        got.append(stream.step(np.ascontiguousarray(fed[:, 16:])))
        assert np.array_equal(np.concatenate(got, axis=1), wanted)


def test_last_logits_only(sessions: Sessions) -> None:
    """``logits="last"``: one row a block from ``step`` and ``feed``, none for an open block."""
    session = sessions("last")
    fed = random_input(session.contract, 80, seed=9)
    text = sessions("text")  # the same weights, all rows
    wanted = step_all(text.stream(), fed)[:, 7::8]
    got = step_all(session.stream(), fed)
    assert got.shape == (1, 10, 96)
    assert np.allclose(got, wanted, rtol=0, atol=1e-4)
    for seed in range(4):
        with session.stream() as stream:
            assert np.array_equal(np.concatenate(list(stream.feed(random_cuts(fed, seed))), axis=1), got)
            assert list(stream.feed([fed[:, :5]])) == []
            assert stream.blocks == 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["plain", "rows", "no_fam", "no_memory", "fp16", "bf16"])
def test_save_load_and_continue_both(sessions: Sessions, name: str, backend: str) -> None:
    session = sessions(name, backend)
    with session.stream() as stream, session.stream() as other:
        before = random_input(session.contract, 40, stream.batch, seed=10)
        after = random_input(session.contract, 40, stream.batch, seed=11)
        step_all(stream, before)
        saved = stream.state()
        for spec in session.contract.states:
            assert saved[spec.name].dtype == np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
            assert saved[spec.name].shape == spec.sized(stream.batch)
        step_all(other, after)  # what was there before must not shine through
        list(other.feed([after[:, :3]]))
        other.load_state(saved)
        assert same_state(stream, other)
        for name_, array in other.state().items():
            assert array.tobytes() == saved[name_].tobytes()
        assert np.array_equal(step_all(stream, after), step_all(other, after))
        assert same_state(stream, other)
        for array in saved.values():  # a copy went in: the caller's arrays are the caller's
            array[...] = 0
        assert same_state(stream, other)


def test_bf16_state_is_exact_or_refused(sessions: Sessions) -> None:
    with sessions("bf16").stream() as stream:
        step_all(stream, random_input(stream.contract, 24))
        saved, before = stream.state(), state_bytes(stream)
        assert {s.dtype for s in stream.contract.states if "key" in s.name} == {"bfloat16"}
        assert (saved["past_key_00"].view(np.uint32) & 0xFFFF == 0).all()
        assert saved["past_key_00"].any()
        saved["past_key_00"].flat[5] = 1 + 2**-10
        with pytest.raises(ContractError, match="past_key_00"):
            stream.load_state(saved)
        assert state_bytes(stream) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_streams_are_as_if_alone(sessions: Sessions, backend: str) -> None:
    session = sessions("plain", backend)
    inputs = [random_input(session.contract, 80, seed=20 + i) for i in range(8)]
    alone = [step_all(session.stream(), fed) for fed in inputs]
    streams = [session.stream() for _ in inputs]
    blocks = [blocks_of(session.contract, fed) for fed in inputs]
    got: list[list[np.ndarray]] = [[] for _ in inputs]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 10))
    for at, i in enumerate(order):
        if i == 3 and len(got[3]) == 4:
            streams[3].close()  # one is gone in the middle
        if i == 3 and len(got[3]) >= 4:
            continue
        got[i].append(streams[i].step(next(blocks[i])))
        if at % 5 == 0:
            with pytest.raises(ContractError):
                streams[i].step(np.full((1, 8), 96))  # not in the vocabulary
            list(session.stream().feed([inputs[0][:, :13]]))  # others come and go
    for i in range(8):
        n = 4 if i == 3 else 10
        assert len(got[i]) == n
        assert np.array_equal(np.concatenate(got[i], axis=1), alone[i][:, : 8 * n])


def test_streams_in_threads_are_as_if_alone(sessions: Sessions) -> None:
    session = sessions("plain")
    inputs = [random_input(session.contract, 400, seed=40 + i) for i in range(4)]
    alone = [step_all(session.stream(), fed) for fed in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda fed: step_all(session.stream(), fed), inputs))
    assert all(np.array_equal(a, b) for a, b in zip(got, alone, strict=True))


def test_a_stream_outlives_its_session(sessions: Sessions, bundles: Callable[[str], Path]) -> None:
    fed = random_input(sessions("plain").contract, 40)
    wanted = step_all(sessions("plain").stream(), fed)
    with fx.load(bundles("plain"), threads=1) as session:
        stream = session.stream()
    del session
    gc.collect()
    assert np.array_equal(step_all(stream, fed), wanted)
    assert np.array_equal(step_all(fx.load(bundles("plain"), threads=1).stream(), fed), wanted)


def test_closed(sessions: Sessions, bundles: Callable[[str], Path]) -> None:
    session = fx.load(bundles("plain"), threads=1)
    stream, block = session.stream(), np.zeros((1, 8), np.int64)
    with stream:
        stream.step(block)
    stream.close()
    going = session.stream()
    held = going.feed([np.zeros((1, 20), np.int64)])
    next(held)
    going.close()
    calls: list[Callable[[], Any]] = [
        lambda: stream.step(block),
        lambda: list(stream.feed([block])),
        lambda: stream.reset(),
        lambda: stream.state(),
        lambda: stream.load_state({}),
        lambda: stream.__enter__(),
        lambda: next(held),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="the stream is closed; open another"):
            call()
    session.close()
    session.close()
    with pytest.raises(UsageError, match="the session is closed"):
        session.stream()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches(sessions: Sessions, backend: str) -> None:
    assert sessions("plain", backend).stream().batch == sessions("plain", backend).stream(1).batch == 1
    assert sessions("rows", backend).stream().batch == sessions("rows", backend).stream(3).batch == 3
    assert sessions("dynamic", backend).stream().batch == 1
    assert sessions("dynamic", backend).stream(5).batch == 5
    for name, batch in (("plain", 2), ("rows", 1), ("plain", 0)):
        with pytest.raises(ContractError, match=f"got batch {batch}, this bundle was exported for .* --batch dynamic"):
            sessions(name, backend).stream(batch)
    for batch in (0, -1, 10**12):
        with pytest.raises(ContractError, match=f"batch must be from 1 to 1048576, got {batch}"):
            sessions("dynamic", backend).stream(batch)
    for batch in ("2", 1.5, True, [1]):
        with pytest.raises(ContractError, match=f"batch must be a number of rows, got {re.escape(repr(batch))}"):
            sessions("dynamic", backend).stream(batch)
