"""Stamp a model's layers from a trace of two: what tracing all of them would give, in a fraction of the time.

The first layer of the traced graph is the pattern of all but the last, which is followed by norm and head. The second
layer tells what changes from one layer to the next: the names of its weights and states, its row of F_0, and which
values come from the layer below. Where the second is not the first in exactly that sense, nothing is stamped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from famexport.contract import GraphIO
from famexport.errors import FamExportError

TRACED_LAYERS = 2
_FAM_INIT = "fam_init"
_WEIGHT = re.compile(r"(?<=^model\.layers\.)\d+(?=\.)")
_STATE = re.compile(r"(?<=_)\d+$")  # of past_fam_LL and its like; no input without a layer ends in a number


@dataclass(frozen=True)
class _Pattern:
    """The nodes of the first layer and of the second with all that follows it; how the first reads from below.

    Args:
        below: what the first layer reads and every layer reads the like of -> what the second reads in its place.
            A value that all layers share stands for itself.
        twins: what the first layer computes -> what the second does.
    """

    first: list[ir.Node]
    second: list[ir.Node]
    below: dict[ir.Value, ir.Value]
    twins: dict[ir.Value, ir.Value]


def stamp(model: ir.Model, io: GraphIO, layers: int) -> bool:
    """Make the graph of ``layers`` layers of a graph of two, in place.

    Requires: the built-in model, traced and cleaned; its weights are initialisers without data.
    Ensures: inputs and outputs are those of ``io``; every value of a layer is named ``layers.N.``.

    Args:
        io: the graph that it becomes.
    Returns:
        whether the two layers are alike; otherwise the graph is as it was.
    """
    if layers < TRACED_LAYERS:
        raise FamExportError(f"a graph of {TRACED_LAYERS} layers cannot become one of {layers}")
    pattern = _pattern(model.graph)
    if pattern is None:
        return False
    _Stamper(model.graph, pattern, layers).run(io)
    return True


class _Stamper:
    def __init__(self, graph: ir.Graph, pattern: _Pattern, layers: int) -> None:
        self.graph, self.pattern, self.last = graph, pattern, layers - 1
        leaves = (*graph.inputs, *graph.initializers.values())
        self.leaves = {value.name: value for value in leaves}
        self.inputs = {value.name for value in graph.inputs}
        self.outputs = {value.name: value for value in graph.outputs}

    def run(self, io: GraphIO) -> None:
        p = self.pattern
        self._rename_leaves()
        made = {value: value for node in p.first for value in node.outputs}
        for layer in range(1, self.last):
            made = self._copy(layer, made)
        for node in p.second:
            for i, value in enumerate(node.inputs):
                if value in made:
                    node.replace_input_with(i, made[value])
            self._set_fam_row(node, self.last)
        names = {twin: self._output_name(twin, self.last, value.name) for value, twin in p.twins.items()}
        names |= {value: self._output_name(value, 0) for node in p.first for value in node.outputs}
        for value, new_name in names.items():
            value.name = new_name
            if value.is_graph_output():
                self.outputs[new_name] = value
        for node in (*p.first, *p.second):
            if node.outputs[0] in names:
                node.name = f"node_{node.outputs[0].name}"
        self.graph.inputs[:] = [self.leaves[spec.name] for spec in io.taken]
        self.graph.outputs[:] = [self.outputs[spec.name] for spec in io.given]
        self.graph.initializers.clear()
        for leaf, value in self.leaves.items():
            if leaf not in self.inputs:
                self.graph.initializers.add(value)

    def _rename_leaves(self) -> None:
        """Weights and states of the second layer become the last one's; those between are made."""
        self.graph.initializers.clear()  # else its keys would not follow the names
        for name in list(self.leaves):
            if name == _FAM_INIT:
                value = self.leaves[name]
                value.shape = ir.Shape((self.last + 1, *list(value.shape or ())[1:]))
            elif _layer(name) == 1:
                value = self.leaves.pop(name)
                value.name = _renamed(name, self.last)
                for layer in range(1, self.last):
                    new = ir.Value(name=_renamed(name, layer), type=value.type, shape=_copied(value.shape))
                    self._keep_leaf(new, name in self.inputs)
                self._keep_leaf(value, name in self.inputs)

    def _keep_leaf(self, value: ir.Value, is_input: bool) -> None:
        self.leaves[value.name] = value
        if is_input:
            self.inputs.add(value.name)

    def _copy(self, layer: int, lower: dict[ir.Value, ir.Value]) -> dict[ir.Value, ir.Value]:
        """Insert the first layer once more, as ``layer``, which reads from ``lower``: what it makes, by the first's."""
        made: dict[ir.Value, ir.Value] = {}

        def read(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in made:
                return value and made[value]
            if _layer(value.name) == 0 and value.producer() is None:
                return self.leaves[_renamed(value.name, layer)]
            source = self.pattern.below.get(value, value)
            return lower.get(source, source)

        for node in self.pattern.first:
            outputs = [
                ir.Value(name=self._output_name(value, layer), type=value.type, shape=_copied(value.shape))
                for value in node.outputs
            ]
            copy = ir.Node(
                node.domain,
                node.op_type,
                [read(value) for value in node.inputs],
                list(node.attributes.values()),
                overload=node.overload,
                version=node.version,
                outputs=outputs,
                name=f"node_{outputs[0].name}",
            )
            self.graph.insert_before(self.pattern.second[0], copy)
            self._set_fam_row(copy, layer)
            for value, new in zip(node.outputs, outputs, strict=True):
                made[value] = new
                if value.is_graph_output():
                    self.outputs[new.name] = new
        return made

    def _set_fam_row(self, node: ir.Node, layer: int) -> None:
        if _fam_row(node) is None:
            return
        row = ir.tensor(np.array(layer, np.int64))
        value = ir.Value(
            name=f"layers.{layer}.fam_row", type=ir.TensorType(row.dtype), shape=ir.Shape(()), const_value=row
        )
        index = ir.node("Constant", [], attributes={"value": row}, outputs=[value], name=f"node_{value.name}")
        self.graph.insert_before(node, index)
        node.replace_input_with(1, value)

    def _output_name(self, value: ir.Value, layer: int, base: str | None = None) -> str:
        """``present_*`` where the graph gives it, else the name that the first layer's like was traced under."""
        if value.is_graph_output():
            return _renamed(value.name, layer) if _layer(value.name) is not None else str(value.name)
        return f"layers.{layer}.{base or value.name}"


def _pattern(graph: ir.Graph) -> _Pattern | None:
    """The two layers of ``graph``, or None where the second is not the first one level up."""
    levels: dict[ir.Value, int] = {}
    units: tuple[list[ir.Node], list[ir.Node]] = ([], [])
    for node in graph:
        level = max([_own_layer(node), *(levels.get(value, -1) for value in node.inputs if value is not None)])
        for value in node.outputs:
            levels[value] = level
        if level >= 0:
            if level >= TRACED_LAYERS or (level == 0 and units[1]):  # the layers overlap
                return None
            units[level].append(node)
    first, second = units
    below: dict[ir.Value, ir.Value] = {}
    twins: dict[ir.Value, ir.Value] = {}
    count = 0
    for a, b in zip(first, second, strict=False):
        found = _alike(a, b, below, twins, levels)
        if found is None:
            break
        below.update(found)
        twins.update(zip(a.outputs, b.outputs, strict=True))
        count += 1
    # What is left of the first has no weight and no state of its own: the start of the layer above, such as its norm's
    # mean. What is left of the second is the model's end.
    for node in (*first[count:], *second[count:]):
        if _own_layer(node) >= 0 or any(_layer(v.name) is not None and v.is_graph_output() for v in node.outputs):
            return None
    for node in first[count:]:
        if any(below.get(value, value) is not value for value in node.inputs if value is not None):
            return None
    for node in second[count:]:
        if any(value is not None and levels.get(value) == 0 for value in node.inputs):
            return None
    return _Pattern(first, second, below, twins) if count else None


def _alike(
    a: ir.Node,
    b: ir.Node,
    below: dict[ir.Value, ir.Value],
    twins: dict[ir.Value, ir.Value],
    levels: dict[ir.Value, int],
) -> dict[ir.Value, ir.Value] | None:
    """What ``a`` reads from below it and what ``b`` reads there, or None where they are not the same operation."""
    if a.op_identifier() != b.op_identifier() or len(a.inputs) != len(b.inputs) or len(a.outputs) != len(b.outputs):
        return None
    if _attributes(a) != _attributes(b):
        return None
    if any(_renamed(x.name, 1) != y.name for x, y in zip(a.outputs, b.outputs, strict=True) if x.is_graph_output()):
        return None
    found: dict[ir.Value, ir.Value] = {}
    rows = _fam_row(a), _fam_row(b)
    if rows != (None, None):
        return found if rows == (0, 1) and a.inputs[0] is b.inputs[0] else None
    for x, y in zip(a.inputs, b.inputs, strict=True):
        if x is None or y is None:
            if x is not y:
                return None
        elif levels.get(x) == 0:
            if twins.get(x) is not y:
                return None
        elif _leaf_layer(x) == 0:
            if _renamed(x.name, 1) != y.name:
                return None
        elif x.const_value is not None and y.const_value is not None:
            if _content(x.const_value) != _content(y.const_value):
                return None
        else:  # both read the same, or the second reads what the first made
            known = below.get(x, found.get(x, y))
            if known is not y or (x is not y and levels.get(y) != 0):
                return None
            found[x] = y
    return found


def _own_layer(node: ir.Node) -> int:
    """The layer whose weight, state or row of F_0 ``node`` reads itself, -1 for none."""
    if node.op_type == "Shape":  # a dynamic batch is read off any state, for all layers
        return -1
    row = _fam_row(node)
    return max([-1 if row is None else row, *(_leaf_layer(value) for value in node.inputs if value is not None)])


def _fam_row(node: ir.Node) -> int | None:
    """The row of F_0 that ``node`` takes."""
    if node.op_type != "Gather" or node.inputs[0] is None or node.inputs[0].name != _FAM_INIT:
        return None
    index = node.inputs[1].const_value if node.inputs[1] is not None else None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if index is None or axis != 0 or index.shape != ():
        raise FamExportError("fam_init is read in a way that the exporter does not know")
    return int(index.numpy())


def _leaf_layer(value: ir.Value) -> int:
    layer = _layer(value.name) if value.producer() is None else None
    return -1 if layer is None else layer


def _layer(name: str | None) -> int | None:
    """The layer that a weight, a state or a new state belongs to."""
    name = name or ""
    if found := _WEIGHT.search(name) or (_STATE.search(name) if name.startswith(("past_", "present_")) else None):
        return int(found.group())
    return None


def _renamed(name: str | None, layer: int) -> str:
    assert name is not None
    return _WEIGHT.sub(str(layer), name) if _WEIGHT.search(name) else _STATE.sub(f"{layer:02d}", name)


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {
        name: _content(attr.value) if attr.type == ir.AttributeType.TENSOR else (attr.type, _plain(attr.value))
        for name, attr in node.attributes.items()
    }


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _content(tensor: Any) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.tobytes()


def _copied(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape(list(shape))
