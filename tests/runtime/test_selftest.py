"""``verify``: from the bundle's bytes to its behaviour. A device, a loop or a file that is not as it was is reported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from famexport.bundle import open_bundle
from famexport.errors import BundleError, IncompatibleError, ParityError, UsageError
from famexport.runtime.golden import GOLDEN_BLOCKS, relative_error, replay
from famexport.runtime.host import HostLoop
from famexport.runtime.ort import OrtLoop
from famexport.runtime.selftest import verify

Bundles = Callable[[str], Path]
advance, commit = OrtLoop.advance, HostLoop.commit


@pytest.mark.parametrize("backend", ["ort-cpu", "torch"])
@pytest.mark.parametrize("name", ["plain", "rows", "dynamic", "embeds", "last", "no_fam", "no_memory", "fp16", "bf16"])
def test_a_good_bundle(bundles: Bundles, name: str, backend: str) -> None:
    hashed: list[tuple[int, int]] = []
    facts = verify(bundles(name), backend, progress=lambda done, total: hashed.append((done, total)))
    bundle = open_bundle(bundles(name))
    assert facts["golden_blocks"] == (3 if name in ("rows", "dynamic") else GOLDEN_BLOCKS)  # until a row is reset
    assert facts["files"] == len(bundle.manifest.files)
    assert facts["bytes"] == hashed[-1][0] == hashed[-1][1]
    assert facts["bundle_id"] == bundle.id
    assert facts["backend"] == backend
    tight = {"fp32": 1e-5}.get(bundle.manifest.precision, facts["tolerance"])
    assert max(facts["logits_error"], facts["state_error"]) < tight <= facts["tolerance"]


def dropped_feedback(self: Any) -> None:
    """``commit`` forgets to make the new state the current one."""


def half_feedback(self: Any) -> None:
    """FAM is not fed back."""
    commit(self)
    now, before = self.buffers[self.current], self.buffers[1 - self.current]
    for name in now:
        if "fam" in name:
            now[name][...] = before[name]


def stale_keys(self: Any) -> None:
    """Keys and values are not fed back."""
    commit(self)
    for name, array in self.buffers[self.current].items():
        if "key" in name or "value" in name:
            array[...] = 0


def scaled(self: Any, fed: np.ndarray, out: np.ndarray) -> None:
    advance(self, fed, out)
    out *= 1.01


def constant(self: Any, fed: np.ndarray, out: np.ndarray) -> None:
    advance(self, fed, out)
    out[...] = out.mean()


def not_finite(self: Any, fed: np.ndarray, out: np.ndarray) -> None:
    advance(self, fed, out)
    out[..., -1, 0] = np.nan


def nothing(self: Any, fed: np.ndarray, out: np.ndarray) -> None:
    """The step never runs: whatever the buffers held stays."""


def shifted(self: Any, fed: np.ndarray, out: np.ndarray) -> None:
    advance(self, fed, out)
    out[...] = np.roll(out, 1, axis=1)


SABOTAGE = {f.__name__: ("commit", f) for f in (dropped_feedback, half_feedback, stale_keys)}
SABOTAGE |= {f.__name__: ("advance", f) for f in (scaled, constant, not_finite, nothing, shifted)}


# in bfloat16, one percent is within what rounding does
CASES = [(name, case) for name in ("plain", "bf16") for case in SABOTAGE if (name, case) != ("bf16", "scaled")]


@pytest.mark.parametrize(("name", "sabotage"), CASES)
def test_a_loop_that_is_wrong_is_reported(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, name: str, sabotage: str
) -> None:
    method, wrong = SABOTAGE[sabotage]
    bundles(name)  # made by a loop that is right
    monkeypatch.setattr(OrtLoop, method, wrong)
    with pytest.raises(
        ParityError, match=r"golden rollout differs on this device by (inf|\d.*) \(relative\), allowed is"
    ):
        verify(bundles(name))


@pytest.mark.parametrize("name", ["past_fam_01", "past_key_00", "past_count"])
def test_what_an_appended_block_leaves_behind_is_checked(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """block_step is right, and so is all of the first appended block: only the second reads what that left."""
    bundles("all")  # made by a loop that is right
    real = OrtLoop.end_block

    def forgotten(self: Any) -> None:
        real(self)
        self.buffers[1 - self.current][name][...] = 0

    monkeypatch.setattr(OrtLoop, "end_block", forgotten)
    with pytest.raises(ParityError, match="golden rollout differs on this device by"):
        verify(bundles("all"))


def altered(bundles: Bundles, to: Path, file: str, change: Callable[[bytearray], Any]) -> Path:
    copy = Path(shutil.copytree(bundles("plain"), to / "bundle"))
    data = bytearray((copy / file).read_bytes())
    change(data)
    (copy / file).write_bytes(data)
    return copy


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


@pytest.mark.parametrize("file", ["weights.safetensors", "block_step.onnx", "golden.safetensors"])
@pytest.mark.parametrize("change", [flip, bytearray.pop, lambda data: data.append(0)], ids=["flip", "cut", "longer"])
def test_an_altered_file_is_refused_before_anything_parses_it(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, change: Callable[[bytearray], Any]
) -> None:
    import onnxruntime
    import safetensors
    import safetensors.numpy

    import famexport.bundle
    import famexport.tensorfile

    parsed: list[str] = []
    for module, name in (
        (onnxruntime, "InferenceSession"),
        (safetensors, "safe_open"),
        (safetensors.numpy, "load"),
        (famexport.bundle, "graph_facts"),
        (famexport.tensorfile, "read_header"),
    ):
        monkeypatch.setattr(module, name, lambda *args, name=name, **options: parsed.append(name))
    with pytest.raises(BundleError, match=rf"{file} has .* expected "):
        verify(altered(bundles, tmp_path, file, change))
    assert parsed == []


def test_what_verify_refuses(bundles: Bundles, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no bundle"):
        verify(tmp_path / "none")
    with pytest.raises(UsageError, match="no backend 'cuda'"):
        verify(bundles("plain"), "cuda")


def test_a_device_that_cannot_run_it(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED\nsecond line")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(IncompatibleError, match="cannot load block_step.onnx: .*NOT_IMPLEMENTED; upgrade onnxruntime"):
        verify(bundles("plain"))


def test_recordings_that_do_not_fit(sessions: Callable[..., Any]) -> None:
    from safetensors.numpy import load, save

    bundle = sessions("plain").bundle
    good = load(bundle.read("golden.safetensors"))
    loop = sessions("plain").backend.open()
    assert replay(save(good), loop, 1e-5).blocks == GOLDEN_BLOCKS
    wrong = {
        "no inputs": {k: v for k, v in good.items() if k != "inputs"},
        "no state": {k: v for k, v in good.items() if k != "state.past_fam_01"},
        "no blocks": {**good, "inputs": good["inputs"][:0], "logits": good["logits"][:0]},
        "a block less": {**good, "logits": good["logits"][1:]},
        "another T": {**good, "inputs": good["inputs"][:, :, 1:].copy()},
        "another V": {**good, "logits": good["logits"][..., 1:].copy()},
        "a scalar to broadcast": {**good, "state.past_fam_00": np.zeros((1, 1, 1), np.float32)},
    }
    for case, arrays in wrong.items():
        with pytest.raises(BundleError, match="golden rollout"):
            replay(save(arrays), loop, 1e-5), case
    with pytest.raises(BundleError, match="golden rollout cannot be read"):
        replay(b"\x00" * 20, loop, 1e-5)
    assert replay(save(good), loop, 1e-5).worst < 1e-5  # whatever state the loop was in


def test_a_wrong_state_is_reported_where_all_logits_are_right(sessions: Callable[..., Any]) -> None:
    """That of the last block, which no logits show any more."""
    from safetensors.numpy import load, save

    session = sessions("plain")
    good, loop = load(session.bundle.read("golden.safetensors")), session.backend.open()
    for spec in session.contract.states:
        wrong = save({**good, f"state.{spec.name}": good[f"state.{spec.name}"] + 1})
        with pytest.raises(ParityError, match="golden rollout differs on this device by"):
            replay(wrong, loop, 1e-2), spec.name
        assert (
            replay(wrong, loop, 1e-2, blocks=GOLDEN_BLOCKS - 1).state_error == 0
        )  # of another block's nothing is known


def test_relative_error() -> None:
    a = np.array([3.0, 4.0], np.float32)
    assert relative_error(a, a) == 0
    assert relative_error(a * 1.5, a) == pytest.approx(0.5)
    assert relative_error(a, np.zeros(2)) == 5
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.array([np.inf, 1]), a) == relative_error(np.array([np.nan, 1]), a) == float("inf")
    assert not relative_error(a, np.array([np.nan, 1])) <= 1e9  # NaN passes no test
    assert relative_error(np.full(4, 6e4, np.float16), np.full(4, 6e4, np.float16)) == 0  # squares that overflow
