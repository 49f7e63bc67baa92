"""ONNX Runtime on NVIDIA GPUs: its CUDA provider, and its TensorRT provider. State stays on the device.

Both work in the stream of the loop, on its addresses. They are not captured in its CUDA graphs: ONNX Runtime keeps
shape arithmetic on the CPU and frees its pinned buffers in host functions of the stream, which a replay would call
again. Nor may a run leave the stream unsynchronised ("disable_synchronize_execution_providers"): those host functions
then end the process when the session goes (onnxruntime-gpu 1.31.1 on an H100, "CUDA failure 800" in cudaFreeHost).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from famexport.contract import StepContract, TensorSpec
from famexport.errors import FamExportError, IncompatibleError, first_line
from famexport.runtime.backend import Backend
from famexport.runtime.cuda import Cuda
from famexport.runtime.device import DeviceLoop
from famexport.runtime.ort import ONNX_ONLY, import_onnxruntime
from famexport.runtime.ort_io import ONNX_TYPES, check_io

_INSTALL = "pip uninstall onnxruntime, then pip install 'famexport[gpu]'"


class OrtCuda(Backend):
    """The graphs of a bundle on ONNX Runtime's CUDA provider; arguments as for ``OrtCpu``.

    Each graph's session holds weights of its own on the device.

    Raises:
        IncompatibleError: this onnxruntime has no such provider, or fell back to the CPU.
        BundleError: a graph takes or gives something else than the contract says.
    """

    name = "ort-cuda"
    provider = "CUDAExecutionProvider"
    device = "cuda"
    uncaptured_reason: str | None = None  # where there is more to say than that the engine cannot
    library: Path | None = None  # of custom operators
    libraries = "its CUDA or cuDNN libraries (pip install 'onnxruntime-gpu[cuda,cudnn]')"

    def __init__(
        self,
        contract: StepContract,
        precision: str,
        graphs: Mapping[str, Path],
        weights: Path | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(contract, precision)
        self.sessions: dict[str, Any] = {}
        self._files, self._threads = dict(graphs), threads
        self._cuda: Cuda | None = None
        self._ort = ort = import_onnxruntime()
        available = ort.get_available_providers()
        if self.provider not in available:
            raise IncompatibleError(
                f"onnxruntime {ort.__version__} has no {self.provider}, only {', '.join(available)}; {_INSTALL}"
            )
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from the wheels that pip installed
        self._cuda = Cuda()
        try:
            self._options = self._session_options()
            for name in self._files:
                self.sessions[name] = self._load(name)
        except BaseException:
            self.close()
            raise

    def _providers(self, stream: int) -> list[tuple[str, dict[str, str]]]:
        options = {"user_compute_stream": str(stream), "device_id": "0"}
        options["use_tf32"] = "0"  # TF32 rounds products to 10 bits, and fp32 bundles promise parity
        options["arena_extend_strategy"] = "kSameAsRequested"  # by default it takes twice as much each time
        return [("CUDAExecutionProvider", options)]

    def _load(self, name: str) -> Any:
        """A session of one graph, as the backend wants it."""
        session = self._session(name)
        check_io(session, self.contract.graph(name))
        return session

    def _session(self, name: str, extra: Mapping[str, str] | None = None) -> Any:
        """A session of one graph; ``extra``: options of the provider."""
        ort, graph, cuda = self._ort, self._files[name], self._cuda
        assert cuda is not None
        try:
            providers = self._providers(cuda.stream)
            providers[0][1].update(extra or {})
            session = ort.InferenceSession(str(graph), self._options, providers=providers)
        except Exception as exc:  # onnxruntime raises a class of its own per status code
            raise IncompatibleError(
                f"onnxruntime {ort.__version__} cannot load {graph.name} on {self.provider}: {first_line(exc)}; "
                "check the driver with nvidia-smi, or use the backend ort-cpu"
            ) from exc
        if (got := session.get_providers()[0]) != self.provider:
            raise IncompatibleError(
                f"onnxruntime {ort.__version__} fell back to {got}, expected {self.provider}: {self.libraries} "
                "do not load"
            )
        return session

    def _session_options(self) -> Any:
        """Those of all sessions, later ones too: the library is loaded once, right after it was checked."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry(*ONNX_ONLY)
        options.enable_mem_pattern = False  # from the second run on it would hold all activations twice
        if self._threads:
            options.intra_op_num_threads = self._threads
        if self.library is not None:
            self._register(options, self.library)
        return options

    def _register(self, options: Any, library: Path) -> None:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as exc:  # as above
            from famexport.kernels.build import COMMAND

            raise IncompatibleError(
                f"onnxruntime {self._ort.__version__} cannot load {library.name}: {first_line(exc)}; "
                f"build it again: {COMMAND}"
            ) from exc

    def _open(self, batch: int) -> DeviceLoop:
        if self._cuda is None:
            raise FamExportError(f"the backend {self.name} is closed; load the bundle again")
        engine = OrtEnqueuer(self.contract, batch, self.sessions)
        loop = DeviceLoop(self.contract, batch, engine, self._cuda)
        if self.uncaptured_reason:
            loop.info["uncaptured_reason"] = self.uncaptured_reason
        if self.kernels:
            loop.info["kernels"] = self.kernels
        return loop

    def close(self) -> None:
        self.sessions = {}  # before their stream
        if self._cuda is not None:
            self._cuda.close()
            self._cuda = None


class OrtTensorrt(OrtCuda):
    """The same on ONNX Runtime's TensorRT provider, which builds its engines while the bundle is loaded. Nodes that it
    cannot take go to the CUDA provider. Its engine cache stays off: cached engines would be run unchecked (R5)."""

    name = "ort-tensorrt"
    provider = "TensorrtExecutionProvider"
    libraries = "the libraries of TensorRT 10 (libnvinfer.so.10), which it is linked with,"

    def _providers(self, stream: int) -> list[tuple[str, dict[str, str]]]:
        options = {"user_compute_stream": str(stream), "trt_engine_cache_enable": "False", "device_id": "0"}
        if self.precision == "fp16":
            options["trt_fp16_enable"] = "True"
        return [(self.provider, options), *super()._providers(stream)]


class OrtEnqueuer:
    """Sessions with IO bound to a loop's addresses, once for each set of them."""

    capturable = False

    def __init__(self, contract: StepContract, batch: int, sessions: Mapping[str, Any]) -> None:
        self._sessions, self._batch, self._contract = dict(sessions), batch, contract
        self._calls: dict[tuple[str, tuple[int, ...]], tuple[Any, Any]] = {}  # binding and options

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sessions)

    def aliased(self, graph: str) -> Mapping[str, str]:
        return {}

    def enqueue(self, graph: str, addresses: Mapping[str, int], stream: int) -> None:
        key = graph, tuple(addresses.values())
        if key not in self._calls:
            self._calls[key] = self._bind(graph, addresses), self._options(graph, addresses)
        binding, options = self._calls[key]
        try:
            self._sessions[graph].run_with_iobinding(binding, options)
        except Exception as exc:  # onnxruntime raises a class of its own per status code
            raise FamExportError(f"onnxruntime failed in {graph}: {first_line(exc)}") from exc

    def _options(self, graph: str, addresses: Mapping[str, int]) -> Any:
        return None

    def _bind(self, graph: str, addresses: Mapping[str, int]) -> Any:
        binding, io = self._sessions[graph].io_binding(), self._contract.graph(graph)

        def place(bind: Any, spec: TensorSpec) -> None:
            shape = list(spec.sized(self._batch))
            bind(spec.name, "cuda", 0, ONNX_TYPES[spec.dtype], shape, addresses[spec.name])

        for spec in io.taken:
            place(binding.bind_input, spec)
        for spec in io.given:
            place(binding.bind_output, spec)
        return binding

    def close(self) -> None:
        self._calls.clear()
        self._sessions = {}  # the last loop of a closed backend takes its weights along
