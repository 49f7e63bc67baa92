"""The loop over device memory equals the one over host memory, bit for bit, on a CUDA layer over host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda, view
from streaming import random_cuts, random_input, state_bytes, step_all

from famexport.contract import OPEN_LENGTH, present_name
from famexport.errors import FamExportError, IncompatibleError, NonFiniteError, UsageError
from famexport.runtime.backend import STORAGE, Backend, Loop
from famexport.runtime.device import DeviceLoop
from famexport.runtime.device_state import ALIGNMENT
from famexport.runtime.session import Session

Sessions = Callable[..., Any]


class CpuEngine:
    """The graphs of a bundle by onnxruntime's CPU sessions, on raw addresses."""

    capturable = True

    def __init__(self, backend: Any, batch: int, cuda: FakeCuda, aliased: bool = False) -> None:
        self.sessions, self.contract, self.batch, self.cuda = backend.sessions, backend.contract, batch, cuda
        self.names = tuple(self.sessions)
        self.shares, self.fails, self.spoil, self.elsewhere, self.closed = aliased, False, -1, False, False

    def aliased(self, graph: str) -> Mapping[str, str]:
        new = self.contract.graph(graph).new
        return {present_name(s.name): s.name for s in new if s.dtype in ("float32", "float16")} if self.shares else {}

    def enqueue(self, graph: str, addresses: Mapping[str, int], stream: int) -> None:
        assert stream == self.cuda.stream
        if self.fails:
            for spec in self.contract.graph(graph).new:  # half-way through
                view(addresses[present_name(spec.name)], np.uint8, (spec.nbytes(self.batch),))[...] = 0x55
            raise FamExportError("the engine failed")
        work = lambda: self.compute(graph, dict(addresses))  # noqa: E731
        if self.elsewhere:  # an engine that ignores the stream: nothing of it is captured
            work()
        else:
            self.cuda.submit(work)

    def compute(self, graph: str, addresses: Mapping[str, int]) -> None:
        io = self.contract.graph(graph)
        arrays = {s.name: view(addresses[s.name], STORAGE[s.dtype], s.sized(self.batch)) for s in io.taken + io.given}
        given = self.sessions[graph].run([s.name for s in io.given], {s.name: arrays[s.name] for s in io.taken})
        for spec, array in zip(io.given, given, strict=True):
            arrays[spec.name][...] = array
            if self.spoil >= 0 and spec.name.startswith("present_") and spec.dtype == "float32":
                arrays[spec.name][self.spoil, ..., -1] = np.inf

    def close(self) -> None:
        self.closed = True


class FakeBackend(Backend):
    name, provider, device = "fake", "fake", "fake"

    def __init__(self, session: Any, capture: bool = True, aliased: bool = False) -> None:
        super().__init__(session.contract, session.backend.precision)
        self.inner, self.capture, self.aliased, self.cuda = session.backend, capture, aliased, FakeCuda()

    def _open(self, batch: int) -> Loop:
        engine = CpuEngine(self.inner, batch, self.cuda, self.aliased)
        return DeviceLoop(self.contract, batch, engine, self.cuda, capture=self.capture)


def over(session: Any, **options: bool) -> Session:
    return Session(session.bundle, FakeBackend(session, **options))


@pytest.fixture(params=["captured", "uncaptured", "aliased"])
def kind(request: pytest.FixtureRequest) -> dict[str, bool]:
    return {"captured": {}, "uncaptured": {"capture": False}, "aliased": {"aliased": True}}[request.param]


@pytest.mark.parametrize("name", ["plain", "rows", "fp16", "all", "all_rows"])
def test_equals_the_host_loop(sessions: Sessions, name: str, kind: dict[str, bool]) -> None:
    session = sessions(name)
    with over(session, **kind).stream() as got, session.stream() as wanted:
        fed = random_input(session.contract, 50 * session.contract.block_size, got.batch)
        assert np.array_equal(step_all(got, fed), step_all(wanted, fed))
        assert state_bytes(got) == state_bytes(wanted)
        assert got._loop.info["captured"] is kind.get("capture", True)
        cuts = random_cuts(fed[:, : 9 * session.contract.block_size + 3], 1)
        parts = [np.concatenate(list(stream.feed(cuts)), axis=1) for stream in (got, wanted)]
        assert np.array_equal(*parts)
        assert state_bytes(got) == state_bytes(wanted)


@pytest.mark.parametrize("name", ["rows", "all_rows"])
def test_a_pool_equals_the_host_loops(sessions: Sessions, name: str, kind: dict[str, bool]) -> None:
    """Rows that come and go: commit of some rows, zero and truncate."""
    session = sessions(name)
    results = []
    for opened in (over(session, **kind), session):
        with opened.pool() as pool:
            streams, given = [pool.open() for _ in range(3)], []
            for i in range(12):
                stream = streams[i % 3]
                given += list(stream.feed([random_input(session.contract, 5 + 3 * (i % 4), 1, seed=i)[0]]))
                if i == 6:
                    stream.close()
                    streams[i % 3] = pool.open()
            results.append((given, [s.state() for s in streams]))
    (a, states_a), (b, states_b) = results
    assert len(a) == len(b)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    for x, y in zip(states_a, states_b, strict=True):
        assert all(np.array_equal(x[n], y[n]) for n in x)


def test_commit_zero_truncate_write(sessions: Sessions, kind: dict[str, bool]) -> None:
    session = sessions("all_rows")
    device, host = over(session, **kind)._open(None), session._open(None)
    rng, contract = np.random.default_rng(0), session.contract
    for loop in (device, host):
        fed = np.arange(9).reshape(3, 3)
        logits = np.empty((3, 3, contract.vocab_size), np.float32)
        for rows in ([0, 2], [1], None, []):
            loop.append(fed, np.array([3, 1, 0]), logits)
            loop.commit(rows)
        loop.truncate([0, 2], 2)
        loop.zero([1])
    assert all(np.array_equal(device.tensor(s.name), host.tensor(s.name)) for s in contract.all_states)
    assert device.tensor(OPEN_LENGTH).tolist() == [2, 0, 2]
    row = {s.name: (rng.standard_normal((1, *s.shape[1:])) * 9).astype(STORAGE[s.dtype]) for s in contract.all_states}
    for loop in (device, host):
        loop.write(row, 1)
    for spec in contract.all_states:
        assert np.array_equal(device.tensor(spec.name), host.tensor(spec.name))
        assert np.array_equal(device.tensor(spec.name, 1), row[spec.name])
    device.close()


@pytest.mark.parametrize("name", ["plain", "all_rows"])
def test_warm_up_restores_the_state(sessions: Sessions, name: str, kind: dict[str, bool]) -> None:
    session = sessions(name)
    loop = over(session, **kind)._open(None)
    rng = np.random.default_rng(1)
    state = {s.name: (rng.standard_normal(s.shape) * 9).astype(STORAGE[s.dtype]) for s in session.contract.all_states}
    loop.write(state)
    loop.warm_up()
    assert all(np.array_equal(loop.tensor(n), a) for n, a in state.items())
    loop.close()


def test_warm_up_copies_no_state_of_zeros(sessions: Sessions, kind: dict[str, bool]) -> None:
    """A copy would be what a loop needs most memory for. Its buffers hold what is left over when it is warmed up."""
    session = sessions("all_rows")
    opened = over(session, **kind)
    loop, mallocs = opened._open(None), []
    for written in (False, True):
        if written:
            loop.write({s.name: np.ones(s.shape, STORAGE[s.dtype]) for s in session.contract.all_states})
        before = opened.backend.cuda.mallocs
        loop.warm_up()
        mallocs.append(opened.backend.cuda.mallocs - before)
        assert all((loop.tensor(s.name) == written).all() for s in session.contract.all_states)
    assert mallocs == [0, 1]
    loop.close()


def test_a_stream_that_has_run_is_warmed_up_again_as_it_is(sessions: Sessions, kind: dict[str, bool]) -> None:
    with over(sessions("plain"), **kind).stream() as stream:
        step_all(stream, random_input(stream.contract, 16))
        before = state_bytes(stream)
        stream._loop.warm_up()
        assert state_bytes(stream) == before


def test_a_failing_engine_leaves_the_state(sessions: Sessions) -> None:
    for options in ({"capture": False}, {"capture": False, "aliased": True}):
        with over(sessions("plain"), **options).stream() as stream:
            fed = random_input(stream.contract, 16)
            step_all(stream, fed)
            before = state_bytes(stream)
            stream._loop._engine.fails = True
            with pytest.raises(FamExportError, match="the engine failed"):
                step_all(stream, fed)
            assert state_bytes(stream) == before
            stream._loop._engine.fails = False
            step_all(stream, fed)


def test_a_capture_that_misses_the_engine_is_not_used(sessions: Sessions) -> None:
    session = sessions("plain")
    with over(session).stream() as got, session.stream() as wanted:
        got._loop._engine.elsewhere = True
        fed = random_input(session.contract, 80)
        assert np.array_equal(step_all(got, fed), step_all(wanted, fed))
        assert got._loop.info["captured"] is False
        assert "does not compute" in got._loop.info["uncaptured_reason"]


def test_nonfinite_rows_are_found(sessions: Sessions, kind: dict[str, bool]) -> None:
    with over(sessions("rows"), **kind).stream() as stream:
        fed = random_input(stream.contract, 16, 3)
        step_all(stream, fed)
        before = state_bytes(stream)
        stream._loop._engine.spoil = 1
        with pytest.raises(NonFiniteError, match="in row 1,"):
            step_all(stream, fed)
        assert state_bytes(stream) == before


def test_nothing_is_allocated_after_warm_up_and_all_is_freed(sessions: Sessions, kind: dict[str, bool]) -> None:
    session = over(sessions("all"), **kind)
    cuda = session.backend.cuda
    stream = session.stream()
    fed = random_input(stream.contract, 200)
    list(stream.feed(random_cuts(fed, 0)))
    mallocs, live, graphs = cuda.mallocs, len(cuda.live), len(cuda.graphs)
    list(stream.feed(random_cuts(fed, 1)))
    step_all_after = cuda.mallocs, len(cuda.live), len(cuda.graphs)
    assert step_all_after == (mallocs, live, graphs)
    engine = stream._loop._engine
    stream.close()
    assert not cuda.live
    assert not cuda.host
    assert not cuda.graphs
    assert engine.closed
    assert cuda.owners == 1


@pytest.mark.parametrize("where", ["together", "in each other", "not aligned"])
def test_buffers_that_lie_in_each_other_are_refused(sessions: Sessions, where: str) -> None:
    loop = over(sessions("plain"))._open(None)
    (first, *_) = loop._memory.keys("block_step")
    good = loop._memory.addresses(first)
    wrong = {"together": 0, "in each other": ALIGNMENT, "not aligned": 8}[where]
    at = {"together": "tokens", "in each other": "present_key_00", "not aligned": "tokens"}[where]
    loop._memory._known[first] = {**good, ("tokens" if where == "not aligned" else "past_fam_00"): good[at] + wrong}
    with pytest.raises(FamExportError, match="of block_step overlap, or are not aligned: "):
        loop.warm_up()
    loop._memory._known[first] = good
    loop.warm_up()
    loop.close()


def test_a_loop_that_another_thread_closed_touches_nothing(sessions: Sessions, kind: dict[str, bool]) -> None:
    """Its memory may be somebody else's by then."""
    opened = over(sessions("all_rows"), **kind)
    loop, contract, cuda = opened._open(None), opened.contract, opened.backend.cuda
    fed, out = random_input(contract, 8, 3), np.empty((3, 8, contract.vocab_size), np.float32)
    loop.advance(fed, out)
    _freed = list(cuda.live.values())  # held, or a loop that is wrong would crash here
    calls_before = len(cuda.calls)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(loop.close).result()
    state = {s.name: np.zeros(s.shape, STORAGE[s.dtype]) for s in contract.all_states}
    calls: list[Callable[[], Any]] = [
        lambda: loop.advance(fed, out),
        lambda: loop.append(fed[:, :3], np.full(3, 3), out[:, :3]),
        loop.end_block,
        loop.commit,
        loop.read,
        lambda: loop.tensor("past_fam_00", 1),
        lambda: loop.write(state),
        lambda: loop.truncate([0], 0),
        lambda: loop.zero(None),
        loop.warm_up,
        loop.time_device,
    ]
    for call in calls:
        with pytest.raises(UsageError, match="the stream was closed meanwhile; open another"):
            call()
    assert len(cuda.calls) == calls_before
    assert not cuda.live
    loop.close()


def test_only_a_states_own_successor_may_share(sessions: Sessions) -> None:
    session, cuda = sessions("plain"), FakeCuda()
    engine = CpuEngine(session.backend, 1, cuda)
    engine.aliased = lambda graph: {"present_fam_00": "past_fam_01"}  # type: ignore[method-assign]
    with pytest.raises(IncompatibleError, match="own successor"):
        DeviceLoop(session.contract, 1, engine, cuda)
