"""Which graphs ONNX Runtime captures for the ring, what happens where it cannot, and where fused kernels do not load."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_ort import FakeSession, install

import famexport as fx
from famexport.bundle import Bundle, open_bundle
from famexport.checkpoint import init_checkpoint
from famexport.config import preset
from famexport.errors import BundleError, FamExportError, IncompatibleError, UntrustedError
from famexport.kernels.build import COMMAND
from famexport.manifest import GraphFiles
from famexport.runtime.layout import START
from famexport.runtime.ort_ring import OrtCudaRing, ring_files
from famexport.runtime.session import Session, open_backend

LENGTHS = (8, 3, 5, 8, 8, 3, 5, 1, 7, 8, 11, 1, 1)  # an open block before memory is full and after, with T = 8
STARTS = ("append_step_start", "append_step_c3_start", "block_step_start", "commit_block_start")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capture")
    config = preset("tiny", model_type="fam", num_hidden_layers=1, memory_segments=2)
    init_checkpoint(folder / "ckpt", config, seed=3)
    fx.export_bundle(folder / "ckpt", folder / "bundle", graphs="all", chunks=(1, 3), parity_blocks=2)
    return folder / "bundle"


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    return install(monkeypatch)


def alike(bundle: Bundle, backend: Any, seed: int = 0) -> dict[str, Any]:
    """``info`` of a loop that gives what the portable graphs give."""
    rng = np.random.default_rng(seed)
    with (
        fx.load(bundle, "ort-cpu") as session,
        session.stream() as host,
        Session(bundle, backend).stream() as device,
    ):
        for length in LENGTHS:
            fed = rng.integers(0, session.contract.vocab_size, (1, length))
            for a, b in zip(device.feed([fed]), host.feed([fed]), strict=True):
                assert np.abs(a - b).max() <= 2e-5 * max(np.abs(b).max(), 1)
        wanted = host.state()
        assert all(np.abs(array - wanted[name]).max() <= 2e-5 for name, array in device.state().items())
        info: dict[str, Any] = device._loop.info
        return info


def numbers(ort: type[FakeSession], graph: str) -> list[set[str]]:
    """The ``gpu_graph_id`` of all runs of each session of a graph that has run."""
    name = graph.removesuffix(START) + (".ort-cuda-start.onnx" if graph.endswith(START) else ".ort-cuda.onnx")
    return [set(made.numbers) for made in ort.made if made.file == name and made.numbers]


def test_start_graphs_are_captured_in_every_orientation(path: Path, ort: Any) -> None:
    """At the first call, each often enough, and no two share a number."""
    bundle = open_bundle(path)
    backend = open_backend(bundle, "ort-cuda")
    assert isinstance(backend, OrtCudaRing)
    loop = backend.open()
    loop.warm_up()
    turns = backend.layout.positions
    found = {name: numbers(ort, name) for name in backend.layout.graphs}
    assert set(STARTS) < set(found)
    assert all(made.capture and len(made.numbers) == 2 * len(set(made.numbers)) for made in ort.made)
    for name, (used,) in found.items():
        assert len(used) == (turns if name.startswith("block_step") else 2 * turns)
        assert not used & {"-1", "0"}
    every = [number for (used,) in found.values() for number in used]
    assert len(every) == len(set(every)) == len(backend._numbers)
    loop.close()
    info = alike(bundle, backend)
    assert (info["captured"], info["uncaptured_reason"], info["uncaptured_graphs"]) == (True, None, {})
    assert len(backend._numbers) == len(every)  # the later loop came to the same addresses


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("when", ["refuses", "breaks"])
def test_a_start_graph_that_cannot_be_captured_runs_uncaptured(path: Path, ort: Any, start: str, when: str) -> None:
    """Found out at load, or in the run that captures."""
    setattr(ort, when, (f"{start.removesuffix(START)}.ort-cuda-start",))
    bundle = open_bundle(path)
    backend = open_backend(bundle, "ort-cuda")
    assert isinstance(backend, OrtCudaRing)
    info = alike(bundle, backend)
    assert info["captured"] is True
    assert info["uncaptured_reason"] is backend.uncaptured_reason is None
    assert list(info["uncaptured_graphs"]) == list(backend.uncaptured_graphs) == [start]
    assert ("graph capture" if when == "refuses" else "is capturing") in info["uncaptured_graphs"][start]
    assert numbers(ort, start)[-1] == {"-1"}
    assert all("-1" not in used for name in backend.layout.graphs if name != start for used in numbers(ort, name))
    loaded = len(ort.made)
    assert alike(bundle, backend, 1) == info  # a later loop knows
    assert len(ort.made) == loaded


@pytest.mark.parametrize("when", ["refuses", "breaks"])
def test_a_steady_graph_that_cannot_be_captured_is_the_reason(path: Path, ort: Any, when: str) -> None:
    setattr(ort, when, ("append_step.ort-cuda.",))
    bundle = open_bundle(path)
    backend = open_backend(bundle, "ort-cuda")
    info = alike(bundle, backend)
    assert info["captured"] is False
    assert info["uncaptured_reason"] == info["uncaptured_graphs"]["append_step"] == backend.uncaptured_reason
    assert list(info["uncaptured_graphs"]) == ["append_step"]
    assert all("-1" not in used for used in numbers(ort, "append_step_start") + numbers(ort, "block_step"))


def test_a_capture_that_fails_in_warm_up_leaves_the_state(path: Path, ort: Any) -> None:
    ort.breaks = ("ort-cuda",)
    bundle, rng = open_bundle(path), np.random.default_rng(2)
    loop = open_backend(bundle, "ort-cuda").open()
    state = {
        s.name: np.zeros(s.sized(1), np.int64 if s.dtype == "int64" else s.dtype) for s in loop.contract.all_states
    }
    state |= {name: rng.standard_normal(a.shape).astype("float32") for name, a in state.items() if a.ndim > 1}
    loop.write({name: array for name, array in state.items() if "open" not in name})
    before = loop.read()
    loop.warm_up()
    assert len(loop.info["uncaptured_graphs"]) == len(bundle.manifest.graphs) * 2
    assert all(np.array_equal(array, before[name]) for name, array in loop.read().items())


def test_an_open_loop_keeps_its_captured_graphs(path: Path, ort: Any) -> None:
    """What fails for a second loop is no news to the first one."""
    bundle = open_bundle(path)
    backend = open_backend(bundle, "ort-cuda")
    first = backend.open()
    first.warm_up()
    ort.breaks = ("commit_block.ort-cuda.",)
    second = backend.open()
    second.warm_up()
    assert first.info["uncaptured_graphs"] == {}
    assert list(second.info["uncaptured_graphs"]) == ["commit_block"]
    assert (first.info["captured"], second.info["captured"]) == (True, False)


def test_what_fails_without_capture_too_is_an_error(path: Path, ort: Any) -> None:
    ort.fails = ("block_step.ort-cuda-start",)
    loop = open_backend(open_bundle(path), "ort-cuda").open()
    with pytest.raises(FamExportError, match="onnxruntime failed in block_step_start: no kernel image"):
        loop.warm_up()


def test_a_graph_whose_file_was_replaced_is_not_run(path: Path, ort: Any, tmp_path: Path) -> None:
    """A session that is made anew after a failed capture reads its file long after the hash was checked."""
    copy = Path(shutil.copytree(path, tmp_path / "bundle"))
    loop = open_backend(open_bundle(copy), "ort-cuda").open()
    ort.breaks = ("block_step.ort-cuda.",)
    with (copy / "block_step.ort-cuda.onnx").open("ab") as file:
        file.write(b"\x32\x00")  # an empty doc string: the same graph
    with pytest.raises(BundleError, match=r"block_step.ort-cuda.onnx has changed since it was loaded"):
        loop.warm_up()
    loop.close()


def test_a_failed_capture_after_the_backend_was_closed(path: Path, ort: Any) -> None:
    """Its stream could go on, but there is nobody to load another session."""
    backend = open_backend(open_bundle(path), "ort-cuda")
    loop = backend.open()
    backend.close()
    ort.breaks = ("commit_block.ort-cuda.",)
    with pytest.raises(FamExportError, match="is capturing"):
        loop.warm_up()
    loop.close()


def test_without_capture_nothing_is(path: Path, ort: Any) -> None:
    bundle = open_bundle(path)
    weights = bundle.file(bundle.manifest.weights or "")
    backend = OrtCudaRing(bundle.contract, "fp32", ring_files(bundle), weights, capture=False)
    info = alike(bundle, backend)
    assert (info["captured"], info["uncaptured_reason"], info["uncaptured_graphs"]) == (False, "not asked for", {})
    assert not any(made.capture for made in ort.made)
    assert all(set(made.numbers) == {"-1"} for made in ort.made if made.numbers)


# Fused kernels that are not there, or do not load


def with_fused(path: Path) -> Bundle:
    """The bundle with its steady graphs as the fused ones, too."""
    bundle = open_bundle(path)
    graphs = {
        name: GraphFiles(graph.file, {**graph.variants, "ort-cuda-fused": graph.variants["ort-cuda"]})
        for name, graph in bundle.manifest.graphs.items()
    }
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))


def without_fused(path: Path) -> Bundle:
    bundle = open_bundle(path)
    graphs = {
        name: GraphFiles(graph.file, {key: file for key, file in graph.variants.items() if key != "ort-cuda-fused"})
        for name, graph in bundle.manifest.graphs.items()
    }
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | FamExportError | None], None]:
    """What ``famexport.kernels.library.find`` gives or raises."""

    def found(result: Path | FamExportError | None) -> None:
        def library() -> Path | None:
            if isinstance(result, FamExportError):
                raise result
            return result

        monkeypatch.setattr("famexport.kernels.library.find", library)

    return found


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (None, f"not built: {COMMAND}"),
        (IncompatibleError("built for another source: type this"), "built for another source: type this"),
        (Path(__file__), "do not load here: onnxruntime fake cannot load test_ring_capture.py: .*; build it again"),
    ],
    ids=["absent", "stale", "unloadable"],
)
def test_without_fused_kernels_the_other_graphs_run(
    path: Path, ort: Any, find: Callable[..., None], result: Any, says: str
) -> None:
    find(result)
    bundle = with_fused(path)
    backend = open_backend(bundle, "ort-cuda")
    assert isinstance(backend, OrtCudaRing)
    info = alike(bundle, backend)
    assert info["captured"] is True
    assert info["kernels"] == Session(bundle, backend).info()["kernels"]
    assert re.search(says, info["kernels"])


def test_a_library_that_was_changed_is_no_reason_to_go_on(path: Path, ort: Any, find: Callable[..., None]) -> None:
    find(UntrustedError("it is not what was built"))
    with pytest.raises(UntrustedError, match="not what was built"):
        open_backend(with_fused(path), "ort-cuda")


def test_a_bundle_without_fused_graphs_says_so(path: Path, ort: Any, find: Callable[..., None]) -> None:
    find(Path(__file__))
    bundle = without_fused(path)
    assert "the bundle has no graphs for them" in alike(bundle, open_backend(bundle, "ort-cuda"))["kernels"]


def test_fused_graphs_take_the_library_in_every_session(
    path: Path, ort: Any, find: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, registered = Path("/nowhere/library.so"), list[str]()
    find(library)
    monkeypatch.setattr(OrtCudaRing, "_register", lambda self, options, file: registered.append(str(file)))
    bundle = with_fused(path)
    backend = open_backend(bundle, "ort-cuda")
    assert alike(bundle, backend)["kernels"] == Session(bundle, backend).info()["kernels"] == "fused"
    assert registered == [str(library)]  # once, right after it was checked
    assert len({id(made.options) for made in ort.made}) == 1
    assert not ort.made[0].options.enable_mem_pattern  # 0.8 GB of 5.6, with the next
    assert all(made.provider["arena_extend_strategy"] == "kSameAsRequested" for made in ort.made)
    unfused = Session(bundle, open_backend(without_fused(path), "ort-cuda"))
    assert Session(bundle, backend)._origin(1).engine != unfused._origin(1).engine  # a snapshot says which it is of
