"""The graphs made for CUDA alone on a GPU, without loop or host copies, beside ``torch.compile`` of the same step.

    PYTHONPATH=. python3 tests/gpu/steps_on_gpu.py --shape edge --compile --profile
    PYTHONPATH=. python3 tests/gpu/steps_on_gpu.py --shape 1b-64 --compile --fused --profile
    PYTHONPATH=. python3 tests/gpu/steps_on_gpu.py --shape 8b --blocks 1000

Random weights are made on the device, so nothing is exported or written, and a model may be as large as the device.
First closed loops against torch eager at the same precision, blocks from an empty memory and then tokens of a block;
then medians of synchronised calls, logits left on the device in every case; then ``append_step`` of one token; with
``--blocks`` a long stream, with free device memory. ``--fused`` does all of it with the unfused graphs and then with
the fused ones, with ``--blocks`` the stream with the fused ones alone. ``--library`` is what ``famexport kernels``
built; without it that of this machine.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_graphs import DEVICE, Append, Ring, Tensors, packed

from famexport.config import FamConfig, preset
from famexport.kernels.library import find
from famexport.model import FamModel
from famexport.rotary import Rope

SHORT, LONG = {"block_size": 64, "fam_length": 16}, {"block_size": 1024, "fam_length": 64}
SHAPES = {
    # attention without a mask
    "causal": preset("tiny", block_size=256, fam_length=20, head_dim=64, num_key_value_heads=2),
    "edge": preset("edge"),
    "1b-64": preset("paper-1b", **SHORT),
    "1b-1024": preset("paper-1b", **LONG),
    "8b": preset("paper-8b", **LONG),
    "24b": preset("paper-24b", **LONG),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CHECKED, TOKENS = 7, 6  # blocks, and tokens of the next one


def random_model(c: FamConfig, dtype: torch.dtype) -> FamModel:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = FamModel(c).eval()
    model = model.to(dtype)
    model.rope = None
    model = model.to_empty(device=DEVICE)
    model.rope = Rope(c).to(DEVICE)
    for p in model.parameters():
        torch.nn.init.ones_(p) if p.dim() == 1 else torch.nn.init.normal_(p, std=0.02)
    with torch.no_grad():
        model.fold_fam()
    return model


def fresh(model: FamModel, precision: str) -> dict[str, torch.Tensor]:
    states = model.contract(precision, 1).states
    return {s.name: torch.zeros(s.sized(1), dtype=getattr(torch, s.dtype), device=DEVICE) for s in states}


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def verify(ring: Ring, model: FamModel, precision: str) -> tuple[float, float, Tensors]:
    """The largest relative error of logits and of FAM in a closed loop against torch eager, and eager's last state."""
    state, c = fresh(model, precision), ring.c
    random = torch.Generator(DEVICE).manual_seed(1)
    errors = [0.0, 0.0]
    for _ in range(CHECKED):
        tokens = torch.randint(0, c.vocab_size, (1, c.block_size), device=DEVICE, generator=random)
        with torch.no_grad():
            logits, state = model.step(tokens, state)
        ring.step(tokens)
        torch.cuda.synchronize()
        fam = max(worst(ring.fam(i), state[f"past_fam_{i:02d}"]) for i in range(c.num_hidden_layers))
        errors = [max(errors[0], worst(ring.own["logits"], logits)), max(errors[1], fam)]
    return errors[0], errors[1], state


def verify_append(append: Append, model: FamModel, state: Tensors) -> float:
    """The largest relative error of logits in a closed loop of tokens, from eager's state after the ring's blocks."""
    c, worst_error = append.ring.c, 0.0
    open_shape = 1, c.num_key_value_heads, c.block_size, c.head_dim
    dtype = next(model.parameters()).dtype
    state = dict(state)
    for i in range(c.num_hidden_layers):
        for kind in ("key", "value"):
            state[f"past_open_{kind}_{i:02d}"] = torch.zeros(open_shape, dtype=dtype, device=DEVICE)
    state["past_open_length"] = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    one, random = torch.ones_like(state["past_open_length"]), torch.Generator(DEVICE).manual_seed(2)
    for _ in range(TOKENS):
        token = torch.randint(0, c.vocab_size, (1, 1), device=DEVICE, generator=random)
        with torch.no_grad():
            logits, new = model.append(token, one, state)
        state |= new
        append.step(token)
        torch.cuda.synchronize()
        worst_error = max(worst_error, worst(append.own["logits"], logits))
    return worst_error


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
    state, tokens = fresh(model, precision), torch.randint(0, c.vocab_size, (1, c.block_size), device=DEVICE)
    state["past_count"].fill_(c.memory_segments)
    with torch.no_grad():
        print("torch eager", timed(lambda: model.step(tokens, state)), flush=True)
        step = torch.compile(model.step, mode="reduce-overhead")
        step(tokens, state)
        print("torch.compile", timed(lambda: step(tokens, state)), flush=True)
    torch._dynamo.reset()


def measure(name: str, ring: Ring, model: FamModel, options: argparse.Namespace) -> None:
    """Errors, times and, where asked for, kernels of one form of the graphs; ``ring`` is fresh and captured."""
    logits, fam, state = verify(ring, model, options.precision)
    append = Append(ring, True)
    tokens = verify_append(append, model, state)
    del state
    print(f"{name}: largest error, logits {logits:.3g}, FAM {fam:.3g}, append_step's logits {tokens:.3g}", flush=True)
    print(f"{name}: block_step", timed(ring.step), flush=True)
    print(f"{name}: append_step", timed(append.step), flush=True)
    del append
    if options.profile:
        traced = Ring(ring.weights, ring.c, DTYPES[options.precision], False, ring.library)
        *_, state = verify(traced, model, options.precision)
        append = Append(traced, False)
        verify_append(append, model, state)
        del state
        profile(traced.step, f"{name}: block_step")
        profile(append.step, f"{name}: append_step")


def stream(ring: Ring, blocks: int) -> None:
    tokens = torch.randint(0, ring.c.vocab_size, (1, ring.c.block_size), device=DEVICE)
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
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--library", type=Path)
    options = parser.parse_args()
    library = None
    if options.fused and (library := options.library or find()) is None:
        parser.error("no kernels are built here: famexport kernels")
    c, dtype = SHAPES[options.shape], DTYPES[options.precision]
    model = random_model(c, dtype)
    print(options.shape, f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}e9 parameters", flush=True)
    if options.compile:
        compiled(model, c, options.precision)
    weights = packed(model)
    for name, used in [("unfused", None), *([("fused", library)] if library else [])]:
        ring = Ring(weights, c, dtype, True, used)
        measure(name, ring, model, options)
        if options.blocks and used is library:
            del model
            gc.collect()
            torch.cuda.empty_cache()
            stream(ring, options.blocks)
        del ring
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
