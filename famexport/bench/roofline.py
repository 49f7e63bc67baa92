"""The hardware's ceilings, measured, and the floor they put under a block step.

A step must read every weight once and do its arithmetic once. Bytes over the measured copy bandwidth and operations
over the measured product rate give two times; no implementation at that precision is faster than the larger by much.
Copy bandwidth counts bytes read and bytes written.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_COPY_BYTES = 2**28
_PRODUCT_SIZE = 1536
_REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """Best of several: GB/s of a large copy, GFLOP/s of a large float32 product, both through numpy."""

    copy_gb_per_s: float
    product_gflop_per_s: float

    def floor(self, weight_bytes: int, flops: int | None) -> dict[str, Any]:
        """The least time of a step in milliseconds, and which ceiling sets it."""
        read = weight_bytes / self.copy_gb_per_s / 1e6
        compute = flops / self.product_gflop_per_s / 1e6 if flops else 0.0
        return {
            **asdict(self),
            "floor_ms": max(read, compute),
            "bound": "arithmetic" if compute > read else "bandwidth",
        }


def measure_ceilings() -> Ceilings:
    """Measure both ceilings on this machine; takes about two seconds."""
    source = np.ones(_COPY_BYTES // 4, np.float32)
    target = np.empty_like(source)
    copy = _best(lambda: np.copyto(target, source))
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((_PRODUCT_SIZE, _PRODUCT_SIZE), np.float32) for _ in range(2))
    out = np.empty_like(a)
    product = _best(lambda: np.matmul(a, b, out=out))
    return Ceilings(2 * _COPY_BYTES / copy / 1e9, 2 * _PRODUCT_SIZE**3 / product / 1e9)


def _best(call: Any) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first touches the pages
