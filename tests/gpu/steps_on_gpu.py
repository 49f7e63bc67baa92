"""The graphs made for CUDA alone on a GPU, without loop or host copies, beside ``torch.compile`` of the same step.

    PYTHONPATH=. python3 tests/gpu/steps_on_gpu.py --shape edge --compile --profile
    PYTHONPATH=. python3 tests/gpu/steps_on_gpu.py --shape 8b --blocks 1000

Random weights are made on the device, so nothing is exported or written, and a model may be as large as the device.
First a closed loop against torch eager at the same precision; then medians of synchronised calls, logits left on the
device in every case; then ``append_step`` of one token; with ``--blocks`` a long stream, with free device memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch

from famexport.config import FamConfig, preset
from famexport.export.cuda_net import Plan
from famexport.export.cuda_steps import AppendStep, BlockStep
from famexport.model import FamModel
from famexport.rotary import Rope

SHORT, LONG = {"block_size": 64, "fam_length": 16}, {"block_size": 1024, "fam_length": 64}
SHAPES = {
    "edge": preset("edge"),
    "1b-64": preset("paper-1b", **SHORT),
    "1b-1024": preset("paper-1b", **LONG),
    "8b": preset("paper-8b", **LONG),
    "24b": preset("paper-24b", **LONG),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TORCH = {"float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}
ONNX = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16, torch.int64: 7}
CHECKED = 7  # blocks


def random_model(c: FamConfig, dtype: torch.dtype) -> FamModel:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = FamModel(c).eval()
    model = model.to(dtype)
    model.rope = None
    model = model.to_empty(device="cuda")
    model.rope = Rope(c).cuda()
    for p in model.parameters():
        torch.nn.init.ones_(p) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.02)
    with torch.no_grad():
        model.fold_fam()
    return model


class Graph:
    """A session over given tensors, each set of them captured as a CUDA graph of its own."""

    def __init__(self, model: ir.Model, stream: torch.cuda.Stream, capture: bool) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        cuda = {"user_compute_stream": str(stream.cuda_stream), "use_tf32": "0"}
        if capture:
            cuda["enable_cuda_graph"] = "1"
        data = ir.to_proto(model).SerializeToString()
        self.session = ort.InferenceSession(data, options, providers=[("CUDAExecutionProvider", cuda)])
        self.capture, self.calls = capture, 0

    def bind(self, tensor: Callable[[Any], torch.Tensor]) -> Callable[[], None]:
        io, keep = self.session.io_binding(), []
        for values, bind in (
            (self.session.get_inputs(), io.bind_input),
            (self.session.get_outputs(), io.bind_output),
        ):
            for value in values:
                keep.append(tensor(value))
                bind(value.name, "cuda", 0, ONNX[keep[-1].dtype], list(keep[-1].shape), keep[-1].data_ptr())
        self.calls += 1
        options = ort.RunOptions()
        if self.capture:
            options.add_run_config_entry("gpu_graph_id", str(self.calls))
        return lambda keep=keep: self.session.run_with_iobinding(io, options)  # type: ignore[misc]


def empty(value: Any) -> torch.Tensor:
    return torch.zeros(value.shape, dtype=TORCH[value.type[7:-1]], device="cuda")


class Ring:
    """``block_step`` over a ring of M + 1 positions, as ``runtime/layout.py`` has it."""

    def __init__(self, model: FamModel, c: FamConfig, dtype: torch.dtype, capture: bool) -> None:
        self.c, self.stream = c, torch.cuda.Stream()
        self.plan = Plan(c, str(dtype).partition(".")[2], 1)
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        for i in range(c.num_hidden_layers):
            part = f"model.layers.{i}.self_attn."
            self.weights[part + "qkv_proj.weight"] = torch.cat([self.weights[f"{part}{x}_proj.weight"] for x in "qkv"])
        self.weights["fam_init"] = model.fam_init.float()
        self.positions = c.memory_segments + 1
        self.own: dict[Any, torch.Tensor] = {}
        steady = Graph(BlockStep(self.plan, steady=True).model(), self.stream, capture)
        start = Graph(BlockStep(self.plan, steady=False).model(), self.stream, False)
        turns = range(self.positions)
        self.calls = {
            (g is steady, t): g.bind(lambda v, t=t: self.tensor(v, t)) for g in (start, steady) for t in turns
        }
        self.turn = self.count = 0
        torch.cuda.synchronize()

    def tensor(self, value: Any, turn: int) -> torch.Tensor:
        name, last = value.name, self.positions - 1
        if name in self.weights:
            return self.weights[name]
        key: Any = name
        if name.startswith(("past_", "present_")) and name != "past_count":
            base, _, slot = name.partition("_")[2].partition(".")
            at = (
                last if name.startswith("present_") else last - self.c.memory_segments + int(slot) if slot else last - 1
            )
            key = base, (turn + at) % self.positions
        if key not in self.own:
            self.own[key] = empty(value)
        return self.own[key]

    def step(self, tokens: torch.Tensor | None = None) -> None:
        if tokens is not None:
            self.own["tokens"].copy_(tokens)
            self.own["past_count"].fill_(self.count)
            torch.cuda.synchronize()
        full = max(self.c.memory_segments, 1)
        self.calls[self.count >= full, self.turn]()
        self.turn, self.count = (self.turn + 1) % self.positions, min(self.count + 1, full)

    def fam(self, layer: int) -> torch.Tensor:
        return self.own[f"fam_{layer:02d}", (self.turn + self.positions - 2) % self.positions][:, : self.c.fam_length]


def fresh(model: FamModel, precision: str) -> dict[str, torch.Tensor]:
    states = model.contract(precision, 1).states
    return {s.name: torch.zeros(s.sized(1), dtype=getattr(torch, s.dtype), device="cuda") for s in states}


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def verify(ring: Ring, model: FamModel, precision: str) -> tuple[float, float]:
    """The largest relative error of logits and of FAM in a closed loop against torch eager."""
    state, c = fresh(model, precision), ring.c
    random = torch.Generator(device="cuda").manual_seed(1)
    errors = [0.0, 0.0]
    for _ in range(CHECKED):
        tokens = torch.randint(0, c.vocab_size, (1, c.block_size), device="cuda", generator=random)
        with torch.no_grad():
            logits, state = model.step(tokens, state)
        ring.step(tokens)
        torch.cuda.synchronize()
        fam = max(worst(ring.fam(i), state[f"past_fam_{i:02d}"]) for i in range(c.num_hidden_layers))
        errors = [max(errors[0], worst(ring.own["logits"], logits)), max(errors[1], fam)]
    return errors[0], errors[1]


def timed(call: Callable[[], Any], repeats: int = 60) -> str:
    for _ in range(12):
        call()
    torch.cuda.synchronize()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) * 1e3)
    taken.sort()
    return f"p50 {statistics.median(taken):.3f} ms, p99 {taken[int(0.99 * repeats)]:.3f}"


def profile(call: Callable[[], Any], title: str) -> None:
    calls = 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    rows = sorted(((e.self_device_time_total, e.count, e.key) for e in found.key_averages()), reverse=True)
    print(f"{title}, kernels: {sum(row[0] for row in rows) / calls:.0f} us")
    for total, count, key in rows[:24]:
        print(f"  {total / calls:8.1f} us in {count / calls:5.0f} calls  {key[:110]}")


def compiled(model: FamModel, c: FamConfig, precision: str) -> None:
    state, tokens = fresh(model, precision), torch.randint(0, c.vocab_size, (1, c.block_size), device="cuda")
    state["past_count"].fill_(c.memory_segments)
    with torch.no_grad():
        print("torch eager", timed(lambda: model.step(tokens, state)), flush=True)
        step = torch.compile(model.step, mode="reduce-overhead")
        step(tokens, state)
        print("torch.compile", timed(lambda: step(tokens, state)), flush=True)
    torch._dynamo.reset()


def append(ring: Ring, capture: bool) -> Callable[[], None]:
    def tensor(value: Any) -> torch.Tensor:
        if value.name in ring.weights:
            return ring.weights[value.name]
        made = empty(value)
        return made.fill_({"chunk_length": 1, "past_open_length": 5}.get(value.name, 0))

    graph = Graph(AppendStep(ring.plan, 1, steady=True).model("append_step"), ring.stream, capture)
    return graph.bind(tensor)


def stream(ring: Ring, blocks: int) -> None:
    tokens = torch.randint(0, ring.c.vocab_size, (1, ring.c.block_size), device="cuda")
    for _ in range(ring.c.memory_segments + 1):
        ring.step(tokens)
    taken = []
    for i in range(blocks + 1):
        start = time.perf_counter()
        ring.step()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        if i in (10, 100, blocks):
            print(f"block {i}: {torch.cuda.mem_get_info()[0]} bytes free, {sum(taken):.2f} s so far", flush=True)
    median = statistics.median(taken)
    print(f"stream: p50 {median * 1e3:.2f} ms, {ring.c.block_size / median:.0f} tokens/s")
    for length in (26, 52, 103, 155, 206, 258):
        if (count := round(length * 1000 / ring.c.block_size)) <= blocks:
            print(f"  {length}k tokens: {sum(taken[:count]):.2f} s")
    assert bool(ring.own["logits"].isfinite().all())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--precision", choices=DTYPES, default="fp16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--blocks", type=int, default=0)
    options = parser.parse_args()
    c, dtype = SHAPES[options.shape], DTYPES[options.precision]
    model = random_model(c, dtype)
    print(options.shape, f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}e9 parameters", flush=True)
    if options.compile:
        compiled(model, c, options.precision)
    ring = Ring(model, c, dtype, True)
    print("largest error, logits and FAM:", verify(ring, model, options.precision))
    print("block_step", timed(ring.step), flush=True)
    print("append_step", timed(append(ring, True)), flush=True)
    if options.profile:
        plain = Ring(model, c, dtype, False)
        verify(plain, model, options.precision)
        profile(plain.step, "block_step")
        profile(append(plain, False), "append_step")
        del plain
    if options.blocks:
        del model
        gc.collect()
        torch.cuda.empty_cache()
        stream(ring, options.blocks)


if __name__ == "__main__":
    main()
