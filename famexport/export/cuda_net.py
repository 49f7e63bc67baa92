"""What the graphs for ONNX Runtime's CUDA provider are made of: its fused operators, and weights that are inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from famexport.config import FamConfig
from famexport.rotary import rotary_tables

OPSET = 20
HIDDEN = -60000.0  # added to the score of what a row does not see; fits every dtype
_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_MS = "com.microsoft"


@dataclass(frozen=True)
class Plan:
    """What a set of CUDA graphs has in common."""

    config: FamConfig
    dtype: str
    batch: int
    logits: str = "all"
    embeds: bool = False

    @property
    def rows(self) -> int:
        return self.config.fam_length + self.config.block_size

    @property
    def columns(self) -> int:
        """What a row may see: M slots and the open block."""
        return (self.config.memory_segments + 1) * self.rows


class Net:
    """A graph under construction. Values are named by the operator and a running number, so files are reproducible."""

    def __init__(self) -> None:
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        self.inputs.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)))
        return self.inputs[-1]

    def constant(self, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        tensor = ir.tensor(array) if dtype is None else ir.tensor(array.astype(dtype.numpy()), dtype)
        key = str(tensor.dtype), tuple(array.shape), tensor.tobytes()
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._constants[key] = value
            self.initializers.append(value)
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        return self.ops(kind, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> Sequence[ir.Value]:
        node = ir.node(kind, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        node.name = f"{kind}_{len(self.nodes)}"
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}_{i}" if outputs > 1 else node.name
        self.nodes.append(node)
        return node.outputs

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        return value


class Step:
    """What all graphs share. ``steady``: for rows whose memory is full; else the graph looks at ``past_count``."""

    def __init__(self, plan: Plan, *, steady: bool) -> None:
        self.plan, self.steady, self.net = plan, steady, Net()
        self.c, self.type = plan.config, _TYPES[plan.dtype]
        self.outputs: list[ir.Value] = []
        self.count: ir.Value | None = None
        self.started: ir.Value | None = None

    def graph(self, name: str) -> ir.Model:
        graph = ir.Graph(
            self.net.inputs,
            self.outputs,
            nodes=self.net.nodes,
            initializers=self.net.initializers,
            opset_imports={"": OPSET, _MS: 1},
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
        """F_{tau-1} of a layer and its residual, float32; in their first F of [b, F+T, D] rows."""
        net, b, r, d = self.net, self.plan.batch, self.plan.rows, self.c.hidden_size
        past = net.input(f"past_fam_{i:02d}", ir.DataType.FLOAT, (b, r, d))
        if self.started is None:
            return past, past
        first = net.op("Gather", self.fam_init, net.ints(i), axis=0)  # [1, F, D]
        first = net.op("Concat", first, self._zeros(1, self.c.block_size, d), axis=1)
        nothing = net.constant(np.zeros((), np.float32))
        return net.op("Where", self.started, past, first), net.op("Where", self.started, past, nothing)

    def _tables(self) -> dict[str, list[ir.Value]]:
        """Cos and sin by the names of ``Rope``; ``columns`` is for the keys [slots; FAM; tokens]."""
        c = self.c
        tables = {name: [t.numpy() for t in pair] for name, pair in rotary_tables(c).items()}
        gap = np.zeros((c.fam_length, c.head_dim // 2), np.float32)
        slots = [
            [part for block in np.split(half, c.memory_segments) for part in (gap, block)] if c.memory_segments else []
            for half in tables["memory"]
        ]
        tables["columns"] = [np.concatenate([*past, own]) for past, own in zip(slots, tables["key"], strict=True)]
        return {name: [self.net.constant(half, self.type) for half in pair] for name, pair in tables.items()}

    def _rotate(self, x: ir.Value, table: Sequence[ir.Value], positions: ir.Value | None = None) -> ir.Value:
        """x [b, n, heads*Dh] by rows of a table: the first n, or those of ``positions`` [b, n]."""
        at = self.net.ints(0) if positions is None else positions
        return self.net.op("RotaryEmbedding", x, at, *table, domain=_MS)

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

    def _qkv(self, i: int, z: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """[b, n, D] -> q [b, n, H*Dh], k and v [b, n, Hkv*Dh], not rotated."""
        c, net, name = self.c, self.net, f"model.layers.{i}.self_attn"
        q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        qkv = self._linear(z, f"{name}.qkv_proj", c.hidden_size, q_width + 2 * kv_width, c.qkv_bias)
        q, k, v = net.ops("Split", qkv, net.ints(q_width, kv_width, kv_width), outputs=3, axis=2)
        if c.qk_norm:
            q, k = self._head_norm(q, f"{name}.q_norm"), self._head_norm(k, f"{name}.k_norm")
        return q, k, v

    def _memory(self, i: int, own: dict[str, ir.Value]) -> list[ir.Value]:
        """Keys and values [b, columns, Hkv*Dh] of the slots, followed by those of the open block."""
        net, m = self.net, self.c.memory_segments
        if not m:
            return list(own.values())
        past = {
            kind: [net.input(f"past_{kind}_{i:02d}.{j}", self.type, self._slot_shape) for j in range(m)] for kind in own
        }
        return [net.op("Concat", *past[kind], value, axis=1) for kind, value in own.items()]

    @property
    def _slot_shape(self) -> tuple[int, int, int]:
        return self.plan.batch, self.plan.rows, self.c.num_key_value_heads * self.c.head_dim

    def _attend(self, q: ir.Value, keys: ir.Value, values: ir.Value, columns: int, bias: ir.Value | None) -> ir.Value:
        inputs: list[ir.Value | None] = [q, self._repeat(keys, columns), self._repeat(values, columns)]
        inputs += [] if bias is None else [None, None, bias]
        return self.net.op("MultiHeadAttention", *inputs, domain=_MS, num_heads=self.c.num_attention_heads)

    def _finish(self, i: int, residual: ir.Value, heads: ir.Value) -> ir.Value:
        """What follows attention: output projection, feed-forward, residuals."""
        c, net, name = self.c, self.net, f"model.layers.{i}"
        width = c.num_attention_heads * c.head_dim
        attended = self._linear(heads, f"{name}.self_attn.o_proj", width, c.hidden_size, c.out_bias)
        residual = net.op("Add", residual, self._float(attended))
        normed = self._norm(residual, f"{name}.post_attention_layernorm", c.hidden_size)
        return net.op("Add", residual, self._float(self._feed_forward(normed, f"{name}.mlp")))

    def _head(self, x: ir.Value, rows: int) -> None:
        """Logits of the rows x [b, n, D], the first output."""
        c, net = self.c, self.net
        x, weight = self._norm(x, "model.norm", c.hidden_size), self.embed
        if not c.tie_word_embeddings:
            weight = net.input("lm_head.weight", self.type, (c.vocab_size, c.hidden_size))
        logits = self._float(self._product(x, weight, None))
        self.outputs.insert(0, net.output(logits, "logits", ir.DataType.FLOAT, (self.plan.batch, rows, c.vocab_size)))

    def _repeat(self, x: ir.Value, columns: int) -> ir.Value:
        """Key/value heads once for each query head of their group."""
        c, net, b = self.c, self.net, self.plan.batch
        groups = c.num_attention_heads // c.num_key_value_heads
        if groups == 1:
            return x
        x = net.op("Reshape", x, net.ints(b, columns, c.num_key_value_heads, 1, c.head_dim))
        x = net.op("Expand", x, net.ints(b, columns, c.num_key_value_heads, groups, c.head_dim))
        return net.op("Reshape", x, net.ints(b, columns, c.num_attention_heads * c.head_dim))

    def _feed_forward(self, z: ir.Value, name: str) -> ir.Value:
        c, net, d, inner = self.c, self.net, self.c.hidden_size, self.c.intermediate_size
        up = self._linear(z, f"{name}.up_proj", d, inner, c.mlp_bias)
        if c.gated_mlp:
            up = net.op("Mul", self._act(self._linear(z, f"{name}.gate_proj", d, inner, c.mlp_bias)), up)
        else:
            up = self._act(up)
        return self._linear(up, f"{name}.down_proj", inner, d, c.mlp_bias)

    def _act(self, x: ir.Value) -> ir.Value:
        kind = self.c.activation
        if kind == "silu":
            return self.net.op("QuickGelu", x, domain=_MS, alpha=1.0)
        if kind == "gelu_tanh":
            return self.net.op("FastGelu", x, domain=_MS)
        return self.net.op("Gelu", x, domain=_MS) if kind == "gelu" else self.net.op("Relu", x)

    def _linear(self, x: ir.Value, name: str, width: int, out: int, bias: bool) -> ir.Value:
        weight = self.net.input(f"{name}.weight", self.type, (out, width))
        return self._product(x, weight, self.net.input(f"{name}.bias", self.type, (out,)) if bias else None)

    def _product(self, x: ir.Value, weight: ir.Value | None, bias: ir.Value | None) -> ir.Value:
        """x [b, n, in] times weight [out, in]: weights stay as checkpoints have them."""
        y = self.net.op("FusedMatMul", x, weight, domain=_MS, transB=1)
        return y if bias is None else self.net.op("Add", y, bias)

    def _norm(self, x: ir.Value, name: str, width: int) -> ir.Value:
        """Computed in float32, given in the weights' dtype."""
        c, net = self.c, self.net
        scale = net.input(f"{name}.weight", self.type, (width,))
        if c.norm == "rmsnorm":
            direct = self.type != ir.DataType.BFLOAT16  # there is a kernel from float32 to float16, none to bfloat16
            scale = scale if direct else self._float(scale)
            y = net.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=c.norm_eps, stash_type=1)
            return y if direct else self._cast(y, self.type)
        bias = net.input(f"{name}.bias", self.type, (width,))
        wide = net.op("LayerNormalization", x, self._float(scale), self._float(bias), axis=-1, epsilon=c.norm_eps)
        return self._cast(wide, self.type)

    def _head_norm(self, x: ir.Value, name: str) -> ir.Value:
        """Over each head of x [b, n, heads*Dh]."""
        shape = self.net.op("Shape", x)
        heads = self.net.op("Reshape", x, self.net.ints(0, 0, -1, self.c.head_dim))
        return self.net.op("Reshape", self._norm(self._float(heads), name, self.c.head_dim), shape)

    def _slice(self, x: ir.Value, start: int, end: int) -> ir.Value:
        return self.net.op("Slice", x, self.net.ints(start), self.net.ints(end), self.net.ints(1))

    def _zeros(self, *shape: int) -> ir.Value:
        return self.net.constant(np.zeros(shape, np.float32))

    def _float(self, x: ir.Value) -> ir.Value:
        return x if self.type == ir.DataType.FLOAT else self._cast(x, ir.DataType.FLOAT)

    def _cast(self, x: ir.Value, to: ir.DataType) -> ir.Value:
        return x if to == self.type == ir.DataType.FLOAT else self.net.op("Cast", x, to=to.value)
