"""A graph stamped from a trace of two layers is the graph that tracing all of them gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from famexport.checkpoint import open_checkpoint
from famexport.config import FamConfig
from famexport.export import pipeline
from famexport.export.pipeline import export_bundle
from famexport.export.source import checkpoint_source
from famexport.export.stamp import TRACED_LAYERS, stamp
from tests.export.helpers import ALL_BIASES, BASE, random_weights, save

GRAPHS = ("block_step", "append_step", "commit_block")
FAMILY = {"model_type": "fam", "norm": "layernorm", "gated_mlp": False, "activation": "gelu_tanh", **ALL_BIASES}
# name -> changes of BASE, layers, opset, options of the source
CASES: dict[str, tuple[dict[str, Any], int, int, dict[str, Any]]] = {
    "five layers": ({}, 5, 20, {}),
    "no FAM, tied, one kv head": (
        {
            "fam_length": 0,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "model_type": "qwen2",
            "qkv_bias": True,
        },
        3,
        20,
        {"batch": 3, "logits": "last"},
    ),
    "no memory": ({"memory_segments": 0, "num_key_value_heads": 4}, 3, 23, {}),
    "neither": ({"fam_length": 0, "memory_segments": 0}, 4, 20, {"logits": "last"}),
    "neither, opset 23": ({"fam_length": 0, "memory_segments": 0}, 3, 23, {"batch": "dynamic"}),
    "fam family": (FAMILY, 3, 20, {"inputs": "inputs_embeds", "logits": "last"}),
    "qwen3": ({"model_type": "qwen3", "qk_norm": True, "fam_query_position": "previous"}, 3, 23, {"batch": 3}),
    "bf16": ({"fam_state_dtype": "float16"}, 3, 20, {"precision": "bf16"}),
    "fp16": ({}, 3, 23, {"precision": "fp16"}),
    "dynamic": ({}, 3, 20, {"batch": "dynamic", "chunks": (3,)}),
}
Seen = tuple[Any, ...]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[FamConfig], Path]:
    def get(config: FamConfig) -> Path:
        return save(tmp_path_factory.mktemp("model") / "checkpoint", config, random_weights(config))

    return get


def both(path: Path, name: str, opset: int, options: dict[str, Any]) -> tuple[ir.Model, ir.Model]:
    """The graph ``name`` by tracing all layers, and by tracing two and stamping the rest."""
    given = {"precision": "fp32", "batch": 1, "chunks": (1,), **options}
    precision, batch = given.pop("precision"), given.pop("batch")
    whole = checkpoint_source(open_checkpoint(path), precision, batch, **given)
    assert whole.cut is not None
    traced = pipeline._graph(replace(whole, cut=None), name, opset, {})
    stamped = pipeline._graph(whole.cut(TRACED_LAYERS), name, opset, {})
    assert stamp(stamped, whole.contract.graph(name), whole.layers)  # and not traced because it could not
    return traced, stamped


def structure(graph: ir.Graph) -> dict[str, list[Seen]]:
    """All of a graph but the names of its values: each stands for the node and output that made it, or what it holds."""
    seen: dict[ir.Value, Seen] = {v: ("leaf", v.name) for v in (*graph.inputs, *graph.initializers.values())}

    def what(value: ir.Value | None) -> Seen:
        if value is None:
            return ("none",)
        if value.const_value is not None:  # equal constants may be one or several
            array = value.const_value.numpy()
            return "constant", str(array.dtype), array.shape, array.tobytes()
        return seen[value]

    def form(value: ir.Value) -> Seen:
        return str(value.type), str(value.shape)

    nodes: list[Seen] = []
    for node in graph:
        if node.op_type == "Constant":
            continue
        attributes = sorted((name, str(attr.type), str(attr.value)) for name, attr in node.attributes.items())
        outputs = [form(v) for v in node.outputs]
        if node.op_type == "Shape" and node.inputs[0] in graph.inputs:
            assert (node.attributes["start"].as_int(), node.attributes["end"].as_int()) == (0, 1)
            seen[node.outputs[0]] = ("batch",)  # read off whichever input: it is axis 0 of all
            continue
        nodes.append((node.op_identifier(), [what(v) for v in node.inputs], attributes, outputs))
        seen |= {v: ("node", len(nodes), i) for i, v in enumerate(node.outputs)}
    return {
        "inputs": [(v.name, *form(v)) for v in graph.inputs],
        "outputs": [(v.name, *form(v), what(v)) for v in graph.outputs],
        "weights": sorted((v.name, *form(v)) for v in graph.initializers.values() if v.const_value is None),
        "nodes": nodes,
    }


SLOW = ("five layers", "dynamic")


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_a_stamped_graph_is_the_traced_one(checkpoint: Callable[[FamConfig], Path], case: str, graph: str) -> None:
    changes, layers, opset, options = CASES[case]
    path = checkpoint(replace(BASE, num_hidden_layers=layers, **changes))
    traced, stamped = both(path, graph, opset, options)
    wanted, got = structure(traced.graph), structure(stamped.graph)
    for part in wanted:
        assert got[part] == wanted[part], part
    names = [v.name for node in stamped.graph for v in node.outputs] + [v.name for v in stamped.graph.inputs]
    assert all(names)
    assert len(set(names)) == len(names)
    assert len({node.name for node in stamped.graph}) == len(list(stamped.graph))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_models_of_few_layers_export_and_pass_parity(tmp_path: Path, layers: int) -> None:
    config = replace(BASE, num_hidden_layers=layers)
    path = save(tmp_path / "checkpoint", config, random_weights(config))
    bundles = [export_bundle(path, tmp_path / name, parity_blocks=24) for name in ("once", "again")]
    assert bundles[0].id == bundles[1].id  # names and order are the same each time
    assert max(bundles[0].manifest.parity["logits_error"]) < 5e-5
    names = {v.name for node in ir.load(bundles[0].path / "block_step.onnx").graph for v in node.outputs}
    assert any(f"layers.{layers - 1}." in str(name) for name in names) == (layers > TRACED_LAYERS)


# -- what is not two layers alike is not stamped


def swap_weights(graph: ir.Graph) -> None:
    """Layer 1 uses its up projection where layer 0 uses the gate's."""
    gate, up = (graph.initializers[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    places = [(list(gate.uses()), up), (list(up.uses()), gate)]
    for uses, other in places:
        for node, index in uses:
            node.replace_input_with(index, other)


def foreign_state(graph: ir.Graph) -> None:
    """Layer 1 reads layer 0's keys too."""
    first, second = (next(v for v in graph.inputs if v.name == f"past_key_0{i}") for i in (0, 1))
    for node, index in list(second.uses()):
        node.replace_input_with(index, first)


def other_attribute(graph: ir.Graph) -> None:
    node = [n for n in graph if n.op_type == "Softmax"][-1]
    node.attributes["axis"] = ir.AttrInt64("axis", 2)


def other_constant(graph: ir.Graph) -> None:
    node = [n for n in graph if n.op_type == "Slice"][-1]
    tensor = ir.tensor(np.array([3], np.int64))
    value = ir.Value(name="other", type=ir.TensorType(tensor.dtype), shape=ir.Shape((1,)), const_value=tensor)
    graph.initializers.add(value)
    node.replace_input_with(1, value)


def same_row(graph: ir.Graph) -> None:
    rows = [n for n in graph if n.op_type == "Gather" and n.inputs[0] is graph.initializers["fam_init"]]
    assert len(rows) == 2
    rows[1].replace_input_with(1, rows[0].inputs[1])


def layer_left_out(graph: ir.Graph) -> None:
    """Layer 1 adds its attention to what layer 0 was given, not to what it gave."""
    residuals = [n for n in graph if n.op_type == "Add" and any(o.name.startswith("add") for o in n.outputs)]
    residuals[-2].replace_input_with(0, residuals[-4].inputs[0])


def outputs_crossed(graph: ir.Graph) -> None:
    names = {v.name: v for v in graph.outputs}
    key, value = names["present_key_01"], names["present_value_01"]
    key.name, value.name = "swapped", "present_key_01"
    key.name = "present_value_01"


EDITS = (swap_weights, foreign_state, other_attribute, other_constant, same_row, layer_left_out, outputs_crossed)


@pytest.mark.parametrize("edit", EDITS)
def test_layers_that_are_not_alike_are_not_stamped(
    checkpoint: Callable[[FamConfig], Path], edit: Callable[[ir.Graph], None]
) -> None:
    whole = checkpoint_source(open_checkpoint(checkpoint(replace(BASE, num_hidden_layers=4))), "fp32", 1)
    assert whole.cut is not None
    io = whole.contract.graph("block_step")
    model = pipeline._graph(whole.cut(TRACED_LAYERS), "block_step", 20, {})
    assert stamp(model.clone(), io, 4)  # the control
    edit(model.graph)
    before = structure(model.graph)
    assert not stamp(model, io, 4)
    assert structure(model.graph) == before


def test_what_cannot_be_stamped_is_traced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(BASE, num_hidden_layers=3)
    path = save(tmp_path / "checkpoint", config, random_weights(config))
    monkeypatch.setattr(pipeline, "stamp", lambda *args: False)
    bundle = export_bundle(path, tmp_path / "bundle", parity_blocks=24)
    assert not any("layers.2." in str(node.outputs[0].name) for node in ir.load(bundle.path / "block_step.onnx").graph)
