"""Graphs with famexport's own operators: the same inputs, outputs and numbers as the graphs without."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from famexport.config import FamConfig
from famexport.contract import contract_for
from famexport.export import passes
from famexport.export.cuda_net import Plan
from famexport.export.cuda_steps import AppendStep, BlockStep, CommitBlock, cuda_graphs
from famexport.runtime.device_weights import parts
from tests.export.helpers import ALL_BIASES, BASE

WIDE = replace(BASE, head_dim=32, model_type="fam")
LONG = {"block_size": 256, "fam_length": 5, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no fam": {"fam_length": 0},
    "no memory": {"memory_segments": 0},
    "neither": {"fam_length": 0, "memory_segments": 0},
    "all heads": {"num_key_value_heads": 4, "activation": "gelu"},
    "one head": {"num_key_value_heads": 1, "fam_query_position": "previous", "activation": "relu"},
    "biases": {**ALL_BIASES, "activation": "gelu_tanh"},
    "layernorm": {"norm": "layernorm", "activation": "gelu_tanh", "gated_mlp": False},
    "layernorm biases": {"norm": "layernorm", "activation": "gelu", "gated_mlp": False, **ALL_BIASES},
    "qk_norm": {"qk_norm": True},
    "tied": {"tie_word_embeddings": True, "memory_segments": 1},
    "narrow heads": {"head_dim": 8},
    "heads of 16": {"head_dim": 16},
    "odd width": {"hidden_size": 20, "intermediate_size": 28},
    "many slots": {"memory_segments": 33, "num_hidden_layers": 1},
    "long": LONG,
    "long, no fam": {**LONG, "fam_length": 0},
    "long, no memory": {**LONG, "memory_segments": 0},
    "long, qk_norm": {**LONG, "qk_norm": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "one row": {"batch": 1},
    "two rows": {"batch": 2, "logits": "last", "embeds": True},
}
STEPS = ("block", "append 1", "append 4", "commit")


def config_of(case: str) -> FamConfig:
    return replace(WIDE, **CASES[case])


def graph(step: str, plan: Plan) -> onnx.ModelProto:
    if step == "block":
        model = BlockStep(plan, steady=True).model()
    elif step == "commit":
        model = CommitBlock(plan, steady=True).model()
    else:
        model = AppendStep(plan, int(step.split()[1]), steady=True).model("append_step")
    return onnx.load_from_string(passes.serialize(model))


def pair(step: str, case: str, dtype: str = "float32", **options: Any) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The plain graph and the fused one."""
    plan = Plan(config_of(case), dtype, **{"batch": 1, **options})
    return graph(step, plan), graph(step, replace(plan, fused=True))


def specs(values: Any) -> dict[str, Any]:
    return {v.name: (v.type.tensor_type.elem_type, [d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values}


def feeds(model: onnx.ModelProto, config: FamConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs by name; a packed weight's are those of its parts."""
    rng, found = np.random.default_rng(seed), {}
    for name, (_, shape) in sorted(specs(model.graph.input).items()):
        if name == "tokens":
            found[name] = rng.integers(0, config.vocab_size, shape)
        elif name == "past_open_length":
            found[name] = np.resize([1, config.block_size - 2], shape)  # the second reaches the block's end
        elif name == "chunk_length":
            found[name] = np.resize([3, 2], shape)
        elif name.startswith(("past", "inputs")):
            found[name] = rng.standard_normal(shape).astype(np.float32)
        else:
            value = np.random.default_rng([seed, *name.encode()]).standard_normal(shape).astype(np.float32)
            scale = 0.3 if len(shape) == 1 else 1.2 / np.sqrt(shape[1])
            found[name] = value * np.float32(scale) + np.float32("norm" in name and name.endswith("weight"))
    if "chunk_length" in found:
        width = (specs(model.graph.input).get("tokens") or specs(model.graph.input)["inputs_embeds"])[1][1]
        found["chunk_length"] = np.minimum(found["chunk_length"], width)
    return found


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and float(np.abs(a - b).max()) <= 2e-5 * max(float(np.abs(b).max()), 1.0)


def run(model: onnx.ModelProto, taken: dict[str, np.ndarray], library: Path | None = None) -> dict[str, np.ndarray]:
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level, quiet.intra_op_num_threads = 3, 1
    if library:
        quiet.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(model.SerializeToString(), quiet, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, taken), strict=True))


def masked(model: onnx.ModelProto, config: FamConfig) -> onnx.ModelProto:
    """Causal attention with its mask written out: on CUDA the last row of queries sees all columns, each before it one
    less. ONNX Runtime's CPU provider lets the first row see the first column alone."""
    t, columns = config.block_size, (config.memory_segments + 1) * config.block_size + config.fam_length
    hidden = np.where(np.arange(columns) > np.arange(t)[:, None] + columns - t, -60000, 0)
    for node in model.graph.node:
        if any(attribute.name == "unidirectional" for attribute in node.attribute):
            kept = [attribute for attribute in node.attribute if attribute.name != "unidirectional"]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.input.extend(["", "", "causal"])
    model.graph.initializer.append(onnx.numpy_helper.from_array(hidden[None, None].astype(np.float32), "causal"))
    return model


def compare(library: Path, step: str, case: str, **options: Any) -> None:
    plain, fused = pair(step, case, **options)
    taken = feeds(plain, config_of(case))
    wanted = run(plain, taken)
    packed = {
        value.name: np.concatenate([taken[part] for part in parts(value.name)])
        for value in fused.graph.input
        if ".gate_up_proj." in value.name
    }
    fed = {value.name: taken.get(value.name, packed.get(value.name)) for value in fused.graph.input}
    got = run(masked(fused, config_of(case)), fed, library)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not close(got[name], wanted[name])] == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", STEPS)
def test_the_numbers_are_those_of_the_plain_graph(
    kernels_for_cpu: Path, step: str, case: str, options: dict[str, Any]
) -> None:
    if case == "neither" and step != "block":
        return  # there is no such graph
    compare(kernels_for_cpu, step, case, **options)


@pytest.mark.parametrize("step", ["append 1", "append 4"])
def test_rows_beyond_what_the_operators_for_short_chunks_take(kernels_for_cpu: Path, step: str) -> None:
    batch = 9 if step == "append 1" else 3
    _, fused = pair(step, "plain", batch=batch)
    assert own_operators(fused) == {**NORMS, "GatedAct": LAYERS}
    compare(kernels_for_cpu, step, "plain", batch=batch)
    compare(kernels_for_cpu, step, "plain", batch=batch, logits="last")


def own_operators(model: onnx.ModelProto) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph.node if node.domain == "famexport"))


LAYERS = WIDE.num_hidden_layers
NORMS = {"SkipNorm": 2 * LAYERS + 1}
THIN = {"SkipNorm": 1, "NormThinMatMul": LAYERS, "NormThinGated": LAYERS, "ThinMatMul": 2 * LAYERS + 1}
FORMS: dict[tuple[str, str], dict[str, int]] = {
    ("block", "plain"): {**NORMS, "BlockMemory": LAYERS, "GatedAct": LAYERS},
    ("block", "qk_norm"): {**NORMS, "GatedAct": LAYERS},
    ("block", "narrow heads"): {**NORMS, "GatedAct": LAYERS},
    ("block", "layernorm"): {**NORMS, "BlockMemory": LAYERS},
    ("block", "many slots"): {"SkipNorm": 3, "GatedAct": 1},
    ("append 1", "many slots"): {"SkipNorm": 1, "NormThinMatMul": 1, "NormThinGated": 1, "ThinMatMul": 3},
    ("block", "long"): {"SkipNorm": 3, "BlockMemorySplit": 1, "GatedAct": 1},
    ("block", "long, no fam"): {"SkipNorm": 3, "BlockMemory": 1, "GatedAct": 1},
    ("block", "long, qk_norm"): {"SkipNorm": 3, "GatedAct": 1},
    ("append 1", "plain"): {**THIN, "TokenAttention": LAYERS},
    ("append 4", "plain"): {**THIN, "TokenAttention": LAYERS},
    ("append 1", "qk_norm"): THIN,
    ("append 1", "heads of 16"): {**THIN, "TokenAttention": LAYERS},
    ("append 1", "biases"): {
        "SkipNorm": LAYERS + 1,
        "NormThinMatMul": LAYERS,
        "ThinMatMul": 3 * LAYERS + 1,
        "GatedAct": LAYERS,
        "TokenAttention": LAYERS,
    },
    ("append 1", "layernorm"): {**NORMS, "ThinMatMul": 4 * LAYERS + 1, "TokenAttention": LAYERS},
    # of widths 20 and 28 only o_proj's 128 is a multiple of 8
    ("append 1", "odd width"): {**NORMS, "ThinMatMul": LAYERS, "TokenAttention": LAYERS},
    ("commit", "plain"): {"SkipNorm": 2 * LAYERS, "GatedAct": LAYERS},
    ("commit", "no fam"): {},
}


@pytest.mark.parametrize(("step", "case"), FORMS)
def test_operators(step: str, case: str) -> None:
    plain, fused = pair(step, case)
    assert own_operators(fused) == FORMS[step, case]
    assert own_operators(plain) == {}


def test_rows_too_wide_for_the_norm() -> None:
    """Such a model gets the plain graph again."""
    plan = Plan(replace(WIDE, hidden_size=12040, num_hidden_layers=1), "float16", 1)
    for step in STEPS:
        assert graph(step, replace(plan, fused=True)) == graph(step, plan)
    names = {part for step in STEPS for v in graph(step, plan).graph.input for part in parts(v.name)}
    found = cuda_graphs(plan.config, contract_for(plan.config, "fp16", 1, chunks=(1, 4)), "fp16", names)
    assert all(list(variants) == ["ort-cuda", "ort-cuda-start"] for variants in found.values())


def test_nodes_of_a_layer() -> None:
    """What is left to ONNX Runtime: products and attention."""

    def layer(step: str, case: str) -> Counter[str]:
        few, many = (
            graph(step, Plan(replace(config_of(case), num_hidden_layers=n), "bfloat16", 1, fused=True)) for n in (2, 3)
        )
        return Counter(node.op_type for node in many.graph.node) - Counter(node.op_type for node in few.graph.node)

    block = {"SkipNorm": 2, "FusedMatMul": 4, "GatedAct": 1}
    assert layer("block", "plain") == {**block, "BlockMemory": 1, "MultiHeadAttention": 1}
    assert layer("block", "long") == {**block, "BlockMemorySplit": 1, "MultiHeadAttention": 2, "Concat": 1}
    assert layer("block", "long, no fam") == {**block, "BlockMemory": 1, "MultiHeadAttention": 1}
    token = {"NormThinMatMul": 1, "TokenAttention": 1, "ThinMatMul": 2, "NormThinGated": 1}
    assert layer("append 1", "plain") == token


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", ["plain", "no memory", "biases", "layernorm", "qk_norm", "tied", "long"])
def test_a_fused_graph_takes_and_gives_what_the_plain_one_does(dtype: str, step: str, case: str) -> None:
    plain, fused = pair(step, case, dtype, logits="last", batch=2)
    if case != "qk_norm":  # its head norms are an operator that ONNX itself does not know, as in plain graphs
        onnx.checker.check_model(fused)
    assert list(specs(fused.graph.output).items()) == list(specs(plain.graph.output).items())
    taken, had = specs(fused.graph.input), specs(plain.graph.input)
    packed = {name: taken.pop(name) for name in list(taken) if ".gate_up_proj." in name}
    for name, (kind, shape) in packed.items():
        singles = [had.pop(part) for part in parts(name)]
        assert singles == [(kind, [shape[0] // 2, *shape[1:]])] * 2
    assert taken == had
    given = {name for node in fused.graph.node if node.domain == "famexport" for name in node.output}
    typed = specs([*fused.graph.value_info, *fused.graph.output])
    assert given <= typed.keys()  # ONNX Runtime does not infer them all
    floats = {output for n in fused.graph.node if "Norm" in n.op_type and n.domain for output in n.output[:1]}
    floats |= {output for n in fused.graph.node if n.op_type == "SkipNorm" for output in n.output[2:]}
    floats |= {output for n in fused.graph.node if n.op_type == "TokenAttention" for output in n.output[3:]}
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
    assert {typed[name][0] for name in given - floats - {"logits"}} == {kind}
    assert {typed[name][0] for name in floats} == {TensorProto.FLOAT}


@pytest.mark.parametrize("case", ["plain", "no fam", "layernorm"])
def test_each_graph_of_a_contract_has_one(case: str) -> None:
    config = config_of(case)
    contract = contract_for(config, "bf16", 1, chunks=(1, 3))
    every = {part for step in STEPS for m in pair(step, case) for v in m.graph.input for part in parts(v.name)}
    names = {name for name in every if "." in name and not name.startswith("past_")}
    found = cuda_graphs(config, contract, "bf16", names)
    assert set(found) == set(contract.graph_names)
    for variants in found.values():
        assert list(variants) == ["ort-cuda", "ort-cuda-start", "ort-cuda-fused"]
        assert "famexport" not in {**variants["ort-cuda"].opset_imports, **variants["ort-cuda-start"].opset_imports}
        assert variants["ort-cuda-fused"].opset_imports["famexport"] == 1
    assert cuda_graphs(config, contract, "bf16", names - {"model.layers.1.mlp.up_proj.weight"}) == {}
