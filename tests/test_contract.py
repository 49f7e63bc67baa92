"""The step contract: the same after a trip through JSON, and every rule of it enforced."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest

from famexport.config import preset
from famexport.contract import (
    ITEM_BYTES,
    OPEN_LENGTH,
    SCHEMA_VERSION,
    StepContract,
    TensorSpec,
    contract_for,
    present_name,
)
from famexport.errors import ContractError

TINY = preset("tiny")  # L=2 D=32 Hkv=2 Dh=8 T=8 M=2 F=4 V=96
CONTRACTS = {
    "tiny": contract_for(TINY),
    "bf16 rows": contract_for(TINY, "bf16", 3),
    "dynamic": contract_for(TINY, "fp16", "dynamic", inputs="inputs_embeds", logits="last"),
    "no fam": contract_for(replace(TINY, fam_length=0)),
    "no memory": contract_for(replace(TINY, memory_segments=0)),
    "three graphs": contract_for(TINY, chunks=(1,)),
    "two chunks": contract_for(TINY, "bf16", "dynamic", logits="last", chunks=(4, 1)),
    "embeds in chunks": contract_for(
        replace(TINY, fam_length=0, memory_segments=0), batch=3, inputs="inputs_embeds", chunks=(3,)
    ),
    "many layers": contract_for(replace(TINY, num_hidden_layers=12)),
}


def tokens(batch: int | str = 1) -> TensorSpec:
    return TensorSpec("tokens", "int64", (batch, 8))


def changed(**changes: Any) -> StepContract:
    return replace(CONTRACTS["tiny"], **changes)


@pytest.mark.parametrize("name", CONTRACTS)
def test_round_trip_through_json(name: str) -> None:
    contract = CONTRACTS[name]
    again = StepContract.from_dict(json.loads(contract.to_json()))
    assert again == contract
    assert hash(again) == hash(contract)
    assert again.to_json() == contract.to_json()
    assert StepContract.from_dict(contract.to_dict()) == contract
    assert again.outputs == contract.outputs
    assert all(type(spec.shape) is tuple for spec in (*again.inputs, *again.states, *again.outputs))


def test_a_fam_models_contract_is_that_of_the_specification() -> None:
    contract = CONTRACTS["tiny"]
    assert [str(spec) for spec in (*contract.inputs, *contract.states, *contract.outputs)] == [
        "tokens: int64 [1, 8]",
        "past_count: int64 [1]",
        "past_fam_00: float32 [1, 4, 32]",
        "past_fam_01: float32 [1, 4, 32]",
        "past_key_00: float32 [1, 2, 16, 8]",
        "past_key_01: float32 [1, 2, 16, 8]",
        "past_value_00: float32 [1, 2, 16, 8]",
        "past_value_01: float32 [1, 2, 16, 8]",
        "logits: float32 [1, 8, 96]",
    ]
    assert contract.input_names == ["tokens", *(spec.name for spec in contract.states)]
    assert contract.output_names == ["logits", *(present_name(spec.name) for spec in contract.states)]
    assert present_name("past_fam_00") == "present_fam_00"


def test_dtypes_rows_and_outputs_follow_the_options() -> None:
    contract = CONTRACTS["dynamic"]
    assert {spec.name[:8]: spec.dtype for spec in contract.states} == {
        "past_cou": "int64", "past_fam": "float32", "past_key": "float16", "past_val": "float16"
    }  # fmt: skip
    assert str(contract.inputs[0]) == "inputs_embeds: float32 [batch, 8, 32]"
    assert str(contract.outputs[0]) == "logits: float32 [batch, 1, 96]"
    assert all(spec.shape[0] == "batch" for spec in contract.states)
    assert contract.outputs[0].sized(5) == (5, 1, 96)
    half = contract_for(replace(TINY, fam_state_dtype="bfloat16"), "bf16", 3)
    assert {spec.dtype for spec in half.states} == {"int64", "bfloat16"}
    assert {spec.shape[0] for spec in half.states} == {3}
    assert [s.name for s in CONTRACTS["no fam"].states if "fam" in s.name] == []
    assert [s.name[:8] for s in CONTRACTS["no memory"].states] == ["past_cou", "past_fam", "past_fam"]
    names = [spec.name for spec in CONTRACTS["many layers"].states if "fam" in spec.name]
    assert names == [f"past_fam_{i:02d}" for i in range(12)]  # sorted order is layer order


def test_bytes_of_state() -> None:
    """Per row L*F*D FAM and 2*L*M*T*Hkv*Dh keys and values (specification), and the count."""
    fam, memory = 2 * 4 * 32, 2 * 2 * 2 * 8 * 2 * 8
    assert CONTRACTS["tiny"].state_bytes() == 4 * fam + 4 * memory + 8
    assert CONTRACTS["bf16 rows"].state_bytes() == 3 * (4 * fam + 2 * memory + 8)
    assert CONTRACTS["dynamic"].state_bytes() == 4 * fam + 2 * memory + 8
    assert CONTRACTS["dynamic"].state_bytes(7) == 7 * CONTRACTS["dynamic"].state_bytes()
    paper = {"paper-1b": (3.5e6, 340e6), "paper-8b": (16.8e6, 1.61e9), "paper-24b": (29.4e6, 88e6)}
    for name, (fam_bytes, memory_bytes) in paper.items():
        config = preset(name, fam_state_dtype="bfloat16")
        with_fam, without = contract_for(config, "bf16"), contract_for(replace(config, fam_length=0), "bf16")
        assert without.state_bytes() == pytest.approx(memory_bytes, rel=0.01)
        assert with_fam.state_bytes() - without.state_bytes() == pytest.approx(fam_bytes, rel=0.02)


_THREE = CONTRACTS["three graphs"]
OPEN: dict[str, Any] = {"graphs": _THREE.graphs, "chunks": _THREE.chunks, "open_states": _THREE.open_states}

VIOLATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "schema version": ({"schema_version": SCHEMA_VERSION - 1}, "schema version 1, expected 2"),
    "no positions": ({"block_size": 0}, "block_size must be at least 1, got 0"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    "negative memory": ({"memory_segments": -1}, "memory_segments must not be negative, got -1"),
    "negative fam": ({"fam_length": -1}, "fam_length must not be negative, got -1"),
    "no rows": ({"batch": 0}, "batch must be a positive number or 'dynamic', got 0"),
    "batch true": ({"batch": True}, "batch must be a positive number or 'dynamic', got True"),
    "batch by another name": ({"batch": "batch"}, "batch must be a positive number or 'dynamic', got 'batch'"),
    "logits": ({"logits": "first"}, "logits must be 'all' or 'last', got 'first'"),
    "unknown graph": ({"graphs": ("block_step", "train_step")}, "unknown graphs ['train_step']"),
    "no graph": ({"graphs": ()}, "graphs must be named once each, got []"),
    "a graph twice": ({"graphs": ("block_step", "block_step")}, "graphs must be named once each"),
    "no input": ({"inputs": ()}, "at least one input is needed"),
    "a name twice": ({"inputs": (tokens(), tokens())}, "tensor names must be there, differ"),
    "an empty name": ({"inputs": (replace(tokens(), name=""),)}, "tensor names must be there, differ"),
    "the name of the output": ({"inputs": (replace(tokens(), name="logits"),)}, "and not be an output's"),
    "the name of a new state": ({"inputs": (replace(tokens(), name="present_fam_00"),)}, "and not be an output's"),
    "states out of order": (
        {"states": tuple(reversed(contract_for(TINY).states))},
        "states must be in sorted order, got ['past_value_01', ",
    ),
    "a state's name": ({"states": (TensorSpec("hidden", "float32", (1, 4)),)}, "state 'hidden' must start with 'past_'"),
    "unknown dtype": ({"states": (TensorSpec("past_x", "float64", (1, 4)),)}, "past_x has unknown dtype 'float64'"),
    "no shape": ({"states": (TensorSpec("past_x", "int64", ()),)}, "past_x must have the batch (1) as axis 0, got shape []"),
    "batch elsewhere": ({"states": (TensorSpec("past_x", "int64", (4, 1)),)}, "past_x must have the batch (1) as axis 0"),
    "rows in a dynamic contract": (
        {"batch": "dynamic", "inputs": (tokens("batch"),), "states": (TensorSpec("past_x", "int64", (1,)),)},
        "past_x must have the batch (batch) as axis 0, got shape [1]",
    ),
    "symbolic rows in a fixed contract": ({"inputs": (tokens("batch"),)}, "tokens must have the batch (1) as axis 0"),
    "rows as true": ({"inputs": (TensorSpec("tokens", "int64", (True, 8)),)}, "tokens must have the batch (1) as axis 0"),
    "too many elements": ({"states": (TensorSpec("past_x", "int64", (1, 2**31)),)}, "below 2**31, got [1, 2147483648]"),
    "too many axes": ({"states": (TensorSpec("past_x", "int64", (1,) * 9),)}, "'past_x' has 9 axes, expected at most 8"),
    "another block": ({"inputs": (TensorSpec("tokens", "int64", (1, 7)),)}, "tokens must have block_size 8 as axis 1, got shape [1, 7]"),
    "no elements": ({"states": (TensorSpec("past_x", "int64", (1, 0)),)}, "past_x must have positive fixed dimensions"),
    "a symbol inside": ({"states": (TensorSpec("past_x", "int64", (1, "n")),)}, "past_x must have positive fixed dimensions"),
    "chunks alone": ({"chunks": (1,)}, "go together, with chunks and open_states; there is no append_step, commit_block, op"),
    "append_step alone": ({"graphs": ("block_step", "append_step")}, "there is no commit_block, chunks, open_states"),
    "no chunks": ({**OPEN, "chunks": ()}, "there is no chunks"),
    "no open block": ({**OPEN, "open_states": ()}, "there is no open_states"),
    "no commit_block": ({**OPEN, "graphs": ("block_step", "append_step")}, "there is no commit_block"),
    "no append_step": ({**OPEN, "graphs": ("block_step", "commit_block")}, "there is no append_step"),
    "a chunk of nothing": ({**OPEN, "chunks": (0, 1)}, "chunks must be from 1 to block_size 8, got [0, 1]"),
    "a chunk beyond the block": ({**OPEN, "chunks": (1, 9)}, "chunks must be from 1 to block_size 8, got [1, 9]"),
    "a chunk as true": ({**OPEN, "chunks": (True,)}, "chunks must be from 1 to block_size 8, got [True]"),
    "half a chunk": ({**OPEN, "chunks": (1.5,)}, "chunks must be from 1 to block_size 8, got [1.5]"),
    "chunks out of order": ({**OPEN, "chunks": (3, 1)}, "chunks must ascend, got [3, 1]"),
    "a chunk twice": ({**OPEN, "chunks": (1, 1)}, "chunks must ascend, got [1, 1]"),
    "no open length": ({**OPEN, "open_states": OPEN["open_states"][:2]}, f"open_states must hold {OPEN_LENGTH}, int64"),
    "an open length of another dtype": (
        {**OPEN, "open_states": (*OPEN["open_states"][:2], TensorSpec(OPEN_LENGTH, "int32", (1,)))},
        f"open_states must hold {OPEN_LENGTH}, int64",
    ),
    "open states out of order": ({**OPEN, "open_states": OPEN["open_states"][::-1]}, "states must be in sorted order, got"),
    "an open state's name": (
        {**OPEN, "open_states": (TensorSpec("open_key", "float32", (1, 4)), *OPEN["open_states"])},
        "state 'open_key' must start with 'past_'",
    ),
    "an open state that is a state": (
        {**OPEN, "open_states": (TensorSpec("past_count", "int64", (1,)), *OPEN["open_states"])},
        "tensor names must be there, differ",
    ),
    "an open state without rows": (
        {**OPEN, "open_states": (TensorSpec("past_a", "float32", (8, 1)), *OPEN["open_states"])},
        "past_a must have the batch (1) as axis 0",
    ),
    "an input by the chunk length's name": ({"inputs": (replace(tokens(), name="chunk_length"),)}, "not be an output's"),
    "an input by a new open state's name": (
        {**OPEN, "inputs": (replace(tokens(), name="present_open_length"),)},
        "not be an output's",
    ),
    "a size as true": ({"states": (TensorSpec("past_x", "int64", (1, True)),)}, "past_x must have positive fixed"),
}  # fmt: skip


@pytest.mark.parametrize("what", VIOLATIONS)
def test_every_rule_is_enforced_from_code_and_from_json(what: str) -> None:
    changes, message = VIOLATIONS[what]
    with pytest.raises(ContractError) as from_code:
        changed(**changes)
    assert message in str(from_code.value)
    data = {**CONTRACTS["tiny"].to_dict(), **changes}
    for group in ("inputs", "states", "open_states"):
        data[group] = [s if isinstance(s, dict) else dict(vars(s), shape=list(s.shape)) for s in data[group]]
    with pytest.raises(ContractError) as from_json:
        StepContract.from_dict(json.loads(json.dumps(data)))
    if what not in ("batch true",):  # the type is checked first there
        assert message in str(from_json.value)


def test_graphs_take_and_give_what_the_specification_says() -> None:
    contract = contract_for(TINY, chunks=(3, 1, 3))
    kv = [f"past_open_{kind}_{i:02d}" for kind in ("key", "value") for i in (0, 1)]
    assert [s.name for s in contract.open_states] == sorted([OPEN_LENGTH, *kv])
    assert [str(s) for s in contract.open_states if "00" in s.name or s.name == OPEN_LENGTH] == [
        "past_open_key_00: float32 [1, 2, 8, 8]",
        "past_open_length: int64 [1]",
        "past_open_value_00: float32 [1, 2, 8, 8]",
    ]
    assert contract.chunks == (1, 3)
    assert contract.graphs == ("block_step", "append_step", "commit_block")
    assert contract.graph_names == ("block_step", "append_step", "append_step_c3", "commit_block")
    states, every = [s.name for s in contract.states], [s.name for s in contract.all_states]
    assert every == sorted(every) == sorted(states + [s.name for s in contract.open_states])

    def io(name: str) -> tuple[list[str], list[str]]:
        graph = contract.graph(name)
        assert graph.name == name
        return [s.name for s in graph.taken], [s.name for s in graph.given]

    present = [present_name(s.name) for s in contract.open_states]
    assert io("block_step") == (["tokens", *states], ["logits", *map(present_name, states)])
    assert io("append_step") == io("append_step_c3") == (["tokens", "chunk_length", *every], ["logits", *present])
    assert io("commit_block") == (every, [present_name(name) for name in every])
    for name, width in (("append_step", 1), ("append_step_c3", 3)):
        graph = contract.graph(name)
        assert graph.chunk == width
        assert [str(s) for s in graph.inputs] == [f"tokens: int64 [1, {width}]", "chunk_length: int64 [1]"]
        assert str(graph.logits) == f"logits: float32 [1, {width}, 96]"
    assert contract.graph("commit_block").logits is contract.graph("block_step").chunk is None
    rows = contract_for(TINY, "bf16", "dynamic", inputs="inputs_embeds", logits="last", chunks=(4,)).graph(
        "append_step"
    )
    assert [str(s) for s in (*rows.inputs, rows.logits)] == [
        "inputs_embeds: float32 [batch, 4, 32]",
        "chunk_length: int64 [batch]",
        "logits: float32 [batch, 1, 96]",
    ]
    assert {s.dtype for s in rows.states if "open" in s.name} == {"int64", "bfloat16"}
    bare = CONTRACTS["tiny"]
    assert (bare.graph_names, bare.chunks, bare.open_states, bare.all_states) == (("block_step",), (), (), bare.states)


def test_the_open_block_counts_as_state() -> None:
    opened = 2 * 2 * 8 * 2 * 8  # keys and values, L, T, Hkv, Dh
    three, tiny = CONTRACTS["three graphs"], CONTRACTS["tiny"]
    assert three.state_bytes() == tiny.state_bytes() + 4 * opened + 8
    assert contract_for(TINY, "fp16", 3, chunks=(1,)).state_bytes() == 3 * (
        contract_for(TINY, "fp16").state_bytes() + 2 * opened + 8
    )


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ContractError) as caught:
        changed(block_size=0, vocab_size=-5, logits="none", graphs=("other",), memory_segments=-1)
    assert "step contract: 5 problems: " in str(caught.value)
    for part in ("block_size", "vocab_size", "logits", "unknown graphs", "memory_segments"):
        assert part in str(caught.value)


def edited(**changes: Any) -> dict[str, Any]:
    return {**CONTRACTS["tiny"].to_dict(), **changes}


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in CONTRACTS["tiny"].to_dict().items() if k != key}


SHAPELESS = {"name": "tokens", "dtype": "int64"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *((without(key), f"missing key '{key}'") for key in CONTRACTS["tiny"].to_dict()),
        (edited(extra=1), "unknown key 'extra'"),
        (edited(outputs=[]), "unknown key 'outputs'"),
        (edited(block_size="8"), "block_size has the wrong type str"),
        (edited(block_size=8.0), "block_size has the wrong type float"),
        (edited(block_size=True), "block_size has the wrong type bool"),
        (edited(batch=None), "batch has the wrong type NoneType"),
        (edited(batch=1.0), "batch has the wrong type float"),
        (edited(logits=["all"]), "logits has the wrong type list"),
        (edited(inputs={}), "inputs has the wrong type dict"),
        (edited(inputs=[5]), "inputs[0]: expected an object, got int"),
        (edited(inputs=[SHAPELESS]), "inputs[0]: missing key 'shape'"),
        (edited(inputs=[{**SHAPELESS, "shape": [1, 8], "layout": 0}]), "inputs[0]: unknown key 'layout'"),
        (edited(states=[{**SHAPELESS, "shape": 8}]), "states[0]: shape has the wrong type int"),
        (edited(states=[{**SHAPELESS, "shape": [1, [8]]}]), "must have positive fixed dimensions"),
        (edited(states=[{**SHAPELESS, "shape": [1, 8.0]}]), "must have positive fixed dimensions"),
        (edited(states=[{**SHAPELESS, "shape": [None]}]), "must have the batch (1) as axis 0"),
        (edited(graphs="block_step"), "graphs has the wrong type str"),
        (edited(graphs=[1]), "graphs must be names"),
        (edited(chunks=1), "chunks has the wrong type int"),
        (edited(chunks=["1"]), "append_step and commit_block go together"),
        (edited(open_states=[5]), "open_states[0]: expected an object, got int"),
        ([], "expected an object, got list"),
        (None, "expected an object, got NoneType"),
    ],
)
def test_json_of_another_form_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ContractError) as caught:
        StepContract.from_dict(data)
    assert message in str(caught.value)


def test_sizes_of_dtypes() -> None:
    import torch

    assert {name: getattr(torch, name).itemsize for name in ITEM_BYTES} == ITEM_BYTES
    assert TensorSpec("x", "float16", ("batch", 3)).nbytes(4) == 24


def test_the_contract_needs_no_torch() -> None:
    import subprocess

    code = "import sys, famexport.contract, famexport.config; print([m for m in ('torch', 'onnx', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
