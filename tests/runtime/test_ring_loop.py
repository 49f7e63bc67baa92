"""The graphs made for CUDA, on the loop that turns their ring, equal the portable graph on the host loop.

Here they run in float32 on the CPU, on a CUDA layer over host memory; ``tests/gpu`` has the device itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_ring import CpuRing, CpuRingBackend, RingBackend

import famexport as fx
from famexport.checkpoint import init_checkpoint
from famexport.config import preset
from famexport.errors import BundleError, NonFiniteError
from famexport.export.cuda_net import Plan
from famexport.export.cuda_steps import AppendStep, BlockStep
from famexport.runtime.device import DeviceLoop
from famexport.runtime.device_weights import parts
from famexport.runtime.layout import START
from famexport.runtime.session import Session

BLOCKS = 7
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no fam": {"fam_length": 0},
    "no memory": {"memory_segments": 0},
    "neither": {"fam_length": 0, "memory_segments": 0},
    "all heads": {"num_key_value_heads": 4, "memory_segments": 3},
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "qk_norm": {"qk_norm": True, "fam_query_position": "previous"},
    "layernorm": {"norm": "layernorm", "activation": "gelu_tanh", "gated_mlp": False},
    "tied": {"tie_word_embeddings": True, "memory_segments": 1},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[Any, ...], Path] = {}

    def get(case: str, **options: Any) -> Path:
        key = case, *sorted(options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("ring")
            init_checkpoint(folder / "ckpt", preset("tiny", model_type="fam", **CASES[case]), seed=3)
            fx.export_bundle(folder / "ckpt", folder / "bundle", parity_blocks=2, **options)
            made[key] = folder / "bundle"
        return made[key]

    return get


@pytest.fixture
def ring_backend() -> RingBackend:
    """What ``test_fused_ring.py`` has other graphs for."""
    return CpuRingBackend


def blocks(session: Session, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, session.contract.vocab_size, session.contract.inputs[0].sized(1))


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return float(np.abs(a - b).max()) <= 2e-5 * max(float(np.abs(b).max()), 1.0)


@pytest.mark.parametrize("case", ["plain", "qk_norm", "layernorm"])
@pytest.mark.parametrize("steady", [True, False])
def test_norms_have_a_kernel_in_bfloat16(case: str, steady: bool) -> None:
    """CUDA's norms of float32 rows take and give float32 or float16: there is none to bfloat16."""
    plan = Plan(preset("tiny", model_type="fam", **CASES[case]), "bfloat16", 1)
    for model in (BlockStep(plan, steady=steady).model(), AppendStep(plan, 1, steady=steady).model("append_step")):
        norms = [node for node in model.graph if node.op_type.endswith("LayerNormalization")]
        assert norms
        for node in norms:
            assert all(x is None or x.producer() is not None for x in node.inputs[1:])  # no weight as it is
            (after,) = {use.node.op_type for value in node.outputs for use in value.uses()}
            assert after == "Cast"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"batch": 3, "logits": "last"}], ids=["one row", "three rows"])
def test_equals_the_portable_graph(
    exported: Callable[..., Path], case: str, options: dict[str, Any], ring_backend: RingBackend
) -> None:
    with fx.load(exported(case, **options), "ort-cpu") as session:
        ring = Session(session.bundle, ring_backend(session))
        rng = np.random.default_rng(0)
        with session.stream() as expected, ring.stream() as got:
            for block in range(BLOCKS):
                fed = blocks(session, rng)
                assert close(got.step(fed), expected.step(fed))
                ours, theirs = got.state(), expected.state()
                assert all(close(ours[name], theirs[name]) for name in theirs)
                if block == 3 and expected.batch > 1:  # rows out of step: one is fresh, its memory empty
                    expected.reset(rows=[1])
                    got.reset(rows=[1])
            used, full = ring.backend.engine.used, max(session.contract.memory_segments, 1)
            assert {"block_step" + START, "block_step"} == set(used)
            if expected.batch == 1:
                steps = used[-BLOCKS:]
                assert steps == ["block_step" + START] * full + ["block_step"] * (BLOCKS - full)


def test_snapshots_travel_between_layouts(exported: Callable[..., Path], ring_backend: RingBackend) -> None:
    with fx.load(exported("all heads", batch=3), "ort-cpu") as session:
        ring = Session(session.bundle, ring_backend(session))
        rng = np.random.default_rng(1)
        with session.stream() as host, ring.stream() as device, ring.stream() as other:
            for _ in range(5):
                host.step(blocks(session, rng))
            state = host.state()
            device._loop.write(state)
            assert all(np.array_equal(device._loop.tensor(name), state[name]) for name in state)
            for row in range(3):
                one = {name: array[row : row + 1] for name, array in state.items()}
                other._loop.write(one, row)
                assert all(np.array_equal(other._loop.tensor(name, row), one[name]) for name in one)
            fed = blocks(session, rng)
            assert close(device.step(fed), host.step(fed))


@pytest.mark.parametrize("bad", [0, 2])
def test_a_row_that_is_not_finite_stays_where_it_was(
    exported: Callable[..., Path], bad: int, ring_backend: RingBackend
) -> None:
    """The ring turns for the others: the row that stays is moved along, slot by slot."""
    with fx.load(exported("all heads", batch=3), "ort-cpu") as session:
        ring = Session(session.bundle, ring_backend(session))
        rng = np.random.default_rng(2)
        with session.stream(on_nonfinite="skip") as host, ring.stream(on_nonfinite="skip") as device:
            for block in range(8):
                fed = blocks(session, rng)
                spoiled = block in (2, 5)
                before = device.state()
                ring.backend.engine.spoil = bad if spoiled else -1
                device.step(fed)
                kept = host.snapshot()
                host.step(fed)
                after = device.state()
                if spoiled:
                    assert all(np.array_equal(after[name][bad], before[name][bad]) for name in after)
                    moved = host.state()
                    host.restore(kept)
                    whole = host.state()
                    for name, array in moved.items():
                        whole[name][[r for r in range(3) if r != bad]] = array[[r for r in range(3) if r != bad]]
                    host._loop.write(whole)
                theirs = host.state()
                assert all(close(after[name], theirs[name]) for name in theirs), block


def test_a_failed_check_keeps_the_state(exported: Callable[..., Path], ring_backend: RingBackend) -> None:
    with fx.load(exported("plain"), "ort-cpu") as session:
        ring = Session(session.bundle, ring_backend(session))
        with ring.stream() as stream:
            fed = blocks(session, np.random.default_rng(3))
            stream.step(fed)
            before, ring.backend.engine.spoil = stream.state(), 0
            with pytest.raises(NonFiniteError):
                stream.step(fed)
            assert all(np.array_equal(stream.state()[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("present_key_00", [1, 24, 16], "present_key_00 is 1536 bytes of float32, expected 768"),
        ("present_fam_00", [1, 12, 32], r"\(export the bundle again\): present_fam_00 is 1536 bytes"),  # as once made
        ("logits", [1, 8, 960], "logits is 30720 bytes of float32, expected 3072"),
        ("present_fam_07", [1, 12, 32], "'present_fam_07' tensor.float. .* is nothing that a step has"),
        ("present_fam_00", ["n", 12, 32], "is nothing that a step has"),
    ],
)
def test_a_graph_that_would_write_beyond_its_own_is_refused(
    exported: Callable[..., Path], name: str, shape: list[Any], says: str, ring_backend: RingBackend
) -> None:
    """A bundle's hashes say that it is whole, not that it is kind."""

    class Value:
        def __init__(self, name: str, shape: list[Any], type: str = "tensor(float)") -> None:
            self.name, self.shape, self.type = name, shape, type

    class Hostile:
        def __init__(self, session: Any) -> None:
            self.session = session

        def get_inputs(self) -> list[Any]:
            return self.session.get_inputs()

        def get_outputs(self) -> list[Any]:
            kept = [v for v in self.session.get_outputs() if v.name != name]
            return [*kept, Value(name, shape)]

    with fx.load(exported("plain"), "ort-cpu") as session:
        backend = ring_backend(session)
        backend.sessions["block_step"] = Hostile(backend.sessions["block_step"])
        with pytest.raises(BundleError, match=says):
            backend.open()


def test_weights_lie_on_the_device_once(exported: Callable[..., Path], ring_backend: RingBackend) -> None:
    with fx.load(exported("biases"), "ort-cpu") as session:
        backend = ring_backend(session)
        name = "model.layers.0.self_attn.qkv_proj.weight"
        assert parts(name) == [name.replace("qkv", kind) for kind in "qkv"]
        size = session.bundle.manifest.files["weights.safetensors"].bytes
        assert backend.weights.nbytes < size + 256 * len(backend.weights.address)
        assert backend.cuda.mallocs == 1


@pytest.mark.parametrize("options", [{"batch": "dynamic"}, {"opset": 23, "batch": "dynamic"}])
def test_what_has_no_such_graph(exported: Callable[..., Path], options: dict[str, Any]) -> None:
    bundle = fx.load(exported("plain", **options), "ort-cpu").bundle
    assert not [key for key in bundle.manifest.graphs["block_step"].variants if key.startswith("ort-cuda")]


ALL = {"graphs": "all", "chunks": (1, 4)}
OPEN_CASES = [case for case in CASES if case != "neither"]


@pytest.mark.parametrize("case", OPEN_CASES)
@pytest.mark.parametrize("options", [ALL, {**ALL, "batch": 2, "logits": "last"}], ids=["one row", "two rows"])
def test_open_blocks_equal_the_portable_graphs(
    exported: Callable[..., Path], case: str, options: dict[str, Any], ring_backend: RingBackend
) -> None:
    """Pieces of any length, whole blocks and generated tokens between."""
    with fx.load(exported(case, **options), "ort-cpu") as session:
        ring, rng = Session(session.bundle, ring_backend(session)), np.random.default_rng(4)
        with session.stream() as host, ring.stream() as device:
            for length in (3, 8, 5, 1, 7, 16, 2, 2, 4, 11, 1, 1):
                fed = rng.integers(0, session.contract.vocab_size, (host.batch, length))
                ours, theirs = list(device.feed([fed])), list(host.feed([fed]))
                assert len(ours) == len(theirs)
                assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))
                state = host.state()
                assert all(close(array, state[name]) for name, array in device.state().items()), length
            used = set(ring.backend.engine.used)
            assert {"append_step", "append_step" + START, "commit_block"} <= used


def test_rows_of_a_pool_take_turns(exported: Callable[..., Path], ring_backend: RingBackend) -> None:
    """Rows fill their blocks at different calls: commit_block moves some, and the ring turns under the others."""
    with fx.load(exported("all heads", **ALL, batch=3), "ort-cpu") as session:
        ring, rng = Session(session.bundle, ring_backend(session)), np.random.default_rng(5)
        with session.pool() as host, ring.pool() as device:
            pairs = [(host.open(), device.open()) for _ in range(3)]
            for _ in range(40):
                row = int(rng.integers(3))
                piece = rng.integers(0, session.contract.vocab_size, int(rng.integers(1, 7)))
                for a, b in zip(*(list(stream.feed([piece])) for stream in pairs[row]), strict=True):
                    assert close(b, a)
                if rng.random() < 0.1:
                    for stream in pairs[row]:
                        stream.reset()
            for a, b in pairs:
                state = a.state()
                assert all(close(array, state[name]) for name, array in b.state().items())


def test_an_open_block_is_taken_back_and_restored(exported: Callable[..., Path], ring_backend: RingBackend) -> None:
    """A snapshot has no FAM keys of the open block's slot: they are computed again."""
    with fx.load(exported("plain", **ALL), "ort-cpu") as session:
        ring, rng = Session(session.bundle, ring_backend(session)), np.random.default_rng(6)
        with session.stream() as host, ring.stream() as device, ring.stream() as other:
            fed = rng.integers(0, session.contract.vocab_size, (1, 29))
            for stream in (host, device):
                list(stream.feed([fed]))
            other.restore(device.snapshot())
            more = fed[:, :6]
            wanted = np.concatenate(list(host.feed([more])), 1)
            assert close(np.concatenate(list(device.feed([more])), 1), wanted)
            assert close(np.concatenate(list(other.feed([more])), 1), wanted)
            assert list(other.generate(fed[0], max_new_tokens=9)) == list(host.generate(fed[0], max_new_tokens=9))


def test_a_chunk_that_is_not_finite_leaves_no_trace(exported: Callable[..., Path], ring_backend: RingBackend) -> None:
    with fx.load(exported("plain", **ALL), "ort-cpu") as session:
        ring, rng = Session(session.bundle, ring_backend(session)), np.random.default_rng(7)
        with session.stream() as host, ring.stream() as device:
            fed = rng.integers(0, session.contract.vocab_size, (1, 27))
            for stream in (host, device):
                list(stream.feed([fed]))
            ring.backend.engine.spoil = 0
            with pytest.raises(NonFiniteError):
                list(device.feed([fed[:, :2]]))
            ring.backend.engine.spoil = -1
            assert close(next(device.feed([fed[:, :2]])), next(host.feed([fed[:, :2]])))


def test_two_streams_and_a_closed_backend(exported: Callable[..., Path], ring_backend: RingBackend) -> None:
    """Each goes on from its own state, and neither loses the weights to the other or to a closed session."""
    with fx.load(exported("plain"), "ort-cpu") as session:
        backend = ring_backend(session)
        ring, rng = Session(session.bundle, backend), np.random.default_rng(8)
        hosts, devices = ([s.stream() for _ in range(2)] for s in (session, ring))
        for block in range(6):
            for host, device in zip(hosts, devices, strict=True):
                fed = blocks(session, rng)
                assert close(device.step(fed), host.step(fed))
            if block == 3:
                backend.weights.close()  # what the backend does
        devices[0].close()
        fed = blocks(session, rng)
        assert close(devices[1].step(fed), hosts[1].step(fed))
        assert backend.cuda.live
        devices[1].close()
        assert not backend.cuda.live


def test_a_captured_graph_belongs_to_its_addresses(exported: Callable[..., Path], ring_backend: RingBackend) -> None:
    """ONNX Runtime replays by number: a second stream must not get the first one's graphs, a later one in its place
    must, since none can be forgotten."""
    from famexport.runtime.ort_ring import KeptRegions

    with fx.load(exported("plain"), "ort-cpu") as session:
        backend, numbers = ring_backend(session), dict[Any, int]()
        kept = KeptRegions(backend.cuda)
        used: list[dict[int, int]] = []

        def loop() -> DeviceLoop:
            engine = CpuRing(backend, 1)
            engine._numbers, seen = numbers, {}
            real = engine.enqueue

            def enqueue(graph: str, addresses: Any, stream: int) -> None:
                options = engine._options(graph, addresses)
                if options.get_run_config_entry("gpu_graph_id") != "-1":
                    seen[int(options.get_run_config_entry("gpu_graph_id"))] = addresses["present_fam_00"]
                real(graph, addresses, stream)

            engine.enqueue = enqueue  # type: ignore[method-assign]
            used.append(seen)
            made = DeviceLoop(session.contract, 1, engine, kept, layout=backend.layout)  # type: ignore[arg-type]
            made.warm_up()
            return made

        first, second = loop(), loop()
        turns = 2 * backend.layout.positions  # of the steady graph and of the one for a stream's start
        assert len(used[0]) == len(used[1]) == turns
        assert not set(used[0]) & set(used[1])
        first.close()
        third = loop()
        assert used[2] == used[0]  # the same numbers, for the same addresses
        kept.give_back()
        for one in (second, third):
            one.close()
        backend.weights.close()
        assert not backend.cuda.live
        assert len(numbers) == 2 * turns
