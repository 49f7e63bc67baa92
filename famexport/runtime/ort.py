"""ONNX Runtime on CPUs. State and inputs are bound once; weights are read from the mapped weight file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from famexport.contract import StepContract, present_name
from famexport.errors import FamExportError, IncompatibleError, MissingDependencyError
from famexport.runtime.backend import STORAGE, Backend, HostLoop

_ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7, "int32": 6, "bool": 9}


def import_onnxruntime() -> Any:
    """The package, without its telemetry: from 1.29 on it reports to its maker unless told otherwise before the import
    (microsoft/onnxruntime, docs/Privacy.md). ``ORT_DISABLE_TELEMETRY=0`` in the environment leaves it as it is."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingDependencyError("onnxruntime", "cpu", "the backend ort-cpu") from exc
    return onnxruntime


class OrtCpu(Backend):
    """``block_step`` on ONNX Runtime's CPU provider.

    Args:
        graph: the ONNX file, already checked; ONNX Runtime maps the weight file beside it.
        threads: intra-op threads; None leaves ONNX Runtime's own choice, one per physical core.
    Raises:
        IncompatibleError: this onnxruntime cannot run the graph.
    """

    name = "ort-cpu"
    provider = "CPUExecutionProvider"
    device = "cpu"

    def __init__(self, contract: StepContract, precision: str, graph: Path, threads: int | None = None) -> None:
        super().__init__(contract, precision)
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions; what it logs besides is no news to a user
        if threads:
            options.intra_op_num_threads = threads
        disabled = None
        if precision == "bf16":
            # Weights are widened as they are used and dropped at once: folding would keep a float32 copy of them all,
            # and an arena would keep the largest of each size
            disabled = ["ConstantFolding"]
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        try:
            self.session = ort.InferenceSession(
                str(graph), options, providers=[self.provider], disabled_optimizers=disabled
            )
        except Exception as exc:  # onnxruntime raises a class of its own per status code
            reason = _first_line(exc)
            raise IncompatibleError(
                f"onnxruntime {ort.__version__} cannot load this graph: {reason}; "
                "upgrade onnxruntime, or export with --opset 20"
            ) from exc

    def _open(self, batch: int) -> OrtLoop:
        return OrtLoop(self, batch)

    def close(self) -> None:
        del self.session


class OrtLoop(HostLoop):
    """Two bindings over two state buffers: one reads A and writes B, the other the reverse."""

    def __init__(self, backend: OrtCpu, batch: int) -> None:
        super().__init__(backend.contract, batch)
        self._session: Any = backend.session
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
        self._session = None  # the last stream of a closed session takes its weights along


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0][:500]
