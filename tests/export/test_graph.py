"""What the exported files hold, and what they must not hold."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, external_data_helper, numpy_helper
from safetensors import safe_open
from safetensors.torch import load_file

import famexport
from famexport.contract import GRAPH_KEY, METADATA_KEY, PRECISION_DTYPE, StepContract, TensorSpec, contract_for
from famexport.export import passes, pipeline
from famexport.export.pipeline import export_bundle
from famexport.export.source import FAM_INIT, INLINE_BYTES
from famexport.export.trace import trace_step
from famexport.tensorfile import read_header
from tests.export.helpers import BASE, CASES, Export, random_weights, reference_model, save, zero_state

DTYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
DTYPES |= {TensorProto.INT64: "int64"}
NATIVE = {"Attention", "RMSNormalization"}  # operators of opset 23
Exported = Callable[[str], Export]
every_case = pytest.mark.parametrize("name", CASES)


def models(export: Export) -> list[onnx.ModelProto]:
    """The graphs, weights left outside."""
    return [onnx.load(path, load_external_data=False) for path in export.graphs]


def external(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    """Of each initialiser outside the file, where it is."""
    tensors = [t for t in model.graph.initializer if external_data_helper.uses_external_data(t)]
    return {t.name: {entry.key: entry.value for entry in t.external_data} for t in tensors}


@every_case
def test_operators_opset_and_ir_version(exported: Exported, name: str) -> None:
    export = exported(name)
    assert [path.name for path in export.graphs] == (
        ["block_step.onnx", "block_step.ort-cpu.onnx"] if export.precision == "bf16" else ["block_step.onnx"]
    )
    for path, model in zip(export.graphs, models(export), strict=True):
        onnx.checker.check_model(path, full_check=True)
        used = {node.op_type for node in model.graph.node}
        assert {node.domain for node in model.graph.node} == {""}
        assert [(o.domain, o.version) for o in model.opset_import] == [("", export.opset)]
        assert not model.functions
        assert not {"If", "Loop", "Scan"} & used
        assert not any(a.HasField("g") or a.graphs for node in model.graph.node for a in node.attribute)
        if export.opset == 20:
            assert model.ir_version == 9
            assert not (NATIVE | {"RotaryEmbedding", "Swish"}) & used
            since = {op: onnx.defs.get_schema(op, 20).since_version for op in used}
            assert max(since.values()) <= 20
            assert {"MatMul", "Softmax"} <= used
        else:
            assert model.ir_version == 11
            assert not NATIVE - used
            assert "Softmax" not in used
        assert (export.bundle.manifest.opset, export.bundle.manifest.ir_version) == (export.opset, model.ir_version)


def specs(values: list[onnx.ValueInfoProto]) -> list[TensorSpec]:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_param if d.HasField("dim_param") else d.dim_value for d in tensor.shape.dim)
        found.append(TensorSpec(value.name, DTYPES[tensor.elem_type], shape))
    return found


@every_case
def test_inputs_and_outputs_are_the_contracts_in_its_order(exported: Exported, name: str) -> None:
    export = exported(name)
    options = {key: value for key, value in export.case.options.items() if key in ("batch", "inputs", "logits")}
    contract = contract_for(export.config, export.precision, **options)
    assert export.bundle.contract == contract
    for model in models(export):
        assert specs(model.graph.input) == [*contract.inputs, *contract.states]
        new = [TensorSpec(s.name.replace("past_", "present_"), s.dtype, s.shape) for s in contract.states]
        assert specs(model.graph.output) == [*contract.outputs, *new]
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert set(metadata) == {METADATA_KEY, GRAPH_KEY, "famexport.precision"}
        assert metadata[GRAPH_KEY] == model.graph.name == "block_step"
        assert metadata["famexport.precision"] == export.precision
        assert StepContract.from_dict(json.loads(metadata[METADATA_KEY])) == contract
    manifest = json.loads((export.bundle.path / "manifest.json").read_text())
    assert manifest["contract"] == contract.to_dict()


@every_case
def test_states_have_the_dtypes_of_the_precision_and_fam_is_float32(exported: Exported, name: str) -> None:
    export = exported(name)
    kinds: dict[str, set[str]] = {}
    for value in specs(models(export)[0].graph.input):
        kinds.setdefault(value.name.rstrip("0123456789"), set()).add(value.dtype)
    wanted = {"past_count": {"int64"}}
    wanted |= {"past_fam_": {"float32"}} if export.config.fam_length else {}
    if export.config.memory_segments:
        wanted |= {kind: {PRECISION_DTYPE[export.precision]} for kind in ("past_key_", "past_value_")}
    assert {key: value for key, value in kinds.items() if key.startswith("past_")} == wanted


@every_case
def test_weights_lie_in_one_safetensors_file_under_hugging_face_names(exported: Exported, name: str) -> None:
    export = exported(name)
    file = export.bundle.path / "weights.safetensors"
    stored, header = load_file(file), read_header(file)
    dtype = getattr(torch, PRECISION_DTYPE[export.precision])
    unused = {"model.fam_embeddings.weight"}  # F_0 is computed from them once, and they are not needed again
    if export.bundle.contract.inputs[0].name == "inputs_embeds":
        unused.add("model.embed_tokens.weight")
    wanted = {n: weight.to(dtype) for n, weight in export.weights.items() if n not in unused}
    if export.config.fam_length:
        wanted[FAM_INIT] = reference_model(export.config, export.weights).initial_fam()
    assert stored.keys() == wanted.keys()
    for n, weight in wanted.items():
        assert stored[n].dtype == weight.dtype, n
        assert torch.equal(stored[n], weight), n
    for model in models(export):
        entries = external(model)
        assert {e["location"] for e in entries.values()} == {"weights.safetensors"}
        assert {n: (int(e["offset"]), int(e["length"])) for n, e in entries.items()} == {
            n: (e.offset, e.nbytes) for n, e in header.items()
        }
        inside = [t for t in model.graph.initializer if t.name not in entries]
        inside += [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
        assert sum(len(numpy_helper.to_array(t).tobytes()) for t in inside) < 16 * INLINE_BYTES


def test_f0_is_a_constant_and_prompt_embeddings_are_gone(exported: Exported) -> None:
    export = exported("base")
    with safe_open(export.bundle.path / "weights.safetensors", "np") as file:
        names = set(file.keys())
    assert "model.fam_embeddings.weight" not in names
    for path in export.graphs:
        assert b"fam_embeddings" not in path.read_bytes()
    # It is the constant that counts: where it is zero, a fresh stream's FAM is another.
    model = onnx.load(export.graphs[0])
    evaluator = onnx.reference.ReferenceEvaluator(model)
    reference = reference_model(export.config, export.weights)
    state = zero_state(reference, 1)
    tokens = np.arange(4)[None]
    fed = {"tokens": tokens, **{n: t.numpy() for n, t in state.items()}}
    wanted = reference.step(torch.from_numpy(tokens), state)[1]["past_fam_01"].numpy()
    outputs = [o.name for o in model.graph.output]
    got = evaluator.run(None, fed)[outputs.index("present_fam_01")]
    assert np.abs(got - wanted).max() < 1e-4
    next(t for t in model.graph.initializer if t.name == FAM_INIT).CopyFrom(
        numpy_helper.from_array(np.zeros((2, 3, 16), np.float32), FAM_INIT)
    )
    zeroed = onnx.reference.ReferenceEvaluator(model).run(None, fed)[outputs.index("present_fam_01")]
    assert np.abs(zeroed - wanted).max() > 1e-2


@every_case
def test_files_say_nothing_about_the_machine_that_made_them(exported: Exported, name: str) -> None:
    export = exported(name)
    home, here = str(Path.home()), str(Path(famexport.__file__).parent.parent)
    forbidden = {home, here, sys.prefix, os.getcwd(), str(export.bundle.path.parent), "/tmp", "/usr"}
    forbidden |= {"site-packages", ".py", "stack_trace", "pkg.torch", "torch.", "Traceback"}
    for path in export.graphs:
        data = path.read_bytes()
        assert [text for text in sorted(forbidden) if len(text) > 1 and text.encode() in data] == []
        model = onnx.load(path, load_external_data=False)
        assert (model.producer_name, model.producer_version, model.doc_string, model.domain) == (
            "famexport",
            "",
            "",
            "",
        )
        assert (model.graph.name, model.graph.doc_string) == ("block_step", "")
        for part in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
            assert not part.doc_string
            assert not part.metadata_props
    text = (export.bundle.path / "manifest.json").read_text()
    assert not [word for word in (home, here, str(export.checkpoint), "/tmp") if len(word) > 1 and word in text]


def test_no_weight_is_copied_for_grouped_heads(exported: Exported) -> None:
    """Grouped heads fold into rows: nothing in the graph repeats keys or values to the number of query heads."""
    for case in ("base", "no_fam", "fp16"):
        export = exported(case)
        model = onnx.shape_inference.infer_shapes(onnx.load(export.graphs[0]), data_prop=True)
        shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
        c = export.config
        seen = c.memory_segments * c.block_size + c.fam_length + c.block_size
        heads = [n for n, s in shapes.items() if s[1:] in ([c.num_attention_heads, seen, c.head_dim],)]
        assert [n for n, s in shapes.items() if s[1:] == [c.num_key_value_heads, seen, c.head_dim]]
        assert heads == []


def test_progress_goes_from_none_to_all_in_each_stage(exported: Exported) -> None:
    reports = exported("base").reports
    assert list(dict.fromkeys(stage for stage, _, _ in reports)) == ["trace", "weights", "parity"]
    for stage in ("trace", "weights", "parity"):
        done = [(d, total) for s, d, total in reports if s == stage]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1] > 0


EXPORT = """
import json, sys
import torch
from tests.export.test_graph import digests
torch.set_num_threads(1)
print(json.dumps([hash("seed"), digests(sys.argv[1], sys.argv[2])]))
"""


def digests(checkpoint: str | Path, target: str | Path) -> dict[str, str]:
    """Export twice, with every kind of graph, and give the bundles' ids and each file's SHA-256."""
    found = {}
    for batch, graphs in (("dynamic", "block"), (1, "all")):
        path = Path(target) / graphs
        bundle = export_bundle(checkpoint, path, precision="bf16", batch=batch, graphs=graphs, parity_blocks=2)
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.path.iterdir()}
        found |= {f"{graphs}/{name}": digest for name, digest in {"id": bundle.id, **files}.items()}
    return found


def test_two_processes_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "trace_step", trace_step)  # not the shared traces of these tests
    config = replace(BASE, num_hidden_layers=3)  # of which one is stamped
    checkpoint = save(tmp_path / "checkpoint", config, random_weights(config))
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(tmp_path / "there")]
    root = str(Path(famexport.__file__).parent.parent)
    env = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": root}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    seed, there = json.loads(done.stdout.splitlines()[-1])
    assert seed != hash("seed")  # the order of sets is another in this process
    assert there == digests(checkpoint, tmp_path / "here")
    kinds = {"onnx", "ort-cpu.onnx", "ort-cuda.onnx", "ort-cuda-start.onnx", "ort-cuda-fused.onnx"}
    graphs = {f"all/{graph}.{kind}" for graph in ("block_step", "append_step", "commit_block") for kind in kinds}
    graphs |= {"block/block_step.onnx", "block/block_step.ort-cpu.onnx"}
    others = {"golden.safetensors", "id", "manifest.json", "weights.safetensors"}
    assert set(there) == graphs | {f"{folder}/{name}" for folder in ("all", "block") for name in others}


def test_emulated_bfloat16_rounds_where_kernels_do(exported: Exported) -> None:
    """Scores stay float32 up to their softmax, as does a SiLU's sigmoid; probabilities and all else are rounded."""
    export = exported("bf16")
    model = next(m for path, m in zip(export.graphs, models(export), strict=True) if "ort-cpu" in path.name)
    producers = {name: node for node in model.graph.node for name in node.output}
    consumers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node.op_type)
    seen = 0
    for node in model.graph.node:
        if node.op_type == "Softmax":
            assert consumers[node.output[0]] == ["Cast"]
            masked = producers[node.input[0]]
            scores = producers[masked.input[0]] if masked.op_type == "Add" else masked
            assert scores.op_type == "MatMul"
            seen += 1
        elif node.op_type == "Sigmoid":
            assert consumers[node.output[0]] == ["Mul"]
            seen += 1
        elif node.op_type == "MatMul":
            assert consumers[node.output[0]] in (["Cast"], ["Add"], ["Softmax"])  # the last two: scores
    assert seen


@pytest.mark.parametrize(("kept", "rounded"), [("silu", 1), ("gate", 2), ("state", 2)])
def test_only_the_sigmoid_of_a_silu_is_not_rounded(kept: str, rounded: int) -> None:
    """Not that of another gate, whose product is two operators on devices too, nor one that is a result itself."""
    bf16 = ir.DataType.BFLOAT16

    def value(name: str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape((2, 3)), type=ir.TensorType(bf16))

    x, other, sigmoid, product = (value(name) for name in ("x", "other", "sigmoid", "product"))
    nodes = [
        ir.Node("", "Sigmoid", [x], outputs=[sigmoid], name="a"),
        ir.Node("", "Mul", [other if kept == "gate" else x, sigmoid], outputs=[product], name="b"),
    ]
    outputs = [product, sigmoid] if kept == "state" else [product]
    graph = ir.Graph([x, other], outputs, nodes=nodes, opset_imports={"": 20}, name="gate")
    passes.emulate_bfloat16(ir.Model(graph, ir_version=10))
    narrowing = [n for n in graph if n.op_type == "Cast" and n.attributes["to"].as_int() == bf16.value]
    assert len(narrowing) == rounded
    assert all(output.dtype == bf16 for output in graph.outputs)
