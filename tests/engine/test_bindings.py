"""The recordings of TensorRT's Python API, and the fakes made of them: they have what the releases have, no more."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine import record_bindings
from tests.engine.fake_tensorrt import FakeEnum, fake_module, parse_signature, recording

OLD, LAST_10, NEW, RTX = RELEASES = (
    ("tensorrt", "10.3.0"),
    ("tensorrt", "10.13.3.9"),
    ("tensorrt", "11.4.0.106"),
    ("tensorrt_rtx", "1.7.1.116"),
)
every_release = pytest.mark.parametrize("release", RELEASES, ids="-".join)

# member -> the releases that have it
WHERE: dict[str, tuple[tuple[str, str], ...]] = {
    "BuilderFlag.FP16": (OLD, LAST_10),
    "BuilderFlag.BF16": (OLD, LAST_10),
    "Builder.platform_has_fast_fp16": (OLD, LAST_10),
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": (OLD, LAST_10),
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": RELEASES,
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": (LAST_10, NEW, RTX),
    "Builder.build_serialized_network_to_stream": (LAST_10, NEW, RTX),
    "ICudaEngine.device_memory_size": (OLD, LAST_10),
    "ICudaEngine.device_memory_size_v2": RELEASES,
    "ICudaEngine.create_runtime_config": (LAST_10, NEW, RTX),
    "IAttention": (NEW, RTX),
    "IAttention.decomposable": (NEW, RTX),
    "INetworkDefinition.add_attention": (NEW, RTX),
    "ICudaEngine.get_aliased_input_tensor": (NEW, RTX),
    "IExecutionContext.set_device_memory": RELEASES,
    "IExecutionContext.device_memory": RELEASES,
    "Runtime.engine_host_code_allowed": RELEASES,
    "ComputeCapability": (RTX,),
    "CudaGraphStrategy": (RTX,),
    "IBuilderConfig.set_compute_capability": (RTX,),
    "IRuntimeConfig": (LAST_10, NEW, RTX),
    "IRuntimeConfig.cuda_graph_strategy": (RTX,),
    "IBuilderConfig.hardware_compatibility_level": RELEASES,
    "IBuilderConfig.runtime_platform": RELEASES,
    "IBuilderConfig.progress_monitor": RELEASES,
    "EngineInspector.get_engine_information": RELEASES,
}


cached_module = functools.cache(fake_module)  # for tests that only look


def has(module: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def recorded_names(classes: dict[str, Any], name: str) -> set[str]:
    """The public members of a recorded class, those of its bases included."""
    entry = classes[name]
    own = {key for part in ("methods", "properties", "static", "constants") for key in entry.get(part, {})}
    inherited = (recorded_names(classes, base) for base in entry.get("bases", []))
    return {key for key in own.union(*inherited) if not key.startswith("_")}


def plain_classes(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in record["classes"].items() if "enum" not in entry}


def sample(trt: Any, record: dict[str, Any], kind: str) -> Any:
    """A value that a property of the type takes and that is not its default."""
    name = kind.rpartition("::")[2]
    if name in record["classes"]:
        cls = trt._classes[name]
        return list(cls.__members__.values())[-1] if issubclass(cls, FakeEnum) else trt.make(name)
    return {"bool": True, "int": 7, "float": 0.5, "str": "seven"}.get(kind)


# the recordings


@every_release
def test_recordings_are_as_the_recorder_writes_them(release: tuple[str, str]) -> None:
    text = (record_bindings.BINDINGS / f"{'-'.join(release)}.json").read_text()
    record = json.loads(text)
    assert (record["name"], record["version"]) == release
    assert record_bindings.to_json(record) == text
    assert len(text) < 150_000
    assert "0x" not in text  # an address, which would differ each time


@every_release
@pytest.mark.parametrize("path", WHERE)
def test_which_release_has_what(path: str, release: tuple[str, str]) -> None:
    assert has(cached_module(*release), path) is (release in WHERE[path])


def test_the_same_flag_has_another_value_in_another_release() -> None:
    """So a flag's value is asked of the module, never written down."""
    typed = [int(fake_module(*release).NetworkDefinitionCreationFlag.STRONGLY_TYPED) for release in RELEASES]
    strip = [int(fake_module(*release).BuilderFlag.STRIP_PLAN) for release in RELEASES]
    assert (typed, strip) == ([1, 1, 0, 0], [19, 19, 18, 18])


def test_rtx_has_all_that_was_recorded() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    if rtx.__version__ != RTX[1]:
        pytest.skip(f"tensorrt_rtx {rtx.__version__} is installed, {RTX[1]} was recorded")
    record = recording(*RTX)
    paths = [f"{name}.{key}" for name in record["classes"] for key in recorded_names(record["classes"], name)]
    paths += [f"{name}.{key}" for name, entry in record["classes"].items() for key in entry.get("enum", {})]
    paths += [*record["functions"], *record["constants"]]
    assert len(paths) > 1000
    assert [path for path in paths if not has(rtx, path)] == []


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="signatures are recorded with 3.11, others spell Buffer anew"
)
def test_rtx_is_recorded_again_as_it_was() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    if rtx.__version__ != RTX[1]:
        pytest.skip(f"tensorrt_rtx {rtx.__version__} is installed, {RTX[1]} was recorded")
    fresh = record_bindings.to_json(record_bindings.record_module(rtx, "tensorrt_rtx"))
    assert fresh == (record_bindings.BINDINGS / f"{'-'.join(RTX)}.json").read_text()


# the fakes


@every_release
def test_fake_classes_have_the_recorded_members(release: tuple[str, str]) -> None:
    trt, record = fake_module(*release), recording(*release)
    for name in plain_classes(record):
        cls, instance = trt._classes[name], trt.make(name)
        public = {key for key in dir(cls) if not key.startswith("_")}
        shown = {key for key in public if isinstance(getattr(cls, key), property) or hasattr(instance, key)}
        assert shown == recorded_names(record["classes"], name), name
        with pytest.raises(AttributeError):
            instance.no_such_member = 1
    top = {name for name in record["classes"] if "." not in name}
    assert top | set(record["functions"]) | set(record["constants"]) <= set(dir(trt))


@every_release
def test_fake_enums_have_the_recorded_values(release: tuple[str, str]) -> None:
    trt, record = fake_module(*release), recording(*release)
    enums = {name: entry for name, entry in record["classes"].items() if "enum" in entry}
    assert len(enums) > 20
    for name, entry in enums.items():
        cls = trt._classes[name]
        assert {key: int(member) for key, member in cls.__members__.items()} == entry["enum"]
        table = {member: int(member) for member in cls.__members__.values()}
        assert all(table[cls(value)] == value for value in entry["enum"].values())
        assert all(member != int(member) for member in table)  # as with pybind11: an enum is no int


@every_release
def test_fake_properties_are_set_only_where_the_release_sets_them(release: tuple[str, str]) -> None:
    trt, record = fake_module(*release), recording(*release)
    seen = set()
    for name, entry in plain_classes(record).items():
        instance = trt.make(name)
        for key, (kind, mode) in entry.get("properties", {}).items():
            seen.add(mode)
            value = sample(trt, record, kind)
            if "w" in mode:
                setattr(instance, key, value)
                assert trt.calls[-1] == (f"{name}.{key}=", (value,))
            else:
                with pytest.raises(AttributeError):
                    setattr(instance, key, value)
            if "r" not in mode:
                with pytest.raises(AttributeError):
                    getattr(instance, key)
            elif "w" in mode:
                assert getattr(instance, key) == value, (name, key)
    assert seen == {"r", "rw", "w"}


@every_release
def test_fake_methods_refuse_other_arguments(release: tuple[str, str]) -> None:
    trt, record = fake_module(*release), recording(*release)
    for name, entry in plain_classes(record).items():
        for key, lines in entry.get("methods", {}).items():
            if key.startswith("__"):
                continue
            method = getattr(trt.make(name), key)
            parameters = [parse_signature(line, bound=True).parameters for line in lines]
            with pytest.raises(TypeError):
                method(*[None] * (max(map(len, parameters)) + 1))
            with pytest.raises(TypeError):
                method(no_such_argument=None)
            if all(any(parameter.default is None for parameter in overload) for overload in parameters):
                with pytest.raises(TypeError):
                    method()
    assert trt.calls == []


@every_release
def test_only_what_has_a_constructor_is_constructed(release: tuple[str, str]) -> None:
    trt, record = fake_module(*release), recording(*release)
    without = [name for name, entry in plain_classes(record).items() if "__init__" not in entry.get("methods", {})]
    assert {"INetworkDefinition", "ICudaEngine", "IExecutionContext", "IHostMemory"} <= set(without)
    for name in without:
        with pytest.raises(TypeError):
            trt._classes[name]()


@every_release
def test_a_build_and_a_run_over_the_defaults(release: tuple[str, str]) -> None:
    trt = fake_module(*release)
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(flags=1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file("step.onnx") is True
    assert builder.logger is logger
    assert isinstance(parser.get_error(0), trt.ParserError)
    with pytest.raises(TypeError):
        parser.parse_from_file(Path("step.onnx"))  # pybind11 takes no paths for str
    with pytest.raises(TypeError):
        config.set_flag(int(trt.BuilderFlag.REFIT))  # nor ints for enums
    with pytest.raises(TypeError):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1e9)  # nor floats for ints
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, pool_size=1 << 30)
    profile = builder.create_optimization_profile()
    profile.set_shape("ids", (1, 1), opt=(1, 8), max=(1, 16))
    trt.on("Builder.build_serialized_network", lambda builder, network, config: trt.host_memory(b"plan"))
    plan = builder.build_serialized_network(network, config)
    assert (bytes(plan), plan.nbytes) == (b"plan", 4)
    with pytest.raises(TypeError):
        len(plan)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    trt.on("ICudaEngine.num_io_tensors", lambda engine: 2)
    assert engine.num_io_tensors == 2
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert context.set_tensor_address("ids", 4096) is True
    assert context.execute_async_v3(stream_handle=5) is True
    assert trt.called("IBuilderConfig.set_memory_pool_limit") == [(trt.MemoryPoolType.WORKSPACE, 1 << 30)]
    assert trt.called("IOptimizationProfile.set_shape") == [("ids", (1, 1), (1, 8), (1, 16))]
    assert [name for name, _ in trt.calls][-3:] == [
        "ICudaEngine.create_execution_context",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.execute_async_v3",
    ]
    with pytest.raises(AttributeError):
        trt.on("Builder.no_such_method", lambda builder: None)


def modules() -> list[Any]:
    installed = pytest.param("installed", id="installed")
    return [installed, *(pytest.param(release, id="-".join(release)) for release in RELEASES)]


@pytest.fixture(params=modules())
def trt(request: pytest.FixtureRequest) -> Any:
    """The installed TensorRT-RTX and each fake: what holds of the first, without a GPU, is to hold of the others."""
    return pytest.importorskip("tensorrt_rtx") if request.param == "installed" else fake_module(*request.param)


def test_fakes_behave_as_the_installed_module(trt: Any) -> None:
    logger = trt.Logger(min_severity=trt.ILogger.Severity.ERROR)
    assert logger.min_severity == trt.Logger.ERROR
    logger.min_severity = trt.Logger.INFO
    assert logger.min_severity == trt.Logger.INFO
    assert trt.Logger.ERROR < trt.Logger.INFO
    flag = trt.BuilderFlag.TF32
    assert (flag == int(flag), flag.name, str(flag), {flag: 1}[flag]) == (False, "TF32", "BuilderFlag.TF32", 1)
    assert trt.Logger().min_severity == trt.Logger.WARNING
    assert trt.BuilderFlag(int(flag)) == flag
    assert trt.float16 == trt.DataType.HALF
    assert trt.Dims((1, 2)) == (1, 2)
    assert list(trt.Dims([3, 4])) == [3, 4]
    assert (len(trt.Dims2(5, 6)), trt.Dims2(5, 6)[1]) == (2, 6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda trt: trt.Logger(2),
        lambda trt: trt.Logger(None),
        lambda trt: trt.Logger(trt.Logger.INFO, 1),
        lambda trt: trt.Logger(severity=trt.Logger.INFO),
        lambda trt: setattr(trt.Logger(), "min_severity", 2),
        lambda trt: trt.Logger().log(trt.Logger.INFO, Path("message")),
        lambda trt: trt.Builder(),
        lambda trt: trt.ICudaEngine(),
        lambda trt: 1 << trt.BuilderFlag.TF32,
        lambda trt: trt.DataType.HALF < trt.DataType.FLOAT,
        lambda trt: type("Silent", (trt.IProgressMonitor,), {"__init__": lambda self: None})(),
    ],
    ids=[
        "an int for an enum",
        "None for an enum",
        "one argument too many",
        "an unknown keyword",
        "an int for a property",
        "a path for a str",
        "one argument too few",
        "no constructor",
        "a flag shifts only as an int",
        "an enum without order",
        "the base is not initialised",
    ],
)
def test_fakes_raise_type_errors_as_the_installed_module(trt: Any, wrong: Any) -> None:
    with pytest.raises(TypeError):
        wrong(trt)


def test_fakes_take_no_attributes_as_the_installed_module(trt: Any) -> None:
    with pytest.raises(AttributeError):
        trt.Logger().no_such_property = 1

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.phases: list[str] = []

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.append(phase_name)

    monitor = Monitor()
    monitor.phase_start("build", None, 1)
    assert monitor.phases == ["build"]


@every_release
def test_a_configuration_takes_a_monitor_and_nothing_else(release: tuple[str, str]) -> None:
    trt = fake_module(*release)
    monitor = type("Monitor", (trt.IProgressMonitor,), {})()
    config = trt.make("IBuilderConfig")
    config.progress_monitor = monitor
    assert config.progress_monitor is monitor
    with pytest.raises(TypeError):
        config.progress_monitor = object()
