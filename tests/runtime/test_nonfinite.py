"""A result that is not finite never enters the state (R8), whatever made it so and wherever in a block it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from streaming import random_input, same_state, state_bytes

from famexport.errors import NonFiniteError, UsageError
from famexport.runtime.host import is_finite
from famexport.runtime.ort import OrtLoop

Sessions = Callable[..., Any]
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
# where the bad piece goes, after 8 positions: a whole block, in an open block, and what completes one
PLACES = {"block": (0, 8), "open": (0, 3), "inside": (3, 2), "completing": (5, 3)}
NAMES = ["all_embeds", "embeds"]  # with append_step, and padded blocks


def pieces(
    contract: Any, held: int, count: int, value: float, batch: int = 1
) -> tuple[list[np.ndarray], np.ndarray, Any]:
    """Good pieces before, the bad one, and good ones after."""
    fed = random_input(contract, 60, batch, seed=1)
    bad = random_input(contract, count, batch, seed=2)
    bad[:, -1, 7] = value  # the last of its positions: those before it are good
    before = [fed[:, :8], fed[:, 8 : 8 + held]] if held else [fed[:, :8]]
    return before, bad, [fed[:, 8 + held : 30], fed[:, 30:47]]


def feed(stream: Any, parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([logits for part in parts for logits in stream.feed([part])], axis=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_as_if_the_bad_piece_had_not_been(sessions: Sessions, name: str, place: str, kind: str, policy: str) -> None:
    session = sessions(name)
    before, bad, after = pieces(session.contract, *PLACES[place], BAD[kind])
    with session.stream(on_nonfinite=policy) as stream, session.stream() as spared:
        assert np.array_equal(feed(stream, before), feed(spared, before))
        held = state_bytes(stream)
        for times in (1, 2):
            if policy == "raise":
                with pytest.raises(NonFiniteError, match=r"NaN or infinity in row 0, \d positions after 1 blocks"):
                    list(stream.feed([bad]))
            else:
                logits = np.concatenate(list(stream.feed([bad])), axis=1)
                assert logits.shape == (1, bad.shape[1], 96)
                assert not np.isfinite(logits).all()
            assert stream.nonfinite == times
        assert state_bytes(stream) == held
        assert np.array_equal(stream.last_logits, spared.last_logits)
        assert np.array_equal(feed(stream, after), feed(spared, after))
        assert same_state(stream, spared)
        assert stream.blocks == spared.blocks


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", PLACES)
def test_reset_is_a_fresh_stream(sessions: Sessions, name: str, place: str) -> None:
    session = sessions(name)
    before, bad, after = pieces(session.contract, *PLACES[place], np.nan)
    with session.stream(on_nonfinite="reset") as stream, session.stream() as fresh:
        feed(stream, before)
        list(stream.feed([bad]))
        assert (stream.blocks, stream.held, stream.last_logits) == (0, 0, None)
        assert np.array_equal(feed(stream, after), feed(fresh, after))
        assert same_state(stream, fresh)


@pytest.mark.parametrize("policy", ["raise", "skip", "reset"])
def test_rows_part_at_a_block_boundary(sessions: Sessions, policy: str) -> None:
    session = sessions("all_embeds")
    fed, bad = random_input(session.contract, 32, 3, seed=3), random_input(session.contract, 8, 3, seed=4)
    bad[1, 2, 3] = np.nan
    with session.stream(3, on_nonfinite=policy) as stream, session.stream(3) as spared, session.stream(3) as went_on:
        for s in (stream, spared, went_on):
            feed(s, [fed[:, :16]])
        finite = bad.copy()
        finite[1] = 0
        feed(went_on, [finite])
        if policy == "raise":
            with pytest.raises(NonFiniteError, match="in row 1, 0 positions after 2 blocks"):
                list(stream.feed([bad]))
            assert same_state(stream, spared)
            return
        list(stream.feed([bad]))
        state, moved, old = stream.state(), went_on.state(), spared.state()
        for array_name, array in state.items():
            assert np.array_equal(array[[0, 2]], moved[array_name][[0, 2]])
            wanted = old[array_name][1] if policy == "skip" else np.zeros_like(array[1])
            assert np.array_equal(array[1], wanted)
        last = went_on.last_logits.copy()
        last[1] = spared.last_logits[1] if policy == "skip" else 0
        assert np.array_equal(stream.last_logits, last)


@pytest.mark.parametrize("policy", ["raise", "skip", "reset"])
def test_rows_stay_together_within_a_block(sessions: Sessions, policy: str) -> None:
    session = sessions("all_embeds")
    fed, bad = random_input(session.contract, 40, 3, seed=5), random_input(session.contract, 2, 3, seed=6)
    bad[2, 0, 0] = np.inf
    with session.stream(3, on_nonfinite=policy) as stream, session.stream(3) as spared:
        assert np.array_equal(feed(stream, [fed[:, :11]]), feed(spared, [fed[:, :11]]))
        with pytest.raises(NonFiniteError, match=r"in row 2, 3 positions after 1 blocks.*use session\.pool\(\)"):
            list(stream.feed([bad]))
        assert same_state(stream, spared)
        assert np.array_equal(feed(stream, [fed[:, 11:]]), feed(spared, [fed[:, 11:]]))


@pytest.mark.parametrize("backend", ["ort-cpu", "torch"])
def test_nothing_is_left_of_the_good_part_of_a_refused_piece(sessions: Sessions, backend: str) -> None:
    """Its first positions were in the open block already: those places are zero again, as ``state`` shows them."""
    session = sessions("all_embeds", backend)
    fed, bad = random_input(session.contract, 11, seed=9), random_input(session.contract, 4, seed=10)
    bad[:, -1, 7] = np.nan
    with session.stream() as stream:
        feed(stream, [fed])
        before = stream.state()
        with pytest.raises(NonFiniteError):
            list(stream.feed([bad]))
        after = stream.state()
        assert after["past_open_key_00"][:, :, :3].any()
        assert not after["past_open_key_00"][:, :, 3:].any()
        assert all(np.array_equal(array, before[name]) for name, array in after.items())


def test_what_the_end_of_a_block_makes_of_fam_counts(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token's result is finite, and FAM's is not: the piece that completed the block goes."""
    session = sessions("all")
    fed = random_input(session.contract, 40, seed=7)
    real = OrtLoop.end_block

    def overflow(self: OrtLoop) -> None:
        real(self)
        self.buffers[1 - self.current]["past_fam_01"][0, 2, 3] = np.inf

    with session.stream() as stream, session.stream() as spared:
        feed(stream, [fed[:, :8], fed[:, 8:13]])
        feed(spared, [fed[:, :8], fed[:, 8:13]])
        with monkeypatch.context() as patch:
            patch.setattr(OrtLoop, "end_block", overflow)
            with pytest.raises(NonFiniteError, match="5 positions after 1 blocks"):
                list(stream.feed([fed[:, 13:16]]))
        assert same_state(stream, spared)
        assert np.array_equal(feed(stream, [fed[:, 20:]]), feed(spared, [fed[:, 20:]]))


@pytest.mark.parametrize("name", ["all_embeds", "embeds"])
def test_step(sessions: Sessions, name: str) -> None:
    session = sessions(name)
    good = random_input(session.contract, 24, seed=8)
    bad = good[:, :8].copy()
    bad[0, 3] = np.nan
    with session.stream() as stream, session.stream() as spared:
        stream.step(good[:, :8].copy()), spared.step(good[:, :8].copy())
        with pytest.raises(NonFiniteError):
            stream.step(bad)
        assert same_state(stream, spared)
        assert np.array_equal(stream.step(good[:, 8:16].copy()), spared.step(good[:, 8:16].copy()))


def test_without_the_check_the_stream_is_lost(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests would show if the check were not there."""
    session = sessions("all_embeds")
    before, bad, after = pieces(session.contract, 0, 8, np.nan)
    monkeypatch.setattr(OrtLoop, "bad_rows", lambda *_: [])
    with session.stream() as stream:
        feed(stream, [*before, bad])
        assert not np.isfinite(feed(stream, after)).any()


@pytest.mark.parametrize("policy", ["raise", "skip", "reset"])
def test_with_last_rows_only_the_block_goes_as_a_whole(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Nothing of it was computed before its end, so nobody can say which of its pieces was bad."""
    session, real = sessions("last"), OrtLoop._run

    def run(self: OrtLoop, name: str, out: Any) -> None:
        real(self, name, out)
        if (self._block_input == 95).any():
            out[...] = np.nan

    monkeypatch.setattr(OrtLoop, "_run", run)
    fed = random_input(session.contract, 40) % 95
    bad = fed[:, 8:11].copy()
    bad[0, 1] = 95
    with session.stream(on_nonfinite=policy) as stream, session.stream() as spared:
        assert np.array_equal(feed(stream, [fed[:, :8]]), feed(spared, [fed[:, :8]]))
        assert list(stream.feed([bad])) == []
        if policy == "raise":
            with pytest.raises(NonFiniteError, match="after 1 blocks"):
                list(stream.feed([fed[:, 11:16]]))
        else:
            assert np.isnan(feed(stream, [fed[:, 11:16]])).all()
        assert (stream.held, stream.nonfinite) == (0, 1)
        if policy == "reset":
            spared.reset()
        assert np.array_equal(feed(stream, [fed[:, 16:]]), feed(spared, [fed[:, 16:]]))
        assert same_state(stream, spared)
        assert stream.blocks == spared.blocks


def test_an_engine_that_fails_keeps_a_block_that_was_not_computed(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sessions("last")
    fed = random_input(session.contract, 16)
    with session.stream() as stream, session.stream() as spared:
        assert list(stream.feed([fed[:, :5]])) == []
        with monkeypatch.context() as patch:
            patch.setattr(OrtLoop, "_run", lambda self, name, out: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                list(stream.feed([fed[:, 5:8]]))
        assert stream.held == 5
        assert np.array_equal(feed(stream, [fed[:, 5:]]), feed(spared, [fed]))


def test_unknown_policy(sessions: Sessions) -> None:
    with pytest.raises(UsageError, match="on_nonfinite must be one of raise, skip, reset, got 'ignore'"):
        sessions("plain").stream(on_nonfinite="ignore")


LARGEST = {"float32": 3.4028235e38, "float16": 65504.0}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_is_finite(dtype: str) -> None:
    good = np.array([0, -0.0, 1, -1, LARGEST[dtype], -LARGEST[dtype], 6e-8], dtype)
    assert is_finite(good)
    assert is_finite(np.repeat(good[4:6], 1000))  # whose sum is no number
    assert is_finite(good[:0])
    for value in (np.nan, np.inf, -np.inf, -np.nan):
        for at in range(len(good)):
            bad = good.copy()
            bad[at] = value
            assert not is_finite(bad)
            assert not is_finite(np.stack([good, bad])[:, 1:] if at else np.stack([bad, good]))


def test_is_finite_in_bfloat16() -> None:
    """Every one of the 65,536 bit patterns, against float32's own idea."""
    bits = np.arange(2**16, dtype=np.uint16)
    finite = np.isfinite((bits.astype(np.uint32) << 16).view(np.float32))
    assert [is_finite(bits[i : i + 1]) for i in range(2**16)] == finite.tolist()
    assert is_finite(bits[finite])
    half = bits.view(np.float16)
    assert [is_finite(half[i : i + 1]) for i in range(2**16)] == np.isfinite(half).tolist()
    assert is_finite(np.array([-(2**62), 2**62]))
