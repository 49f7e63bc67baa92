"""``load`` and its backends: what they say of themselves, what they refuse, and that they agree over many blocks."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import random_input

import famexport as fx
from famexport.contract import TensorSpec
from famexport.errors import BundleError, IncompatibleError, MissingDependencyError, UsageError
from famexport.runtime.golden import relative_error
from famexport.runtime.session import AUTO, open_backend

# Largest relative error of one block's logits or of one state tensor, closed loop, over 50 blocks. Measured: 3e-6 in
# float32, where only the order of sums differs; fp16 and bf16 round at other places in the two backends.
TOLERANCES = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 1.5e-1}


@pytest.mark.parametrize("name", ["plain", "rows", "dynamic", "embeds", "last", "no_fam", "no_memory", "fp16", "bf16"])
def test_backends_agree_over_50_blocks(sessions: Callable[..., Any], name: str) -> None:
    ort, torch = sessions(name, "ort-cpu"), sessions(name, "torch")
    tolerance = TOLERANCES[ort.backend.precision]
    batch = 2 if name == "dynamic" else None
    with ort.stream(batch) as a, torch.stream(batch) as b:
        for block in range(50):
            fed = random_input(ort.contract, 8, a.batch, seed=block)
            assert relative_error(a.step(fed), b.step(fed)) < tolerance
            if block % 10 == 9:
                states = zip(a.state().items(), b.state().values(), strict=True)
                assert max(relative_error(got, wanted) for (_, got), wanted in states) < tolerance
        assert a.state()["past_count"].tolist() == b.state()["past_count"].tolist()


def test_memory_and_fam_reach_the_logits(sessions: Callable[..., Any]) -> None:
    """Or else no test of a state fed back would show anything: each state tensor changes the next block's logits."""
    for name, backend in (("plain", "ort-cpu"), ("plain", "torch"), ("bf16", "ort-cpu"), ("no_memory", "ort-cpu")):
        session = sessions(name, backend)
        with session.stream() as stream:
            for block in range(4):
                stream.step(random_input(session.contract, 8, seed=block))
            state, fed = stream.state(), random_input(session.contract, 8, seed=9)
            wanted = stream.step(fed)
            for spec in session.contract.states:
                stream.load_state({**state, spec.name: np.zeros_like(state[spec.name])})
                assert relative_error(stream.step(fed), wanted) > 1e-3, spec.name


def test_info(sessions: Callable[..., Any], bundles: Callable[[str], Path]) -> None:
    # count 8 bytes; two layers of keys and values [2, 16, 8] and FAM [4, 32], in float32
    state = 8 + 2 * (2 * 2 * 16 * 8 * 4 + 4 * 32 * 4)
    info = sessions("plain").info()
    assert info == {
        "backend": "ort-cpu",
        "provider": "CPUExecutionProvider",
        "reason": "asked for",
        "device": "cpu",
        "precision": "fp32",
        "state_bytes": state,
        "bundle_id": fx.open_bundle(bundles("plain")).id,
        "kernels": None,
    }
    assert sum(array.nbytes for array in sessions("plain").stream().state().values()) == state
    assert sessions("rows").info()["state_bytes"] == 3 * state
    assert sessions("bf16", "torch").info()["precision"] == "bf16"
    assert sessions("bf16").info()["state_bytes"] == 8 + 2 * 2 * 16 * 8 * 2 + 4 * 32 * 4
    assert sessions("plain", "torch").info()["backend"] == "torch"


def test_load(bundles: Callable[[str], Path]) -> None:
    path = bundles("plain")
    seen: list[tuple[int, int]] = []
    with fx.load(str(path), threads=1, progress=lambda done, total: seen.append((done, total))) as session:
        assert session.backend.name == AUTO[-1] == "ort-cpu"
        assert session.contract == fx.open_bundle(path).contract
    total = sum(entry.bytes for entry in fx.open_bundle(path).manifest.files.values())
    assert seen[-1] == (total, total)
    with fx.load(fx.open_bundle(path), "torch", threads=1) as session:
        assert session.backend.name == "torch"


def test_what_load_refuses(bundles: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError,
        match="no backend 'cuda'; expected auto, tensorrt, tensorrt-rtx, ort-cuda, ort-tensorrt, ort-cpu, torch",
    ):
        fx.load(bundles("plain"), "cuda")
    with pytest.raises(UsageError, match="there is no bundle at"):
        fx.load(tmp_path / "none")
    with pytest.raises(BundleError, match="is not a bundle"):
        fx.load(tmp_path)
    for package, backend, extra in (("onnxruntime", "auto", "cpu"), ("torch", "torch", "export")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingDependencyError, match=rf"pip install 'famexport\[{extra}\]'"):
                fx.load(bundles("plain"), backend)


@pytest.mark.parametrize("given", ["path", "bundle"])
@pytest.mark.parametrize("late", [True, False], ids=["after its checks", "before them"])
@pytest.mark.parametrize("seen", [True, False], ids=["another contract", "nothing else tells"])
def test_a_bundle_that_is_replaced_while_it_loads(
    bundles: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    late: bool,
    seen: bool,
) -> None:
    """What was checked and what was loaded are one and the same: the new one where it is asked for by its path."""
    from famexport.runtime import session as module
    from famexport.runtime.ort import OrtCpu

    live, later = tmp_path / "live", tmp_path / "later"
    shutil.copytree(bundles("plain"), live)
    shutil.copytree(bundles("no_memory"), later)
    real, old, new = OrtCpu._load if late else module._load, fx.open_bundle(live), fx.open_bundle(later).id

    def load(*args: Any) -> Any:
        if later.exists():
            live.rename(tmp_path / "gone")
            later.rename(live)
        return real(*args)

    monkeypatch.setattr(OrtCpu if late else module, "_load", load)
    if not seen:
        monkeypatch.setattr("famexport.runtime.ort.check_io", lambda session, io: None)
    if given == "bundle":
        with pytest.raises(BundleError, match="was replaced while it was loaded; load it again|is not what|expected"):
            fx.load(old, "ort-cpu", threads=1)
    else:
        with fx.load(live, "ort-cpu", threads=1) as session:
            assert session.info()["bundle_id"] == new
            assert session.contract.memory_segments == 0


def test_a_bundle_whose_files_were_touched_is_still_the_same(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(bundles("plain"), tmp_path / "bundle")
    opened = fx.open_bundle(tmp_path / "bundle")
    for file in (tmp_path / "bundle").iterdir():
        file.chmod(0o600)
    fx.load(opened, "ort-cpu", threads=1).close()
    (tmp_path / "bundle" / "golden.safetensors").unlink()
    assert not opened.is_unchanged()
    with pytest.raises(BundleError, match="was replaced while it was loaded; load it again"):
        fx.load(opened, "ort-cpu", threads=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"states": 0}, r"it takes 'past_count' tensor\(int64\) \[1\]"),
        ({"dtype": "float16"}, r"it takes 'past_fam_00' tensor\(float\) \[1, 4, 32\], expected past_fam_00: float16"),
        ({"rows": 5}, r"it gives 'present_fam_00' tensor\(float\) \[1, 4, 32\], expected present_fam_00: float32"),
        ({"name": "past_fam_99"}, "it does not have past_fam_99: float32"),
    ],
)
def test_a_graph_that_is_not_what_the_contract_says(
    bundles: Callable[[str], Path], change: dict[str, Any], says: str
) -> None:
    from famexport.runtime.ort import OrtCpu

    bundle = fx.open_bundle(bundles("plain"))
    states = list(bundle.contract.states)
    if "states" in change:
        del states[0]
    else:
        i = [spec.name for spec in states].index("past_fam_00")
        shape = (1, change.get("rows", 4), 32)
        states[i] = TensorSpec(change.get("name", "past_fam_00"), change.get("dtype", "float32"), shape)
    contract = dataclasses.replace(bundle.contract, states=tuple(sorted(states, key=lambda spec: spec.name)))
    with pytest.raises(BundleError, match=says):
        OrtCpu(contract, "fp32", {"block_step": bundle.file("block_step.onnx")}, threads=1)


def test_onnxruntime_reads_no_other_format(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    """By its name alone it would take a file for one of its own format, which nobody looked into."""
    import onnxruntime

    from famexport.runtime.ort import OrtCpu

    bundle, graph = fx.open_bundle(bundles("plain")), tmp_path / "block_step.ort"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(graph)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(bundle.file("block_step.onnx")), options, providers=["CPUExecutionProvider"])
    assert onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])  # a good one, so to say
    with pytest.raises(IncompatibleError, match=r"cannot load block_step\.ort"):
        OrtCpu(bundle.contract, "fp32", {"block_step": graph})


def test_a_dynamic_batch_leaves_open_the_batch_and_nothing_else(sessions: Callable[..., Any]) -> None:
    """Whatever it is called; and it is no fixed one, nor a fixed one it."""
    from famexport.runtime.ort_io import check_io

    dynamic, fixed = sessions("dynamic"), sessions("text")  # one layer each
    io = dynamic.contract.graph("block_step")
    assert {spec.shape[0] for spec in io.taken + io.given} == {"batch"}

    def resized(name: str, *shape: Any) -> Any:
        changed = [TensorSpec(s.name, s.dtype, shape) if s.name == name else s for s in io.states]
        return dataclasses.replace(io, states=tuple(changed), new=tuple(changed))

    graph = dynamic.backend.sessions["block_step"]
    check_io(graph, io)
    check_io(graph, resized("past_fam_00", "rows", 4, 32))
    wrong = {
        "FAM": (
            graph,
            resized("past_fam_00", "batch", 5, 32),
            r"takes 'past_fam_00' .*, 4, 32\], expected .*, 5, 32\]",
        ),
        "rank": (graph, resized("past_fam_00", "batch", 4), r"takes 'past_fam_00' .*, 4, 32\], expected"),
        "one row": (graph, fixed.contract.graph("block_step"), r"takes 'tokens' .*\['.*', 8\], expected .*\[1, 8\]"),
        "any": (fixed.backend.sessions["block_step"], io, r"takes 'tokens' tensor\(int64\) \[1, 8\], expected"),
    }
    for case, (session, contract, says) in wrong.items():
        with pytest.raises(BundleError, match=says):
            check_io(session, contract), case


def test_a_graph_that_onnxruntime_cannot_load(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    from famexport.runtime.ort import OrtCpu

    bundle = fx.open_bundle(bundles("plain"))
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"\x08\x0a\x12\x03abc")
    with pytest.raises(IncompatibleError, match=r"onnxruntime .* cannot load damaged.onnx: ") as caught:
        OrtCpu(bundle.contract, "fp32", {"block_step": damaged})
    assert "\n" not in str(caught.value)


def test_torch_needs_the_built_in_model(bundles: Callable[[str], Path]) -> None:
    import dataclasses

    bundle = fx.open_bundle(bundles("plain"))
    own = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, config=None))
    with pytest.raises(
        IncompatibleError, match="runs famexport's own model, and this bundle holds another; use ort-cpu"
    ):
        open_backend(own, "torch")


def test_torch_wants_every_weight_and_no_other(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from famexport.config import FamConfig
    from famexport.runtime.torch_reference import Torch

    bundle = fx.open_bundle(bundles("plain"))
    weights = load_file(bundles("plain") / "weights.safetensors")
    config = FamConfig.from_dict(dict(bundle.manifest.config or {}))
    path = tmp_path / "weights.safetensors"
    save_file({key: value for key, value in weights.items() if key != "model.norm.weight"}, path)
    with pytest.raises(BundleError, match=r"lacks model\.norm\.weight"):
        Torch(bundle.contract, "fp32", config, path)
    save_file({**weights, "strange": np.zeros(3, np.float32)}, path)
    with pytest.raises(BundleError, match="holds strange, which the model does not have"):
        Torch(bundle.contract, "fp32", config, path)


def test_a_failing_step_is_a_typed_error_and_the_state_stays(sessions: Callable[..., Any]) -> None:
    session = sessions("plain")
    with session.stream() as stream, session.stream() as spared:
        fed = [random_input(session.contract, 8, seed=i) for i in range(3)]
        stream.step(fed[0]), spared.step(fed[0])

        class Broken:
            def io_binding(self) -> Any:
                return good.io_binding()

            def run_with_iobinding(self, binding: Any) -> None:
                raise RuntimeError("out of luck\nand of lines")

        loop, good = stream._loop, stream._loop._sessions["block_step"]
        loop._sessions["block_step"] = Broken()
        loop._calls.clear()
        with pytest.raises(fx.FamExportError, match="onnxruntime failed in block_step: out of luck$"):
            stream.step(fed[1])
        loop._sessions["block_step"] = good
        loop._calls.clear()
        assert stream.blocks == 1
        assert np.array_equal(stream.step(fed[2]), spared.step(fed[2]))
