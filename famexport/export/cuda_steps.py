"""The step graphs for ONNX Runtime's CUDA provider.

Same maths as ``model.py``, another form, because on a GPU a step is bound by its number of kernels and copies:

- Weights are graph inputs, so that all graphs use one copy on the device. Query, key and value weights are one input:
  they lie one after the other in memory.
- A layer's whole rows [FAM; tokens] are its FAM state; the next block reads the first F of them. Nothing is sliced.
- Memory is M slots of one block each, and a call gives the new block's slot alone: the loop turns the ring.
- One attention call for FAM and tokens, with a bias that says what each row sees of the columns [slots; FAM; tokens].
  A slot keeps the FAM keys of its block, which nothing sees: they cost less than taking them out.
- The open block has a slot too, and FAM's keys and values are computed once for it, by the graph that begins it.
- *Steady* graphs are for rows whose memory is full (and, in ``append_step``, whose slot has FAM's keys and values): no
  mask that depends on the count, F_0 nowhere. ``*_start`` graphs are right for every row.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from famexport.config import FamConfig
from famexport.contract import CHUNK_LENGTH, OPEN_LENGTH, PRECISION_DTYPE, StepContract
from famexport.export.cuda_net import Plan, Step
from famexport.runtime.device_weights import parts


class BlockStep(Step):
    def model(self) -> ir.Model:
        c, net, f, t, r = self.c, self.net, self.c.fam_length, self.c.block_size, self.plan.rows
        fed = self._fed(t)
        self._see_start()
        self.tables = self._tables()
        self.bias = self._bias(net.constant(np.concatenate([np.full(f, t), np.arange(t)])[None, None, :, None]))
        self.is_fam = net.constant(np.arange(r)[None, :, None] < f) if f else None
        x = self._embedded(fed)
        if f:
            x = net.op("Concat", self._zeros(self.plan.batch, f, c.hidden_size), x, axis=1)
        for i in range(c.num_hidden_layers):
            x = self._layer(i, x)
            if f:
                shape = self.plan.batch, r, c.hidden_size
                self.outputs.append(net.output(x, f"present_fam_{i:02d}", ir.DataType.FLOAT, shape))
        n = 1 if self.plan.logits == "last" else t
        self._head(x if n == r else self._slice(x, r - n, r), n)
        return self.graph("block_step")

    def _layer(self, i: int, x: ir.Value) -> ir.Value:
        net, rows, residual = self.net, x, x
        if self.is_fam is not None:
            fam, fam_residual = self._fam(i)
            rows = residual = net.op("Where", self.is_fam, fam, x)
            if fam_residual is not fam:
                residual = net.op("Where", self.is_fam, fam_residual, x)
        q, k, v = self._qkv(i, self._norm(rows, f"model.layers.{i}.input_layernorm", self.c.hidden_size))
        own = {"key": k, "value": v}
        if self.c.memory_segments:
            for kind, value in own.items():
                self.outputs.append(net.output(value, f"present_{kind}_{i:02d}", self.type, self._slot_shape))
        keys, values = self._memory(i, own)
        q, keys = self._rotate(q, self.tables["query"]), self._rotate(keys, self.tables["columns"])
        return self._finish(i, residual, self._attend(q, keys, values, self.plan.columns, self.bias))


class AppendStep(Step):
    """``append_step`` for ``chunk`` positions. The start graph also puts FAM's keys and values into the slot."""

    def __init__(self, plan: Plan, chunk: int, *, steady: bool) -> None:
        super().__init__(plan, steady=steady)
        self.chunk = chunk

    def model(self, name: str) -> ir.Model:
        c, net, b, n = self.c, self.net, self.plan.batch, self.chunk
        fed = self._fed(n)
        length, opened = (net.input(name, ir.DataType.INT64, (b,)) for name in (CHUNK_LENGTH, OPEN_LENGTH))
        self._see_start()
        self.tables = self._tables()
        place = net.op("Add", net.op("Reshape", opened, net.ints(b, 1)), net.constant(np.arange(n)[None]))  # [b, n]
        self.positions = net.op("Min", place, net.ints(c.block_size - 1))  # only padding reaches the limit
        self.bias = self._bias(net.op("Reshape", self.positions, net.ints(b, 1, n, 1)))
        self._place(opened, length)
        x = self._embedded(fed)
        for i in range(c.num_hidden_layers):
            x = self._layer(i, x)
        if self.plan.logits == "last":
            last = net.op("Max", net.op("Sub", length, net.ints(1)), net.ints(0))
            x = net.op("GatherND", x, net.op("Reshape", last, net.ints(b, 1, 1)), batch_dims=1)
        self._head(x, 1 if self.plan.logits == "last" else n)
        return self.graph(name)

    def _place(self, opened: ir.Value, length: ir.Value) -> None:
        """Which rows of the slot are the chunk's [b, F+T, 1], and which of the chunk's each is [b, F+T, 1]."""
        net, b, r = self.net, self.plan.batch, self.plan.rows
        rows = net.constant(np.arange(r)[None] - self.c.fam_length)
        opened, length = (net.op("Reshape", value, net.ints(b, 1)) for value in (opened, length))
        at = net.op("Sub", rows, opened)
        hit = net.op("And", net.op("GreaterOrEqual", at, net.ints(0)), net.op("Less", at, length))
        self.hit = net.op("Reshape", hit, net.ints(b, r, 1))
        inside = net.op("Min", net.op("Max", at, net.ints(0)), net.ints(self.chunk - 1))
        self.source = net.op("Reshape", inside, net.ints(b, r, 1))

    def _write(self, slot: ir.Value, new: ir.Value) -> ir.Value:
        """The slot [b, F+T, W] with the rows of ``new`` [b, c, W] in their places."""
        if self.chunk > 1:
            new = self.net.op("GatherND", new, self.source, batch_dims=1)
        if self.type != ir.DataType.BFLOAT16:
            return self.net.op("Where", self.hit, new, slot)
        # ONNX Runtime has no bfloat16 Where on CUDA; times one or zero is exact
        hit = self._cast(self.hit, self.type)
        kept = self.net.op("Mul", slot, self._cast(self.net.op("Not", self.hit), self.type))
        return self.net.op("Add", kept, self.net.op("Mul", new, hit))

    def _layer(self, i: int, x: ir.Value) -> ir.Value:
        net, f, r, rows = self.net, self.c.fam_length, self.plan.rows, x
        begins = f > 0 and not self.steady
        if begins:
            rows = net.op("Concat", self._slice(self._fam(i)[0], 0, f), x, axis=1)
        q, *kv = self._qkv(i, self._norm(rows, f"model.layers.{i}.input_layernorm", self.c.hidden_size))
        own = {}
        for kind, new in zip(("key", "value"), kv, strict=True):
            slot = net.input(f"past_open_{kind}_{i:02d}", self.type, self._slot_shape)
            if begins:
                slot = net.op("Concat", self._slice(new, 0, f), self._slice(slot, f, r), axis=1)
                new = self._slice(new, f, f + self.chunk)
            own[kind] = self._write(slot, new)
            self.outputs.append(net.output(own[kind], f"present_open_{kind}_{i:02d}", self.type, self._slot_shape))
        keys, values = self._memory(i, own)
        q = self._rotate(self._slice(q, f, f + self.chunk) if begins else q, self.tables["token"], self.positions)
        keys = self._rotate(keys, self.tables["columns"])
        return self._finish(i, x, self._attend(q, keys, values, self.plan.columns, self.bias))


class CommitBlock(Step):
    """``commit_block`` as if every row's open block were full; the loop takes over those that are."""

    def model(self) -> ir.Model:
        c, net, b, f, r, t = self.c, self.net, self.plan.batch, self.c.fam_length, self.plan.rows, self.c.block_size
        if f:
            self._see_start()
        self.tables = self._tables()
        for i in range(c.num_hidden_layers):
            opened = {
                kind: net.input(f"past_open_{kind}_{i:02d}", self.type, self._slot_shape) for kind in ("key", "value")
            }
            if f:
                rows = net.op("Concat", self._layer(i, opened), self._zeros(b, t, c.hidden_size), axis=1)
                shape = b, r, c.hidden_size
                self.outputs.append(net.output(rows, f"present_fam_{i:02d}", ir.DataType.FLOAT, shape))
            if c.memory_segments:
                for kind, slot in opened.items():
                    copied = net.op("Identity", slot)
                    self.outputs.append(net.output(copied, f"present_{kind}_{i:02d}", self.type, self._slot_shape))
        return self.graph("commit_block")

    def _layer(self, i: int, opened: dict[str, ir.Value]) -> ir.Value:
        """F_tau [b, F, D]."""
        net, f, r = self.net, self.c.fam_length, self.plan.rows
        fam, residual = (self._slice(value, 0, f) for value in self._fam(i))
        q, *kv = self._qkv(i, self._norm(fam, f"model.layers.{i}.input_layernorm", self.c.hidden_size))
        keys, values = (
            net.op("Concat", new, self._slice(slot, f, r), axis=1)
            for new, slot in zip(kv, opened.values(), strict=True)
        )
        q, keys = self._rotate(q, self.tables["fam_query"]), self._rotate(keys, self.tables["key"])
        return self._finish(i, residual, self._attend(q, keys, values, r, None))


def cuda_graphs(
    config: FamConfig, contract: StepContract, precision: str, weights: Collection[str]
) -> dict[str, dict[str, ir.Model]]:
    """The CUDA variants of each graph by the key that they have in a manifest; none where they cannot be had.

    They have no form for: a batch that is not fixed, a FAM state that is not float32, an open block without any past,
    weights that are not in the weight file as they are.

    Args:
        weights: the names in the weight file.
    """
    stateless = contract.chunks and not config.fam_length and not config.memory_segments
    if not isinstance(contract.batch, int) or config.fam_state_dtype != "float32" or stateless:
        return {}
    fed = contract.inputs[0].name
    plan = Plan(config, PRECISION_DTYPE[precision], contract.batch, contract.logits, fed == "inputs_embeds")
    found: dict[str, dict[str, ir.Model]] = {}
    for name in contract.graph_names:
        found[name] = {}
        for key, steady in (("ort-cuda", True), ("ort-cuda-start", False)):
            if chunk := contract.graph(name).chunk:
                found[name][key] = AppendStep(plan, chunk, steady=steady).model(name)
            else:
                found[name][key] = (BlockStep if name == "block_step" else CommitBlock)(plan, steady=steady).model()
    models = [model for variants in found.values() for model in variants.values()]
    taken = {part for model in models for value in model.graph.inputs for part in parts(str(value.name))}
    lacking = {name for name in taken if "." in name and not name.startswith("past_")} - set(weights)
    return {} if lacking else found
