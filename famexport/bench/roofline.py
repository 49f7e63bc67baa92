"""The hardware's ceilings, measured, and the floor they put under a block step.

A step must read every weight once and do its arithmetic once. Bytes over the measured copy bandwidth and operations
over the measured product rate give two times; no implementation at that precision is faster than the larger by much.
Copy bandwidth counts bytes read and bytes written. Weights that stay in a cache can be read faster than that: a small
model's share can pass 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from famexport.errors import FamExportError
from famexport.runtime.cuda import Cuda

_COPY_BYTES = 2**28
_PRODUCT_SIZE = 1536
_GPU_COPY_BYTES = 2**30
_GPU_PRODUCT_SIZE = 8192
_REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """Best of several: GB/s of a large copy, GFLOP/s of a large product; None where there is nothing to measure that
    with."""

    copy_gb_per_s: float
    product_gflop_per_s: float | None

    def floor(self, weight_bytes: int, flops: int | None) -> dict[str, Any]:
        """The least time of a step in milliseconds, and which ceiling sets it."""
        read = weight_bytes / self.copy_gb_per_s / 1e6
        rate = self.product_gflop_per_s
        compute = flops / rate / 1e6 if flops and rate else 0.0
        return {
            **asdict(self),
            "floor_ms": max(read, compute),
            "bound": "arithmetic" if compute > read else "bandwidth",
        }

    def share(
        self,
        weight_bytes: int,
        flops: int | None,
        host_ms: Mapping[str, float],
        device_ms: Mapping[str, float] | None,
    ) -> dict[str, Any]:
        """``floor``, and the ``share`` of it in the median time: on the device where that is known, else on the host.
        ``of`` says which."""
        floor = self.floor(weight_bytes, flops)
        of, times = ("device", device_ms) if device_ms else ("host", host_ms)
        return {**floor, "of": of, "share": floor["floor_ms"] / times["p50"]}


def measure_limits(devices: Collection[str], dtype: str) -> tuple[dict[str, Ceilings], dict[str, Any]]:
    """The ceilings of each kind of device, ``cpu`` and ``cuda``, and what the GPU is.

    Args:
        dtype: of the products, for a GPU: the bundle's. A CPU's are float32.
    Returns:
        ceilings by device, and facts of the GPU: {} if it was not used. If its ceilings cannot be measured they are
        missing, and ``problem`` says why: what took the time of a whole benchmark is not thrown away for that.
    """
    found: dict[str, Ceilings] = {}
    gpu: dict[str, Any] = {}
    if "cpu" in devices:
        found["cpu"] = measure_ceilings()
    if "cuda" in devices:
        try:
            cuda = Cuda()
            try:
                gpu = cuda.facts()
                found["cuda"] = measure_gpu_ceilings(cuda, dtype)
            finally:
                cuda.close()
        except FamExportError as exc:
            gpu["problem"] = str(exc)
    return found, gpu


def measure_ceilings() -> Ceilings:
    """Measure both ceilings of this machine's CPU, in float32 through numpy; takes about two seconds."""
    source = np.ones(_COPY_BYTES // 4, np.float32)
    target = np.empty_like(source)
    copy = _best(lambda: np.copyto(target, source))
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((_PRODUCT_SIZE, _PRODUCT_SIZE), np.float32) for _ in range(2))
    out = np.empty_like(a)
    product = _best(lambda: np.matmul(a, b, out=out))
    return Ceilings(2 * _COPY_BYTES / copy / 1e9, 2 * _PRODUCT_SIZE**3 / product / 1e9)


def measure_gpu_ceilings(cuda: Any, dtype: str) -> Ceilings:
    """Measure both ceilings of a GPU, by events: a copy from device memory to device memory, which needs 2 GiB of it,
    and a product in ``dtype`` (float32 without TF32, as the backends compute it).

    Raises:
        FamExportError: CUDA failed, for want of memory for example.
    """
    return Ceilings(2 * _GPU_COPY_BYTES / _gpu_copy_s(cuda) / 1e9, _gpu_product_gflop_per_s(dtype))


def _gpu_copy_s(cuda: Any) -> float:
    held: list[int] = []
    events: list[Any] = []
    try:
        for _ in range(2):
            held.append(cuda.malloc(_GPU_COPY_BYTES))
            events.append(cuda.event())
            cuda.memset(held[-1], 0, _GPU_COPY_BYTES)

        def once() -> float:
            cuda.record(events[0])
            cuda.copy(held[1], held[0], _GPU_COPY_BYTES)
            cuda.record(events[1])
            cuda.synchronize()
            return float(cuda.elapsed_ms(*events)) / 1e3

        return min([once() for _ in range(_REPEATS)][1:])
    finally:
        for event in events:
            cuda.drop_event(event)
        for address in held:
            cuda.free(address)


def _gpu_product_gflop_per_s(dtype: str) -> float | None:
    """None without a torch that sees CUDA: the floor is that of the bandwidth alone then."""
    # The one place where bench imports torch, which a device need not have: a product that reaches the hardware's rate
    # takes cuBLAS, and famexport itself brings no library of products for GPUs.
    try:
        import torch as torch_module
    except (ImportError, OSError):  # OSError: a shared library of its own is missing
        return None
    torch: Any = torch_module
    if not torch.cuda.is_available():
        return None
    size, before = _GPU_PRODUCT_SIZE, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        # Random values: a GPU draws less power, and clocks higher, on zeros
        a, b = (torch.randn(size, size, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def once() -> float:
            start.record()
            torch.mm(a, b, out=out)
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return 2 * size**3 / min([once() for _ in range(_REPEATS)][1:]) / 1e9
    except RuntimeError:  # out of memory, or a GPU without this dtype
        return None
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _best(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first touches the pages
