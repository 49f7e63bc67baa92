"""The operators of the kernels in numpy, float64, and calls of them in many shapes: what the library is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

SILU, GELU_TANH, GELU, RELU = range(4)
INT = "i"  # kinds of inputs: int64, float32, the weights' type
FLOAT = "f"
WEIGHT = "T"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """One call. ``inputs``: a kind and an array, or None where an optional one is absent."""

    op: str
    inputs: Sequence[tuple[str, Array] | None]
    outputs: str
    expected: Sequence[Array | None]  # None: scratch
    attributes: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    def model(self, weight: int) -> bytes:
        """A graph of this node alone, for weights of an ONNX element type."""
        types = {INT: TensorProto.INT64, FLOAT: TensorProto.FLOAT, WEIGHT: weight}
        names = [f"in_{i}" if given else "" for i, given in enumerate(self.inputs)]
        while names and not names[-1]:
            names.pop()
        given = [
            helper.make_tensor_value_info(f"in_{i}", types[pair[0]], pair[1].shape)
            for i, pair in enumerate(self.inputs)
            if pair
        ]
        out = [f"out_{i}" for i in range(len(self.outputs))]
        found = [
            helper.make_tensor_value_info(name, types[kind], None) for name, kind in zip(out, self.outputs, strict=True)
        ]
        node = helper.make_node(self.op, names, out, domain="famexport", **self.attributes)
        graph = helper.make_graph([node], self.op, given, found)
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("famexport", 1)]
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=9)
        return model.SerializeToString()

    def feeds(self) -> dict[str, tuple[str, Array]]:
        return {f"in_{i}": pair for i, pair in enumerate(self.inputs) if pair}


def activated(act: int, x: Array) -> Array:
    from math import erf

    if act == SILU:
        return x / (1 + np.exp(-x))
    if act == GELU_TANH:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    if act == GELU:
        return 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2)))
    return np.maximum(x, 0)


def skip_norm(
    b: int,
    n: int,
    d: int,
    *,
    fam: int = 0,
    delta: bool = True,
    centered: bool = False,
    states: str = "base next",
    apart: bool = True,
    seed: int = 0,
) -> Case:
    """Where there is ``fam``: which ``states`` are given, and whether its sum is given apart."""
    r = np.random.default_rng(seed)
    base, weight = r.normal(size=(b, n, d)), r.normal(size=d)
    added, bias = (r.normal(size=(b, n, d)) if delta else None), (r.normal(size=d) if centered else None)
    fam_base, fam_next = (
        r.normal(size=(b, fam, d)) if fam and name in states.split() else None for name in ("base", "next")
    )
    total = base.copy()
    if fam_base is not None:
        total[:, :fam] = fam_base
    if added is not None:
        total = total + added
    rows = total.copy()
    if fam_next is not None:
        rows[:, :fam] = fam_next
    if centered:
        rows = rows - rows.mean(-1, keepdims=True)
    normed = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5) * weight
    inputs = [(FLOAT, base), (WEIGHT, weight), (WEIGHT, added), (FLOAT, fam_base), (FLOAT, fam_next), (WEIGHT, bias)]
    given = [None if pair[1] is None else pair for pair in inputs]
    attributes = {"fam": fam, "epsilon": 1e-5, "centered": int(centered)}
    label = f"{b}x{n}x{d} fam {fam} {states} {'delta ' * delta}{'centered' * centered}"
    outputs = [total, normed if bias is None else normed + bias, *([total[:, :fam]] if fam and apart else [])]
    return Case("SkipNorm", given, "fTf"[: len(outputs)], outputs, attributes, label)


def gated_act(b: int, n: int, inner: int, act: int, seed: int = 0) -> Case:
    x = np.random.default_rng(seed).normal(size=(b, n, 2 * inner))
    y = activated(act, x[..., :inner]) * x[..., inner:]
    return Case("GatedAct", [(WEIGHT, x)], "T", [y], {"act": act}, f"{b}x{n}x{inner} act {act}")


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    """x [b, n, heads, Dh] by tables [n, half]."""
    one, two = np.split(x, 2, -1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


@dataclass(frozen=True)
class Shape:
    b: int = 1
    t: int = 8
    fam: int = 4
    m: int = 3
    heads: int = 2
    kv: int = 2
    width: int = 16

    @property
    def rows(self) -> int:
        return self.fam + self.t

    @property
    def label(self) -> str:
        return f"b{self.b} T{self.t} F{self.fam} M{self.m} {self.heads}/{self.kv} heads of {self.width}"


class Drawn:
    """Projections, tables and slots for a shape."""

    def __init__(self, s: Shape, n: int, seed: int) -> None:
        r = np.random.default_rng(seed)
        self.s = s
        self.qkv = r.normal(size=(s.b, n, (s.heads + 2 * s.kv) * s.width))
        angles = [r.uniform(0, 6.28, (lines, s.width // 2)) for lines in (s.rows, s.t, (s.m + 1) * s.rows)]
        self.query, self.token, self.columns = ((np.cos(a), np.sin(a)) for a in angles)
        self.slots = [r.normal(size=(s.b, s.rows, s.kv * s.width)) for _ in range(2 * s.m + 2)]
        q, k, v = np.split(self.qkv, np.cumsum([s.heads * s.width, s.kv * s.width]), -1)
        self.q, self.k, self.v = q, k, v

    def split(self, x: Array, repeat: int = 1) -> Array:
        s = self.s
        return np.repeat(x.reshape(s.b, x.shape[1], -1, s.width), repeat, 2)

    def flat(self, x: Array) -> Array:
        return x.reshape(self.s.b, x.shape[1], -1)


def block_memory(s: Shape, apart: bool, seed: int = 0) -> Case:
    d, group = Drawn(s, s.rows, seed), s.heads // s.kv
    slots = d.slots[: 2 * s.m]
    keys = np.concatenate([*slots[: s.m], d.k], 1)
    values = np.concatenate([*slots[s.m :], d.v], 1)
    query = rotated(d.split(d.q), *d.query)
    keys, values = rotated(d.split(keys, group), *d.columns), d.split(values, group)
    inputs = [(WEIGHT, d.qkv), *((FLOAT, t) for t in (*d.query, *d.columns)), *((WEIGHT, x) for x in slots)]
    attributes = {"heads": s.heads, "kv_heads": s.kv, "fam": s.fam}
    if not apart:
        expected = [d.k, d.v, *(d.flat(x) for x in (query, keys, values))]
        return Case("BlockMemory", inputs, "TTTTT", expected, attributes, s.label)
    column = np.arange((s.m + 1) * s.rows)
    seen = (column % s.rows >= s.fam) | (column >= s.m * s.rows)
    own = column >= s.m * s.rows
    parts = [query[:, s.fam :], query[:, : s.fam], keys[:, seen], values[:, seen], keys[:, own], values[:, own]]
    return Case("BlockMemorySplit", inputs, "TTTTTTTT", [d.k, d.v, *(d.flat(x) for x in parts)], attributes, s.label)


def token_attention(s: Shape, opened: Sequence[int], length: Sequence[int], chunk: int, seed: int = 0) -> Case:
    d, group = Drawn(s, chunk, seed), s.heads // s.kv
    open_key, open_value = (x.copy() for x in d.slots[2 * s.m :])
    slots = d.slots[: 2 * s.m]
    start_key, start_value = open_key.copy(), open_value.copy()
    for b, (at, n) in enumerate(zip(opened, length, strict=True)):
        for i in range(min(n, chunk)):
            if at + i < s.t:
                open_key[b, s.fam + at + i], open_value[b, s.fam + at + i] = d.k[b, i], d.v[b, i]
    keys = rotated(d.split(np.concatenate([*slots[: s.m], open_key], 1), group), *d.columns)
    values = d.split(np.concatenate([*slots[s.m :], open_value], 1), group)
    out = np.zeros((s.b, chunk, s.heads, s.width))
    column = np.arange((s.m + 1) * s.rows)
    for b, i in product(range(s.b), range(chunk)):
        place = min(opened[b] + i, s.t - 1)
        row = column % s.rows
        seen = np.where(column < s.m * s.rows, row >= s.fam, row <= s.fam + place)
        cos, sin = (table[[place]] for table in d.token)
        query = rotated(d.split(d.q)[b : b + 1, i : i + 1], cos, sin)[0, 0]  # [H, Dh]
        for h in range(s.heads):
            score = keys[b, seen, h] @ query[h] / np.sqrt(s.width)
            weight = np.exp(score - score.max())
            out[b, i, h] = weight @ values[b, seen, h] / weight.sum()
    given = [np.array(x, np.int64) for x in (opened, length)]
    inputs = [
        (WEIGHT, d.qkv),
        *((INT, x) for x in given),
        *((FLOAT, t) for t in (*d.token, *d.columns)),
        *((WEIGHT, x) for x in (start_key, start_value, *slots)),
    ]
    attributes = {"heads": s.heads, "kv_heads": s.kv, "fam": s.fam}
    expected = [d.flat(out), open_key, open_value, None]
    label = f"{s.label} opened {list(opened)} length {list(length)}"
    return Case("TokenAttention", inputs, "TTTf", expected, attributes, label)


def thin(b: int, c: int, width: int, out: int, *, bias: bool = False, act: int | None = None, seed: int = 0) -> Case:
    r = np.random.default_rng(seed)
    x, weight = r.normal(size=(b, c, width)), r.normal(size=(out * (1 if act is None else 2), width)) / np.sqrt(width)
    y = x @ weight.T
    label = f"{b * c} rows, {out}x{width}"
    if act is not None:
        y = activated(act, y[..., :out]) * y[..., out:]
        return Case("ThinGated", [(WEIGHT, x), (WEIGHT, weight)], "T", [y], {"act": act}, label)
    added = (WEIGHT, r.normal(size=out)) if bias else None
    return Case(
        "ThinMatMul", [(WEIGHT, x), (WEIGHT, weight), added], "T", [y if added is None else y + added[1]], {}, label
    )


def norm_thin(
    b: int, c: int, width: int, out: int, *, delta: bool = True, bias: bool = False, act: int | None = None
) -> Case:
    norm, product = skip_norm(b, c, width, delta=delta), thin(b, c, width, out, bias=bias, act=act)
    total, x = norm.expected
    weight, added = product.inputs[1], product.inputs[2] if bias else None
    assert x is not None
    assert weight is not None
    y = x @ weight[1].T
    if act is not None:
        y = activated(act, y[..., :out]) * y[..., out:]
    if added is not None:
        y = y + added[1]
    inputs = [norm.inputs[0], norm.inputs[1], weight, norm.inputs[2], added]
    attributes = {"epsilon": 1e-5} if act is None else {"epsilon": 1e-5, "act": act}
    label = f"{product.label} {'delta ' * delta}{'bias' * bias}"
    return Case("Norm" + product.op, inputs[: 5 if act is None else 4], "fT", [total, y], attributes, label)


def cases() -> list[Case]:
    shapes = [
        Shape(),
        Shape(b=2, fam=0),
        Shape(m=0, heads=4, kv=2, width=32),
        Shape(b=2, heads=6, kv=2, width=64),
        Shape(t=64, fam=16, heads=2, kv=1, width=128),
        Shape(t=300, fam=20, m=4, width=96),
        Shape(t=5, fam=3, m=1, width=256),
    ]
    found = [
        skip_norm(1, 5, 64),
        skip_norm(2, 7, 100, fam=3, delta=False),
        skip_norm(2, 6, 96, fam=2, centered=True),
        skip_norm(1, 3, 1537, fam=1),
        skip_norm(2, 6, 64, fam=2, states="next"),  # before attention
        skip_norm(2, 6, 64, fam=2, states="base", apart=False),  # after attention
        skip_norm(2, 6, 64, fam=2, states=""),  # before the head
        skip_norm(1, 2, 4096),
        *(gated_act(2, 3, 72, act) for act in range(4)),
        *(block_memory(s, apart) for s in shapes for apart in (False, True) if s.fam or not apart),
        *(thin(1, rows, 80, 37, bias=rows % 2 == 0) for rows in range(1, 9)),
        *(thin(1, 1, width, 24) for width in (8, 256, 1024, 1032, 4104)),
        *(thin(2, 2, 72, 16, act=act) for act in range(4)),
        thin(1, 1, 2056, 40, act=SILU),
        thin(1, 1, 4104, 3000),
        norm_thin(1, 1, 64, 24, delta=False),
        norm_thin(2, 2, 1032, 40, bias=True),
        norm_thin(1, 8, 1400, 24, act=SILU),
        norm_thin(1, 1, 2056, 40, act=GELU),
    ]
    for s in shapes:
        for opened, length, chunk in ((0, 1, 1), (s.t - 1, 1, 1), (1, 2, 4), (s.t - 2, 2, 3)):
            both = [opened, max(opened - 1, 0)][: s.b], [length, 0][: s.b]
            found.append(token_attention(s, *both, chunk))
    return found
