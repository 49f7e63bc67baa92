"""ONNX Runtime on CPUs. State and inputs are bound once; weights are read from the mapped weight file."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from famexport.contract import CHUNK_LENGTH, QUANTIZED, StepContract, TensorSpec, present_name
from famexport.errors import FamExportError, IncompatibleError, MissingDependencyError, UsageError, first_line
from famexport.runtime.backend import STORAGE, Backend
from famexport.runtime.host import HostLoop
from famexport.runtime.ort_io import ONNX_TYPES, check_io
from famexport.tensorfile import read_header

_CONVERT = "session.x64quantprecision"  # signed weights to unsigned, as they are loaded
ONNX_ONLY = ("session.load_model_format", "ONNX")  # what was checked, and no other format, whatever the file's name
_SIGNED_PRODUCT = Path(__file__).parent / "signed_product.onnx"


def import_onnxruntime() -> Any:
    """The package, without its telemetry: from 1.29 on it reports to its maker unless told otherwise before the import
    (microsoft/onnxruntime, docs/Privacy.md). ``ORT_DISABLE_TELEMETRY=0`` in the environment leaves it as it is."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingDependencyError("onnxruntime", "cpu", "the backend ort-cpu") from exc
    return onnxruntime


def add_int8_options(options: Any) -> None:
    """Have a session load signed weights so that their products with unsigned rows are right on this CPU.

    Raises:
        IncompatibleError: as ``signed_products_overflow``.
    """
    if signed_products_overflow():
        options.add_session_config_entry(_CONVERT, "1")


@cache
def signed_products_overflow() -> bool:
    """Whether products of unsigned rows and signed weights come out wrong here: x86 without VNNI adds them in 16 bits.

    onnxruntime does not say, so it is given rows to multiply whose sums are known (``signed_product.onnx``). Where they
    are wrong, it must be told to convert the weights to unsigned.

    Raises:
        IncompatibleError: they are wrong even then, or cannot be computed. Versions of onnxruntime had wrong kernels
            for many rows on CPUs with AMX or AVX-VNNI (microsoft/onnxruntime#27671).
    """
    ort = import_onnxruntime()
    try:
        if _signed_products_are_right(ort, converted=False):
            return False
        if _signed_products_are_right(ort, converted=True):
            return True
    except Exception as exc:  # onnxruntime raises a class of its own per status code
        raise IncompatibleError(
            f"onnxruntime {ort.__version__} cannot multiply int8: {first_line(exc)}; upgrade it, or export in fp32"
        ) from exc
    raise IncompatibleError(
        f"onnxruntime {ort.__version__} gives wrong int8 products on this CPU; upgrade it, or export in fp32"
    )


def signed_weight() -> np.ndarray:
    """That of ``signed_product.onnx``, int64 [96, 48]: pairs of it are often too large together for 16 bits."""
    return (np.arange(96 * 48) * 37 % 255 - 127).reshape(96, 48)


def _signed_products_are_right(ort: Any, *, converted: bool) -> bool:
    """One row, several, and as many as kernels take at once: rows of 195 to 255, times weights of -127 to 127."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(_CONVERT, str(int(converted)))
    session = ort.InferenceSession(str(_SIGNED_PRODUCT), options, providers=[OrtCpu.provider])
    weight = signed_weight()
    for count in (1, 16, 40, 80):
        rows = (255 - np.arange(count * 96) % 61).astype(np.uint8).reshape(count, 96)
        (sums,) = session.run(None, {"rows": rows})
        if (sums != (rows.astype(np.int64) - 128) @ weight).any():
            return False
    return True


class OrtCpu(Backend):
    """The graphs of a bundle on ONNX Runtime's CPU provider.

    A bundle of several graphs holds its weights in memory once: the sessions share tensors over one mapping of the
    weight file. ONNX Runtime must not fold or pack them then, since each session would keep copies of its own.

    Args:
        graphs: the ONNX files by name, already checked.
        weights: the weight file that lies beside them, already checked; None where all is in the graphs.
        threads: intra-op threads; None leaves ONNX Runtime's own choice, one per physical core.
    Raises:
        IncompatibleError: this onnxruntime cannot run a graph.
        BundleError: a graph takes or gives something else than the contract says.
    """

    name = "ort-cpu"
    provider = "CPUExecutionProvider"
    device = "cpu"

    def __init__(
        self,
        contract: StepContract,
        precision: str,
        graphs: Mapping[str, Path],
        weights: Path | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(contract, precision)
        ort = import_onnxruntime()
        # The sessions point into these and do not keep them alive; nor does an OrtValue its array.
        self.weights = _mapped_weights(weights) if weights and len(graphs) > 1 else {}
        shared = {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_TYPES[dtype])
            for name, (array, dtype) in self.weights.items()
        }
        self.sessions = {name: self._load(ort, file, shared, threads) for name, file in graphs.items()}
        for name, session in self.sessions.items():
            check_io(session, contract.graph(name))

    def _load(self, ort: Any, graph: Path, shared: Mapping[str, Any], threads: int | None) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions; what it logs besides is no news to a user
        options.add_session_config_entry(*ONNX_ONLY)
        if threads:
            options.intra_op_num_threads = threads
        if self.precision in QUANTIZED:
            add_int8_options(options)
        disabled = None
        if shared:
            disabled = ["ConstantFolding"]
            # Unpacked, a product of 4 bits takes 2 to 70 times as long, and a step in int8 1.15 to 1.3 times (AVX2).
            # The price is a packed copy in each session: with four graphs SmolLM2-135M in int8 has 704 MB resident,
            # in float32 664.
            if self.precision not in QUANTIZED:
                options.add_session_config_entry("session.disable_prepacking", "1")
            for name, value in shared.items():
                options.add_initializer(name, value)
        if self.precision == "bf16":
            # Weights are widened as they are used and dropped at once: folding would keep a float32 copy of them all,
            # and an arena would keep the largest of each size
            disabled = ["ConstantFolding"]
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        try:
            return ort.InferenceSession(str(graph), options, providers=[self.provider], disabled_optimizers=disabled)
        except Exception as exc:  # onnxruntime raises a class of its own per status code
            reason = first_line(exc)
            raise IncompatibleError(
                f"onnxruntime {ort.__version__} cannot load {graph.name}: {reason}; "
                "upgrade onnxruntime, or export with --opset 20"
            ) from exc

    def _open(self, batch: int) -> OrtLoop:
        return OrtLoop(self, batch)

    def close(self) -> None:
        self.sessions = {}
        self.weights = {}


def _mapped_weights(file: Path) -> dict[str, tuple[np.ndarray, str]]:
    """The tensors of a safetensors file and their dtypes, over one mapping of it."""
    raw = np.memmap(file, np.uint8, "r")
    found = {}
    for name, entry in read_header(file).items():
        dtype = STORAGE.get(entry.dtype, entry.dtype)
        array = raw[entry.offset : entry.offset + entry.nbytes].view(dtype).reshape(entry.shape)
        found[name] = array, entry.dtype
    return found


class OrtLoop(HostLoop):
    """Inputs, state and outputs are bound once for each graph and each side of the two buffers that it reads."""

    def __init__(self, backend: OrtCpu, batch: int) -> None:
        super().__init__(backend.contract, batch)
        self._sessions: dict[str, Any] = dict(backend.sessions)
        self._weights = backend.weights  # which the sessions read
        self._graphs = {name: self.contract.graph(name) for name in self._sessions}
        self._fed = {
            name: {spec.name: np.zeros(spec.sized(batch), STORAGE[spec.dtype]) for spec in io.inputs}
            for name, io in self._graphs.items()
        }
        self._appends = {io.chunk: name for name, io in self._graphs.items() if io.chunk}
        self._calls: dict[tuple[str, int, int], _Call] = {}
        self._block_input = self._fed["block_step"][self.contract.inputs[0].name]

    def advance(self, fed: np.ndarray, out: np.ndarray, rows: Sequence[int] | None = None) -> None:
        self._block_input[...] = fed
        self._run("block_step", out)
        self._computed(True, False)

    def append(self, fed: np.ndarray, length: np.ndarray, out: np.ndarray) -> None:
        name = self._appends[fed.shape[1]]
        np.copyto(self._fed[name][self.contract.inputs[0].name], fed)
        np.copyto(self._fed[name][CHUNK_LENGTH], length)
        self._run(name, out)
        self._computed(False, True)

    def end_block(self) -> None:
        self._run("commit_block", None)
        self._computed(True, True)

    def _run(self, name: str, out: np.ndarray | None) -> None:
        key = name, self.current, self.open_current
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._bind(name)
        # Binding costs as much as all the rest of this loop, and callers mostly give the same buffer again
        if out is not None and call.bound() is not out:
            call.bind(out)
        try:
            call.session.run_with_iobinding(call.binding)
        except Exception as exc:  # onnxruntime raises a class of its own per status code
            raise FamExportError(f"onnxruntime failed in {name}: {first_line(exc)}") from exc

    def _bind(self, name: str) -> _Call:
        weights, session = self._weights, self._sessions.get(name)  # in this order: a close in between shows
        if session is None:
            raise UsageError("the stream was closed meanwhile; open another with session.stream()")
        binding, io = session.io_binding(), self._graphs[name]

        def place(bind: Callable[..., None], graph_name: str, spec: TensorSpec, array: np.ndarray) -> None:
            bind(graph_name, "cpu", 0, ONNX_TYPES[spec.dtype], list(spec.sized(self.batch)), array.ctypes.data)

        past = {**self.buffers[self.current], **self.open_buffers[self.open_current]}
        new = {**self.buffers[1 - self.current], **self.open_buffers[1 - self.open_current]}
        for spec in io.inputs:
            place(binding.bind_input, spec.name, spec, self._fed[name][spec.name])
        for spec in io.states:
            place(binding.bind_input, spec.name, spec, past[spec.name])
        for spec in io.new:
            place(binding.bind_output, present_name(spec.name), spec, new[spec.name])
        return _Call(session, weights, binding)

    def close(self) -> None:
        """A call that another thread is in holds what it needs until it is over."""
        self._calls.clear()
        self._sessions = {}  # the last stream of a closed session takes its weights along
        self._weights = {}


class _Call:
    """A graph with its state bound, what must live while it runs, and the array that its logits are bound to.

    That is known by a weak reference: numpy does not resize an array that has one, so while it lives its memory is
    where it was.
    """

    __slots__ = ("binding", "bound", "session", "weights")

    def __init__(self, session: Any, weights: Mapping[str, Any], binding: Any) -> None:
        self.session, self.weights, self.binding = session, weights, binding
        self.bound: Callable[[], np.ndarray | None] = lambda: None

    def bind(self, out: np.ndarray) -> None:
        self.binding.bind_output("logits", "cpu", 0, ONNX_TYPES["float32"], list(out.shape), out.ctypes.data)
        self.bound = weakref.ref(out)
