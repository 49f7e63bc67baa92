"""The graphs made for CUDA and their loop, attacked: random calls against the host loop, rows that must not disturb each
other, an ONNX Runtime that captures as the real one does, and bundles that are not kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_ring import CpuRing, CpuRingBackend, RingBackend
from fake_cuda import FakeCuda, view
from fake_ort import FakeSession, install

import famexport as fx
from famexport.bundle import Bundle, open_bundle
from famexport.checkpoint import init_checkpoint
from famexport.config import preset
from famexport.contract import OPEN_LENGTH
from famexport.errors import BundleError, FamExportError
from famexport.manifest import GraphFiles
from famexport.runtime.device_weights import DeviceWeights
from famexport.runtime.layout import COUNT
from famexport.runtime.ort_ring import OrtCudaRing
from famexport.runtime.session import Session, open_backend

CASES: dict[str, dict[str, Any]] = {
    "memory 2": {"num_hidden_layers": 1, "memory_segments": 2},
    "memory 1": {"num_hidden_layers": 1, "memory_segments": 1},
    "no memory": {"num_hidden_layers": 1, "memory_segments": 0},
    "no fam": {"num_hidden_layers": 1, "memory_segments": 2, "fam_length": 0},
}
ROWS, CHUNKS = 3, (1, 3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(case: str = "memory 2") -> Path:
        if case not in made:
            folder = tmp_path_factory.mktemp("ring")
            init_checkpoint(folder / "ckpt", preset("tiny", model_type="fam", **CASES[case]), seed=3)
            options = {"graphs": "all", "chunks": CHUNKS, "batch": ROWS, "parity_blocks": 2}
            fx.export_bundle(folder / "ckpt", folder / "bundle", **options)
            made[case] = folder / "bundle"
        return made[case]

    return get


@pytest.fixture
def ring_backend() -> RingBackend:
    """What ``test_fused_ring.py`` has other graphs for."""
    return CpuRingBackend


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return float(np.abs(a - b).max(initial=0)) <= 2e-5 * max(float(np.abs(b).max(initial=0)), 1.0)


def equal_states(device: Any, host: Any, row: int | None = None) -> list[str]:
    return [s.name for s in host.contract.all_states if not close(device.tensor(s.name, row), host.tensor(s.name, row))]


# Random calls


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_calls_equals_the_host_loop(
    exported: Callable[..., Path], case: str, seed: int, ring_backend: RingBackend
) -> None:
    """What a pool does, and more: rows out of step, idle ones, commits of some rows, writes, resets, truncations,
    snapshots in the middle of a block and before the memory is full."""
    with fx.load(exported(case), "ort-cpu") as session:
        host, device = session._open(None), ring_backend(session).open()
        contract, rng = session.contract, np.random.default_rng(seed)
        size, vocab = contract.block_size, contract.vocab_size
        held, saved = np.zeros(ROWS, np.int64), [(host.read(row), 0) for row in range(ROWS)]

        def some(rows: Any) -> list[int]:
            return [int(row) for row in rows if rng.random() < 0.7]

        for turn in range(120):
            kind = rng.choice(["block", "append", "append", "append", "write", "save", "zero", "truncate"])
            if kind == "block":
                fed, outs = rng.integers(0, vocab, (ROWS, size)), []
                rows = some(np.flatnonzero(held == 0))
                for loop in (host, device):
                    outs.append(np.zeros((ROWS, size, vocab), np.float32))
                    loop.advance(fed, outs[-1], rows)
                    loop.commit(rows)
                assert all(close(outs[1][row], outs[0][row]) for row in rows), turn
            elif kind == "append":
                width = int(rng.choice(CHUNKS))
                fed, outs = rng.integers(0, vocab, (ROWS, width)), []
                length = np.array([rng.integers(0, min(width, size - h) + 1) for h in held])
                rows = None if rng.random() < 0.6 else some(range(ROWS))
                for loop in (host, device):
                    outs.append(np.zeros((ROWS, width, vocab), np.float32))
                    loop.append(fed, length, outs[-1])
                    loop.commit(rows)
                going = range(ROWS) if rows is None else rows
                assert all(close(outs[1][r, : length[r]], outs[0][r, : length[r]]) for r in going), turn
                for row in going:
                    held[row] += length[row]
                if (held == size).any() or rng.random() < 0.2:  # also where no row is full
                    for loop in (host, device):
                        loop.end_block()
                    refused = [int(r) for r in np.flatnonzero(held == size) if rng.random() < 0.3]
                    for loop in (host, device):
                        loop.commit([r for r in range(ROWS) if r not in refused] if refused else None)
                        for row in refused:
                            loop.truncate([row], size - 1)
                    held[held == size] = 0
                    held[refused] = size - 1
            elif kind == "write":
                source, row = rng.integers(0, ROWS, 2)
                state, length_then = saved[source]
                for loop in (host, device):
                    loop.write(state, int(row))
                held[row] = length_then
            elif kind == "save":
                row = int(rng.integers(ROWS))
                saved[row] = device.read(row), int(held[row])
            elif kind == "zero":
                rows = some(range(ROWS))
                for loop in (host, device):
                    loop.zero(rows)
                held[rows] = 0
            else:
                row = int(rng.integers(ROWS))
                held[row] = rng.integers(0, held[row] + 1)
                for loop in (host, device):
                    loop.truncate([row], int(held[row]))
            assert not equal_states(device, host), (turn, kind)
            assert np.array_equal(device.tensor(OPEN_LENGTH), held)


def test_streams_of_a_pool_are_restored_in_the_middle_of_blocks(
    exported: Callable[..., Path], ring_backend: RingBackend
) -> None:
    with fx.load(exported(), "ort-cpu") as session:
        ring, rng = Session(session.bundle, ring_backend(session)), np.random.default_rng(9)
        with session.pool() as host, ring.pool() as device:
            pairs = [(host.open(), device.open()) for _ in range(ROWS)]
            snapshots = [(a.snapshot(), b.snapshot()) for a, b in pairs]
            for step in range(60):
                row = int(rng.integers(ROWS))
                piece = rng.integers(0, session.contract.vocab_size, int(rng.integers(1, 21)))
                for a, b in zip(*(list(s.feed([piece])) for s in pairs[row]), strict=True):
                    assert close(b, a), step
                if step % 5 == 0:
                    snapshots[row] = tuple(s.snapshot() for s in pairs[row])
                if step % 7 == 0:
                    target = int(rng.integers(ROWS))
                    for stream, saved in zip(pairs[target], snapshots[row], strict=True):
                        stream.restore(saved, any_engine=True)


@pytest.mark.parametrize("policy", ["skip", "reset"])
@pytest.mark.parametrize("bad", range(ROWS))
def test_a_spoilt_row_of_a_pool_leaves_the_others_alone(
    exported: Callable[..., Path], policy: str, bad: int, ring_backend: RingBackend
) -> None:
    """In append_step, and in the block_step of rows that are at a boundary."""
    with fx.load(exported(), "ort-cpu") as session:
        ring, rng = Session(session.bundle, ring_backend(session)), np.random.default_rng(10)
        with session.pool() as host, ring.pool(on_nonfinite=policy) as device:
            pairs = [(host.open(), device.open()) for _ in range(ROWS)]
            for step in range(40):
                spoilt = step in (5, 6, 17, 29)
                ring.backend.engine.spoil = bad if spoilt else -1
                for row, (a, b) in enumerate(pairs):
                    piece = rng.integers(0, session.contract.vocab_size, int(rng.choice([1, 3, 8])))[: a.room]
                    before = b.state()
                    b.put(piece)
                    if spoilt and row == bad:
                        while b.queued:  # chunk by chunk, each of them spoilt
                            device.run()
                        b.take()
                        if policy == "skip":
                            after = b.state()
                            assert all(np.array_equal(after[name], before[name]) for name in after)
                        else:
                            a.reset()
                    else:
                        a.put(piece)
                        while b.queued:
                            device.run(), host.run()
                        for x, y in zip(b.take(), a.take(), strict=True):
                            assert close(x, y), (step, row)
                for a, b in pairs:
                    wanted = a.state()
                    assert all(close(array, wanted[name]) for name, array in b.state().items()), step


@pytest.mark.parametrize("case", CASES)
def test_rows_that_take_no_part_do_not_keep_others_from_steady_graphs(
    exported: Callable[..., Path], case: str, ring_backend: RingBackend
) -> None:
    """A pool with rows that nobody opened, or whose stream has just begun and waits, runs the fast graphs for the
    rest; those rows' own results are right when they come to take part."""
    with fx.load(exported(case), "ort-cpu") as session:
        ring, rng = Session(session.bundle, ring_backend(session)), np.random.default_rng(5)
        size, vocab = session.contract.block_size, session.contract.vocab_size
        with ring.pool() as pool, session.pool() as wanted:
            pairs = [(pool.open(), wanted.open()) for _ in range(2)]  # of three rows

            def feed(i: int, count: int) -> set[str]:
                ring.backend.engine.used.clear()
                fed = rng.integers(0, vocab, count)
                for a, b in zip(*(stream.feed([fed]) for stream in pairs[i]), strict=True):
                    assert close(a, b)
                return set(ring.backend.engine.used)

            for _ in range(session.contract.memory_segments + 1):
                feed(0, size)
            assert feed(0, size) == {"block_step"}
            begins = "_start" if session.contract.fam_length else ""  # puts FAM's keys and values into the open slot
            assert feed(0, 2) == {f"append_step_c3{begins}"}
            assert all(not name.endswith("_start") for name in feed(0, size - 2))
            assert all(name.endswith("_start") for name in feed(1, size + 1))
            feed(0, 1)  # while the other is within its second block
            assert all(not name.endswith("_start") for name in feed(0, size - 1))
            for a, b in pairs:
                assert all(close(array, b.state()[name]) for name, array in a.state().items())
            feed(1, 2 * size)
            for a, b in pairs:
                assert all(close(array, b.state()[name]) for name, array in a.state().items())


def test_a_row_within_its_block_is_no_part_of_anothers_end(
    exported: Callable[..., Path], ring_backend: RingBackend
) -> None:
    """commit_block computes every row as if it were full. What it computes of the others is thrown away, so it must
    not be looked at: streams are isolated (R11), and a stream that is told of a failure is as it was before."""
    with fx.load(exported(), "ort-cpu") as session:
        ring, rng = Session(session.bundle, ring_backend(session)), np.random.default_rng(11)
        size = session.contract.block_size
        with ring.pool() as pool:
            full, other = pool.open(), pool.open()
            engine, real = ring.backend.engine, ring.backend.engine.compute

            def compute(graph: str, addresses: Any) -> None:
                real(graph, addresses)
                if graph.startswith("commit_block"):  # of a half-empty slot
                    spec = ring.backend.layout.stored["past_fam_00"]
                    view(addresses["present_fam_00"], np.float32, (ROWS, *spec.shape))[other.row] = np.inf

            full.put(rng.integers(0, session.contract.vocab_size, size - 1))
            other.put(rng.integers(0, session.contract.vocab_size, 1))
            while full.queued or other.queued:
                pool.run()
            engine.compute = compute
            for stream in (full, other):
                stream.take()
                stream.put(rng.integers(0, session.contract.vocab_size, 1))
            pool.run()
            assert full.blocks == 1
            assert other.held == int(other.state()[OPEN_LENGTH][0])
            assert other.take()[0].shape[1] == 1  # no NonFiniteError


def test_a_count_beyond_what_is_saturated(exported: Callable[..., Path], ring_backend: RingBackend) -> None:
    with fx.load(exported(), "ort-cpu") as session:
        host, device = session._open(None), ring_backend(session).open()
        rng, size, vocab = np.random.default_rng(12), session.contract.block_size, session.contract.vocab_size
        state = {
            s.name: rng.standard_normal(s.sized(ROWS)).astype(np.float32) if s.dtype == "float32" else None
            for s in session.contract.all_states
        }
        state |= {COUNT: np.array([1000, 1, 0]), OPEN_LENGTH: np.zeros(ROWS, np.int64)}
        for loop in (host, device):
            loop.write({name: a if "open" not in name else np.zeros_like(a) for name, a in state.items()})
        for _ in range(3):
            fed, outs = rng.integers(0, vocab, (ROWS, size)), []
            for loop in (host, device):
                outs.append(np.zeros((ROWS, size, vocab), np.float32))
                loop.advance(fed, outs[-1])
                loop.commit()
            assert close(outs[1], outs[0])
            assert not equal_states(device, host)


# Errors in the middle, memory


def test_an_engine_that_fails_in_the_middle_of_a_feed(exported: Callable[..., Path], ring_backend: RingBackend) -> None:
    with fx.load(exported(), "ort-cpu") as session:
        ring, rng = Session(session.bundle, ring_backend(session)), np.random.default_rng(13)
        with session.stream() as host, ring.stream() as device:
            engine = ring.backend.engine
            fed = rng.integers(0, session.contract.vocab_size, (ROWS, 17))  # seven more are chunks of 3, 3 and 1
            for stream in (host, device):
                list(stream.feed([fed]))
            for fails in ("append_step", "commit_block"):
                real, left = engine.compute, [1]

                def compute(graph: str, addresses: Any, real: Any = real, fails: str = fails, left: Any = left) -> None:
                    if graph.startswith(fails):
                        left[0] -= 1
                        if left[0] < 0 or fails == "commit_block":
                            raise FamExportError("the engine failed")
                    real(graph, addresses)

                engine.compute = compute
                before = device.state()
                with pytest.raises(FamExportError, match="the engine failed"):
                    list(device.feed([fed[:, : device.room]]))
                after = device.state()
                assert all(np.array_equal(after[name], before[name]) for name in after)
                engine.compute = real
            more = fed[:, :13]
            assert close(np.concatenate(list(device.feed([more])), 1), np.concatenate(list(host.feed([more])), 1))


def test_warming_up_again_keeps_no_second_set_of_graphs(
    exported: Callable[..., Path], ring_backend: RingBackend
) -> None:
    with fx.load(exported(), "ort-cpu") as session:
        backend = ring_backend(session)
        loop = backend.open()
        loop.warm_up()
        graphs = len(backend.cuda.graphs)
        loop.warm_up()
        assert len(backend.cuda.graphs) == graphs
        loop.close()
        assert not backend.cuda.graphs


def test_the_ring_gives_no_throughput_back_to_back(exported: Callable[..., Path], ring_backend: RingBackend) -> None:
    """Counts that the host keeps would run ahead of their copies to the device."""
    with fx.load(exported(), "ort-cpu") as session:
        device = ring_backend(session).open()
        assert device.back_to_back(np.zeros((ROWS, session.contract.block_size), np.int64), 5) is None
        assert not device.tensor(COUNT).any()


def test_weights_that_do_not_arrive_are_freed(exported: Callable[..., Path]) -> None:
    bundle, cuda = open_bundle(exported()), FakeCuda()

    def copy_in(address: int, array: np.ndarray) -> None:
        raise FamExportError("CUDA failed")

    cuda.copy_in = copy_in  # type: ignore[method-assign]
    with pytest.raises(FamExportError, match="CUDA failed"):
        DeviceWeights(bundle.file("weights.safetensors"), ["model.norm.weight"], cuda)
    assert not cuda.live


# An ONNX Runtime whose CUDA provider captures as the real one does


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    return install(monkeypatch)


def alike(session: Session, ring: Session, lengths: tuple[int, ...], rng: np.random.Generator) -> bool:
    with session.stream() as host, ring.stream() as device:
        for length in lengths:
            fed = rng.integers(0, session.contract.vocab_size, (ROWS, length))
            for a, b in zip(device.feed([fed]), host.feed([fed]), strict=True):
                if not close(a, b):
                    return False
        wanted = host.state()
        return all(close(array, wanted[name]) for name, array in device.state().items())


LENGTHS = (8, 8, 8, 8, 3, 5, 1, 7, 8, 8, 11, 1, 1)


def test_the_real_backend_over_a_capturing_runtime(exported: Callable[..., Path], ort: Any) -> None:
    """Streams one after the other, and interleaved."""
    with fx.load(exported(), "ort-cpu") as session:
        backend = open_backend(session.bundle, "ort-cuda")
        assert isinstance(backend, OrtCudaRing)
        ring, rng = Session(session.bundle, backend), np.random.default_rng(15)
        assert alike(session, ring, LENGTHS, rng)
        assert alike(session, ring, LENGTHS, rng)
        hosts, devices = ([s.stream() for _ in range(2)] for s in (session, ring))
        for length in LENGTHS:
            for a, b in zip(hosts, devices, strict=True):
                fed = rng.integers(0, session.contract.vocab_size, (ROWS, length))
                for x, y in zip(b.feed([fed]), a.feed([fed]), strict=True):
                    assert close(x, y)
        numbers = len(backend._numbers)
        devices[0].close()
        assert alike(session, ring, LENGTHS, rng)
        assert len(backend._numbers) == numbers
        cuda = backend._cuda
        ring.close()
        devices[1].close()
        assert not cuda.live
        assert not cuda.host
        assert cuda.closed


@pytest.mark.parametrize("refused", ["append_step", "commit_block", "block_step"])
def test_a_graph_that_cannot_be_captured_spoils_no_other(exported: Callable[..., Path], ort: Any, refused: str) -> None:
    """The other sessions were made to capture: without a number each turn of the ring would replay the first."""
    ort.refuses = (f"{refused}.",)
    with fx.load(exported(), "ort-cpu") as session:
        ring = Session(session.bundle, open_backend(session.bundle, "ort-cuda"))
        assert alike(session, ring, LENGTHS, np.random.default_rng(16))


# Bundles that are not kind


def changed(bundle: Bundle, change: Callable[[dict[str, dict[str, str]]], None]) -> Bundle:
    """The bundle with other variants in its manifest, as one whose hashes and id are right would have them."""
    variants = {name: dict(graph.variants) for name, graph in bundle.manifest.graphs.items()}
    change(variants)
    graphs = {name: GraphFiles(graph.file, variants[name]) for name, graph in bundle.manifest.graphs.items()}
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))


@pytest.mark.parametrize("graph", ["block_step", "commit_block"])
def test_a_start_graph_that_is_missing_is_a_typed_error(exported: Callable[..., Path], ort: Any, graph: str) -> None:
    bundle = changed(open_bundle(exported()), lambda variants: variants[graph].pop("ort-cuda-start"))
    bundle.manifest.to_bytes()  # no rule of the manifest forbids it
    try:
        backend = open_backend(bundle, "ort-cuda")
        backend.open().warm_up()
    except FamExportError:
        return
    assert not isinstance(backend, OrtCudaRing)  # or it runs the portable graphs


def test_auto_goes_on_where_a_start_graph_is_missing(exported: Callable[..., Path]) -> None:
    bundle = changed(open_bundle(exported()), lambda variants: variants["block_step"].pop("ort-cuda-start"))
    with fx.load(bundle, "auto") as session:
        assert session.info()["backend"] == "ort-cpu"


@pytest.mark.parametrize("graph", ["append_step", "commit_block"])
def test_a_bundle_with_some_graphs_made_for_cuda(exported: Callable[..., Path], ort: Any, graph: str) -> None:
    bundle = changed(open_bundle(exported()), lambda variants: variants[graph].clear())
    try:
        backend = open_backend(bundle, "ort-cuda")
        backend.open().warm_up()
    except FamExportError:
        return
    assert not isinstance(backend, OrtCudaRing)


def test_a_variant_is_the_graph_that_it_says_it_is(exported: Callable[..., Path], ort: Any) -> None:
    """The start graph in place of the steady one takes a count that the layout does not give it."""

    def swap(variants: dict[str, dict[str, str]]) -> None:
        variants["block_step"]["ort-cuda"] = variants["block_step"]["ort-cuda-start"]

    with pytest.raises(BundleError, match="past_count"):
        open_backend(changed(open_bundle(exported()), swap), "ort-cuda").open()


@pytest.mark.parametrize("lacking", ["present_fam_00", "present_key_00", "logits"])
def test_a_graph_that_does_not_give_all_is_refused(
    exported: Callable[..., Path], lacking: str, ring_backend: RingBackend
) -> None:
    """What it does not write would be read all the same: an older block, or what lay there before."""

    class Lacking:
        def __init__(self, inner: Any) -> None:
            self.get_inputs, self.inner = inner.get_inputs, inner

        def get_outputs(self) -> list[Any]:
            return [value for value in self.inner.get_outputs() if value.name != lacking]

    with fx.load(exported(), "ort-cpu") as session:
        backend = ring_backend(session)
        backend.sessions["block_step"] = Lacking(backend.sessions["block_step"])
        with pytest.raises(BundleError, match=lacking):
            CpuRing(backend, ROWS)


def test_a_manifest_with_a_variant_that_is_no_file(exported: Callable[..., Path], tmp_path: Path) -> None:
    tree = json.loads((exported() / "manifest.json").read_text())
    tree["graphs"]["block_step"]["variants"]["ort-cuda"] = "../../etc/passwd"
    del tree["checksum"]
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    tree["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    from famexport.manifest import Manifest

    with pytest.raises(BundleError, match="which is not in files"):
        Manifest.parse(json.dumps(tree).encode())
