"""Each operator of the kernel library on a GPU against numpy, for all types, and how long each takes at real sizes.

    PYTHONPATH=. python3 tests/gpu/kernels_on_gpu.py build/kernels/libfamexport_kernels.so

Times are those of the kernels alone, as CUPTI reports them; beside each the bytes it must move at the least, over them.
"""

from __future__ import annotations

import sys
from math import prod

import numpy as np
import onnxruntime as ort
import torch
from step_graphs import ONNX

from tests.kernels.operators import (
    FLOAT,
    INT,
    SILU,
    Case,
    Shape,
    block_memory,
    cases,
    gated_act,
    norm_thin,
    skip_norm,
    thin,
    token_attention,
)

TYPES = {
    "float": (1, torch.float32, 2e-4),
    "float16": (10, torch.float16, 4e-3),
    "bfloat16": (16, torch.bfloat16, 3e-2),
}


class Bound:
    """A session of one node over tensors of torch."""

    def __init__(self, library: str, case: Case, weight: int, dtype: torch.dtype) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(library)
        stream = str(torch.cuda.current_stream().cuda_stream)
        cuda = {"user_compute_stream": stream, "use_tf32": "0"}
        self.session = ort.InferenceSession(case.model(weight), options, providers=[("CUDAExecutionProvider", cuda)])
        self.io, self.keep = self.session.io_binding(), []
        for name, (kind, array) in case.feeds().items():
            tensor = torch.from_numpy(array.astype(np.int64) if kind == INT else array.astype(np.float32)).cuda()
            tensor = tensor if kind in (INT, FLOAT) else tensor.to(dtype)
            self.bind(self.io.bind_input, name, tensor)
        self.outputs = []
        for i, (kind, expected) in enumerate(zip(case.outputs, case.expected, strict=True)):
            if expected is None:
                self.io.bind_output(f"out_{i}", "cuda")
                continue
            tensor = torch.full(expected.shape, float("nan"), dtype=torch.float32 if kind == FLOAT else dtype).cuda()
            self.outputs.append((tensor, expected))
            self.bind(self.io.bind_output, f"out_{i}", tensor)

    def bind(self, bind, name: str, tensor: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
        self.keep.append(tensor.contiguous())
        bind(name, "cuda", 0, ONNX[tensor.dtype], list(tensor.shape), self.keep[-1].data_ptr())

    def run(self) -> None:
        self.session.run_with_iobinding(self.io)

    def worst(self) -> float:
        self.run()
        torch.cuda.synchronize()
        found = 0.0
        for got, expected in self.outputs:
            got = got.double().cpu().numpy()
            found = max(found, float(np.abs(got - expected).max() / np.abs(expected).max()))
            if not np.isfinite(got).all():
                return float("inf")
        return found


def verify(library: str) -> bool:
    fine = True
    for name, (weight, dtype, allowed) in TYPES.items():
        worst: dict[str, float] = {}
        for case in cases():
            error = Bound(library, case, weight, dtype).worst()
            if not error <= allowed:
                print(f"WRONG {name} {case.op} {case.label}: {error:.2e}, {allowed} allowed")
                fine = False
            worst[case.op] = max(worst.get(case.op, 0), error)
        print(name, {op: f"{error:.1e}" for op, error in worst.items()}, flush=True)
    return fine


def timed(library: str) -> None:
    shape = {"heads": 12, "kv": 12, "width": 128}
    long, short = Shape(t=1024, fam=64, **shape), Shape(t=64, fam=16, **shape)
    big = [
        skip_norm(1, 1088, 1536, fam=64),
        skip_norm(1, 80, 1536, fam=16),
        skip_norm(1, 1, 1536),
        gated_act(1, 1088, 12288, SILU),
        gated_act(1, 80, 12288, SILU),
        block_memory(long, True),
        block_memory(short, False),
        token_attention(long, [700], [1], 1),
        token_attention(short, [40], [1], 1),
        thin(1, 1, 1536, 4608),
        thin(1, 1, 1536, 1536),
        thin(1, 1, 1536, 12288, act=SILU),
        thin(1, 1, 12288, 1536),
        thin(1, 1, 1536, 32000),
        norm_thin(1, 1, 1536, 4608),
        norm_thin(1, 1, 1536, 12288, act=SILU),
        thin(1, 4, 1536, 12288, act=SILU),
    ]
    flush = torch.empty(2**27, device="cuda")  # half a GB: weights of a layer are cold when its turn comes
    for case in big:
        bound = Bound(library, case, 10, torch.float16)
        error = bound.worst()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            for _ in range(20):
                flush.add_(1)
                bound.run()
            torch.cuda.synchronize()
        rows = [e for e in found.key_averages() if "elementwise" not in e.key and "Mem" not in e.key]
        taken = sum(e.self_device_time_total for e in rows) / 20
        size = {FLOAT: 4, INT: 8}
        moved = sum(prod(array.shape) * size.get(kind, 2) for kind, array in case.feeds().values())
        moved += sum(t.numel() * t.element_size() for t, _ in bound.outputs)
        print(
            f"{case.op} {case.label}: {taken:.1f} us, {moved / 1e6:.2f} MB, {moved / taken / 1e6:.2f} TB/s, {error:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    right = verify(sys.argv[1])
    timed(sys.argv[1])
    raise SystemExit(0 if right else "an operator is wrong")
