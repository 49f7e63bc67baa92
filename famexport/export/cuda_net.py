"""What the graphs for ONNX Runtime's CUDA provider have in common: their inputs, tables, masks, products and norms.

Weights are inputs. Where ONNX Runtime has a fused operator, it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from famexport.config import FamConfig
from famexport.export.cuda_fused import DOMAIN, Fused, takes_norms
from famexport.export.net import Net
from famexport.export.passes import MS
from famexport.rotary import rotary_tables

OPSET = 20
HIDDEN = -60000.0  # added to the score of what a row does not see; fits every dtype
_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Plan:
    """What a set of CUDA graphs has in common. ``fused``: steady ones use famexport's own kernels where these can."""

    config: FamConfig
    dtype: str
    batch: int
    logits: str = "all"
    embeds: bool = False
    fused: bool = False

    @property
    def rows(self) -> int:
        return self.config.fam_length + self.config.block_size

    @property
    def columns(self) -> int:
        """What a row may see: M slots and the open block."""
        return (self.config.memory_segments + 1) * self.rows


class Step:
    """What all graphs share. ``steady``: for rows whose memory is full; else the graph looks at ``past_count``."""

    def __init__(self, plan: Plan, *, steady: bool) -> None:
        self.plan, self.steady, self.net = plan, steady, Net()
        self.c, self.type = plan.config, _TYPES[plan.dtype]
        self.kernels = Fused(self.net, plan.config, self.type)
        self.fused = plan.fused and steady and takes_norms(plan.config)
        self.thin_rows = 0  # of a call, where the operators for few rows take them
        self.outputs: list[ir.Value] = []
        self.count: ir.Value | None = None
        self.started: ir.Value | None = None

    def graph(self, name: str) -> ir.Model:
        own = {DOMAIN: 1} if self.fused else {}
        graph = ir.Graph(
            self.net.inputs,
            self.outputs,
            nodes=self.net.nodes,
            initializers=self.net.initializers,
            opset_imports={"": OPSET, MS: 1, **own},
            name=name,
        )
        return ir.Model(graph, ir_version=9, producer_name="famexport")

    def _fed(self, positions: int) -> ir.Value:
        b = self.plan.batch
        if self.plan.embeds:
            return self.net.input("inputs_embeds", ir.DataType.FLOAT, (b, positions, self.c.hidden_size))
        return self.net.input("tokens", ir.DataType.INT64, (b, positions))

    def _embedded(self, fed: ir.Value) -> ir.Value:
        """Rows [b, n, D], float32. Keeps the table, which may be the head as well."""
        c = self.c
        self.embed: ir.Value | None = None
        if c.tie_word_embeddings or not self.plan.embeds:
            self.embed = self.net.input("model.embed_tokens.weight", self.type, (c.vocab_size, c.hidden_size))
        return fed if self.plan.embeds else self._float(self.net.op("Gather", self.embed, fed))

    def _see_start(self) -> None:
        """Where the memory may not be full: how many blocks each row has seen, and F_0."""
        c, net = self.c, self.net
        if self.steady:
            return
        self.count = net.input("past_count", ir.DataType.INT64, (self.plan.batch,))
        self.started = net.op("Reshape", net.op("Greater", self.count, net.ints(0)), net.ints(self.plan.batch, 1, 1))
        if c.fam_length:
            shape = c.num_hidden_layers, c.fam_length, c.hidden_size
            self.fam_init = net.input("fam_init", ir.DataType.FLOAT, shape)

    def _fam(self, i: int) -> tuple[ir.Value, ir.Value]:
        """F_{tau-1} of a layer and its residual, float32 [b, F, D]."""
        net = self.net
        past = net.input(f"past_fam_{i:02d}", ir.DataType.FLOAT, self._fam_shape)
        if self.started is None:
            return past, past
        first = net.op("Gather", self.fam_init, net.ints(i), axis=0)  # [1, F, D]
        nothing = net.constant(np.zeros((), np.float32))
        return net.op("Where", self.started, past, first), net.op("Where", self.started, past, nothing)

    @property
    def _fam_shape(self) -> tuple[int, int, int]:
        return self.plan.batch, self.c.fam_length, self.c.hidden_size

    def _tables(self, *wanted: str) -> dict[str, list[ir.Value]]:
        """Cos and sin by the names of ``Rope``; ``slots`` is for the keys [slots; FAM; tokens] of a ring.

        Args:
            wanted: those that fused operators take, in float32; else all, in the weights' dtype.
        """
        c = self.c
        tables = {name: [t.numpy() for t in pair] for name, pair in rotary_tables(c).items()}
        gap = np.zeros((c.fam_length, c.head_dim // 2), np.float32)
        memory = [half[c.fam_length : -c.block_size] for half in tables.pop("column")]
        blocks = [np.split(half, c.memory_segments) if c.memory_segments else [] for half in memory]
        tables["slots"] = [
            np.concatenate([*(part for block in past for part in (gap, block)), own])
            for past, own in zip(blocks, tables["key"], strict=True)
        ]
        if wanted:
            return {name: [self.net.constant(half) for half in tables[name]] for name in wanted}
        return {name: [self.net.constant(half, self.type) for half in pair] for name, pair in tables.items()}

    def _rotate(self, x: ir.Value, table: Sequence[ir.Value], positions: ir.Value | None = None) -> ir.Value:
        """x [b, n, heads*Dh] by rows of a table: the first n, or those of ``positions`` [b, n]."""
        at = self.net.ints(0) if positions is None else positions
        return self.net.op("RotaryEmbedding", x, at, *table, domain=MS)

    def _bias(self, rank: ir.Value) -> ir.Value:
        """What is added to the scores, [b or 1, 1, n, columns]. ONNX Runtime folds it where nothing is counted: in the
        file it would have megabytes.

        Each column is seen by the ranks from a lowest to a highest.

        Args:
            rank: int64 [b or 1, 1, n, 1]: of a token row its place in the block, of a FAM row T.
        """
        c, net, r = self.c, self.net, self.plan.rows
        f, t, m = c.fam_length, c.block_size, c.memory_segments
        past = np.concatenate([np.full(f, 1), np.zeros(t)]), np.concatenate([np.zeros(f), np.full(t, t - 1)])
        own = np.concatenate([np.zeros(f), np.arange(t)]), np.full(r, t)
        lowest, highest = (
            net.constant(np.concatenate([*[slot] * m, block]).astype(np.int64)[None, None, None])
            for slot, block in zip(past, own, strict=True)
        )
        seen = net.op("And", net.op("GreaterOrEqual", rank, lowest), net.op("LessOrEqual", rank, highest))
        if self.count is not None and m:  # of M slots the newest `count` are filled
            needed = np.concatenate([np.repeat(np.arange(m, 0, -1), r), np.zeros(r, np.int64)])
            count = net.op("Reshape", self.count, net.ints(self.plan.batch, 1, 1, 1))
            full = net.op("GreaterOrEqual", count, net.constant(needed.astype(np.int64)[None, None, None]))
            seen = net.op("And", seen, full)
        zero, hidden = (net.constant(np.array(value, np.float32)) for value in (0.0, HIDDEN))
        return self._cast(net.op("Where", seen, zero, hidden), self.type)

    def _linear(self, x: ir.Value, name: str, width: int, out: int, bias: bool) -> ir.Value:
        return self._product(x, *self._weights(name, width, out, bias))

    def _weights(self, name: str, width: int, out: int, bias: bool) -> tuple[ir.Value, ir.Value | None]:
        weight = self.net.input(f"{name}.weight", self.type, (out, width))
        return weight, self.net.input(f"{name}.bias", self.type, (out,)) if bias else None

    def _is_thin(self, weight: ir.Value) -> bool:
        return self.thin_rows > 0 and self.kernels.takes_thin(weight)

    def _product(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """x [b, n, in] times weight [out, in]: weights stay as checkpoints have them."""
        if self._is_thin(weight):
            return self.kernels.thin_matmul(x, weight, bias)
        y = self.net.op("FusedMatMul", x, weight, domain=MS, transB=1)
        return y if bias is None else self.net.op("Add", y, bias)

    def _norm(self, x: ir.Value, name: str, width: int) -> ir.Value:
        """Computed in float32, given in the weights' dtype."""
        c, net = self.c, self.net
        scale, bias = self._norm_weights(name, width)
        if bias is None:
            direct = self.type != ir.DataType.BFLOAT16  # there is a kernel from float32 to float16, none to bfloat16
            scale = scale if direct else self._float(scale)
            y = net.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=c.norm_eps, stash_type=1)
            return y if direct else self._cast(y, self.type)
        wide = net.op("LayerNormalization", x, self._float(scale), self._float(bias), axis=-1, epsilon=c.norm_eps)
        return self._cast(wide, self.type)

    def _norm_weights(self, name: str, width: int) -> tuple[ir.Value, ir.Value | None]:
        kinds = ("weight", "bias") if self.c.norm == "layernorm" else ("weight",)
        scale, *bias = (self.net.input(f"{name}.{kind}", self.type, (width,)) for kind in kinds)
        return scale, bias[0] if bias else None

    def _head_norm(self, x: ir.Value, name: str) -> ir.Value:
        """Over each head of x [b, n, heads*Dh]."""
        shape = self.net.op("Shape", x)
        heads = self.net.op("Reshape", x, self.net.ints(0, 0, -1, self.c.head_dim))
        return self.net.op("Reshape", self._norm(self._float(heads), name, self.c.head_dim), shape)

    def _slice(self, x: ir.Value, start: int, end: int) -> ir.Value:
        return self.net.op("Slice", x, self.net.ints(start), self.net.ints(end), self.net.ints(1))

    def _over(self, fam: ir.Value, rows: ir.Value) -> ir.Value:
        """Rows [b, F+T, D] with ``fam`` [b, F, D] in place of their first F, in every layer. A Concat of unequal parts
        takes longer: it copies their sizes to the device."""
        places = np.arange(self.plan.rows)
        spread = self.net.op("Gather", fam, self.net.constant(np.minimum(places, self.c.fam_length - 1)), axis=1)
        return self.net.op("Where", self.net.constant(places[None, :, None] < self.c.fam_length), spread, rows)

    def _join(self, *rows: ir.Value) -> ir.Value:
        return self.net.op("Concat", *rows, axis=1)

    def _zeros(self, *shape: int) -> ir.Value:
        return self.net.constant(np.zeros(shape, np.float32))

    def _float(self, x: ir.Value) -> ir.Value:
        return x if self.type == ir.DataType.FLOAT else self._cast(x, ir.DataType.FLOAT)

    def _cast(self, x: ir.Value, to: ir.DataType) -> ir.Value:
        return x if to == self.type == ir.DataType.FLOAT else self.net.op("Cast", x, to=to.value)
