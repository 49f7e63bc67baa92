"""Full TensorRT, on fakes made of the real bindings' recorded API: what is called, and what is never called.

Any call that a release does not have, or with arguments it does not take, fails in the fake.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from famexport.bundle import open_bundle
from famexport.contract import StepContract
from famexport.engine import build as build_module
from famexport.engine.build import build_engines
from famexport.engine.build_options import BuildOptions
from famexport.engines import DeviceTuple, EngineEntry, read_entries
from famexport.errors import EngineError, IncompatibleError, SnapshotError, UntrustedError
from famexport.runtime.session import Session
from famexport.runtime.tensorrt import EngineSet, Tensorrt, choose_engines, device_problems, load_engine, this_device
from famexport.runtime.tensorrt_api import DTYPES, new_logger
from famexport.runtime.trust import trust
from tests.engine.fake_tensorrt import fake_module
from tests.runtime.fake_cuda import FakeCuda as LoopCuda

RELEASES = ("10.3.0", "10.13.3.9", "11.4.0.106")
FACTS = {"name": "NVIDIA L4", "compute_capability": [8, 9], "memory_bytes": 24 << 30, "runtime": 12060}
PLAN = b"a plan of full TensorRT" * 100


class FakeCuda:
    def __init__(self) -> None:
        self.allocated: dict[int, int] = {}

    def facts(self) -> dict[str, Any]:
        return dict(FACTS)

    def malloc(self, nbytes: int) -> int:
        address = 4096 * (len(self.allocated) + 1)
        self.allocated[address] = nbytes
        return address

    def free(self, address: int) -> None:
        del self.allocated[address]

    def close(self) -> None:
        pass


def fake_network(trt: Any, contract: StepContract, graph: str, product: str) -> Any:
    """A parsed network with the contract's inputs and outputs and one product."""
    io = contract.graph(graph)

    def tensor(name: str, dtype: str) -> Any:
        return trt.make("ITensor", name=name, dtype=trt.DataType.__members__[DTYPES[dtype]])

    taken = [tensor(spec.name, spec.dtype) for spec in io.taken]
    given = [tensor(spec.name, spec.dtype) for spec in io.given]
    layer = trt.make("ILayer", type=trt.LayerType.MATRIX_MULTIPLY, num_outputs=1)
    out = trt.make("ITensor", name="x", dtype=trt.DataType.__members__[product])
    trt.on("INetworkDefinition.get_input", lambda self, i: taken[i])
    trt.on("INetworkDefinition.get_output", lambda self, i: given[i])
    trt.on("INetworkDefinition.get_layer", lambda self, i: layer)
    trt.on("ILayer.get_output", lambda self, i: out)
    return trt.make("INetworkDefinition", num_inputs=len(taken), num_outputs=len(given), num_layers=1)


def fake_engine(trt: Any, contract: StepContract, graph: str, **changes: tuple[str, tuple[int, ...]]) -> Any:
    io = contract.graph(graph)
    specs = {s.name: (DTYPES[s.dtype], s.sized(1)) for s in (*io.taken, *io.given)}
    specs.update(changes)
    names = list(specs)
    trt.on("ICudaEngine.get_tensor_name", lambda self, i: names[i])
    trt.on("ICudaEngine.get_tensor_dtype", lambda self, name: trt.DataType.__members__[specs[name][0]])
    trt.on("ICudaEngine.get_tensor_shape", lambda self, name: specs[name][1])
    return trt.make("ICudaEngine", num_io_tensors=len(names), device_memory_size_v2=1 << 16)


@pytest.fixture(params=RELEASES)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_module("tensorrt", request.param)
    module.__spec__ = ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(build_module, "find_spec", lambda name: name == "tensorrt" or None)
    monkeypatch.setattr("famexport.runtime.cuda.Cuda", FakeCuda)
    monkeypatch.setattr("famexport.runtime.tensorrt_api.platform.machine", lambda: "x86_64")
    return module


@pytest.fixture
def built(trt: Any, bundle: Callable[[str], Path]) -> Path:
    """A bundle with one engine that the fake built for the GPU at hand."""
    path = bundle("fp16")
    contract = open_bundle(path).contract
    network = fake_network(trt, contract, "block_step", "HALF")
    trt.on("Builder.create_network", lambda self, flags: network)
    trt.on("OnnxParser.parse_from_file", lambda self, path: True)
    trt.on("Builder.build_serialized_network", lambda self, network, config: trt.host_memory(PLAN))
    trt.on("Runtime.deserialize_cuda_engine", lambda self, data: fake_engine(trt, contract, "block_step"))
    build_engines(path, "l4", options=BuildOptions(version_compatible=True, workspace_mb=64, optimization_level=3))
    return path


def here(version: str) -> DeviceTuple:
    return DeviceTuple(version, "12.6", "8.9", "NVIDIA L4", "linux", "x86_64")


def test_a_build_asks_for_strong_types_and_never_for_host_code(trt: Any, built: Path) -> None:
    (entry,) = read_entries(open_bundle(built).manifest.engines)
    assert (entry.engine, entry.checked, entry.device) == ("tensorrt", "engine", here(str(trt.__version__)))
    ((flags,),) = [args[-1:] for args in trt.called("Builder.create_network")]
    assert flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    flagged = {args[-1].name for args in trt.called("IBuilderConfig.set_flag")}
    assert flagged == {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}
    assert not any("host_code" in name and args[-1] is True for name, args in trt.calls)
    order = [name for name, _ in trt.calls]
    assert order.index("Builder.build_serialized_network") < order.index("Runtime.deserialize_cuda_engine")
    assert any(args[-1] == 64 << 20 for args in trt.called("IBuilderConfig.set_memory_pool_limit"))


def test_a_product_of_another_type_stops_the_build(trt: Any, bundle: Callable[[str], Path]) -> None:
    path = bundle("fp16")
    network = fake_network(trt, open_bundle(path).contract, "block_step", "FLOAT")
    trt.on("Builder.create_network", lambda self, flags: network)
    trt.on("OnnxParser.parse_from_file", lambda self, path: True)
    with pytest.raises(EngineError, match="expected all HALF for fp16"):
        build_engines(path, "l4")
    assert not trt.called("Builder.build_serialized_network")


def test_a_graph_that_cannot_be_parsed(trt: Any, bundle: Callable[[str], Path]) -> None:
    trt.on("OnnxParser.parse_from_file", lambda self, path: False)
    with pytest.raises(IncompatibleError, match="cannot parse block_step.onnx.*export with --opset 20"):
        build_engines(bundle("fp16"), "l4")


def test_another_gpu_or_version_than_the_targets(
    trt: Any, bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IncompatibleError, match=r"has NVIDIA L4 .8.9.*a100 is NVIDIA A100.*run this there"):
        build_engines(bundle("fp16"), "a100")
    if not str(trt.__version__).startswith("10.3"):
        monkeypatch.setattr("famexport.runtime.tensorrt_api.platform.machine", lambda: "aarch64")
        with pytest.raises(IncompatibleError, match=r"TensorRT here is .*, jetson-orin-nx-jp6 has 10.3 to before 10.4"):
            build_engines(bundle("fp16"), "jetson-orin-nx-jp6")


def loading(trt: Any, path: Path, entry: EngineEntry | None = None) -> Any:
    bundle = open_bundle(path)
    found = entry or read_entries(bundle.manifest.engines)[0]
    trt.calls.clear()
    logger = new_logger(trt)
    runtime = trt.Runtime(logger)
    return load_engine(trt, runtime, logger, bundle, found, bundle.contract.graph(found.graph))


def test_a_good_engine_loads_with_host_code_off(trt: Any, built: Path) -> None:
    assert loading(trt, built) is not None
    assert len(trt.called("Runtime.deserialize_cuda_engine")) == 1


@pytest.mark.parametrize("change", ["truncated", "modified", "removed", "symlink", "hardlink", "foreign"])
def test_nothing_is_deserialised_before_it_is_checked(
    trt: Any, built: Path, trust_store: Path, tmp_path: Path, change: str
) -> None:
    plan = next(built.rglob("*.plan"))
    digest = read_entries(open_bundle(built).manifest.engines)[0].sha256
    if change == "truncated":
        plan.write_bytes(PLAN[:-1])
    elif change == "modified":
        plan.write_bytes(b"A" + PLAN[1:])
    elif change == "removed":
        plan.unlink()
    elif change == "symlink":
        plan.rename(tmp_path / "elsewhere")
        plan.symlink_to(tmp_path / "elsewhere")
    elif change == "hardlink":
        (tmp_path / "elsewhere").hardlink_to(plan)
    else:
        (trust_store / digest).unlink()
    with pytest.raises(UntrustedError, match="famexport build .* --target l4 --engine tensorrt") as caught:
        loading(trt, built)
    assert caught.value.exit_code == 4
    assert not trt.called("Runtime.deserialize_cuda_engine")


def test_a_modified_engine_with_a_modified_manifest_is_still_foreign(trt: Any, built: Path) -> None:
    """An attacker who can write the bundle can write both; the list of engines built here is elsewhere."""
    import hashlib

    bundle = open_bundle(built)
    ((name, data),) = bundle.manifest.engines.items()
    evil = b"evil" + PLAN
    next(built.rglob("*.plan")).write_bytes(evil)
    changed = {name: {**data, "bytes": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}}
    (built / "manifest.json").write_bytes(replace(bundle.manifest, engines=changed).to_bytes())
    with pytest.raises(UntrustedError, match="was not built here, and an engine is executable code"):
        loading(trt, built)
    assert not trt.called("Runtime.deserialize_cuda_engine")


def test_a_trust_store_that_others_can_write_vouches_for_nothing(trt: Any, built: Path, trust_store: Path) -> None:
    for mode in (0o720, 0o702, 0o777):
        trust_store.chmod(mode)
        with pytest.raises(UntrustedError, match="no other can write; chmod 700"):
            loading(trt, built)
        assert not trt.called("Runtime.deserialize_cuda_engine")
        with pytest.raises(UntrustedError):
            trust("0" * 64)


def test_an_engine_without_weights_is_not_run(trt: Any, built: Path) -> None:
    (entry,) = read_entries(open_bundle(built).manifest.engines)
    with pytest.raises(IncompatibleError, match="built without its weights.*famexport build .* --target l4"):
        loading(trt, built, replace(entry, options={**entry.options, "strip": True}))
    assert not trt.called("Runtime.deserialize_cuda_engine")


def test_a_null_engine_is_an_error_with_the_command(trt: Any, built: Path) -> None:
    trt.on("Runtime.deserialize_cuda_engine", lambda self, data: None)
    with pytest.raises(
        IncompatibleError, match="refuses l4/block_step.*build it again with: famexport build"
    ) as caught:
        loading(trt, built)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"past_count": ("INT32", (1,))}, "past_count is INT32, expected INT64"),
        ({"past_fam_00": ("FLOAT", (1, 5, 32))}, r"past_fam_00 has shape \[1, 5, 32\], expected \[1, 4, 32\]"),
        ({"past_more": ("FLOAT", (1,))}, "it has the unknown tensor past_more"),
    ],
)
def test_an_engine_of_other_shapes_is_refused(trt: Any, built: Path, change: dict, said: str) -> None:
    contract = open_bundle(built).contract
    trt.on("Runtime.deserialize_cuda_engine", lambda self, data: fake_engine(trt, contract, "block_step", **change))
    with pytest.raises(IncompatibleError, match=said):
        loading(trt, built)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tensorrt", "9.1.0", "TensorRT is 9.1.0, expected"),
        ("cuda", "13.0", "CUDA is 13.0, expected 12.6"),
        ("compute_capability", "8.6", "compute capability is 8.6, expected 8.9"),
        ("gpu", "NVIDIA GeForce RTX 4090", "the GPU is NVIDIA GeForce RTX 4090, expected NVIDIA L4"),
        ("os", "windows", "system is windows, expected linux"),
        ("arch", "aarch64", "processor is aarch64, expected x86_64"),
    ],
)
def test_each_field_of_the_device_is_compared(trt: Any, built: Path, field: str, value: str, said: str) -> None:
    bundle, version = open_bundle(built), str(trt.__version__)
    assert set(choose_engines(bundle, "tensorrt", here(version))) == {"block_step"}
    with pytest.raises(IncompatibleError, match=said) as caught:
        choose_engines(bundle, "tensorrt", replace(here(version), **{field: value}))
    assert "famexport build" in str(caught.value)
    with pytest.raises(IncompatibleError, match="has no tensorrt-rtx engines; build them with"):
        choose_engines(bundle, "tensorrt-rtx", here(version))


def test_compatibility_loosens_only_what_it_is_for(built: Path) -> None:
    (entry,) = read_entries(open_bundle(built).manifest.engines)
    major = entry.device.tensorrt.partition(".")[0]
    later = replace(entry.device, tensorrt=f"{major}.99.0")
    assert entry.options["version_compatible"]
    assert device_problems(entry, later) == []
    strict = replace(entry, options={**entry.options, "version_compatible": False})
    assert device_problems(strict, later) == [f"TensorRT is {major}.99.0, expected {entry.device.tensorrt}"]
    ampere = replace(entry, options={**entry.options, "hardware_compatible": "ampere-plus"})
    other = replace(entry.device, gpu="NVIDIA A10", compute_capability="8.6")
    assert device_problems(ampere, other) == []
    assert device_problems(ampere, replace(other, compute_capability="7.5"))


def test_contexts_get_scratch_and_addresses_before_they_run(trt: Any, built: Path) -> None:
    bundle, cuda = open_bundle(built), FakeCuda()
    engine = loading(trt, built)
    engines = EngineSet(trt, bundle.contract, 1, {"block_step": engine}, cuda)
    io = bundle.contract.graph("block_step")
    addresses = {spec.name: 256 * i for i, spec in enumerate((*io.taken, *io.given), 1)}
    trt.calls.clear()
    engines.enqueue("block_step", addresses, 7)
    order = [name for name, _ in trt.calls]
    assert order[0] == "ICudaEngine.create_execution_context"
    assert trt.calls[0][1][-1] == trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert order[-1] == "IExecutionContext.execute_async_v3"
    assert trt.calls[-1][1][-1] == 7
    assert order.count("IExecutionContext.set_tensor_address") == len(addresses)
    assert trt.called("IExecutionContext.set_device_memory")[0][-2:] == (4096, 1 << 16)
    trt.calls.clear()
    engines.enqueue("block_step", addresses, 7)
    assert [name for name, _ in trt.calls] == ["IExecutionContext.execute_async_v3"]
    engines.enqueue("block_step", {name: a + 1 for name, a in addresses.items()}, 7)
    assert "ICudaEngine.create_execution_context" in [name for name, _ in trt.calls]
    assert cuda.allocated == {4096: 1 << 16}
    engines.close()
    engines.close()
    assert cuda.allocated == {}


def test_a_snapshot_names_the_engine(trt: Any, built: Path) -> None:
    """Two builds of one bundle may round differently."""

    class Device(LoopCuda):
        facts = FakeCuda.facts

    def opened() -> Any:
        bundle = open_bundle(built)
        return Session(bundle, Tensorrt(bundle, "tensorrt", cuda=Device()))

    with opened() as session, session.stream() as stream:
        saved = stream.snapshot()
    with opened() as session, session.stream() as stream:
        stream.restore(saved)
    trt.on("Builder.build_serialized_network", lambda self, network, config: trt.host_memory(PLAN[::-1]))
    build_engines(built, "l4", options=BuildOptions(optimization_level=1))
    with opened() as session, session.stream() as stream:
        with pytest.raises(SnapshotError, match="it was taken on tensorrt .*, this is tensorrt .*--any-engine"):
            stream.restore(saved)
        stream.restore(saved, any_engine=True)


def test_aliases_are_asked_for_where_the_release_has_them(trt: Any, built: Path) -> None:
    bundle = open_bundle(built)
    engine = loading(trt, built)
    state = bundle.contract.states[-1].name
    present = "present_" + state.removeprefix("past_")
    has = hasattr(engine, "get_aliased_input_tensor")
    assert has == str(trt.__version__).startswith("11")
    if has:
        trt.on("ICudaEngine.get_aliased_input_tensor", lambda self, name: state if name == present else "")
    engines = EngineSet(trt, bundle.contract, 1, {"block_step": engine}, FakeCuda())
    assert engines.aliased("block_step") == ({present: state} if has else {})


def test_this_device_reads_versions_as_cuda_writes_them(trt: Any) -> None:
    assert this_device(trt, FACTS).cuda == "12.6"
    assert this_device(trt, {**FACTS, "runtime": 13000, "compute_capability": [12, 0]}).compute_capability == "12.0"


def test_storage_dtypes_and_tensorrt_names_cover_each_other() -> None:
    from famexport.runtime.backend import STORAGE

    assert set(DTYPES) == set(STORAGE)
    assert np.dtype(STORAGE["int64"]) == np.int64
