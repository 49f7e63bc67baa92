"""Graph passes: functions ``model -> None`` that say what they require and ensure, and check what they ensure."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from famexport.contract import GRAPH_KEY, METADATA_KEY, StepContract
from famexport.errors import ContractError, FamExportError, raise_problems
from famexport.tensorfile import TensorEntry

MS = "com.microsoft"  # operators of ONNX Runtime's own
CONTROL_FLOW = ("If", "Loop", "Scan")
_FOLD_LIMIT = 2**16  # bytes of input that constant folding may read: masks and indices, never weights
_MERGE_LIMIT = 2**10  # elements
# Operators that only move data run on bfloat16 everywhere; they need no emulation.
_MOVES = {"Gather", "Concat", "Transpose", "Slice", "Reshape", "Split", "Identity", "Unsqueeze", "Squeeze", "Expand"}
_MOVES |= {"Shape"}  # with a dynamic batch; it reads no data at all


def fill_constants(model: ir.Model, values: Mapping[str, np.ndarray]) -> None:
    """Give the initialisers named in ``values`` their data, so that folding can use them."""
    for name, array in values.items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = ir.tensor(array, name=name)


def clean(model: ir.Model) -> None:
    """Fold constants, merge equal nodes, drop dead ones and every trace of the machine that traced.

    Requires: weights are initialisers without data (``const_value`` None), so that none is folded or copied.
    Ensures: no control flow, no stack traces or paths in the file, no initialiser that nothing reads.
    """
    from onnxscript import optimizer

    graph, outputs = model.graph, [value.name for value in model.graph.outputs]
    level = logging.getLogger("onnxscript").level
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        optimizer.fold_constants(model, onnx_shape_inference=False, input_size_limit=_FOLD_LIMIT)
    finally:
        logging.getLogger("onnxscript").setLevel(level)
    _merge_constants(graph)  # else what reads them would not be equal
    for one in (
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        one(model)
    for i, name in enumerate(outputs):
        if graph.outputs[i].name != name:  # equal outputs were merged, and one name was left to them
            merged, copy = graph.outputs[i], ir.node("Identity", [graph.outputs[i]], name=f"node_{name}")
            copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = name, merged.type, merged.shape
            graph.append(copy)
            graph.outputs[i] = copy.outputs[0]
    for value in (*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs)):
        value.metadata_props.clear()  # the pass above leaves those of values
        value.doc_string = None
    for name in [n for n, value in model.graph.initializers.items() if not value.uses()]:
        if not model.graph.initializers[name].is_graph_output():
            del model.graph.initializers[name]
    if found := sorted({node.op_type for node in model.graph.all_nodes()} & set(CONTROL_FLOW)):
        raise FamExportError(f"the step traced into control flow ({', '.join(found)}); express it with tensors only")


def _merge_constants(graph: ir.Graph) -> None:
    """Leave one of several small initialisers with the same content."""
    kept: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        data = value.const_value
        if data is None or data.size > _MERGE_LIMIT or value.is_graph_output():
            continue
        other = kept.setdefault((data.dtype, tuple(data.shape), data.tobytes()), value)
        if other is not value:
            value.replace_all_uses_with(other)
            del graph.initializers[name]


def bind_weights(model: ir.Model, entries: Mapping[str, TensorEntry], location: str) -> None:
    """Point each weight's initialiser at its bytes in the external file ``location``.

    Ensures: every initialiser has data, inside the graph or outside.
    """
    initializers = model.graph.initializers
    for name, entry in entries.items():
        if name in initializers:
            dtype = ir.DataType[{"float32": "FLOAT"}.get(entry.dtype, entry.dtype.upper())]
            initializers[name].shape = ir.Shape(entry.shape)  # a cut model takes rows of the whole one's F_0
            initializers[name].const_value = ir.ExternalTensor(
                location, entry.offset, entry.nbytes, dtype, shape=ir.Shape(entry.shape), name=name
            )
    empty = [name for name, value in initializers.items() if value.const_value is None]
    raise_problems(FamExportError, "exported graph", [f"initialiser {name} has no data" for name in empty])


def attach_contract(model: ir.Model, contract: StepContract, name: str, facts: Mapping[str, str]) -> None:
    """Write the contract and ``facts`` into the file's metadata, and name the graph.

    Ensures: the graph's inputs and outputs are exactly those that the contract has for ``name``, in order, dtype and
    shape.
    """
    graph, io, problems = model.graph, contract.graph(name), []
    for what, values, specs in (("inputs", graph.inputs, io.taken), ("outputs", graph.outputs, io.given)):
        if (got := [v.name for v in values]) != (expected := [s.name for s in specs]):
            problems.append(f"{what} are {got}, expected {expected}")
    if not problems:
        for value, spec in zip((*graph.inputs, *graph.outputs), io.taken + io.given, strict=True):
            shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape or ())
            dtype = str(value.dtype).lower()
            dtype = "float32" if dtype == "float" else dtype
            if shape != spec.shape or dtype != spec.dtype:
                problems.append(f"{value.name} is {dtype} {list(shape)}, expected {spec.dtype} {list(spec.shape)}")
    raise_problems(ContractError, "the step does not keep its contract", problems)
    describe(model, contract, name, facts)


def describe(model: ir.Model, contract: StepContract, name: str, facts: Mapping[str, str]) -> None:
    """Write into the file's metadata which graph of which contract it is, and ``facts``."""
    model.graph.name = name
    model.producer_name, model.producer_version = "famexport", None
    model.metadata_props.clear()
    model.metadata_props.update({METADATA_KEY: contract.to_json(), GRAPH_KEY: name, **facts})


def emulate_bfloat16(model: ir.Model) -> None:
    """Compute in float32 and round results to bfloat16, for runtimes without bfloat16 arithmetic (ORT on CPUs).

    Requires: values carry dtypes (shape inference has run).
    Ensures: no arithmetic on bfloat16; inputs, outputs and weights stay bfloat16, and roundings where kernels of
    devices have them: scores up to their softmax and a SiLU are not rounded on the way.
    """
    graph = model.graph
    bf16 = ir.DataType.BFLOAT16
    exact = {value for node in graph for value in _unrounded(node)}
    widened: dict[ir.Value, ir.Value] = {}

    def emulated(node: ir.Node) -> bool:
        if node.op_type == "Cast":
            return False
        weight = node.op_type == "Transpose" and node.inputs[0] in graph.initializers.values()
        # A weight is cast before it is transposed: the transpose then fuses into the product
        return node.op_type not in _MOVES or weight

    def cast(value: ir.Value, to: ir.DataType) -> ir.Node:
        node = ir.node("Cast", [value], attributes={"to": to.value})
        node.outputs[0].dtype, node.outputs[0].shape = to, value.shape
        return node

    for node in list(graph):
        if not emulated(node):
            continue
        for i, value in enumerate(node.inputs):
            if value is None or value.dtype != bf16:
                continue
            if value not in widened:
                widening = cast(value, ir.DataType.FLOAT)
                graph.insert_before(node, widening)
                widened[value] = widening.outputs[0]
            node.replace_input_with(i, widened[value])
        transposed_weight = node.op_type == "Transpose"
        for output in node.outputs:
            if output.dtype != bf16:
                continue
            output.type = ir.TensorType(ir.DataType.FLOAT)  # a new one: values may share the old
            if transposed_weight or output in exact:
                widened[output] = output
                continue
            narrowing = cast(output, bf16)
            narrow = narrowing.outputs[0]
            if output.is_graph_output():
                index = list(graph.outputs).index(output)
                narrow.name, output.name = output.name, f"{output.name}_wide"
                graph.outputs[index] = narrow
            for consumer, at in list(output.uses()):
                if consumer is not narrowing:
                    consumer.replace_input_with(at, narrow)
            graph.insert_after(node, narrowing)
    _rename_new_nodes(graph)
    for node in graph:
        if emulated(node) and any(v is not None and v.dtype == bf16 for v in (*node.inputs, *node.outputs)):
            raise FamExportError(f"bfloat16 emulation left {node.op_type} {node.name} in bfloat16")


def _unrounded(node: ir.Node) -> Iterator[ir.Value]:
    """What a kernel that ends in ``node`` keeps in float32: a softmax its scores, a SiLU its sigmoid."""
    if node.op_type == "Sigmoid" and not node.outputs[0].is_graph_output():
        consumers = [consumer for consumer, _ in node.outputs[0].uses()]
        if len(consumers) == 1 and consumers[0].op_type == "Mul" and node.inputs[0] in consumers[0].inputs:
            yield node.outputs[0]
    value = node.inputs[0] if node.op_type == "Softmax" else None
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        producer = value.producer()
        if producer is None or producer.op_type not in ("Add", "MatMul"):
            return
        yield value
        value = producer.inputs[0] if producer.op_type == "Add" else None


def constant(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    """The initialiser of that name, made of ``value`` where it is not there yet."""
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(value, name=name)))
    return graph.initializers[name]


def fuse_rotary(model: ir.Model) -> int:
    """Make one operator of each rotary embedding by a constant table: ONNX Runtime's ``RotaryEmbedding``.

    Requires: a value [b, heads, n, Dh] split in halves, turned as ``rotary.rotate`` does, its tables initialisers
    [n, Dh/2]. Tables that depend on the input stay as they are.
    Returns:
        how many were fused.
    """
    graph, fused = model.graph, 0
    for node in list(graph):
        found = _rotary(node)
        if found is None:
            continue
        x, table = found
        first = constant(graph, "rotary.first_row", np.zeros(1, np.int64))
        old, new = node.outputs[0], ir.node("RotaryEmbedding", [x, first, *table], domain=MS)
        graph.insert_before(node, new)
        rotated, name = new.outputs[0], old.name
        rotated.shape, rotated.type = old.shape, old.type
        old.replace_all_uses_with(rotated, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        rotated.name, new.name, fused = name, f"node_{name}", fused + 1
    if fused:
        common.RemoveUnusedNodesPass()(model)
        model.opset_imports[MS] = 1
    return fused


def _rotary(node: ir.Node) -> tuple[ir.Value, tuple[ir.Value, ir.Value]] | None:
    """What a Concat turns, and by which cos and sin: [a * cos - b * sin, b * cos + a * sin]."""
    ends = [value.producer() for value in node.inputs if value is not None] if node.op_type == "Concat" else []
    if [end and end.op_type for end in ends] != ["Sub", "Add"]:
        return None
    products = [value.producer() for end in ends if end for value in end.inputs if value is not None]
    if any(product is None or product.op_type != "Mul" for product in products):
        return None
    (a, cos), (b, sin), second, third = (product.inputs for product in products if product)
    split = a.producer() if a is not None else None
    if split is None or split.op_type != "Split" or list(split.outputs) != [a, b] or cos is None or sin is None:
        return None
    if tuple(second) != (b, cos) or tuple(third) != (a, sin) or not (cos.is_initializer() and sin.is_initializer()):
        return None
    x = split.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 4 or not {_axis(node), _axis(split)} <= {3, -1}:
        return None
    rows, width = x.shape[2], x.shape[3]
    half = width // 2 if isinstance(width, int) else None
    whole = all(table.shape is not None and tuple(table.shape) == (rows, half) for table in (cos, sin))
    return (x, (cos, sin)) if whole and len(split.inputs) == 1 else None


def _axis(node: ir.Node) -> int | None:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else None


def infer_types(model: ir.Model) -> None:
    """Give every value its dtype and shape, by ONNX shape inference on the graph without its weights' data."""
    common.ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model)
    untyped = [o.name for node in model.graph for o in node.outputs if o.dtype is None]
    raise_problems(FamExportError, "exported graph", [f"{name} has no dtype" for name in untyped[:5]])


def serialize(model: ir.Model) -> bytes:
    """The file's bytes: the same model gives the same bytes."""
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def _rename_new_nodes(graph: ir.Graph) -> None:
    names: dict[str, Any] = {v.name: v for node in graph for v in node.outputs if v.name}
    fresh = 0
    for node in graph:
        for output in node.outputs:
            if not output.name:
                while f"cast_{fresh}" in names:
                    fresh += 1
                output.name = f"cast_{fresh}"
                names[output.name] = output
        node.name = node.name or f"node_{node.outputs[0].name}"
