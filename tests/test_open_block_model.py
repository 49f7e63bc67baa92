"""``append`` and ``commit`` are ``step`` cut in two, in float64: for any cut, in every row, with padding and without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import famexport.model as model_module
from famexport.config import FamConfig
from famexport.model import FamModel, Layer, Place, State
from famexport.rotary import Rope, rotate
from tests.test_model import (
    BASE,
    CORNERS,
    VOCAB,
    build,
    corner,
    exact,  # noqa: F401 - a fixture
    fresh_state,
    gap,
    one_thread,  # noqa: F401 - a fixture
    random_tokens,
    running_state,
    same,
    stream,
)

EXACT = 1e-12  # absolute, float64, logits of order 1; measured: 3e-14
FOUR = ["base", "no_fam", "no_memory", "no_fam_no_memory"]
OPEN = "past_open_length"
in_float64 = pytest.mark.usefixtures("exact")


def with_open(model: FamModel, state: State) -> State:
    """``state`` with an empty open block."""
    batch, dtype = len(state["past_count"]), model.model.embed_tokens.weight.dtype
    specs = model.contract(batch=batch, chunks=(1,)).open_states
    opened = {s.name: torch.zeros(s.sized(batch), dtype=torch.int64 if s.name == OPEN else dtype) for s in specs}
    return {**state, **opened}


def ones(model: FamModel, batch: int) -> State:
    """Nothing in it is zero, so that what is zeroed shows, nor full."""
    state = with_open(model, running_state(model, 3, batch))
    for name, tensor in state.items():
        if name.startswith("past_open") and name != OPEN:
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    return state


def rows_of(state: State, rows: Any) -> State:
    return {name: tensor[rows] for name, tensor in state.items()}


def append_block(model: FamModel, block: Tensor, state: State, chunk: int) -> tuple[Tensor, State]:
    """``step`` by chunks of ``chunk``, the last of them padded: logits [b, T, V] and the new state."""
    (b, size), out = block.shape, []
    for at in range(0, size, chunk):
        n = min(chunk, size - at)
        fed = torch.full((b, chunk), VOCAB - 1)
        fed[:, :n] = block[:, at : at + n]
        logits, new = model.append(fed, torch.full((b,), n), state)
        assert new.keys() == {name for name in state if name.startswith("past_open")}
        state = {**state, **new}
        out.append(logits[:, :n])
    new = model.commit(state)
    assert new.keys() == state.keys()
    return torch.cat(out, 1), new


def difference(config: FamConfig, chunk: int, blocks: int = 5, batch: int = 1) -> float:
    """Between ``step`` and ``append`` + ``commit``, in any logits or state, each going on from its own state."""
    model = build(config)
    tokens = random_tokens(config, blocks, batch)
    plain = fresh_state(model, batch)
    state, worst = with_open(model, plain), 0.0
    for block in tokens:
        wanted, plain = model.step(block, plain)
        got, state = append_block(model, block, state, chunk)
        worst = max(worst, gap(got, wanted), *(gap(state[name], plain[name]) for name in plain))
        worst = max(worst, *(float(state[name].abs().max()) for name in state.keys() - plain.keys()))  # it is empty
    return worst


@in_float64
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("name", CORNERS)
def test_a_step_is_its_tokens_appended_and_committed(name: str, chunk: int) -> None:
    assert difference(corner(name), chunk) < EXACT


@in_float64
@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("name", FOUR)
def test_a_batch_in_lockstep(name: str, chunk: int) -> None:
    assert difference(corner(name), chunk, batch=3) < EXACT


@in_float64
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("name", [*FOUR, "query_previous", "block_of_one"])
def test_rows_out_of_step_are_streams_of_their_own(name: str, chunk: int, batch: int) -> None:
    """Each row takes what it likes of each chunk, nothing at times, and the last starts again when it likes."""
    config, rng, blocks = corner(name), np.random.default_rng(5), 5
    model, size = build(config), config.block_size
    tokens = random_tokens(config, blocks, batch)
    alone = [[stream(model, tokens[: n + 1, r : r + 1]) for n in range(blocks)] for r in range(batch)]
    state, at, total = with_open(model, fresh_state(model, batch)), [0] * batch, blocks * size
    idle = unlike = parted = rounds = 0
    while min(at) < total:
        rounds += 1
        if rounds == 7:
            state = {key: tensor.clone() for key, tensor in state.items()}
            for tensor in state.values():
                tensor[batch - 1] = 0
            at[batch - 1] = 0
        length = [int(rng.integers(0, min(chunk, size - a % size, total - a) + 1)) for a in at]
        fed = torch.from_numpy(rng.integers(0, VOCAB, (batch, chunk)))
        for r, n in enumerate(length):
            fed[r, :n] = tokens[:, r].reshape(-1)[at[r] : at[r] + n]
        logits, new = model.append(fed, torch.tensor(length), state)
        before, state, full = state, {**state, **new}, []
        for r, n in enumerate(length):
            if n:
                wanted = alone[r][at[r] // size][0][-1, 0, at[r] % size :][:n]
                assert gap(logits[r, :n], wanted) < EXACT
            else:
                idle += 1
                assert same(rows_of(before, r), rows_of(state, r))
            at[r] += n
            full.append(n > 0 and at[r] % size == 0)
            assert state[OPEN][r] == (size if full[r] else at[r] % size)
        before, state = state, model.commit(state)
        for r in range(batch):
            if full[r]:
                wanted_state = alone[r][at[r] // size - 1][1]
                assert max(gap(state[key][r], wanted_state[key][0]) for key in wanted_state) < EXACT
                assert not any(state[key][r].any() for key in state.keys() - wanted_state.keys())
            else:
                assert same(rows_of(before, r), rows_of(state, r))
        parted += any(full) and not all(full)
        unlike += len(set(state["past_count"].tolist())) > 1
    assert idle > 5
    assert batch == 1 or min(parted, unlike) > 2


@in_float64
@pytest.mark.parametrize("name", FOUR)
def test_commit_leaves_rows_alone_that_are_not_full(name: str) -> None:
    model = build(corner(name))
    size = model.config.block_size
    state = ones(model, size + 1)
    state[OPEN] = torch.arange(size + 1)
    new = model.commit(state)
    assert same(rows_of(new, slice(size)), rows_of(state, slice(size)))
    assert not any(new[key][size].any() for key in new if key.startswith("past_open"))
    moved = [
        key for key in new if not key.startswith("past_open") and not torch.equal(new[key][size], state[key][size])
    ]
    assert set(moved) | {"past_count"} == {key for key in new if not key.startswith("past_open")}
    for i in range(model.config.num_hidden_layers if model.config.memory_segments else 0):
        for kind in ("key", "value"):
            memory, opened = new[f"past_{kind}_{i:02d}"][size], state[f"past_open_{kind}_{i:02d}"][size]
            assert torch.equal(memory[:, -size:], opened)
            assert torch.equal(memory[:, :-size], state[f"past_{kind}_{i:02d}"][size][:, size:])


@pytest.mark.parametrize("value", [0.0, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["base", "no_fam_no_memory"])
def test_padding_leaves_no_trace(name: str, value: float) -> None:
    """Bit for bit, whatever the padding holds: in a row that is idle, that takes a part, and whose block it fills."""
    model = build(corner(name), dtype=torch.float32)
    c, length = model.config, torch.tensor([0, 1, 2, 3])
    state = ones(model, 4)
    state[OPEN] = torch.tensor([2, 3, 1, 1])
    x = torch.randn(4, 3, c.hidden_size, generator=torch.Generator().manual_seed(0))
    logits, new = model.append(x, length, state)
    padded = x.clone()
    for row, n in enumerate(length.tolist()):
        padded[row, n:] = value
    other_logits, other = model.append(padded, length, state)
    assert same(new, other)
    for row, n in enumerate(length.tolist()):
        assert torch.equal(logits[row, :n], other_logits[row, :n])
    assert same(rows_of(new, 0), rows_of({key: state[key] for key in new}, 0))
    for key in new:
        if key != OPEN:
            for row, (start, n) in enumerate(zip(state[OPEN].tolist(), length.tolist(), strict=True)):
                kept = [slot for slot in range(c.block_size) if not start <= slot < start + n]
                assert torch.equal(new[key][row][:, kept], state[key][row][:, kept])
                assert n == 0 or not torch.equal(new[key][row], state[key][row])


@pytest.mark.parametrize("garbage", [-3e4, 1e20])
@pytest.mark.parametrize("name", FOUR)
def test_slots_that_are_not_written_yet_are_not_seen(name: str, garbage: float) -> None:
    model = build(corner(name), dtype=torch.float32)
    state = ones(model, 3)
    state[OPEN] = torch.tensor([0, 1, 2])
    fed, length = random_tokens(model.config, 1, batch=3)[0][:, :2], torch.tensor([1, 2, 2])
    spoilt = {key: tensor.clone() for key, tensor in state.items()}
    for key in spoilt:
        if key.startswith("past_open") and key != OPEN:
            for row, start in enumerate(state[OPEN].tolist()):
                spoilt[key][row, :, start:] = garbage
    logits, other = (model.append(fed, length, s)[0] for s in (state, spoilt))
    for row, n in enumerate(length.tolist()):
        assert torch.equal(logits[row, :n], other[row, :n])


@in_float64
@pytest.mark.parametrize("name", FOUR)
def test_last_logits_are_those_of_each_rows_last_position(name: str) -> None:
    model = build(corner(name))
    state, length = ones(model, 4), torch.tensor([1, 3, 2, 0])
    state[OPEN] = torch.tensor([3, 1, 0, 2])
    fed = random_tokens(model.config, 1, batch=4)[0][:, :3]
    (every, new), (last, last_new) = (model.append(fed, length, state, logits=which) for which in ("all", "last"))
    assert last.shape == (4, 1, VOCAB)
    assert gap(last[:3, 0], every[range(3), length[:3] - 1]) < 1e-12
    assert same(new, last_new)


def test_embeddings_folded_f0_and_the_callers_tensors() -> None:
    model = build(BASE, dtype=torch.float32)
    state = ones(model, 3)
    state[OPEN] = torch.tensor([0, 1, 4])
    state["past_count"] = torch.tensor([0, 1, 2])
    before = {key: tensor.clone() for key, tensor in state.items()}
    fed, length = random_tokens(BASE, 1, batch=3)[0][:, :3], torch.tensor([2, 3, 0])
    (logits, new), committed = model.append(fed, length, state), model.commit(state)
    by_embedding = model.append(model.model.embed_tokens(fed), length, state)
    assert torch.equal(by_embedding[0], logits)
    assert same(by_embedding[1], new)
    model.fold_fam()
    folded = model.append(fed, length, state)
    assert torch.equal(folded[0], logits)
    assert same(folded[1], new)
    assert same(model.commit(state), committed)
    for tensor in (*new.values(), *committed.values()):
        tensor.fill_(9)  # also not by way of storage that input and output share
    assert same(state, before)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_keeps_the_contracts_dtypes(precision: str, dtype: torch.dtype) -> None:
    """Measured, relative to the largest value: 0.02 and 0.003; the model's own ``step`` is as far from float32."""
    model = build(BASE, dtype=dtype)
    specs = model.contract(precision, 2, chunks=(3,)).all_states
    state = {s.name: torch.zeros(s.sized(2), dtype=getattr(torch, s.dtype)) for s in specs}
    tokens = random_tokens(BASE, 4, batch=2)
    for block, wanted in zip(tokens, stream(build(BASE, dtype=torch.float32), tokens)[0], strict=True):
        logits, state = append_block(model, block, state, 3)
        assert logits.dtype == torch.float32
        assert gap(logits, wanted) < (0.06 if dtype == torch.bfloat16 else 0.006) * float(wanted.abs().max())
        assert {s.name: (getattr(torch, s.dtype), s.sized(2)) for s in specs} == {
            key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()
        }


# Sabotage: the comparison above must notice


def positions_off_by_one(patch: pytest.MonkeyPatch) -> None:
    plain = Rope.at
    patch.setattr(Rope, "at", lambda self, positions: plain(self, (positions - 1).clamp(min=0)))


def future_slots_are_seen(patch: pytest.MonkeyPatch) -> None:
    plain = Place.__init__

    def init(self: Place, *args: Any) -> None:
        plain(self, *args)
        self.seen = torch.ones_like(self.seen)

    patch.setattr(Place, "__init__", init)


def own_slot_is_not_seen(patch: pytest.MonkeyPatch) -> None:
    plain = Place.__init__

    def init(self: Place, opened: Tensor, length: Tensor, chunk: int, rope: Rope) -> None:
        plain(self, opened, length, chunk, rope)
        self.seen = torch.arange(rope.block_size) < self.positions[..., None]

    patch.setattr(Place, "__init__", init)


def padding_is_written(patch: pytest.MonkeyPatch) -> None:
    plain = Place.__init__
    patch.setattr(Place, "__init__", lambda self, opened, length, *rest: plain(self, opened, length + 9, *rest))


def fam_reads_past_blocks(patch: pytest.MonkeyPatch) -> None:
    plain, seen = FamModel._past, []

    def past(self: FamModel, state: State) -> Any:
        for fam, residual, memory in plain(self, state):
            seen[:] = [memory]
            yield fam, residual, memory

    def commit(self: Layer, fam: Tensor, residual: Tensor, opened: Any, rope: Rope) -> Tensor:
        q, k, v = self.self_attn.qkv(self.input_layernorm(fam))
        keys, values = torch.cat([k, seen[0][0], opened[0]], 2), torch.cat([v, seen[0][1], opened[1]], 2)
        keys = rotate(keys, rope.column)
        return self._finish(residual, model_module.attend(rotate(q, rope.fam_query), keys, values))

    patch.setattr(FamModel, "_past", past)
    patch.setattr(Layer, "commit", commit)


def first_residual_is_kept(patch: pytest.MonkeyPatch) -> None:
    plain = Layer.commit
    patch.setattr(Layer, "commit", lambda self, fam, residual, *rest: plain(self, fam, fam, *rest))


def fam_query_is_a_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rope, "fam_query", property(lambda self: self.prompt))


SABOTAGE: list[Callable[[pytest.MonkeyPatch], None]] = [
    positions_off_by_one,
    future_slots_are_seen,
    own_slot_is_not_seen,
    padding_is_written,
    fam_reads_past_blocks,
    first_residual_is_kept,
    fam_query_is_a_key,
]


@in_float64
@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_sabotage_is_caught(monkeypatch: pytest.MonkeyPatch, sabotage: Callable[..., None]) -> None:
    config = replace(BASE, block_size=5, fam_length=3)  # by chunks of 3 the last is padded
    assert difference(config, 3) < EXACT
    sabotage(monkeypatch)
    assert difference(config, 3) > 1e-3
