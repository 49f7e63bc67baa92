"""ONNX Runtime on CPUs. State and inputs are bound once; weights are read in place from the mapped weight file."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from famexport.contract import StepContract, present_name
from famexport.errors import BundleError, FamExportError, IncompatibleError, MissingDependencyError
from famexport.runtime.backend import STORAGE, Backend, HostLoop
from famexport.tensorfile import TensorEntry, read_header

_ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7, "int32": 6, "bool": 9}


def import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingDependencyError("onnxruntime", "cpu", "the backend ort-cpu") from exc
    return onnxruntime


class OrtCpu(Backend):
    """``block_step`` on ONNX Runtime's CPU provider.

    Args:
        graph: the ONNX file's bytes, already checked.
        weights: the bundle's weight file, a safetensors file that the graph points into; None where it has none.
        threads: intra-op threads; None leaves ONNX Runtime's own choice, one per physical core.
    Raises:
        IncompatibleError: this onnxruntime cannot run the graph.
    """

    name = "ort-cpu"
    provider = "CPUExecutionProvider"
    device = "cpu"

    def __init__(
        self, contract: StepContract, precision: str, graph: bytes, weights: Path | None, threads: int | None = None
    ) -> None:
        super().__init__(contract, precision)
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3  # warnings about nodes it moves to fit are no news to a user
        if threads:
            options.intra_op_num_threads = threads
        # bfloat16 weights are widened as they are used: folding would keep a float32 copy of them all
        disabled = ["ConstantFolding"] if precision == "bf16" else []
        self._weights: list[Any] = []
        try:
            if weights is not None:
                mapped = np.memmap(weights, np.uint8, mode="r")
                names, self._weights = map_weights(ort, mapped, weights, graph)
                options.add_external_initializers(names, self._weights)
            self.session = ort.InferenceSession(
                graph, options, providers=[self.provider], disabled_optimizers=disabled or None
            )
        except FamExportError:
            raise
        except Exception as exc:  # onnxruntime raises a class of its own per status code
            raise IncompatibleError(
                f"onnxruntime {ort.__version__} cannot load this graph: {_first_line(exc)}"
            ) from exc

    def _open(self, batch: int) -> OrtLoop:
        return OrtLoop(self, batch)

    def close(self) -> None:
        del self.session
        self._weights.clear()


def map_weights(ort: Any, mapped: np.ndarray, path: Path, graph: bytes) -> tuple[list[str], list[Any]]:
    """The weights that ``graph`` refers to, as OrtValues over the mapped file ``path``: no copy.

    Raises:
        BundleError: the graph's offsets are not the file's.
    """
    from famexport.onnx_wire import graph_facts

    header = read_header(path)
    names, values = [], []
    for name, (location, offset, length) in graph_facts(graph).external_initializers.items():
        entry = header.get(name)
        if entry is None or location != path.name or (offset, length) != (entry.offset, entry.nbytes):
            raise BundleError(f"weight {name} lies at {location}:{offset}+{length} by the graph, not so in {path.name}")
        names.append(name)
        values.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(_view(mapped, entry), _ONNX_TYPES[entry.dtype]))
    return names, values


def _view(mapped: np.ndarray, entry: TensorEntry) -> np.ndarray:
    raw: np.ndarray = mapped[entry.offset : entry.offset + entry.nbytes].view(STORAGE[entry.dtype])
    return raw.reshape(entry.shape)


class OrtLoop(HostLoop):
    """Two bindings over two state buffers: one reads A and writes B, the other the reverse."""

    def __init__(self, backend: OrtCpu, batch: int) -> None:
        super().__init__(backend.contract, batch)
        self._session = backend.session
        self._weights = list(backend._weights)  # onnxruntime wants them alive as long as its session
        spec = self.contract.inputs[0]
        self._fed = np.zeros(spec.sized(batch), STORAGE[spec.dtype])
        self._logits_shape = list(self.contract.outputs[0].sized(batch))
        self._bindings = [self._bind(self.buffers[i], self.buffers[1 - i]) for i in (0, 1)]

    def _bind(self, past: dict[str, np.ndarray], present: dict[str, np.ndarray]) -> Any:
        binding = self._session.io_binding()
        fed = self.contract.inputs[0]
        binding.bind_input(fed.name, "cpu", 0, _ONNX_TYPES[fed.dtype], list(self._fed.shape), self._fed.ctypes.data)
        for spec in self.contract.states:
            kind, shape = _ONNX_TYPES[spec.dtype], list(spec.sized(self.batch))
            binding.bind_input(spec.name, "cpu", 0, kind, shape, past[spec.name].ctypes.data)
            binding.bind_output(present_name(spec.name), "cpu", 0, kind, shape, present[spec.name].ctypes.data)
        return binding

    def advance(self, fed: np.ndarray, out: np.ndarray) -> None:
        np.copyto(self._fed, fed)
        binding = self._bindings[self.current]
        binding.bind_output("logits", "cpu", 0, _ONNX_TYPES["float32"], self._logits_shape, out.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as exc:  # onnxruntime raises a class of its own per status code
            raise FamExportError(f"onnxruntime failed in block_step: {_first_line(exc)}") from exc

    def close(self) -> None:
        self._bindings.clear()


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0][:500]
