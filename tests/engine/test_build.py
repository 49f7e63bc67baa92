"""Real builds with TensorRT-RTX, which needs no GPU: what they give, what they keep, what they refuse."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from famexport.bundle import engine_bytes, open_bundle
from famexport.config import preset
from famexport.engine.build import _build_one, _lock, build_engines
from famexport.engine.build_options import BuildOptions
from famexport.engine.network import build_failure
from famexport.engine.targets import TARGETS
from famexport.engines import read_entries
from famexport.errors import (
    BundleError,
    EngineError,
    FamExportError,
    IncompatibleError,
    InvalidInputError,
    UntrustedError,
    UsageError,
)
from famexport.export.pipeline import export_bundle
from famexport.inspection import inspect
from famexport.manifest import Manifest
from famexport.runtime.trust import is_trusted

Bundles = Callable[[str], Path]
DTYPES = {"plain": "FLOAT", "fp16": "HALF", "bf16": "BF16"}


@pytest.mark.parametrize("name", DTYPES)
def test_products_have_the_precision_that_was_asked(bundle: Bundles, name: str) -> None:
    path = bundle(name)
    (entry,) = build_engines(path, "rtx-4090").engines
    products = entry.layers["MATRIX_MULTIPLY"]
    assert set(products) == {DTYPES[name]}
    assert products[DTYPES[name]] >= 10  # of a layer 7 with weights and 2 of attention; the head
    assert (entry.graph, entry.engine, entry.checked, entry.attention) == (
        "block_step",
        "tensorrt-rtx",
        "network",
        None,
    )
    contract = open_bundle(path).contract
    assert sum(entry.io.values()) == len(contract.input_names) + len(contract.output_names)
    assert (entry.device.compute_capability, entry.device.gpu) == ("8.9", None)
    assert len(engine_bytes(open_bundle(path), entry)) == entry.bytes > 100_000
    assert is_trusted(entry.sha256)


@pytest.mark.parametrize("target", [name for name, t in TARGETS.items() if "tensorrt-rtx" in t.engines])
def test_every_target_of_tensorrt_rtx_builds(bundle: Bundles, target: str) -> None:
    (entry,) = build_engines(bundle("fp16"), target).engines
    assert entry.device.compute_capability == TARGETS[target].compute_capability
    assert set(entry.layers["MATRIX_MULTIPLY"]) == {"HALF"}


def test_all_graphs_build_and_an_unchanged_key_is_kept(bundle: Bundles) -> None:
    path = bundle("all")
    before = open_bundle(path)
    first = build_engines(path, "rtx-4090")
    graphs = set(before.contract.graph_names)
    assert {e.graph for e in first.engines} == graphs == {"block_step", "append_step", "append_step_c3", "commit_block"}
    assert first.kept == []
    files = {p: p.stat().st_mtime_ns for p in path.rglob("*.plan")}
    assert len(files) == 4
    again = build_engines(path, "rtx-4090")
    assert set(again.kept) == graphs
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*.plan")} == files
    other = build_engines(path, "rtx-5090")
    assert other.kept == []
    assert len(list(path.rglob("*.plan"))) == 8
    now = open_bundle(path)
    assert now.id != before.id
    assert now.manifest.files == before.manifest.files
    assert {(e.target, e.graph) for e in read_entries(now.manifest.engines)} == {
        (target, graph) for target in ("rtx-4090", "rtx-5090") for graph in now.contract.graph_names
    }


def test_other_options_replace_the_engine(bundle: Bundles) -> None:
    path = bundle("fp16")
    (first,) = build_engines(path, "l4").engines
    (second,) = build_engines(path, "l4", options=BuildOptions(optimization_level=1, workspace_mb=64)).engines
    assert first.key != second.key
    assert [p.name for p in path.rglob("*.plan")] == [second.file]
    assert list(open_bundle(path).manifest.engines) == [second.name]


@pytest.mark.parametrize("damage", ["truncate", "modify", "remove", "untrust"])
def test_a_damaged_or_foreign_engine_is_built_again(bundle: Bundles, trust_store: Path, damage: str) -> None:
    path = bundle("fp16")
    (entry,) = build_engines(path, "l4").engines
    plan = path / "engines" / entry.name
    if damage == "truncate":
        plan.write_bytes(plan.read_bytes()[:-1])
    elif damage == "modify":
        data = bytearray(plan.read_bytes())
        data[1000] ^= 1
        plan.write_bytes(data)
    elif damage == "remove":
        plan.unlink()
    else:
        (trust_store / entry.sha256).unlink()
    if damage != "untrust":
        with pytest.raises(UntrustedError, match="not as it was built.*famexport build .* --target l4"):
            engine_bytes(open_bundle(path), entry)
    (again,) = (built := build_engines(path, "l4")).engines
    assert built.kept == []
    assert engine_bytes(open_bundle(path), again)
    assert is_trusted(again.sha256)


def test_an_engine_can_be_inspected(bundle: Bundles, trust_store: Path) -> None:
    path = bundle("fp16")
    (entry,) = build_engines(path, "l4").engines
    plan = path / "engines" / entry.name
    facts = inspect(plan)
    assert (facts["kind"], facts["target"], facts["graph"], facts["built_here"]) == ("engine", "l4", "block_step", True)
    assert facts["layers"]["MATRIX_MULTIPLY"].endswith(" HALF")
    assert "built here" in inspect(path)["engines"][entry.name]
    (trust_store / entry.sha256).unlink()
    assert inspect(plan)["built_here"] is False
    assert "not built here" in inspect(path)["engines"][entry.name]
    stray = plan.with_name("block_step-" + "0" * 16 + ".plan")
    stray.write_bytes(plan.read_bytes())
    with pytest.raises(InvalidInputError, match="no engine that the manifest of .* names"):
        inspect(stray)
    plan.write_bytes(b"other")
    with pytest.raises(UntrustedError, match="not as it was built"):
        inspect(plan)


def test_litter_is_removed_by_the_next_build_and_never_named(bundle: Bundles) -> None:
    path = bundle("fp16")
    folder = path / "engines" / "l4"
    folder.mkdir(parents=True)
    (folder / ("block_step-" + "0" * 16 + ".plan")).write_bytes(b"litter of a killed build")
    assert open_bundle(path).manifest.engines == {}
    (entry,) = build_engines(path, "l4").engines
    assert [p.name for p in folder.iterdir()] == [entry.file]


def test_of_two_builds_for_one_target_the_second_is_refused(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the plans of the first for litter, and the manifest would come to name what is gone."""
    path, refused = bundle("all"), []

    def build_one(*args: Any) -> Any:
        entry = _build_one(*args)
        if len(refused) < 2:
            refused.append(entry.file)
            with pytest.raises(FamExportError, match="another process builds engines for l4 in .*; wait until it has"):
                build_engines(path, "l4", options=BuildOptions(optimization_level=1))
        return entry

    monkeypatch.setattr("famexport.engine.build._build_one", build_one)
    built = build_engines(path, "l4").engines
    assert len(refused) == 2
    opened = open_bundle(path)
    assert set(opened.manifest.engines) == {entry.name for entry in built}
    assert all(engine_bytes(opened, entry) for entry in built)


def test_what_another_build_published_meanwhile_is_kept(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the bundle and being its builder; also where the build fails."""
    path = bundle("fp16")
    opened = open_bundle(path)
    (entry,) = build_engines(path, "l4").engines
    assert build_engines(opened, "l4").kept == ["block_step"]

    def fail(*_: Any) -> None:
        raise EngineError("not what was asked")

    monkeypatch.setattr("famexport.engine.build._build_one", fail)
    with pytest.raises(EngineError):
        build_engines(opened, "l4", options=BuildOptions(optimization_level=1))
    assert engine_bytes(open_bundle(path), entry)


def test_a_folder_removed_while_it_is_locked_is_locked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a build that fails, and removes its empty folders."""
    real, removed = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        if len(removed) < 3:
            (tmp_path / "engines" / "l4").rmdir()
            (tmp_path / "engines").rmdir()
            if len(removed) == 1:
                (tmp_path / "engines" / "l4").mkdir(parents=True)  # another one
            removed.append(descriptor)

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", flock)
    lock = _lock(tmp_path, "engines", "l4", wait=False)
    assert len(removed) == 3
    assert os.path.samestat(os.fstat(lock), os.stat(tmp_path / "engines" / "l4"))
    with pytest.raises(BlockingIOError):
        _lock(tmp_path, "engines", "l4", wait=False)
    os.close(lock)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        _lock(tmp_path / "none", "engines")


@pytest.mark.parametrize("where", ["engines", "engines/l4"])
def test_no_plan_is_written_or_removed_through_a_link(bundle: Bundles, tmp_path: Path, where: str) -> None:
    path, outside = bundle("fp16"), tmp_path / "outside"
    outside.mkdir()
    (outside / "canary.plan").write_bytes(b"canary")
    (path / where).parent.mkdir(exist_ok=True)
    (path / where).symlink_to(outside)
    with pytest.raises(BundleError):
        build_engines(path, "l4")
    assert [p.name for p in outside.iterdir()] == ["canary.plan"]
    assert (outside / "canary.plan").read_bytes() == b"canary"


@pytest.mark.parametrize(
    ("target", "name", "engine", "error", "said"),
    [
        ("t4", "bf16", None, IncompatibleError, "t4 .* has no bf16 in tensorrt-rtx; export with --precision fp16"),
        ("t4", "plain", None, IncompatibleError, "has no fp32 in tensorrt-rtx; export with --precision fp16"),
        ("h100", "fp16", "tensorrt-rtx", IncompatibleError, "no engines for h100 .compute capability 9.0"),
        ("jetson-orin-nx-jp6", "fp16", "tensorrt-rtx", IncompatibleError, "--engine tensorrt on the device itself"),
        (
            "jetson-thor",
            "fp16",
            None,
            IncompatibleError,
            "this machine .* x86_64, .*Thor .11.0, aarch64.*run this there",
        ),
        ("h100", "fp16", None, IncompatibleError, "needs the package 'tensorrt'.*famexport.tensorrt"),
        ("rtx-9999", "fp16", None, UsageError, "no target 'rtx-9999'; expected one of"),
        ("l4", "fp16", "onnx", UsageError, "no engine 'onnx'; expected tensorrt or tensorrt-rtx"),
    ],
)
def test_what_cannot_be_built(
    bundle: Bundles, target: str, name: str, engine: str | None, error: type[FamExportError], said: str
) -> None:
    path = bundle(name)
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(error, match=said):
        build_engines(path, target, engine=engine)
    assert (path / "manifest.json").read_bytes() == before
    assert not (path / "engines").exists()


def test_a_jetson_without_its_tensorrt_is_not_sent_to_pypi(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("famexport.runtime.tensorrt_api.platform.machine", lambda: "aarch64")
    with pytest.raises(IncompatibleError, match="JetPack's own TensorRT.*python3-libnvinfer") as caught:
        build_engines(bundle("fp16"), "jetson-orin-nx-jp6")
    assert "pip install" not in str(caught.value)


def test_sm75_itself_refuses_bfloat16(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the table of targets wrong, the builder's own refusal would be said, and nothing left."""
    monkeypatch.setattr("famexport.engine.build.precision_problems", lambda *_: [])
    path = bundle("bf16")
    with pytest.raises(IncompatibleError, match="block_step for t4: TensorRT could not build it.*b16"):
        build_engines(path, "t4")
    assert not (path / "engines").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_profile": (1, 2, 4)}, "is for a dynamic batch, this bundle has 1"),
        ({"timing_cache": Path("x")}, "options of --engine tensorrt alone"),
        ({"hardware_compatible": "ampere-plus"}, "options of --engine tensorrt alone"),
        ({"hardware_compatible": "all"}, "hardware_compatible must be one of none"),
        ({"attention": "flash"}, "attention must be"),
        ({"optimization_level": 6, "workspace_mb": 0}, "2 problems"),
    ],
)
def test_options_that_cannot_be(bundle: Bundles, options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_engines(bundle("fp16"), "l4", options=BuildOptions(**options))


def test_a_dynamic_batch_gets_a_profile(bundle: Bundles) -> None:
    path = bundle("all_dynamic")
    built = build_engines(path, "rtx-4090", options=BuildOptions(batch_profile=(1, 2, 4))).engines
    assert {e.graph for e in built} == set(open_bundle(path).contract.graph_names)
    assert all(e.options["batch_profile"] == [1, 2, 4] for e in built)


@pytest.mark.parametrize("options", [{"strip": True}, {"refit": True}])
def test_what_needs_a_gpu_at_the_build_says_so(bundle: Bundles, options: dict) -> None:
    """TensorRT-RTX 1.7.1, on a machine without a GPU."""
    path = bundle("fp16")
    with pytest.raises(IncompatibleError, match="the build needs a GPU.*leave out --refit and --strip"):
        build_engines(path, "l4", options=BuildOptions(**options))
    assert not (path / "engines").exists()


@pytest.fixture(scope="module")
def wide(make_checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64, as fused attention needs them; the tiny preset has 8."""
    changes = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = preset("tiny", **changes, block_size=64, fam_length=16)
    return make_checkpoint(tmp_path_factory.mktemp("wide") / "ckpt", config)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_fused_attention_is_proven_by_building(wide: Path, tmp_path: Path, precision: str) -> None:
    """A chunk of one position has no fused kernel, a chunk of 8 has (TensorRT-RTX 1.7.1): both are said."""
    options = {"precision": precision, "opset": 23, "graphs": "all", "parity_blocks": 4}
    export_bundle(wide, tmp_path / "b", chunks=(8,), **options)
    built = build_engines(tmp_path / "b", "l4", options=BuildOptions(attention="fused")).engines
    assert [e.attention for e in built] == ["fused"] * 3
    assert all(e.layers["ATTENTION_OUTPUT"] for e in built)
    export_bundle(wide, tmp_path / "one", chunks=(1,), **options)
    with pytest.raises(EngineError, match="append_step for l4: TensorRT has no fused kernel for this attention"):
        build_engines(tmp_path / "one", "l4", options=BuildOptions(attention="fused"))
    assert not (tmp_path / "one" / "engines").exists()
    assert {e.attention for e in build_engines(tmp_path / "one", "l4").engines} == {"decomposable"}


def test_float32_attention_is_decomposable_only(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_bundle(wide, tmp_path / "b", precision="fp32", opset=23, parity_blocks=4)
    with pytest.raises(EngineError, match="precision is fp32, expected fp16 or bf16"):
        build_engines(tmp_path / "b", "l4", options=BuildOptions(attention="fused"))
    (entry,) = build_engines(tmp_path / "b", "l4").engines
    assert entry.attention == "decomposable"
    # and TensorRT itself says so, if it is asked
    data = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert data["precision"] == "fp32"
    monkeypatch.setattr("famexport.engine.build._fused_problems", lambda *_: [])
    with pytest.raises(EngineError, match="no fused kernel"):
        build_engines(tmp_path / "b", "l4", options=BuildOptions(attention="fused"))


def test_fused_attention_needs_native_attention(bundle: Bundles) -> None:
    with pytest.raises(EngineError, match="has no Attention nodes .opset 20.*export with --opset 23"):
        build_engines(bundle("fp16"), "l4", options=BuildOptions(attention="fused"))


def test_a_head_of_eight_is_refused_before_the_build(make_checkpoint, tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "ckpt", preset("tiny"))
    export_bundle(made, tmp_path / "b", precision="fp16", opset=23, parity_blocks=4)
    with pytest.raises(EngineError, match="the head size is 8, expected 16 to 256 and a multiple of 8"):
        build_engines(tmp_path / "b", "l4", options=BuildOptions(attention="fused"))


def test_an_engine_that_is_silently_float32_is_refused(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """rf-detr#1453: the fp16 engine that was not. Sabotage: the manifest says fp16, the graph multiplies float32."""
    path = bundle("plain")
    data = open_bundle(path).manifest
    from dataclasses import replace

    (path / "manifest.json").write_bytes(replace(data, precision="fp16").to_bytes())
    with pytest.raises(EngineError, match="'FLOAT': .* of the MATRIX_MULTIPLY layers, expected all HALF for fp16"):
        build_engines(path, "l4")
    assert open_bundle(path).manifest.engines == {}


def test_a_bundle_exported_anew_meanwhile_is_not_touched(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle("fp16")
    opened = open_bundle(path)
    data = json.loads((path / "manifest.json").read_text())
    weights = path / data["weights"]
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    from dataclasses import replace

    from famexport.bundle import describe_files

    files = describe_files(path)
    (path / "manifest.json").write_bytes(replace(opened.manifest, files=files).to_bytes())
    with pytest.raises(BundleError):
        build_engines(opened, "l4")
    assert open_bundle(path).manifest.engines == {}


def test_engines_in_a_manifest_are_checked(bundle: Bundles) -> None:
    path = bundle("fp16")
    build_engines(path, "l4")
    manifest = open_bundle(path).manifest
    (name,) = manifest.engines
    good = manifest.engines[name]
    from dataclasses import replace

    for bad, said in (
        ({"../x/" + name.split("/")[1]: good}, "its name is not target/graph-key.plan"),
        ({name: {**good, "more": 1}}, "unknown key 'more'"),
        ({name: {k: v for k, v in good.items() if k != "device"}}, "lacks the key 'device'"),
        ({name: {**good, "bytes": "1"}}, "bytes of .* has the wrong type str"),
        ({name: {**good, "sha256": "x"}}, "no valid size and SHA-256"),
        ({name: {**good, "device": {}}}, "device of .* must have"),
        ({name: {**good, "engine": "exe"}}, "unknown kind 'exe'"),
        ({name: []}, "must be an object"),
    ):
        with pytest.raises(BundleError, match=said):
            replace(manifest, engines=bad).to_bytes()
    assert Manifest.parse(replace(manifest).to_bytes()).engines == manifest.engines


def test_a_build_without_memory_says_what_to_lower() -> None:
    error = build_failure("block_step for l4", ["Error Code 2: OutOfMemory (Requested size was 1 bytes.)"])
    assert type(error) is FamExportError
    assert "lower --workspace or --optimization-level" in str(error)


CHILD = """
import sys
from famexport.cli import main
print("ready", flush=True)
main(["build", sys.argv[1], "--target", "l4", "-q"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_stopped_leaves_the_bundle_as_it_was(bundle: Bundles, kill: signal.Signals) -> None:
    path = bundle("all")
    before = (path / "manifest.json").read_bytes()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not list(path.rglob("*.plan")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(kill)
    _, said = child.communicate(timeout=60)
    assert child.returncode != 0, "it ended before it was stopped"
    assert (path / "manifest.json").read_bytes() == before
    open_bundle(path)
    if kill == signal.SIGINT:
        assert child.returncode == 130
        assert b"interrupted" in said
        assert not (path / "engines").exists()
    build_engines(path, "l4")
    assert len(list(path.rglob("*.plan"))) == 4


SMOLLM2 = {
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "num_hidden_layers": 3,
    "block_size": 128,
    "memory_segments": 3,
    "fam_length": 16,
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_step_of_smollm2s_shapes(make_checkpoint, tmp_path: Path, precision: str) -> None:
    """Its widths, heads, vocabulary and block, three of its 30 layers: portable, and with fused attention."""
    made = make_checkpoint(tmp_path / "ckpt", preset("tiny", **SMOLLM2))
    for opset, attention in ((20, None), (23, "fused")):
        export_bundle(made, tmp_path / f"{opset}", precision=precision, opset=opset, parity_blocks=2)
        options = BuildOptions(attention=attention or "decomposable")
        (entry,) = build_engines(tmp_path / f"{opset}", "rtx-4090", options=options).engines
        assert entry.attention == attention
        assert set(entry.layers["MATRIX_MULTIPLY"]) == {{"fp16": "HALF", "bf16": "BF16"}[precision]}
        assert entry.bytes > 2 * 576 * 49152  # the embedding alone
