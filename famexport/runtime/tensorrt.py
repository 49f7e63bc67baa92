"""TensorRT and TensorRT-RTX engines on the device. Nothing is deserialised before it is checked (R5, R6).

The order: an engine for this machine, by what the manifest says of it; the very bytes, against the manifest; the bytes
again, against the list of engines built here; only then TensorRT sees them, with host code forbidden.

Not yet run on hardware: see docs/verified.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from famexport.bundle import Bundle, engine_bytes
from famexport.contract import GraphIO, StepContract
from famexport.engines import DeviceTuple, EngineEntry, read_entries
from famexport.errors import FamExportError, IncompatibleError, UntrustedError
from famexport.runtime.backend import Backend
from famexport.runtime.device import DeviceLoop
from famexport.runtime.tensorrt_api import DTYPES, host_facts, import_tensorrt, new_logger
from famexport.runtime.trust import is_trusted


def device_problems(entry: EngineEntry, here: DeviceTuple) -> list[str]:
    """How this machine differs from the one an engine is for.

    A plan built ahead of time names no GPU and no CUDA: those are not compared then. Hardware and version
    compatibility, where asked for at the build, loosen what they are for.
    """
    built, options = entry.device, entry.options
    problems = []
    same_major = built.tensorrt.partition(".")[0] == here.tensorrt.partition(".")[0]
    if built.tensorrt != here.tensorrt and not (options.get("version_compatible") and same_major):
        problems.append(f"TensorRT is {here.tensorrt}, expected {built.tensorrt}")
    hardware = options.get("hardware_compatible", "none")
    major, wanted = (text.partition(".")[0] for text in (here.compute_capability, built.compute_capability))
    newer_is_fine = hardware == "ampere-plus" and int(major) >= 8 and int(wanted) >= 8
    if built.compute_capability != here.compute_capability and not newer_is_fine:
        problems.append(f"compute capability is {here.compute_capability}, expected {built.compute_capability}")
    if built.gpu is not None and built.gpu != here.gpu and hardware == "none":
        problems.append(f"the GPU is {here.gpu}, expected {built.gpu}")
    if built.cuda is not None and built.cuda.partition(".")[0] != (here.cuda or "").partition(".")[0]:
        problems.append(f"CUDA is {here.cuda}, expected {built.cuda}")
    problems += [
        f"{what} is {got}, expected {expected}"
        for what, got, expected in (("system", here.os, built.os), ("processor", here.arch, built.arch))
        if got != expected
    ]
    return problems


def engines_of(bundle: Bundle, engine: str) -> list[EngineEntry]:
    """The bundle's engines of that kind, for whatever machine.

    Raises:
        IncompatibleError: there are none; with the command that builds them.
    """
    entries = [entry for entry in read_entries(bundle.manifest.engines) if entry.engine == engine]
    if not entries:
        raise IncompatibleError(
            f"{bundle.path} has no {engine} engines; build them with: "
            f"famexport build {bundle.path} --target TARGET --engine {engine}"
        )
    return entries


def choose_engines(bundle: Bundle, engine: str, here: DeviceTuple) -> dict[str, EngineEntry]:
    """The engine of every graph of the bundle that is for this machine, by graph.

    Raises:
        IncompatibleError: there is none, or not of all graphs; with the command that builds them.
    """
    by_target: dict[str, dict[str, EngineEntry]] = {}
    for entry in engines_of(bundle, engine):
        by_target.setdefault(entry.target, {})[entry.graph] = entry
    reasons = []
    for target, found in by_target.items():
        differences = sorted({problem for entry in found.values() for problem in device_problems(entry, here)})
        if absent := sorted(set(bundle.contract.graph_names) - set(found)):
            differences.append(f"no engine of {', '.join(absent)}")
        if not differences:
            return found
        reasons.append(f"those for {target}: {', '.join(differences)}")
    raise IncompatibleError(
        f"no {engine} engine of {bundle.path} is for this machine; {'; '.join(reasons)}; "
        f"build on it with: famexport build {bundle.path} --target TARGET --engine {engine}"
    )


def load_engine(trt: Any, runtime: Any, logger: Any, bundle: Bundle, entry: EngineEntry, io: GraphIO) -> Any:
    """Deserialise an engine that was chosen for this machine.

    Raises:
        UntrustedError: it is not as it was built, or was not built here.
        IncompatibleError: TensorRT refuses it, it has no weights, or its tensors are not the contract's.
    """
    command = f"famexport build {bundle.path} --target {entry.target} --engine {entry.engine}"
    if entry.options.get("strip"):
        raise IncompatibleError(
            f"the engine {entry.name} was built without its weights, and this runtime does not put them in; "
            f"build one with them: {command}"
        )
    data = engine_bytes(bundle, entry)
    if not is_trusted(entry.sha256):
        raise UntrustedError(
            f"the engine {entry.name} of {bundle.path} was not built here, and an engine is executable code; "
            f"build your own with: {command}"
        )
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        why = " ".join(logger.errors)[:300] or "it gave no reason"
        raise IncompatibleError(
            f"TensorRT {trt.__version__} refuses {entry.name}: {why}; build it again with: {command}"
        )
    problems = tensor_problems(engine, io)
    if problems:
        raise IncompatibleError(
            f"the engine {entry.name} does not fit the contract: {'; '.join(problems[:6])}; "
            f"build it again with: {command}"
        )
    return engine


def tensor_problems(engine: Any, io: GraphIO) -> list[str]:
    """Where the tensors of an engine differ from the contract in name, dtype or static shape (R7)."""
    found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    wanted = {spec.name: spec for spec in (*io.taken, *io.given)}
    problems = [f"it lacks {name}" for name in sorted(set(wanted) - found)]
    problems += [f"it has the unknown tensor {name}" for name in sorted(found - set(wanted))]
    for name in sorted(found & set(wanted)):
        spec = wanted[name]
        if (dtype := engine.get_tensor_dtype(name).name) != DTYPES[spec.dtype]:
            problems.append(f"{name} is {dtype}, expected {DTYPES[spec.dtype]}")
        shape = tuple(engine.get_tensor_shape(name))
        expected = tuple(-1 if isinstance(dim, str) else dim for dim in spec.shape)
        if shape != expected:
            problems.append(f"{name} has shape {list(shape)}, expected {list(expected)}")
    return problems


class EngineSet:
    """The engines of a bundle's graphs, as what one device loop enqueues.

    Each set of addresses gets an execution context of its own, since a captured CUDA graph stays bound to the context
    it was captured from. All of them share one scratch buffer: they run one after the other on one stream.

    Args:
        engines: by graph name, already checked.
        cuda: gives and takes back the scratch buffer (``malloc``, ``free``).
    """

    capturable = True

    def __init__(self, trt: Any, contract: StepContract, batch: int, engines: Mapping[str, Any], cuda: Any) -> None:
        self._trt, self._contract, self._batch, self._engines, self._cuda = trt, contract, batch, dict(engines), cuda
        self._contexts: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._bytes = max((int(engine.device_memory_size_v2) for engine in engines.values()), default=0)
        self._scratch = cuda.malloc(self._bytes) if self._bytes else 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._engines)

    def aliased(self, graph: str) -> dict[str, str]:
        """Outputs that the engine writes in place of an input (TensorRT 11: KVCacheUpdate)."""
        engine = self._engines[graph]
        if not hasattr(engine, "get_aliased_input_tensor"):
            return {}
        given = [spec.name for spec in self._contract.graph(graph).given]
        return {name: source for name in given if (source := engine.get_aliased_input_tensor(name))}

    def enqueue(self, graph: str, addresses: Mapping[str, int], stream: int) -> None:
        """Run a graph on these addresses, in order with the stream.

        Raises:
            FamExportError: TensorRT refused an address, a shape or the run.
        """
        key = graph, tuple(addresses.values())
        if key not in self._contexts:
            self._contexts[key] = self._context(graph, addresses)
        if not self._contexts[key].execute_async_v3(stream):
            raise FamExportError(f"TensorRT failed to enqueue {graph}")

    def _context(self, graph: str, addresses: Mapping[str, int]) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engines[graph].create_execution_context(strategy)
        if context is None:
            raise FamExportError(f"TensorRT gives no execution context for {graph}; is the device's memory full?")
        if self._bytes:
            context.set_device_memory(self._scratch, self._bytes)
        if self._contract.batch == "dynamic":
            for spec in self._contract.graph(graph).taken:
                if not context.set_input_shape(spec.name, spec.sized(self._batch)):
                    raise FamExportError(
                        f"TensorRT refuses a batch of {self._batch} for {spec.name} in {graph}; build the engines with "
                        "a --batch-profile that holds it"
                    )
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise FamExportError(f"TensorRT refuses the address of {name} in {graph}")
        return context

    def close(self) -> None:
        """Give back contexts and scratch; closing twice does nothing."""
        self._contexts.clear()
        self._engines.clear()
        if self._scratch:
            self._cuda.free(self._scratch)
            self._scratch = 0


def this_device(trt: Any, facts: Mapping[str, Any]) -> DeviceTuple:
    """What an engine must be for to run here; ``facts`` are those of ``Cuda.facts``."""
    major, minor = facts["compute_capability"]
    cuda = f"{facts['runtime'] // 1000}.{facts['runtime'] % 1000 // 10}"
    return DeviceTuple(str(trt.__version__), cuda, f"{major}.{minor}", facts["name"], *host_facts())


class Tensorrt(Backend):
    """A bundle's engines, with state on the device.

    Args:
        engine: ``tensorrt`` or ``tensorrt-rtx``.
        cuda: the device; its own unless given.
    Raises:
        UntrustedError, IncompatibleError, MissingDependencyError: as ``choose_engines`` and ``load_engine``.
    """

    device = "cuda"

    def __init__(self, bundle: Bundle, engine: str, *, capture: bool = True, cuda: Any = None) -> None:
        super().__init__(bundle.contract, bundle.manifest.precision)
        self.name = engine
        self._capture, self._engines = capture, dict[str, Any]()
        engines_of(bundle, engine)  # before TensorRT and CUDA are loaded for nothing
        self._trt = trt = import_tensorrt(engine)
        self.provider = f"{trt.__name__} {trt.__version__}"
        self._cuda = cuda or _open_cuda()
        try:
            chosen = choose_engines(bundle, engine, this_device(trt, self._cuda.facts()))
            logger = new_logger(trt)
            runtime = trt.Runtime(logger)
            if runtime is None:
                raise IncompatibleError(f"{trt.__name__} gives no runtime here: {' '.join(logger.errors)[:300]}")
            for name, entry in chosen.items():
                graph = bundle.contract.graph(name)
                self._engines[name] = load_engine(trt, runtime, logger, bundle, entry, graph)
            self.engines = {f"{name}.plan": entry.sha256 for name, entry in chosen.items()}
            self._runtime = runtime  # engines need it alive
        except BaseException:
            self._cuda.close()
            raise

    def _open(self, batch: int) -> DeviceLoop:
        if not self._engines:
            raise FamExportError(f"the backend {self.name} is closed; load the bundle again")
        engines = EngineSet(self._trt, self.contract, batch, self._engines, self._cuda)
        return DeviceLoop(self.contract, batch, engines, self._cuda, capture=self._capture)

    def close(self) -> None:
        if self._engines:
            self._engines = {}
            self._cuda.close()


def _open_cuda() -> Any:
    from famexport.runtime.cuda import Cuda

    return Cuda()
