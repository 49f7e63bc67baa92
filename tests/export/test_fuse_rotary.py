"""One operator for each rotary embedding: it gives the same, where the pattern is the right one, and is left else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from famexport.bundle import open_bundle
from famexport.export.passes import MS, fuse_rotary, serialize

HEADS, ROWS, HALF = 3, 5, 4
Bundles = Callable[[str], Path]


def run(model: ir.Model, fed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    found: list[np.ndarray] = ort.InferenceSession(serialize(model), options, ["CPUExecutionProvider"]).run(None, fed)
    return found


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def rotation(wrong: str = "") -> ir.Model:
    """x [2, heads, n, Dh] turned as ``rotary.rotate`` does, or nearly."""
    rng = np.random.default_rng(0)
    shape = (2, HEADS, ROWS, 2 * HALF)
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    size = (1, HALF) if wrong == "row" else (ROWS, HALF)
    tables = [
        ir.Value(name=name, shape=ir.Shape(size), type=ir.TensorType(ir.DataType.FLOAT)) for name in ("cos", "sin")
    ]
    for table in tables:
        if wrong != "input":
            table.const_value = ir.tensor(rng.standard_normal(size).astype(np.float32), name=table.name)
    cos, sin = tables
    nodes: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(kind, inputs, attributes=attributes))
        nodes[-1].outputs[0].name = f"v{len(nodes)}"
        return nodes[-1].outputs[0]

    split_axis = 2 if wrong == "split" else 3
    nodes.append(ir.node("Split", [x], attributes={"axis": split_axis, "num_outputs": 2}, num_outputs=2))
    a, b = nodes[0].outputs
    a.name, b.name = "a", "b"
    if wrong == "halves":
        a, b = b, a
    left = op("Sub" if wrong != "sum" else "Add", op("Mul", a, cos), op("Mul", b, sin))
    right = op("Add", op("Mul", b, cos), op("Mul", a, sin if wrong != "table" else cos))
    y = op("Concat", left, right, axis=2 if wrong == "concat" else -1)
    y.shape, y.type, y.name = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT), "y"
    inputs, constants = ([x, cos, sin], []) if wrong == "input" else ([x], tables)
    graph = ir.Graph(inputs, [y], nodes=nodes, initializers=constants, opset_imports={"": 20}, name="rotation")
    return ir.Model(graph, ir_version=10)


def test_it_gives_the_same() -> None:
    model = rotation()
    fed = {"x": np.random.default_rng(1).standard_normal((2, HEADS, ROWS, 2 * HALF)).astype(np.float32)}
    (wanted,) = run(model, fed)
    assert fuse_rotary(model) == 1
    assert kinds(model) == ["RotaryEmbedding"]
    assert model.opset_imports[MS] == 1
    (got,) = run(model, fed)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    assert fuse_rotary(model) == 0


@pytest.mark.parametrize("wrong", ["halves", "sum", "table", "input", "split", "concat", "row"])
def test_what_only_looks_like_one_is_left(wrong: str) -> None:
    model = rotation(wrong)
    before = serialize(model)
    assert fuse_rotary(model) == 0
    assert serialize(model) == before


@pytest.mark.parametrize("name", ["all", "all_rows"])
def test_of_traced_graphs(bundles: Bundles, name: str) -> None:
    """Queries and columns of every layer; but the queries of tokens of an open block turn by where they stand."""
    bundle = open_bundle(bundles(name))
    for graph, files in bundle.manifest.graphs.items():
        model = ir.load(bundle.path / files.file)
        ir.external_data.load_to_model(model)
        rng, fed = np.random.default_rng(2), dict[str, np.ndarray]()
        for spec in bundle.contract.graph(graph).taken:
            ones, shape = spec.dtype == "int64", spec.sized(3)
            fed[spec.name] = np.ones(shape, np.int64) if ones else rng.standard_normal(shape).astype(np.float32)
        wanted = run(model, fed)
        count = 2 * (1 if graph.startswith("append") else 2)  # layers, and in each
        assert fuse_rotary(model) == count
        assert kinds(model).count("RotaryEmbedding") == count
        for got, right in zip(run(model, fed), wanted, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4)
