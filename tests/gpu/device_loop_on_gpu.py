"""The loop over device memory on a real GPU: ``PYTHONPATH=. python3 tests/gpu/device_loop_on_gpu.py``.

One JSON line for each part; exit code 1 if any failed. torch works as a stand-in engine on the loop's own addresses.

    PYTHONPATH=. python3 tests/gpu/device_loop_on_gpu.py --precision bf16 --library FILE

With ``--precision`` only ort-cuda is run, in that precision: less than 100 seconds. With ``--library`` (what
``famexport kernels`` built) its fused graphs are run, too, and heads are as wide as these need.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from famexport.bundle import open_bundle
from famexport.checkpoint import init_checkpoint
from famexport.config import FamConfig, preset
from famexport.contract import present_name
from famexport.export.pipeline import export_bundle
from famexport.runtime.backend import Backend
from famexport.runtime.cuda import Cuda, table_entry
from famexport.runtime.device import DeviceLoop
from famexport.runtime.session import Session, load
from famexport.runtime.torch_reference import load_model

BLOCKS = 1000
REFERENCE = 256  # blocks that are compared with ort-cpu
PIECES = (8, 3, 5, 8, 1, 7, 2, 2, 4)  # tokens of the first blocks, before and after memory is full; T = 8
TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 0.5}


class TorchEngine:
    capturable = True

    def __init__(self, model: Any, contract: Any, batch: int) -> None:
        self.model, self.contract, self.batch = model, contract, batch
        self.names = contract.graph_names

    def aliased(self, graph: str) -> Mapping[str, str]:
        return {}

    def enqueue(self, graph: str, addresses: Mapping[str, int], stream: int) -> None:
        io = self.contract.graph(graph)
        t = {s.name: tensor_at(addresses[s.name], s.sized(self.batch), s.dtype) for s in io.taken + io.given}
        past, kind = {s.name: t[s.name] for s in io.states}, self.contract.logits
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            if graph == "commit_block":
                logits, new = None, self.model.commit(past)
            elif graph == "block_step":
                logits, new = self.model.step(t[io.inputs[0].name], past, logits=kind)
            else:
                logits, new = self.model.append(t[io.inputs[0].name], t[io.inputs[1].name], past, logits=kind)
            if logits is not None:
                t["logits"].copy_(logits)
            for spec in io.new:
                t[present_name(spec.name)].copy_(new[spec.name])

    def close(self) -> None: ...


def tensor_at(address: int, shape: tuple[int, ...], dtype: str) -> Any:
    kinds = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2", "int64": "<i8", "int32": "<i4", "uint64": "<i8"}
    raw = type("Raw", (), {})()
    raw.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": kinds[dtype], "version": 3}
    found = torch.as_tensor(raw, device="cuda")
    return found.view(torch.bfloat16) if dtype == "bfloat16" else found


class TorchCuda(Backend):
    name, provider, device = "torch-cuda", "torch", "cuda"

    def __init__(self, bundle: Any, capture: bool) -> None:
        super().__init__(bundle.contract, bundle.manifest.precision)
        weights = bundle.file(bundle.manifest.weights)
        self.model = load_model(bundle.contract, FamConfig.from_dict(bundle.manifest.config), weights, "cuda")
        self.capture, self.cuda = capture, Cuda()

    def _open(self, batch: int) -> DeviceLoop:
        engine = TorchEngine(self.model, self.contract, batch)
        return DeviceLoop(self.contract, batch, engine, self.cuda, capture=self.capture)


def ort_cuda(bundle: Any, capture: bool, library: Path | None = None) -> Backend:
    from famexport.runtime.ort_ring import OrtCudaRing, ring_files

    weights, precision = bundle.file(bundle.manifest.weights), bundle.manifest.precision
    files = ring_files(bundle, fused=library is not None)
    return OrtCudaRing(bundle.contract, precision, files, weights, capture=capture, library=library)


def fed(stream: Any, pieces: Sequence[int], tokens: np.ndarray) -> list[np.ndarray]:
    """The logits of each piece of ``tokens`` [1, n], one after the other."""
    ends = np.cumsum(pieces)
    return [np.concatenate(list(stream.feed([tokens[:, e - n : e]])), 1) for n, e in zip(pieces, ends, strict=True)]


def equal(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return all(a[n].tobytes() == b[n].tobytes() for n in b)


def loop(path: Path, make: Callable[[Any, bool], Backend]) -> dict[str, Any]:
    bundle = open_bundle(path)
    rng, contract = np.random.default_rng(0), bundle.contract
    blocks = rng.integers(0, contract.vocab_size, (BLOCKS, 1, contract.block_size))
    first = rng.integers(0, contract.vocab_size, (1, sum(PIECES)))
    found: dict[str, Any] = {"precision": bundle.manifest.precision}
    with load(path, "ort-cpu", threads=1).stream() as stream:
        wanted = fed(stream, PIECES, first)
        wanted += [stream.step(block).copy() for block in blocks[:REFERENCE]]
    results, same = [], True
    for capture in (True, False):
        label = "captured" if capture else "uncaptured"
        session = Session(bundle, make(bundle, capture))
        with session.stream() as stream:
            for block in blocks[:3]:
                stream.step(block)
            before = stream._loop.read()
            stream._loop.warm_up()
            same &= equal(stream._loop.read(), before)
            stream.reset()
            logits, times, free = fed(stream, PIECES, first), list[float](), 0
            for i, block in enumerate(blocks):
                if i == 10:
                    free = torch.cuda.mem_get_info()[0]
                start = time.perf_counter()
                given = stream.step(block)
                times.append((time.perf_counter() - start) * 1e6)
                logits.append(given)
            found[f"{label}_memory_change_bytes"] = free - torch.cuda.mem_get_info()[0]
            found[f"{label}_p50_us"] = round(float(np.median(times[10:])), 1)
            state = stream._loop.read()
            logits += fed(stream, (1, 2, contract.block_size), np.concatenate(blocks[:3], 1))  # over a block's end
            results.append((logits, state, stream._loop.read()))
            found[f"{label}_info"] = stream._loop.info
        session.close()
    (a, state_a, end_a), (b, state_b, end_b) = results
    found["bit_equal"] = all(map(np.array_equal, a, b)) and equal(state_a, state_b) and equal(end_a, end_b)
    found["warm_up_restores"] = same
    found["max_error"] = max(float(np.abs(x - y).max()) for x, y in zip(a, wanted, strict=False))
    memory = found["captured_memory_change_bytes"] == found["uncaptured_memory_change_bytes"] == 0
    info = found["captured_info"]
    captured = info["captured"] and not info.get("uncaptured_graphs") and not found["uncaptured_info"]["captured"]
    good = found["bit_equal"] and same and memory and captured
    return {**found, "ok": bool(good and found["max_error"] < TOLERANCE[found["precision"]])}


def finite(_: Any = None) -> dict[str, Any]:
    cuda, wrong, tried = Cuda(), [], 0
    for dtype in ("float32", "float16", "bfloat16"):
        kind = getattr(torch, dtype)
        for rows, n in ((1, 1), (3, 7), (4, 1000), (3, 8192), (2, 100001)):
            for value in (None, float("nan"), float("inf"), -float("inf")):
                for row, at in ((0, 0), (rows - 1, n - 1), (rows // 2, n // 2)):
                    data = torch.randn(rows, n, device="cuda").to(kind)
                    data[:, ::3] = torch.finfo(kind).max
                    if value is not None:
                        data[row, at] = value
                    entry = table_entry(data.data_ptr(), n * data.element_size(), dtype)
                    table = torch.tensor(entry, dtype=torch.int64, device="cuda")
                    flags = torch.zeros(rows, dtype=torch.int32, device="cuda")
                    torch.cuda.synchronize()
                    cuda.flag_nonfinite(table.data_ptr(), 1, rows, entry[1], flags.data_ptr())
                    cuda.synchronize()
                    wanted = [int(value is not None and r == row) for r in range(rows)]
                    tried += 1
                    if flags.tolist() != wanted:
                        wrong.append([dtype, rows, n, str(value), flags.tolist()])
    return {"tried": tried, "wrong": wrong[:5], "facts": cuda.facts(), "ok": not wrong}


def rtx(path: Path) -> dict[str, Any]:
    """A real plan for another compute capability: refused by us, and past our check by TensorRT-RTX, each clearly."""
    try:
        import tensorrt_rtx as trt
    except ImportError:
        try:
            import tensorrt_rtx_bindings as trt  # the same without its wrapper
        except ImportError as exc:
            return {"ok": True, "skipped": str(exc)}
        sys.modules["tensorrt_rtx"] = trt
    from famexport.engine.build import build_engines
    from famexport.engines import read_entries
    from famexport.errors import IncompatibleError
    from famexport.runtime.session import load
    from famexport.runtime.tensorrt import load_engine
    from famexport.runtime.tensorrt_api import new_logger

    build_engines(path, "rtx-4090", engine="tensorrt-rtx")
    said = []
    try:
        load(path, "tensorrt-rtx")
    except IncompatibleError as exc:
        said.append(str(exc))
    bundle = open_bundle(path)
    entry = read_entries(bundle.manifest.engines)[0]
    logger = new_logger(trt)
    try:
        load_engine(trt, trt.Runtime(logger), logger, bundle, entry, bundle.contract.graph(entry.graph))
    except IncompatibleError as exc:
        said.append(str(exc))
    with load(path, "auto") as session:
        said.append(f"auto: {session.info()['backend']}: {session.info()['reason']}")
    ok = len(said) == 3 and "compute capability is" in said[0] and "refuses" in said[1]
    return {"ok": ok, "version": trt.__version__, "said": said}


def part(name: str, call: Callable[[], dict[str, Any]]) -> bool:
    start = time.perf_counter()
    try:
        found = call()
    except Exception as exc:
        found = {"ok": False, "error": f"{type(exc).__name__}: {exc}", "trace": traceback.format_exc()[-1200:]}
    print(json.dumps({"part": name, "seconds": round(time.perf_counter() - start, 1), **found}), flush=True)
    return bool(found["ok"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--precision", choices=TOLERANCE, help="only ort-cuda, in this one")
    parser.add_argument("--library", type=Path, help="what famexport kernels built: the fused graphs, too")
    options = parser.parse_args()
    engines: dict[str, Callable[[Any, bool], Backend]] = {"ort-cuda": ort_cuda}
    if not options.precision:
        engines = {"torch": TorchCuda, **engines}
    if options.library:
        engines["ort-cuda-fused"] = partial(ort_cuda, library=options.library)
    good = [] if options.precision else [part("finite", finite)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        init_checkpoint(root / "model", preset("tiny", **({"head_dim": 64} if options.library else {})))
        for precision in [options.precision] if options.precision else TOLERANCE:
            path = root / precision
            good.append(part(f"export-{precision}", lambda path=path, precision=precision: export(path, precision)))
            for name, make in engines.items() if good[-1] else ():
                if name.startswith("ort-cuda") and not _has_cuda_provider():
                    print(json.dumps({"part": f"{name}-{precision}", "skipped": "no CUDAExecutionProvider here"}))
                else:
                    good.append(part(f"{name}-{precision}", lambda path=path, make=make: loop(path, make)))
        if not options.precision:
            good.append(part("tensorrt-rtx", lambda: rtx(root / "fp16")))
    return 0 if all(good) else 1


def export(path: Path, precision: str) -> dict[str, Any]:
    export_bundle(path.parent / "model", path, precision=precision, graphs="all", parity_blocks=9)
    return {"ok": True}


def _has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


if __name__ == "__main__":
    sys.exit(main())
