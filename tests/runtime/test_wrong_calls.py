"""R7: a wrong call is a ContractError that names the tensor; the state does not move, the next good block is unharmed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from streaming import Arrays, random_input, same_state, state_bytes, step_all

from famexport.errors import ContractError

BACKENDS = ["ort-cpu", "torch"]


def tokens(*shape: int, dtype: Any = np.int64, fill: int = 1) -> np.ndarray:
    return np.full(shape, fill, dtype)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


# bundle, the argument, what the message must say
STEP: dict[str, tuple[str, Any, str]] = {
    "int32": ("plain", tokens(1, 8, dtype=np.int32), "tokens is int32, expected int64"),
    "uint64": ("plain", tokens(1, 8, dtype=np.uint64), "tokens is uint64, expected int64"),
    "big endian": ("plain", tokens(1, 8, dtype=">i8"), "tokens is >i8, expected int64"),
    "bool": ("plain", tokens(1, 8, dtype=bool), "tokens is bool, expected int64"),
    "float64": ("plain", tokens(1, 8, dtype=float), "tokens is float64, expected int64"),
    "list of floats": ("plain", [[0.5] * 8], "tokens is float64, expected int64"),
    "ragged list": ("plain", [[1, 2], [3]], "tokens is list that is no array"),
    "None": ("plain", None, "tokens is object"),
    "text": ("plain", "a stone", "tokens is <U7"),
    "objects": ("plain", np.array([[1] * 8], object), "tokens is object"),
    "T - 1": ("plain", tokens(1, 7), r"tokens has shape \[1, 7\], expected \[1, 8\]"),
    "T + 1": ("plain", tokens(1, 9), r"tokens has shape \[1, 9\], expected \[1, 8\]"),
    "no batch axis": ("plain", tokens(8), r"tokens has shape \[8\], expected \[1, 8\]"),
    "an axis too many": ("plain", tokens(1, 8, 1), r"tokens has shape \[1, 8, 1\]"),
    "no rows": ("plain", tokens(0, 8), r"tokens has shape \[0, 8\], expected \[1, 8\]"),
    "a row too many": ("plain", tokens(2, 8), r"tokens has shape \[2, 8\], expected \[1, 8\]"),
    "a row too few": ("rows", tokens(2, 8), r"tokens has shape \[2, 8\], expected \[3, 8\]"),
    "one row to broadcast": ("rows", tokens(1, 8), r"tokens has shape \[1, 8\], expected \[3, 8\]"),
    "transposed shape": ("rows", tokens(8, 3), r"tokens has shape \[8, 3\], expected \[3, 8\]"),
    "transposed": ("rows", tokens(8, 3).T, "tokens is not contiguous"),
    "every second": ("plain", tokens(1, 16)[:, ::2], "tokens is not contiguous"),
    "backwards": ("plain", tokens(1, 8)[:, ::-1], "tokens is not contiguous"),
    "broadcast view": ("rows", np.broadcast_to(tokens(1, 8), (3, 8)), "tokens is not contiguous"),
    "id = V": ("plain", tokens(1, 8, fill=96), "token id 96 is not in the vocabulary; expected 0 to 95"),
    "id = -1": ("plain", tokens(1, 8, fill=-1), "token id -1 is not in the vocabulary; expected 0 to 95"),
    "id = 2**62": ("plain", tokens(1, 8, fill=2**62), f"token id {2**62} is not in the vocabulary"),
    "one id of many": ("rows", np.array([[1] * 8, [1] * 8, [1] * 7 + [-5]]), "token id -5"),
    "tokens for embeddings": ("embeds", tokens(1, 8), "inputs_embeds is int64, expected float32.*has shape"),
    "float64 embeddings": ("embeds", np.zeros((1, 8, 32)), "inputs_embeds is float64, expected float32"),
    "float16 embeddings": ("embeds", np.zeros((1, 8, 32), np.float16), "inputs_embeds is float16"),
    "width of embeddings": ("embeds", np.zeros((1, 8, 31), np.float32), r"inputs_embeds has shape \[1, 8, 31\]"),
    "Fortran embeddings": ("embeds", np.zeros((1, 8, 32), np.float32, order="F"), "inputs_embeds is not contiguous"),
}
OUT: dict[str, tuple[str, Any, str]] = {
    "float64": ("plain", np.zeros((1, 8, 96)), "logits is float64, expected float32"),
    "a list": ("plain", [0.0], "logits is list, expected a numpy array"),
    "T + 1": ("plain", np.zeros((1, 9, 96), np.float32), r"logits has shape \[1, 9, 96\], expected \[1, 8, 96\]"),
    "no batch axis": ("plain", np.zeros((8, 96), np.float32), r"logits has shape \[8, 96\]"),
    "all rows for the last": ("last", np.zeros((1, 8, 96), np.float32), r"logits has .* expected \[1, 1, 96\]"),
    "wrong batch": ("rows", np.zeros((1, 8, 96), np.float32), r"logits has .* expected \[3, 8, 96\]"),
    "transposed": ("plain", np.zeros((1, 96, 8), np.float32).transpose(0, 2, 1), "logits is not contiguous"),
    "read-only": ("plain", read_only(np.zeros((1, 8, 96), np.float32)), "logits: out is read-only"),
}
FEED: dict[str, tuple[str, Any, str]] = {
    "floats": ("plain", [0.5, 1.0], r"tokens is float64 \[1, 2\], expected int64 \[1, n\]"),
    "bools": ("plain", tokens(4, dtype=bool), "tokens is bool"),
    "ragged": ("plain", [[1, 2], [3]], "tokens is list that is no array"),
    "a scalar": ("plain", 5, r"tokens is int64 \[\], expected int64 \[1, n\]"),
    "no rows": ("plain", tokens(0, 5), r"tokens is int64 \[0, 5\], expected int64 \[1, n\]"),
    "a row too many": ("plain", tokens(2, 5), r"tokens is int64 \[2, 5\], expected int64 \[1, n\]"),
    "one row for three": ("rows", tokens(5), r"tokens is int64 \[5\], expected int64 \[3, n\]"),
    "rows and columns": ("rows", tokens(5, 3), r"tokens is int64 \[5, 3\], expected int64 \[3, n\]"),
    "an axis too many": ("plain", tokens(1, 5, 1), r"tokens is int64 \[1, 5, 1\]"),
    "id = V at the end": ("plain", [1] * 19 + [96], "token id 96 is not in the vocabulary; expected 0 to 95"),
    "a negative id": ("plain", [1] * 19 + [-96], "token id -96"),
    "uint64 past int64": ("plain", np.array([1, 2**64 - 1], np.uint64), f"token id {2**64 - 1}"),
    "float64 embeddings": ("embeds", np.zeros((1, 3, 32)), r"inputs_embeds is float64 \[1, 3, 32\], expected float32"),
    "width of embeddings": ("embeds", np.zeros((1, 3, 31), np.float32), r"inputs_embeds .* expected .*\[1, n, 32\]"),
    "tokens for embeddings": ("embeds", tokens(1, 5), r"inputs_embeds is int64"),
}


def change(name: str, make: Callable[[np.ndarray], Any]) -> Callable[[Arrays], Any]:
    return lambda state: {**state, name: make(state[name])}


def longer(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, array[:, :, -8:]], axis=2)


def transposed(array: np.ndarray) -> np.ndarray:
    return np.asfortranarray(array)  # the same values, shape and dtype


STATE: dict[str, tuple[str, Callable[[Arrays], Any], str]] = {
    "M - 1 blocks": (
        "plain",
        change("past_key_00", lambda a: a[:, :, 8:].copy()),
        "past_key_00 has shape .*8, 8.* exp",
    ),
    "M + 1 blocks": ("plain", change("past_value_01", longer), r"past_value_01 has shape \[1, 2, 24, 8\]"),
    "no rows": ("plain", change("past_fam_01", lambda a: a[:0].copy()), r"past_fam_01 has shape \[0, 4, 32\]"),
    "a row too few": (
        "rows",
        change("past_count", lambda a: a[:1].copy()),
        r"past_count has shape \[1\], expected \[3\]",
    ),
    "another batch": ("plain", change("past_fam_00", lambda a: np.repeat(a, 3, 0)), r"past_fam_00 has shape \[3"),
    "float16": (
        "plain",
        change("past_key_01", lambda a: a.astype(np.float16)),
        "past_key_01 is float16, expected float32",
    ),
    "float64": ("plain", change("past_fam_00", lambda a: a.astype(float)), "past_fam_00 is float64"),
    "NaN": ("plain", change("past_fam_00", lambda a: a * np.float32(np.nan)), "past_fam_00 has NaN or infinity"),
    "infinity": (
        "bf16",
        change("past_value_00", lambda a: np.where(a == a[0, 0, 0, 0], np.float32(np.inf), a)),
        "past_value_00 has NaN or infinity",
    ),
    "float32 for float16": (
        "fp16",
        change("past_key_00", lambda a: a.astype(np.float32)),
        "past_key_00 is float32, exp",
    ),
    "bits for bfloat16": ("bf16", change("past_key_00", lambda a: a.astype(np.uint16)), "past_key_00 is uint16, exp"),
    "finer than bfloat16": (
        "bf16",
        change("past_value_00", lambda a: a + np.float32(1e-3)),
        "past_value_00 is a bfloat16",
    ),
    "int32 count": ("plain", change("past_count", lambda a: a.astype(np.int32)), "past_count is int32, expected int64"),
    "transposed": ("plain", change("past_value_00", transposed), "past_value_00 is not contiguous"),
    "a list": ("plain", change("past_fam_00", lambda a: a.tolist()), "past_fam_00 is list, expected a numpy array"),
    "missing": ("plain", lambda s: {k: v for k, v in s.items() if k != "past_fam_01"}, "missing state past_fam_01"),
    "unknown": ("plain", lambda s: {**s, "past_fam_02": s["past_fam_01"]}, "unknown state past_fam_02"),
    "nothing": ("plain", lambda s: {}, "7 problems: missing state past_count; missing state past_fam_00"),
    "several": (
        "plain",
        lambda s: {**change("past_count", lambda a: a.astype(float))(s), "x": s["past_count"], "past_fam_00": None},
        "3 problems: unknown state x; past_count is float64, expected int64; past_fam_00 is NoneType",
    ),
    "another model's": ("no_fam", lambda s: {**s, "past_fam_00": s["past_count"]}, "unknown state past_fam_00"),
}


def check(session: Any, call: Callable[[Any], Any], says: str) -> None:
    """``call`` is refused on a stream in the middle of its life, and might as well not have happened."""
    contract = session.contract
    with session.stream() as stream, session.stream() as spared:
        before = random_input(contract, 32, stream.batch, seed=1)
        after = random_input(contract, 16, stream.batch, seed=2)
        assert np.array_equal(step_all(stream, before), step_all(spared, before))
        held, blocks = state_bytes(stream), stream.blocks
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                with pytest.raises(ContractError, match=says):
                    call(stream)
        assert state_bytes(stream) == held
        assert stream.blocks == blocks
        assert np.array_equal(step_all(stream, after), step_all(spared, after))
        assert same_state(stream, spared)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STEP)
def test_step(sessions: Callable[..., Any], case: str, backend: str) -> None:
    name, wrong, says = STEP[case]
    session = sessions(name, backend)
    shape = session.contract.outputs[0].sized(session.stream().batch)
    out = np.full(shape, 7, np.float32)
    check(session, lambda stream: stream.step(wrong), says)
    check(session, lambda stream: stream.step(wrong, out), says)
    assert (out == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", OUT)
def test_out(sessions: Callable[..., Any], case: str, backend: str) -> None:
    name, wrong, says = OUT[case]
    session = sessions(name, backend)
    good = random_input(session.contract, 8, session.stream().batch)
    kept = np.array(wrong, copy=True)
    check(session, lambda stream: stream.step(good, wrong), says)
    check(session, lambda stream: list(stream.feed([good], wrong)), says)
    assert np.array_equal(np.asarray(wrong), kept)


@pytest.mark.parametrize("case", FEED)
def test_feed(sessions: Callable[..., Any], case: str) -> None:
    name, wrong, says = FEED[case]
    check(sessions(name), lambda stream: list(stream.feed([wrong])), says)


@pytest.mark.parametrize("case", FEED)
def test_feed_in_an_open_block(sessions: Callable[..., Any], case: str) -> None:
    """The pieces before the wrong one count; nothing of the wrong one does; the rest follows as if it had not been."""
    name, wrong, says = FEED[case]
    session = sessions(name)
    with session.stream() as stream, session.stream() as spared:
        fed = random_input(session.contract, 40, stream.batch, seed=3)
        wanted = np.concatenate(list(spared.feed([fed])), axis=1)
        got = list(stream.feed([fed[:, :11]]))
        with pytest.raises(ContractError, match=says):
            for part in stream.feed([fed[:, 11:13], fed[:, 13:21], wrong]):
                got.append(part)
        got += stream.feed([fed[:, 21:]])
        assert np.array_equal(np.concatenate(got, axis=1), wanted)
        assert same_state(stream, spared)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STATE)
def test_load_state(sessions: Callable[..., Any], case: str, backend: str) -> None:
    name, spoil, says = STATE[case]
    check(sessions(name, backend), lambda stream: stream.load_state(spoil(stream.state())), says)


def test_a_refused_state_keeps_the_open_block(sessions: Callable[..., Any]) -> None:
    session = sessions("plain")
    with session.stream() as stream:
        fed = random_input(session.contract, 24, seed=4)
        wanted = step_all(session.stream(), fed)
        got = list(stream.feed([fed[:, :13]]))
        with pytest.raises(ContractError):
            stream.load_state({})
        got += stream.feed([fed[:, 13:]])
        assert np.array_equal(np.concatenate(got, axis=1), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_read_only_input_is_good_input(sessions: Callable[..., Any], backend: str) -> None:
    """A mapped file is read-only, and a step only reads."""
    session = sessions("plain", backend)
    block = random_input(session.contract, 8)
    wanted = session.stream().step(block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(session.stream().step(read_only(block)), wanted)
