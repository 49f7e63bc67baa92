"""The wire walker against the onnx package, and against damage."""

from __future__ import annotations

import contextlib
import random
from typing import Any, cast

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.onnx_ml_pb2 import ModelProto

from famexport import onnx_wire
from famexport.errors import BundleError
from famexport.onnx_wire import LINKS, SINGLE, ExternalData, graph_facts


def external(name: str, location: str = "weights.safetensors", **fields: object) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **fields}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def identity(name: str, **attributes: Any) -> Any:
    return helper.make_node("Identity", ["x"], [name], **attributes)


def graph(name: str, nodes: list[Any] | None = None, initializers: list[Any] | None = None) -> Any:
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    return helper.make_graph(nodes or [identity("y")], name, [info], [out], initializer=initializers or [])


def model(main: Any, **metadata: str) -> ModelProto:
    made = helper.make_model(main, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)])
    made.ir_version = 10
    helper.set_model_props(made, metadata)
    return cast(ModelProto, made)


def test_plain_model() -> None:
    inline = numpy_helper.from_array(np.arange(2, dtype=np.float32), "inline")
    tensors = [external("a", offset=0, length=8), external("b", offset=4096), inline]
    facts = graph_facts(model(graph("g", initializers=tensors), key="välue", other="").SerializeToString())
    assert (facts.ir_version, facts.opset) == (10, 20)
    assert facts.metadata == {"key": "välue", "other": ""}
    assert facts.operators == {("", "Identity")}
    assert facts.external_initializers == {
        "a": ExternalData("weights.safetensors", 0, 8),
        "b": ExternalData("weights.safetensors", 4096, None),
    }
    assert facts.external_locations == {"weights.safetensors"}


def test_external_data_is_found_everywhere() -> None:
    def const(where: str) -> Any:
        node = helper.make_node("Constant", [], [where])
        node.attribute.add(name="value", type=4).t.CopyFrom(external(where, where))
        return node

    sparse = helper.make_sparse_tensor(external("s", "sparse-values"), external("i", "sparse-indices"), [2])
    inner = graph("inner", [const("inner-constant"), helper.make_node("Sin", ["x"], ["y"])])
    then = graph("then", [helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)])
    els = graph("else", initializers=[external("w", "else-initializer")])
    branch = helper.make_node("If", ["x"], ["z"], then_branch=then, else_branch=els)
    many = identity("m")
    many.attribute.add(name="tensors", type=9).tensors.append(external("t", "attribute-tensors"))
    many.attribute.add(name="graphs", type=10).graphs.append(graph("l", initializers=[external("g", "graph-list")]))
    many.attribute.add(name="sparse", type=11).sparse_tensor.CopyFrom(sparse)
    many.attribute.add(name="sparses", type=12).sparse_tensors.append(
        helper.make_sparse_tensor(external("s2", "sparses-values"), external("i2", "sparses-indices"), [2])
    )
    main = graph("main", [branch, many, identity("y")])
    main.sparse_initializer.add().CopyFrom(
        helper.make_sparse_tensor(external("s3", "main-values"), external("i3", "main-indices"), [2])
    )
    made = model(main)
    function = helper.make_function(
        "custom", "F", ["x"], ["y"], [const("function-constant"), helper.make_node("Cos", ["x"], ["y"])], []
    )
    function.attribute_proto.add(name="default", type=4).t.CopyFrom(external("d", "function-default"))
    made.functions.append(function)
    training = made.training_info.add()
    training.initialization.CopyFrom(graph("init", initializers=[external("ti", "training-init")]))
    training.algorithm.CopyFrom(graph("algo", [const("training-algo")]))

    facts = graph_facts(made.SerializeToString())
    assert facts.external_locations == {
        "inner-constant",
        "else-initializer",
        "attribute-tensors",
        "graph-list",
        "sparse-values",
        "sparse-indices",
        "sparses-values",
        "sparses-indices",
        "main-values",
        "main-indices",
        "function-constant",
        "function-default",
        "training-init",
        "training-algo",
    }
    assert facts.operators == {("", kind) for kind in ("Identity", "If", "Constant", "Sin", "Cos")}
    assert facts.external_initializers == {}


def test_links_name_every_path_of_the_format() -> None:
    """A field added to a later ONNX that can reach a tensor or node fails here instead of being skipped."""
    found: dict[str, dict[int, str]] = {}
    single: dict[str, set[int]] = {}
    messages: dict[str, Any] = {}

    def collect(message: Any) -> None:
        if message.name not in messages:
            messages[message.name] = message
            for sub in message.fields:
                if sub.message_type is not None:
                    collect(sub.message_type)

    collect(ModelProto.DESCRIPTOR)
    reaching = {"TensorProto", "NodeProto"}
    while True:
        more = {
            n for n, m in messages.items() if any(f.message_type and f.message_type.name in reaching for f in m.fields)
        }
        if more <= reaching:
            break
        reaching |= more
    for name in reaching:
        fields = [f for f in messages[name].fields if f.message_type and f.message_type.name in reaching]
        found[name] = {f.number: f.message_type.name for f in fields}
        if once := {f.number for f in fields if not f.is_repeated}:
            single[name] = once
    found["ModelProto"] |= {8: "OperatorSetIdProto", 14: "StringStringEntryProto"}
    assert found == LINKS
    assert single == SINGLE


def rich_bytes() -> bytes:
    branch = graph("b", initializers=[external("w", offset=16, length=8)])
    node = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    main = graph("g", [node], [external("a", offset=0, length=8)])
    data: bytes = model(main, key="value").SerializeToString()
    return data


def test_every_prefix_and_bit_flip_is_refused_or_read() -> None:
    data = rich_bytes()
    whole = graph_facts(data)
    # Only a cut between two top-level fields can still be a model; the format has no end mark (hence the hashes).
    readable = []
    for size in range(len(data)):
        with contextlib.suppress(BundleError):
            readable.append(graph_facts(data[:size]))
    assert len(readable) <= 4
    assert whole not in readable
    rng = random.Random(0)
    refused = 0
    for _ in range(5000):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            graph_facts(bytes(damaged))
        except BundleError:
            refused += 1
    assert refused > 1000
    for _ in range(2000):
        with contextlib.suppress(BundleError):
            graph_facts(rng.randbytes(rng.randrange(64)))


def field(number: int, payload: bytes) -> bytes:
    size, encoded = len(payload), b""
    while True:
        encoded += bytes([size & 0x7F | (0x80 if size > 0x7F else 0)])
        size >>= 7
        if not size:
            return bytes([number << 3 | 2]) + encoded + payload


HEAD = b"\x08\x0a" + field(8, b"\x10\x14")  # ir_version 10, opset 20


def test_deep_nesting_is_refused() -> None:
    for levels in (30, 5000):
        nested = b""
        for _ in range(levels):
            nested = field(1, field(5, field(6, nested)))  # graph -> node -> attribute -> graph
        with pytest.raises(BundleError, match="nests more than 64"):
            graph_facts(HEAD + field(7, nested))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "lacks a graph"),
        (HEAD, "lacks a graph"),
        (field(7, b""), "lacks a graph"),
        (HEAD + b"\x38\x01", "wire type 0, expected 2"),
        (b"\x0a\x00", "ir_version has wire type 2"),
        (HEAD + b"\x3b\x3c", "wire type 3"),
        (b"\x00\x00", "field number 0"),
        (b"\x80" * 11, "damaged number"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "damaged number"),
        (b"\x3a\xff\xff\xff\xff\x0f", "ends inside"),
        (HEAD + field(7, b"") + field(7, b""), "repeats field 7"),
        (HEAD + field(8, b"\x10\x15"), "twice"),
        (HEAD + field(8, field(1, b"ai.onnx") + b"\x10\x15"), "twice"),
        (HEAD + field(14, field(1, b"k")) * 2, "metadata key 'k' twice"),
        (HEAD + field(14, field(1, b"k") + field(1, b"l")), "two keys"),
        (HEAD + field(14, field(1, b"\xff")), "not UTF-8"),
        (HEAD + field(7, field(5, b"\x70\x01")), "without a location"),
        (HEAD + field(7, field(5, field(13, field(1, b"offset") + field(2, b"1")))), "without a location"),
    ],
)
def test_malformed(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        graph_facts(data)


@pytest.mark.parametrize("fields", [{"offset": -1}, {"length": "1e3"}, {"offset": "9" * 30}, {"length": "٣"}])
def test_bad_external_numbers(fields: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="expected a number"):
        graph_facts(model(graph("g", initializers=[external("a", **fields)])).SerializeToString())


def test_repeats_are_refused() -> None:
    twice = external("a")
    twice.external_data.add(key="location", value="elsewhere")
    with pytest.raises(BundleError, match="'location' twice"):
        graph_facts(model(graph("g", initializers=[twice])).SerializeToString())
    with pytest.raises(BundleError, match="two initializers named 'a'"):
        graph_facts(model(graph("g", initializers=[external("a"), external("a")])).SerializeToString())


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_wire, "MAX_FIELDS", 1000)
    with pytest.raises(BundleError, match="more than 1000 fields"):
        graph_facts(HEAD + field(7, b"\x50\x00" * 2000))
