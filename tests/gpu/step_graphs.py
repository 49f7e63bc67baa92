"""Sessions of the graphs made for CUDA over torch's tensors, without the library's own loop: for ``steps_on_gpu.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch

from famexport.config import FamConfig
from famexport.export.cuda_net import Plan
from famexport.export.cuda_steps import AppendStep, BlockStep
from famexport.model import FamModel

TORCH = {"float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}
DEVICE = "cuda"
ONNX = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16, torch.int64: 7}

Tensors = dict[str, torch.Tensor]


def packed(model: FamModel) -> Tensors:
    """All weights by the graphs' names. Those that are one input are one tensor, and the model's parameters become
    views of it: nothing is on the device twice, but for one layer's while this works."""
    weights: Tensors = {}
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for part, name, kinds in (
                (layer.self_attn, "self_attn.qkv", ("q", "k", "v")),
                (layer.mlp, "mlp.gate_up", ("gate", "up")),
            ):
                ones = [getattr(part, f"{kind}_proj") for kind in kinds]
                for end in ("weight", "bias"):
                    if any(one is None or getattr(one, end) is None for one in ones):
                        continue
                    whole = torch.cat([getattr(one, end) for one in ones])
                    weights[f"model.layers.{i}.{name}_proj.{end}"] = whole
                    for one, rows in zip(ones, whole.split([len(getattr(one, end)) for one in ones]), strict=True):
                        getattr(one, end).data = rows
            torch.cuda.empty_cache()  # or what was freed would be kept, in pieces too small for the next
    weights |= {name: p.detach() for name, p in model.named_parameters()}
    if model.fam_init is not None:
        weights["fam_init"] = model.fam_init.float()
    return weights


class Graph:
    """A session over given tensors, each set of them captured as a CUDA graph of its own."""

    def __init__(self, model: ir.Model, stream: torch.cuda.Stream, capture: bool, library: Path | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if library is not None:
            options.register_custom_ops_library(str(library))
        data = ir.to_proto(model).SerializeToString()
        cuda = {"user_compute_stream": str(stream.cuda_stream), "use_tf32": "0"}

        def session(**extra: str) -> Any:
            return ort.InferenceSession(data, options, providers=[("CUDAExecutionProvider", cuda | extra)])

        self.capture, self.calls = capture, 0
        try:
            self.session = session(**({"enable_cuda_graph": "1"} if capture else {}))
        except Exception as exc:  # onnxruntime raises a class of its own per status code
            if not capture:
                raise
            self.capture, self.session = False, session()
            print(f"{model.graph.name} with {len(model.graph)} nodes is not captured: {exc}"[:400], flush=True)

    def bind(self, tensor: Callable[[Any], torch.Tensor]) -> Callable[[], None]:
        io, keep = self.session.io_binding(), []
        for values, bind in (
            (self.session.get_inputs(), io.bind_input),
            (self.session.get_outputs(), io.bind_output),
        ):
            for value in values:
                keep.append(tensor(value))
                bind(value.name, DEVICE, 0, ONNX[keep[-1].dtype], list(keep[-1].shape), keep[-1].data_ptr())
        self.calls += 1
        options = ort.RunOptions()
        if self.capture:
            options.add_run_config_entry("gpu_graph_id", str(self.calls))
        return lambda keep=keep: self.session.run_with_iobinding(io, options)  # type: ignore[misc]


def empty(value: Any) -> torch.Tensor:
    return torch.zeros(value.shape, dtype=TORCH[value.type[7:-1]], device=DEVICE)


class Ring:
    """``block_step`` over a ring of M + 1 positions, as ``runtime/layout.py`` has it."""

    def __init__(
        self, weights: Tensors, c: FamConfig, dtype: torch.dtype, capture: bool, library: Path | None = None
    ) -> None:
        self.c, self.stream, self.weights, self.library = c, torch.cuda.Stream(), weights, library
        self.plan = Plan(c, str(dtype).partition(".")[2], 1, fused=library is not None)
        self.positions = c.memory_segments + 1
        self.own: dict[Any, torch.Tensor] = {}
        steady = Graph(BlockStep(self.plan, steady=True).model(), self.stream, capture, library)
        start = Graph(BlockStep(self.plan, steady=False).model(), self.stream, capture, library)
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
        return self.own[f"fam_{layer:02d}", (self.turn + self.positions - 2) % self.positions]


class Append:
    """``append_step`` of one token behind the blocks of a ring, whose memory is full; the open block's slot moves
    between two places. The first token of a block is a start graph's. Verify before the ring goes on."""

    def __init__(self, ring: Ring, capture: bool) -> None:
        self.ring, self.own, self.count = ring, dict[Any, torch.Tensor](), 0
        self.calls = {}
        for steady in (False, True):
            step = AppendStep(ring.plan, 1, steady=steady).model("append_step")
            graph = Graph(step, ring.stream, capture, ring.library)
            for turn in range(2):
                self.calls[steady, turn] = graph.bind(lambda v, turn=turn: self.tensor(v, turn))
        torch.cuda.synchronize()

    def tensor(self, value: Any, turn: int) -> torch.Tensor:
        name, key = value.name, value.name
        kind, _, rest = name.partition("_")
        if rest.startswith(("open_key_", "open_value_")):
            key = rest, turn if kind == "past" else 1 - turn
        elif name in self.ring.weights or (kind == "past" and name not in ("past_count", "past_open_length")):
            found: torch.Tensor = self.ring.tensor(value, self.ring.turn)
            return found
        if key not in self.own:
            self.own[key] = empty(value)
        return self.own[key]

    def step(self, token: torch.Tensor | None = None) -> None:
        """Without a token the last one again, in the same place: for timing."""
        if token is not None:
            self.own["tokens"].copy_(token)
            self.own["chunk_length"].fill_(1)
            self.own["past_open_length"].fill_(self.count)
            self.own["past_count"].fill_(self.ring.count)
            torch.cuda.synchronize()
        self.calls[self.count > 0, self.count % 2]()
        self.count += 1
