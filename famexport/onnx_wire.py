"""Read what must be known about an ONNX file from its bytes, without the onnx package.

A device has no onnx package, and no parser should be trusted to say where a model's external data is before that was
checked. This walks the protobuf wire format of a ModelProto (onnx.proto; protobuf.dev/programming-guides/encoding) and
looks into every message that can hold a tensor, a node or a metadata entry. Where protobuf would merge or let the last
value win, which two parsers may do differently, the file is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from famexport.errors import BundleError

MAX_DEPTH = 64  # messages inside messages; protobuf's own limit is 100
MAX_FIELDS = 4_000_000  # bounds the time spent on a hostile file to seconds
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# message -> field number -> message found there. Everything else is skipped: it can hold none of what is looked for.
LINKS: dict[str, dict[int, str]] = {
    "ModelProto": {
        7: "GraphProto",
        8: "OperatorSetIdProto",
        14: "StringStringEntryProto",
        20: "TrainingInfoProto",
        25: "FunctionProto",
    },
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "TensorProto": {},
}
# Fields that may occur only once; protobuf would merge the second message into the first.
SINGLE = {
    "ModelProto": {7},
    "AttributeProto": {5, 6, 22},
    "SparseTensorProto": {1, 2},
    "TrainingInfoProto": {1, 2},
}
_IR_VERSION, _OP_TYPE, _DOMAIN, _TENSOR_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 4, 7, 8, 13, 14


class ExternalData(NamedTuple):
    """Where a tensor's bytes are; ``length`` is None where the file leaves it to the tensor's shape."""

    location: str
    offset: int
    length: int | None


@dataclass(frozen=True)
class GraphFacts:
    """What ``graph_facts`` found.

    ``external`` lists every tensor with external data wherever it is (initializers, node attributes, subgraphs,
    functions); ``external_initializers`` only the main graph's initializers, by name. ``operators`` are domain and name
    of every operator, those of subgraphs and functions included; ``subgraphs`` says whether a node has a graph in it.
    """

    ir_version: int
    opset: int
    metadata: dict[str, str]
    operators: frozenset[tuple[str, str]]
    subgraphs: bool
    external: tuple[ExternalData, ...]
    external_initializers: dict[str, ExternalData]

    @property
    def external_locations(self) -> set[str]:
        return {data.location for data in self.external}


def graph_facts(data: bytes) -> GraphFacts:
    """Walk the bytes of one ONNX ModelProto.

    Raises:
        BundleError: the bytes are not a well-formed ONNX model, or two parsers could read them differently.
    """
    wire = _Wire(data)
    ir_version = 0
    metadata: dict[str, str] = {}
    opsets: dict[str, int] = {}
    operators: set[tuple[str, str]] = set()
    external: list[ExternalData] = []
    initializers: dict[str, ExternalData] = {}
    has_graph = subgraphs = False
    todo = [("ModelProto", 0, len(data), 0)]
    while todo:
        kind, start, end, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise BundleError(f"ONNX file nests more than {MAX_DEPTH} messages; export again")
        if kind == "TensorProto":
            name, where = wire.tensor(start, end)
            if where is not None:
                external.append(where)
                if depth == 2:  # ModelProto, GraphProto, TensorProto: nothing else has this depth
                    if name in initializers:
                        raise BundleError(f"ONNX file has two initializers named {name!r:.80}; export again")
                    initializers[name] = where
        elif kind == "OperatorSetIdProto":
            domain, version = wire.opset(start, end)
            if domain in opsets:
                raise BundleError(f"ONNX file imports the operator set {domain!r:.80} twice; export again")
            opsets[domain] = version
        elif kind == "StringStringEntryProto":
            key, value = wire.entry(start, end)
            if key in metadata:
                raise BundleError(f"ONNX file has the metadata key {key!r:.80} twice; export again")
            metadata[key] = value
        else:
            seen: set[int] = set()
            texts = {_OP_TYPE: "", _DOMAIN: ""}  # of a node
            for number, wire_type, low, high in wire.fields(start, end):
                if number in LINKS[kind]:
                    wire.need(wire_type, _BYTES, f"{kind} field {number}")
                    if number in seen and number in SINGLE.get(kind, ()):
                        raise BundleError(f"ONNX file repeats field {number} of {kind}; export again")
                    seen.add(number)
                    todo.append((LINKS[kind][number], low, high, depth + 1))
                    has_graph |= depth == 0 and number == 7
                    subgraphs |= kind == "AttributeProto" and LINKS[kind][number] == "GraphProto"
                elif kind == "NodeProto" and number in texts:
                    if texts[number]:
                        raise BundleError(f"ONNX file repeats field {number} of {kind}; export again")
                    texts[number] = wire.text(wire_type, low, high, "op_type or domain")
                elif kind == "ModelProto" and number == _IR_VERSION:
                    wire.need(wire_type, _VARINT, "ir_version")
                    ir_version = low
            if kind == "NodeProto":
                operators.add((_plain(texts[_DOMAIN]), texts[_OP_TYPE]))
    if not (has_graph and ir_version and opsets.get("")):
        raise BundleError(
            "ONNX file lacks a graph, an IR version or an operator set: truncated? Export or copy it again"
        )
    return GraphFacts(ir_version, opsets[""], metadata, frozenset(operators), subgraphs, tuple(external), initializers)


def _plain(domain: str) -> str:
    """ "ai.onnx" is another spelling of ""."""
    return "" if domain == "ai.onnx" else domain


class _Wire:
    """Reads fields out of protobuf bytes; every position is checked before it is read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.count = 0

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (field number, wire type, low, high): a varint's value is ``low``, other bytes are [low, high)."""
        at = start
        while at < end:
            self.count += 1
            if self.count > MAX_FIELDS:
                raise BundleError(f"ONNX file has more than {MAX_FIELDS} fields; export again")
            tag, at = self._varint(at, end)
            number, wire_type = tag >> 3, tag & 7
            if not 0 < number < 1 << 29:
                raise BundleError(f"ONNX file has field number {number} at byte {at}: damaged; export or copy it again")
            if wire_type == _VARINT:
                value, at = self._varint(at, end)
                yield number, wire_type, value, value
                continue
            if wire_type == _BYTES:
                size, at = self._varint(at, end)
            elif wire_type in (_FIXED64, _FIXED32):
                size = 8 if wire_type == _FIXED64 else 4
            else:
                raise BundleError(f"ONNX file has wire type {wire_type} at byte {at}: damaged; export or copy it again")
            if size > end - at:
                raise BundleError(f"ONNX file ends inside a field at byte {at}: truncated; export or copy it again")
            yield number, wire_type, at, at + size
            at += size

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 1 << 64:
                    break
                return value, at
            shift += 7
        raise BundleError(f"ONNX file has a damaged number before byte {at}; export or copy it again")

    def need(self, got: int, expected: int, what: str) -> None:
        if got != expected:
            raise BundleError(f"ONNX file: {what} has wire type {got}, expected {expected}; export or copy it again")

    def text(self, wire_type: int, low: int, high: int, what: str) -> str:
        self.need(wire_type, _BYTES, what)
        try:
            return self.data[low:high].decode()
        except UnicodeDecodeError as exc:
            raise BundleError(f"ONNX file: {what} at byte {low} is not UTF-8; export or copy it again") from exc

    def entry(self, start: int, end: int) -> tuple[str, str]:
        """A StringStringEntryProto."""
        found: dict[int, str] = {}
        for number, wire_type, low, high in self.fields(start, end):
            if number in found:
                raise BundleError("ONNX file has an entry with two keys or two values; export again")
            if number in (1, 2):
                found[number] = self.text(wire_type, low, high, "metadata")
        return found.get(1, ""), found.get(2, "")

    def opset(self, start: int, end: int) -> tuple[str, int]:
        """An OperatorSetIdProto: domain and version."""
        domain, version = "", 0
        for number, wire_type, low, high in self.fields(start, end):
            if number == 1:
                domain = self.text(wire_type, low, high, "operator set domain")
            elif number == 2:
                self.need(wire_type, _VARINT, "operator set version")
                version = low
        return _plain(domain), version

    def tensor(self, start: int, end: int) -> tuple[str, ExternalData | None]:
        """A TensorProto: its name, and where its data is if that is outside the file."""
        name, outside = "", False
        entries: dict[str, str] = {}
        for number, wire_type, low, high in self.fields(start, end):
            if number == _TENSOR_NAME:
                name = self.text(wire_type, low, high, "tensor name")
            elif number == _DATA_LOCATION:
                self.need(wire_type, _VARINT, "data_location")
                outside |= low != 0
            elif number == _EXTERNAL_DATA:
                self.need(wire_type, _BYTES, "external_data")
                key, value = self.entry(low, high)
                if key in entries:
                    raise BundleError(f"tensor {name!r:.80} has external {key!r:.80} twice; export again")
                entries[key] = value
        if not outside and not entries:
            return name, None
        if "location" not in entries:
            raise BundleError(f"tensor {name!r:.80} has external data without a location; export again")
        numbers = {key: entries[key] for key in ("offset", "length") if key in entries}
        for key, text in numbers.items():
            if not (text.isascii() and text.isdigit() and len(text) < 20):
                raise BundleError(
                    f"tensor {name!r:.80} has external {key} {text!r:.80}, expected a number; export again"
                )
        length = int(numbers["length"]) if "length" in numbers else None
        return name, ExternalData(entries["location"], int(numbers.get("offset", 0)), length)
