"""Integer products for CPUs: a graph pass, and the weights that its graphs read instead, one in memory at a time.

Only products with a weight change. State, norms, attention, residual stream and the embedding table stay float32; a
table that is also the head is there twice, whole for looking up and quantised for the product.

Every row of activations has a scale of its own, so what a row gives does not depend on other tokens, on padding, or on
other streams of a batch, and what is not finite stays in its row. ONNX's DynamicQuantizeLinear has one scale for all
rows, which may be asymmetric; it is used where there is only one row, so a token step rounds otherwise than a block.

| precision | weights | activations | product |
|---|---|---|---|
| int8 | int8, a scale for each output channel | uint8, a scale for each row | MatMulIntegerToFloat |
| int4 | 4 bits, scale and zero point for each 32 | int8, a scale for each 32 | MatMulNBits, accuracy level 4 |

Both operators are ONNX Runtime's own (domain com.microsoft). The head is int8 in both. Signed weights times unsigned
rows is what ONNX Runtime multiplies by VNNI and AMX: 3.7 times as fast as both unsigned. x86 without either adds these
products in 16 bits, which overflow; SmolLM2-135M lost 0.15 nats by that on 2,048 tokens of text. There, and only there,
ONNX Runtime is told to make the weights unsigned as it loads them (``session.x64quantprecision``, in
``runtime/ort.py``): the sums are then the same integers everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from famexport.checkpoint import EMBED_WEIGHT
from famexport.errors import FamExportError, NumericError
from famexport.export.passes import MS, constant, fuse_rotary
from famexport.export.source import Source
from famexport.tensorfile import TensorEntry

HEADS = ("lm_head.weight", EMBED_WEIGHT)  # int8 also where the rest is int4: with 4 bits the loss grew more
INT4_BLOCK = 32  # weights that share a scale
INT8_LIMIT, MIDDLE = 127, 128  # rows: 1 to 255 stand for -127 to 127
_TINY = 1e-30  # a row of zeros has this scale, not 0


@dataclass(frozen=True)
class _Part:
    """A tensor that stands for a weight, or for some of it: the ``index``-th of what ``make`` gives."""

    weight: str
    make: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    index: int
    entry: TensorEntry


def quantize(what: Source, models: Iterable[ir.Model], precision: str) -> Source:
    """Make every product with a weight an integer product, in all graphs, and of each rotary embedding one operator.

    Returns:
        the source with the quantised weights beside its own; each graph names those that it reads.
    Raises:
        NumericError: a weight that is not finite.
    """
    parts: dict[str, _Part] = {}
    for model in models:
        fuse_rotary(model)
        for part in quantize_products(model, what.weights, precision):
            parts[part.entry.name] = part

    def load(name: str) -> Any:
        if name not in parts:
            return what.load(name)
        part = parts[name]
        shape = what.weights[part.weight].shape
        weight = np.frombuffer(memoryview(what.load(part.weight)).cast("B"), np.float32).reshape(shape)
        if not np.isfinite(weight).all():
            raise NumericError(f"{part.weight} holds NaN or infinity; the checkpoint is damaged")
        return part.make(weight)[part.index]

    weights = {**what.weights, **{name: part.entry for name, part in parts.items()}}
    return replace(what, weights=weights, load=load, cost=_cost(what, parts))


def quantize_products(model: ir.Model, weights: Mapping[str, TensorEntry], precision: str) -> list[_Part]:
    """Replace each ``MatMul(x, Transpose(weight))`` by an integer product.

    Requires: weights are float32 [N, K], initialisers without data; opset 20, whose products are MatMul nodes.
    Ensures: no product reads a float weight; graph inputs and outputs are as they were; initialisers that only
    products read are gone.
    """
    graph, parts = model.graph, list[_Part]()
    rewrite = _Products(graph, precision)
    for node in list(graph):
        if name := _weight_of(node, graph, weights):
            parts += rewrite.replace(node, name, weights[name])
    for node in reversed(list(graph)):
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
    for name in [n for n, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
        del graph.initializers[name]
    model.opset_imports[MS] = 1
    for node in graph:
        if node.op_type in ("MatMul", "Gemm") and any(_origin(v, graph) in weights for v in node.inputs):
            raise FamExportError(f"the product {node.name} was not quantised; export with --precision fp32")
    return parts


def _weight_of(node: ir.Node, graph: ir.Graph, weights: Mapping[str, TensorEntry]) -> str | None:
    """The weight whose transpose a product reads, if that is what the node is."""
    if node.op_type != "MatMul":
        return None
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    if transpose is None or transpose.op_type != "Transpose":
        return None
    name = _origin(node.inputs[1], graph)
    return name if name is not None and name in weights and len(weights[name].shape) == 2 else None


def _origin(value: ir.Value | None, graph: ir.Graph) -> str | None:
    """The initialiser that a value is, or is the transpose of."""
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type == "Transpose":
        return _origin(node.inputs[0], graph)
    return value.name if value.name in graph.initializers else None


class _Products:
    """Puts integer products in place of float ones; rows that several products read are quantised once."""

    def __init__(self, graph: ir.Graph, precision: str) -> None:
        self._graph, self._precision = graph, precision
        self._rows: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value, bool]] = {}

    def replace(self, node: ir.Node, name: str, entry: TensorEntry) -> list[_Part]:
        n, k = entry.shape
        x, out = node.inputs[0], node.outputs[0]
        if x is None:
            raise FamExportError(f"the product {node.name} has no input")
        whole_bytes = self._precision == "int8" or name in HEADS
        if whole_bytes:
            entries = [
                TensorEntry(f"{name}.int8", "int8", (k, n)),
                TensorEntry(f"{name}.scale", "float32", (n,)),
            ]
            product = self._int8(node, x, name, [self._initializer(e) for e in entries])
        else:
            blocks = -(-k // INT4_BLOCK)
            entries = [
                TensorEntry(f"{name}.int4", "uint8", (n, blocks, INT4_BLOCK // 2)),
                TensorEntry(f"{name}.scale", "float32", (n, blocks)),
                TensorEntry(f"{name}.zero", "uint8", (n, -(-blocks // 2))),
            ]
            attributes = {"K": k, "N": n, "bits": 4, "block_size": INT4_BLOCK, "accuracy_level": 4}
            inputs = [x, *(self._initializer(e) for e in entries)]
            product = self._add(node, out, "MatMulNBits", inputs, domain=MS, attributes=attributes)
        product.shape, product.type = out.shape, out.type
        replaced = out.name
        out.replace_all_uses_with(product, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        product.name = replaced
        return [_Part(name, _int8 if whole_bytes else _int4, i, e) for i, e in enumerate(entries)]

    def _int8(self, node: ir.Node, x: ir.Value, name: str, weight: list[ir.Value]) -> ir.Value:
        rows, scale, zero, single = self._quantized_rows(node, x)
        one = scale if single else self._constant("one", np.float32(1))
        # Where onnxruntime converts weights (see above), 1.25 to 1.30 abort at one without a zero point, and all refuse
        # a graph in which two share it
        weight_zero = self._constant(f"{name}.zero", np.int8(0))
        inputs = [rows, weight[0], one, weight[1], zero, weight_zero]
        product = self._add(node, node.outputs[0], "MatMulIntegerToFloat", inputs, domain=MS)
        return product if single else self._add(node, node.outputs[0], "Mul", [product, scale])

    def _quantized_rows(self, before: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, bool]:
        """Rows as uint8 around 128 or their own zero, their scales, the zero, and whether it is a single row."""
        if x in self._rows:
            return self._rows[x]
        shape = tuple(x.shape or ())
        single = bool(shape) and all(dim == 1 for dim in shape[:-1])
        if single:
            node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
            self._graph.insert_before(before, node)
            for output, part in zip(node.outputs, ("rows", "scale", "zero"), strict=True):
                output.name = f"{x.name}.{part}"
            node.name = f"node_{x.name}.rows"
            rows, scale, zero = node.outputs
            found = rows, scale, zero, True
        else:
            size = self._add(before, x, "Abs", [x])
            axes = self._constant("last_axis", np.array([-1], np.int64))
            largest = self._add(before, x, "ReduceMax", [size, axes], attributes={"keepdims": 1})
            step = self._add(before, x, "Mul", [largest, self._constant("step", np.float32(1 / INT8_LIMIT))])
            scale = self._add(before, x, "Max", [step, self._constant("tiny", np.float32(_TINY))])
            zero, one = self._constant("middle", np.uint8(MIDDLE)), self._constant("one", np.float32(1))
            ratio = self._add(before, x, "Div", [x, scale])
            found = self._add(before, x, "QuantizeLinear", [ratio, one, zero]), scale, zero, False
        self._rows[x] = found
        return found

    def _add(self, before: ir.Node, of: ir.Value, op: str, inputs: list[ir.Value], **options: Any) -> ir.Value:
        """What a new node gives, named after the value that it is part of."""
        node = ir.node(op, inputs, **options)
        self._graph.insert_before(before, node)
        node.outputs[0].name = f"{of.name}.{op}"
        node.name = f"node_{node.outputs[0].name}"
        return node.outputs[0]

    def _constant(self, name: str, value: Any) -> ir.Value:
        return constant(self._graph, f"quantize.{name}", value)

    def _initializer(self, entry: TensorEntry) -> ir.Value:
        if entry.name not in self._graph.initializers:
            dtype = ir.DataType[{"float32": "FLOAT"}.get(entry.dtype, entry.dtype.upper())]
            value = ir.Value(name=entry.name, shape=ir.Shape(entry.shape), type=ir.TensorType(dtype))
            self._graph.initializers[entry.name] = value
        return self._graph.initializers[entry.name]


def _int8(weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """[N, K] -> int8 [K, N], and scales float32 [N]."""
    scale = np.maximum(np.abs(weight).max(1) / INT8_LIMIT, _TINY).astype(np.float32)
    rounded = np.empty(weight.shape[::-1], np.int8)
    for start in range(0, len(scale), 1024):  # a head's temporaries would be several times its own size
        rows = slice(start, start + 1024)
        rounded[:, rows] = np.rint(weight[rows] / scale[rows, None]).T
    return rounded, scale


def _int4(weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """[N, K] -> packed uint8 [N, blocks, 16], scales float32 [N, blocks], packed zero points, as MatMulNBits has it."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=INT4_BLOCK, is_symmetric=False, accuracy_level=4)
    packed, scale, zero = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight.T))
    return packed, scale, zero


def _cost(what: Source, parts: Mapping[str, _Part]) -> dict[str, int]:
    """With the bytes that a step reads after quantising."""
    cost = dict(what.cost)
    if "weight_bytes_read" in cost:
        replaced = sum(what.weights[name].nbytes for name in {part.weight for part in parts.values()})
        cost["weight_bytes_read"] += sum(part.entry.nbytes for part in parts.values()) - replaced
    return cost
