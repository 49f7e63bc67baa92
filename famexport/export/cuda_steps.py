"""The step graphs for ONNX Runtime's CUDA provider.

Same maths as ``model.py``, another form, because on a GPU a step is bound by its number of kernels and copies:

- Weights are graph inputs, so that all graphs use one copy on the device. Query, key and value weights are one input:
  they lie one after the other in memory.
- Memory is M slots of one block each, and a call gives the new block's slot alone: the loop turns the ring.
- One attention call for FAM and tokens, with a bias that says what each row sees of the columns [slots; FAM; tokens].
  A slot keeps the FAM keys of its block, which nothing sees: they cost less than taking them out.
- The open block has a slot too, and FAM's keys and values are computed once for it, by the graph that begins it.
- *Steady* graphs are for rows whose memory is full (and, in ``append_step``, whose slot has FAM's keys and values): no
  mask that depends on the count, F_0 nowhere. ``*_start`` graphs are right for every row.
- *Fused* graphs are steady ones with operators of famexport's own kernel library (``cuda_fused.py``) where these can
  take the model; gate and up weights are one input, too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from famexport.config import FamConfig
from famexport.contract import CHUNK_LENGTH, OPEN_LENGTH, PRECISION_DTYPE, StepContract
from famexport.export.cuda_fused import THIN_ROWS, takes_norms
from famexport.export.cuda_layer import LayerStep, Residual
from famexport.export.cuda_net import Plan
from famexport.runtime.device_weights import parts

_CAUSAL_BLOCK = 256  # tokens of a block from which attention without a mask is the faster
_KINDS = "key", "value"


class BlockStep(LayerStep):
    def model(self) -> ir.Model:
        c, net, f, t, r = self.c, self.net, self.c.fam_length, self.c.block_size, self.plan.rows
        fed = self._fed(t)
        self._see_start()
        self.packed = self.fused and self.kernels.packs
        self.causal = self.packed and t >= _CAUSAL_BLOCK
        self.tables = self._tables(*(("query", "slots") if self.packed else ()))
        if not self.causal:
            self.bias = self._bias(net.constant(np.concatenate([np.full(f, t), np.arange(t)])[None, None, :, None]))
        embedded = self._embedded(fed)
        if f:
            embedded = self._join(self._zeros(*self._fam_shape), embedded)
        x = Residual(embedded)
        for i in range(c.num_hidden_layers):
            x = self._layer(i, x)
        n = 1 if self.plan.logits == "last" else t
        left = self._head(x, n, lambda x: x if n == r else self._slice(x, r - n, r), apart=f > 0)
        self._give_fam(c.num_hidden_layers - 1, left)
        return self.graph("block_step")

    def _layer(self, i: int, x: Residual) -> Residual:
        fam = self._fam(i) if self.c.fam_length else None
        left, x, z = self._skip_norm(x, f"model.layers.{i}.input_layernorm", fam, apart=fam is not None and i > 0)
        self._give_fam(i - 1, left)
        qkv = self._qkv(i, z)
        if self.packed:
            return self._finish(i, x, self._packed(i, qkv))
        q, *own = self._heads(i, qkv)
        self._give(i, own)
        keys, values = self._memory(i, own)
        q, keys = self._rotate(q, self.tables["query"]), self._rotate(keys, self.tables["slots"])
        return self._finish(i, x, self._attend(q, keys, values, self.plan.columns, self.bias))

    def _packed(self, i: int, qkv: ir.Value) -> ir.Value:
        """The heads, where one operator does all that comes before attention."""
        split = self.causal and self.c.fam_length > 0
        slots = [slot for past in self._slots(i) for slot in past]
        key, value, q, *seen = self.kernels.block_memory(
            qkv, self.tables["query"], self.tables["slots"], slots, split=split
        )
        self._give(i, [key, value])
        if split:
            fam_q, keys, values, *fam_seen = seen
            tokens = self._attention(q, keys, values, unidirectional=1)
            return self._join(self._attention(fam_q, *fam_seen), tokens)
        keys, values = seen
        if self.causal:
            return self._attention(q, keys, values, unidirectional=1)
        return self._attention(q, keys, values, self.bias)

    def _give(self, i: int, own: Sequence[ir.Value]) -> None:
        if self.c.memory_segments:
            for kind, value in zip(_KINDS, own, strict=True):
                self.outputs.append(self.net.output(value, f"present_{kind}_{i:02d}", self.type, self._slot_shape))


class AppendStep(LayerStep):
    """``append_step`` for ``chunk`` positions. The start graph also puts FAM's keys and values into the slot."""

    def __init__(self, plan: Plan, chunk: int, *, steady: bool) -> None:
        super().__init__(plan, steady=steady)
        self.chunk = chunk
        if self.fused and plan.batch * chunk <= THIN_ROWS:
            self.thin_rows = plan.batch * chunk
        self.packed = self.thin_rows > 0 and self.kernels.packs_tokens

    def model(self, name: str) -> ir.Model:
        c, net, b, n = self.c, self.net, self.plan.batch, self.chunk
        fed = self._fed(n)
        length, opened = (net.input(name, ir.DataType.INT64, (b,)) for name in (CHUNK_LENGTH, OPEN_LENGTH))
        self._see_start()
        if self.packed:
            self.tables, self.lengths = self._tables("token", "slots"), (opened, length)
        else:
            self.tables = self._tables()
            place = net.op("Add", net.op("Reshape", opened, net.ints(b, 1)), net.constant(np.arange(n)[None]))  # [b, n]
            self.positions = net.op("Min", place, net.ints(c.block_size - 1))  # only padding reaches the limit
            self.bias = self._bias(net.op("Reshape", self.positions, net.ints(b, 1, n, 1)))
            self._place(opened, length)
        x = Residual(self._embedded(fed))
        for i in range(c.num_hidden_layers):
            x = self._layer(i, x)
        if self.plan.logits == "last":
            self._head(x, 1, lambda x: self._last(x, length))
        else:
            self._head(x, n, lambda x: x)
        return self.graph(name)

    def _last(self, x: ir.Value, length: ir.Value) -> ir.Value:
        """Of x [b, c, D] the row of each chunk's last token, [b, 1, D]."""
        net = self.net
        if self.fused and self.chunk == 1:
            return x
        last = net.op("Max", net.op("Sub", length, net.ints(1)), net.ints(0))
        return net.op("GatherND", x, net.op("Reshape", last, net.ints(self.plan.batch, 1, 1)), batch_dims=1)

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

    def _layer(self, i: int, x: Residual) -> Residual:
        c, f, name = self.c, self.c.fam_length, f"model.layers.{i}.input_layernorm"
        begins = f > 0 and not self.steady
        if begins:
            z = self._norm(self._join(self._fam(i)[0], x.base), name, c.hidden_size)
            qkv = self._qkv(i, z)
        else:
            x, qkv = self._normed_linear(x, name, *self._qkv_proj(i))
        if self.packed:
            return self._finish(i, x, self._packed(i, qkv))
        q, *new = self._heads(i, qkv)
        own = [self._give(i, kind, self._open(i, kind, rows, begins)) for kind, rows in zip(_KINDS, new, strict=True)]
        keys, values = self._memory(i, own)
        q = self._rotate(self._slice(q, f, f + self.chunk) if begins else q, self.tables["token"], self.positions)
        keys = self._rotate(keys, self.tables["slots"])
        return self._finish(i, x, self._attend(q, keys, values, self.plan.columns, self.bias))

    def _packed(self, i: int, qkv: ir.Value) -> ir.Value:
        """The heads, where one operator does all that comes before attention, and attention."""
        slots = [slot for past in self._slots(i) for slot in past]
        opened = [self._open_slot(i, kind) for kind in _KINDS]
        tables = self.tables["token"], self.tables["slots"]
        heads, *own = self.kernels.token_attention(qkv, *self.lengths, *tables, opened, slots)
        for kind, slot in zip(_KINDS, own, strict=True):
            self._give(i, kind, slot)
        return heads

    def _open(self, i: int, kind: str, new: ir.Value, begins: bool) -> ir.Value:
        """The open block's slot with the chunk's keys or values."""
        f, r, slot = self.c.fam_length, self.plan.rows, self._open_slot(i, kind)
        if begins:
            slot = self._join(self._slice(new, 0, f), self._slice(slot, f, r))
            new = self._slice(new, f, f + self.chunk)
        return self._write(slot, new)

    def _give(self, i: int, kind: str, slot: ir.Value) -> ir.Value:
        self.outputs.append(self.net.output(slot, f"present_open_{kind}_{i:02d}", self.type, self._slot_shape))
        return slot


class CommitBlock(LayerStep):
    """``commit_block`` as if every row's open block were full; the loop takes over those that are."""

    def model(self) -> ir.Model:
        c, net, f = self.c, self.net, self.c.fam_length
        if f:
            self._see_start()
        self.tables = self._tables()
        for i in range(c.num_hidden_layers):
            opened = {kind: self._open_slot(i, kind) for kind in _KINDS}
            if f:
                self._give_fam(i, self._layer(i, opened))
            if c.memory_segments:
                for kind, slot in opened.items():
                    copied = net.op("Identity", slot)
                    self.outputs.append(net.output(copied, f"present_{kind}_{i:02d}", self.type, self._slot_shape))
        return self.graph("commit_block")

    def _layer(self, i: int, opened: dict[str, ir.Value]) -> ir.Value:
        """F_tau [b, F, D]."""
        f, r = self.c.fam_length, self.plan.rows
        name = f"model.layers.{i}.input_layernorm"
        if self.fused:
            _, x, z = self._skip_norm(Residual(self._fam(i)[0]), name)
        else:
            fam, residual = self._fam(i)
            x, z = Residual(residual), self._norm(fam, name, self.c.hidden_size)
        q, *kv = self._heads(i, self._qkv(i, z))
        keys, values = (self._join(new, self._slice(slot, f, r)) for new, slot in zip(kv, opened.values(), strict=True))
        q, keys = self._rotate(q, self.tables["fam_query"]), self._rotate(keys, self.tables["key"])
        x = self._finish(i, x, self._attend(q, keys, values, r, None))
        return x.base if x.delta is None else self._sum(x.base, x.delta)


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
    forms = [("ort-cuda", plan, True), ("ort-cuda-start", plan, False)]
    if takes_norms(config):
        forms.append(("ort-cuda-fused", replace(plan, fused=True), True))
    found: dict[str, dict[str, ir.Model]] = {}
    for name in contract.graph_names:
        found[name] = {}
        for key, form, steady in forms:
            if chunk := contract.graph(name).chunk:
                found[name][key] = AppendStep(form, chunk, steady=steady).model(name)
            else:
                found[name][key] = (BlockStep if name == "block_step" else CommitBlock)(form, steady=steady).model()
    models = [model for variants in found.values() for model in variants.values()]
    taken = {part for model in models for value in model.graph.inputs for part in parts(str(value.name))}
    lacking = {name for name in taken if "." in name and not name.startswith("past_")} - set(weights)
    return {} if lacking else found
