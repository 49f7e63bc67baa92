"""CUDA as far as a loop needs it, over cuda-python: memory, one stream, captured graphs, and a check for NaN. No torch.

Every call is checked. Addresses are plain ints, so that any engine can be given them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from math import prod
from threading import RLock
from typing import Any

import numpy as np

from famexport.errors import FamExportError, IncompatibleError, MissingDependencyError

# The bits of a 32-bit word that are all ones in a value that is not finite; of two halves, either
EXPONENTS = {
    "float32": (0x7F800000, 0x7F800000),
    "float16": (0x00007C00, 0x7C000000),
    "bfloat16": (0x00007F80, 0x7F800000),
}
TABLE_ROW = 3  # uint64 for each tensor of a finite check: address, bytes of one row, both exponents

# Exponents are compared as integers: no arithmetic that flags like fast-math could change, and no half-precision types,
# which old architectures lack. blockIdx.z is the tensor, blockIdx.y the row.
_SOURCE = r"""
extern "C" __global__ void flag_nonfinite(const unsigned long long* table, int rows, int* flags) {
  const unsigned long long* entry = table + 3 * blockIdx.z;
  const unsigned long long size = entry[1], at = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
  const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
  const unsigned int a = (unsigned int)entry[2], b = (unsigned int)(entry[2] >> 32);
  for (int row = blockIdx.y; row < rows; row += gridDim.y) {
    const unsigned long long start = entry[0] + row * size;
    bool bad = false;
    #define BAD(w) ((((w) & a) == a) || (((w) & b) == b))
    if ((start | size) % 16 == 0) {
      for (unsigned long long i = at; i < size / 16; i += step) {
        const uint4 w = ((const uint4*)start)[i];
        bad |= BAD(w.x) || BAD(w.y) || BAD(w.z) || BAD(w.w);
      }
    } else if ((start | size) % 4 == 0) {
      for (unsigned long long i = at; i < size / 4; i += step) bad |= BAD(((const unsigned int*)start)[i]);
    } else {
      for (unsigned long long i = at; i < size / 2; i += step)
        bad |= (((const unsigned short*)start)[i] & a) == a;
    }
    if (bad) atomicOr(flags + row, 1);
  }
}
"""


def table_entry(address: int, row_bytes: int, dtype: str) -> list[int]:
    """One tensor [b, n] of contiguous rows, as ``flag_nonfinite`` takes it."""
    low, high = EXPONENTS[dtype]
    return [address, row_bytes, low | high << 32]


class Cuda:
    """One device and one stream of its own, not the default one. ``close`` once for each ``retain`` and once more.

    Args:
        device: its ordinal.
    Raises:
        MissingDependencyError: there is no cuda-python.
        IncompatibleError: no device, or a driver that this cuda-python cannot use.
    """

    def __init__(self, device: int = 0) -> None:
        self._runtime, self._driver, self._nvrtc = _import_cuda()
        self.device, self.lock = device, RLock()  # calls of several threads share the stream
        count = self._checked("cudaGetDeviceCount", IncompatibleError)
        if not 0 <= device < count:
            raise IncompatibleError(f"there is no CUDA device {device}, this machine has {count}; see: nvidia-smi")
        self.bind()
        self._stream = self._checked(
            "cudaStreamCreateWithFlags", IncompatibleError, self._runtime.cudaStreamNonBlocking
        )
        self._owners = 1
        self._pinned: dict[int, int] = {}  # address -> the address to free
        self._graphs: dict[int, Any] = {}
        self._module: Any = None
        self._kernel: Any = None

    @property
    def stream(self) -> int:
        """Its ``cudaStream_t`` as a number, for engines."""
        return int(self._stream)

    def bind(self) -> None:
        """Make the device current in the calling thread: CUDA's default is device 0 in every new one."""
        self._checked("cudaSetDevice", IncompatibleError, self.device)

    def facts(self) -> dict[str, Any]:
        """Name, compute capability, memory in bytes, and versions as CUDA writes them (13010 is 13.1)."""
        name = bytes(self._checked("cudaGetDeviceProperties", FamExportError, self.device).name)
        return {
            "name": name.split(b"\0")[0].decode(errors="replace"),
            "compute_capability": list(self.compute_capability()),
            "memory_bytes": self.memory()[1],
            "driver": self._checked("cudaDriverGetVersion"),
            "runtime": self._checked("cudaRuntimeGetVersion"),
        }

    def compute_capability(self) -> tuple[int, int]:
        kinds = self._runtime.cudaDeviceAttr
        names = kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor
        major, minor = (int(self._checked("cudaDeviceGetAttribute", FamExportError, n, self.device)) for n in names)
        return major, minor

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""
        free, total = self._checked("cudaMemGetInfo")
        return int(free), int(total)

    def malloc(self, nbytes: int) -> int:
        return int(self._checked("cudaMalloc", FamExportError, nbytes))

    def free(self, address: int) -> None:
        self._checked("cudaFree", FamExportError, address)

    def pinned(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """A zeroed host array that the device can read and write directly. It is gone after ``free_pinned``."""
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        address = int(self._checked("cudaMallocHost", FamExportError, max(nbytes, 1)))
        raw = (ctypes.c_uint8 * nbytes).from_address(address)
        array: np.ndarray = np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)
        array[...] = 0
        self._pinned[array.ctypes.data] = address
        return array

    def free_pinned(self, array: np.ndarray) -> None:
        self._checked("cudaFreeHost", FamExportError, self._pinned.pop(array.ctypes.data))

    def copy_in(self, address: int, array: np.ndarray) -> None:
        """Host to device, in the stream; ``array`` is contiguous and stays as it is until ``synchronize``."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def copy_out(self, array: np.ndarray, address: int) -> None:
        """Device to host, in the stream; there after ``synchronize``."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Device to device, in the stream."""
        self._copy(target, source, nbytes, "cudaMemcpyDeviceToDevice")

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        which = getattr(self._runtime.cudaMemcpyKind, kind)
        self._checked("cudaMemcpyAsync", FamExportError, target, source, nbytes, which, self._stream)

    def memset(self, address: int, value: int, nbytes: int) -> None:
        self._checked("cudaMemsetAsync", FamExportError, address, value, nbytes, self._stream)

    def memset_2d(self, address: int, pitch: int, value: int, width: int, height: int) -> None:
        """``height`` times ``width`` bytes, ``pitch`` bytes from one start to the next."""
        self._checked("cudaMemset2DAsync", FamExportError, address, pitch, value, width, height, self._stream)

    def synchronize(self) -> None:
        self._checked("cudaStreamSynchronize", FamExportError, self._stream)

    def capture(self, call: Callable[[], None]) -> int:
        """What ``call`` puts into the stream, as a graph to ``launch``; it is not run now.

        Thread-local mode: what other threads do meanwhile, also on other streams, neither fails nor is captured.

        Raises:
            FamExportError: something in it cannot be captured. The stream is no longer capturing.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._checked("cudaStreamBeginCapture", FamExportError, self._stream, mode)
        try:
            call()
        except BaseException:
            graph = self._runtime.cudaStreamEndCapture(self._stream)[1]
            if graph is not None and int(graph):
                self._runtime.cudaGraphDestroy(graph)
            self._runtime.cudaGetLastError()  # or the next call of somebody else would report it
            raise
        graph = self._checked("cudaStreamEndCapture", FamExportError, self._stream)
        try:
            made = self._checked("cudaGraphInstantiate", FamExportError, graph, 0)
        finally:
            self._checked("cudaGraphDestroy", FamExportError, graph)
        self._graphs[int(made)] = made
        return int(made)

    def launch(self, graph: int) -> None:
        self._checked("cudaGraphLaunch", FamExportError, self._graphs[graph], self._stream)

    def drop_graph(self, graph: int) -> None:
        self._checked("cudaGraphExecDestroy", FamExportError, self._graphs.pop(graph))

    def event(self) -> Any:
        """A point in the stream, to be marked with ``record``. ``drop_event`` when done."""
        return self._checked("cudaEventCreate")

    def record(self, event: Any) -> None:
        self._checked("cudaEventRecord", FamExportError, event, self._stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Between two recorded events that the device has passed."""
        return float(self._checked("cudaEventElapsedTime", FamExportError, start, end))

    def drop_event(self, event: Any) -> None:
        self._checked("cudaEventDestroy", FamExportError, event)

    def prepare(self) -> None:
        """Compile what ``flag_nonfinite`` runs, which cannot be done while capturing."""
        if self._kernel is None:
            self._module = self._checked("cuModuleLoadData", FamExportError, self._compile(), of=self._driver)
            args = self._module, b"flag_nonfinite"
            self._kernel = self._checked("cuModuleGetFunction", FamExportError, *args, of=self._driver)

    def flag_nonfinite(self, table: int, tensors: int, rows: int, row_bytes: int, flags: int) -> None:
        """OR 1 into ``flags`` (int32 [b], on the device) at each row in which a tensor has NaN or infinity.

        Args:
            table: device address of uint64 [tensors, 3], each a ``table_entry``.
            row_bytes: of the longest row: sets how many threads look at one.
        """
        self.prepare()
        grid = min(max(row_bytes // (256 * 16 * 4), 1), 128), min(rows, 65535), tensors
        params = (table, rows, flags), (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        args = self._kernel, *grid, 256, 1, 1, 0, self._driver.CUstream(self.stream), params, 0
        self._checked("cuLaunchKernel", FamExportError, *args, of=self._driver)

    def _compile(self) -> bytes:
        """For the device itself, or as PTX for the newest architecture before it that this NVRTC knows."""
        major, minor = self.compute_capability()
        own = major * 10 + minor
        try:
            known = self._checked("nvrtcGetSupportedArchs", IncompatibleError, of=self._nvrtc)
        except (RuntimeError, OSError) as exc:  # cuda-python looks for the library only now
            wanted = "pip install 'cuda-python[all]', or nvidia-cuda-nvrtc of the driver's CUDA version"
            raise IncompatibleError(f"the check for NaN needs NVRTC, which is not here: {exc}; {wanted}") from exc
        older = [arch for arch in known if arch <= own]
        if not older:
            raise IncompatibleError(
                f"compute capability {major}.{minor} is older than this NVRTC compiles for (from {min(known)}); "
                "install the cuda-python of an earlier CUDA version: pip install 'cuda-python<13'"
            )
        kind = "sm" if own in known else "compute"
        options = [f"--gpu-architecture={kind}_{max(older)}".encode()]
        source = _SOURCE.encode(), b"finite.cu", 0
        program = self._checked("nvrtcCreateProgram", FamExportError, *source, [], [], of=self._nvrtc)
        try:
            self._checked("nvrtcCompileProgram", FamExportError, program, 1, options, of=self._nvrtc)
            form = "CUBIN" if kind == "sm" else "PTX"
            code = bytes(self._checked(f"nvrtcGet{form}Size", FamExportError, program, of=self._nvrtc))
            self._checked(f"nvrtcGet{form}", FamExportError, program, code, of=self._nvrtc)
        finally:
            self._nvrtc.nvrtcDestroyProgram(program)
        return code

    def retain(self) -> None:
        """One more owner, who will ``close``."""
        self._owners += 1

    def close(self) -> None:
        """Give back the stream, with the last owner."""
        self._owners -= 1
        if self._owners == 0:
            for graph in list(self._graphs):
                self.drop_graph(graph)
            if self._module is not None:
                self._checked("cuModuleUnload", FamExportError, self._module, of=self._driver)
            self._checked("cudaStreamDestroy", FamExportError, self._stream)

    def _checked(self, name: str, error: type[FamExportError] = FamExportError, *args: Any, of: Any = None) -> Any:
        """Call it; what it gives besides the status."""
        status, *given = getattr(of or self._runtime, name)(*args)
        if int(status):
            label = getattr(status, "name", str(status))
            advice = _ADVICE.get(label, "see nvidia-smi, and the messages before this one")
            raise error(f"CUDA failed in {name}: {label} ({int(status)}); {advice}")
        return given[0] if len(given) == 1 else tuple(given)


_ADVICE: Mapping[str, str] = {
    "cudaErrorInsufficientDriver": "there is no NVIDIA driver, or one too old for this cuda-python: update the driver, "
    "or install the cuda-python of the CUDA version that nvidia-smi shows",
    "cudaErrorNoDevice": "no NVIDIA GPU is visible here: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "cudaErrorMemoryAllocation": "device memory is full: close other streams or processes, or open fewer rows",
    "cudaErrorStreamCaptureInvalidated": "the engine did something that cannot be captured: open it uncaptured",
    "cudaErrorStreamCaptureUnsupported": "the engine did something that cannot be captured: open it uncaptured",
}


def _import_cuda() -> tuple[Any, Any, Any]:
    """(runtime, driver, nvrtc) of cuda-python, which moved them in version 12.6."""
    try:
        try:
            from cuda.bindings import driver, nvrtc, runtime
        except ImportError:
            from cuda import cuda as driver
            from cuda import cudart as runtime
            from cuda import nvrtc
    except ImportError as exc:
        raise MissingDependencyError("cuda-python", "gpu", "running on CUDA devices") from exc
    return runtime, driver, nvrtc
