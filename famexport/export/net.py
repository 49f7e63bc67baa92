"""An ONNX graph under construction, with weights that are inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Net:
    """Values are named by the operator and a running number, so files are reproducible."""

    def __init__(self) -> None:
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        self.inputs.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)))
        return self.inputs[-1]

    def constant(self, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        tensor = ir.tensor(array) if dtype is None else ir.tensor(array.astype(dtype.numpy()), dtype)
        key = str(tensor.dtype), tuple(array.shape), tensor.tobytes()
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._constants[key] = value
            self.initializers.append(value)
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        return self.ops(kind, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> Sequence[ir.Value]:
        node = ir.node(kind, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        node.name = f"{kind}_{len(self.nodes)}"
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}_{i}" if outputs > 1 else node.name
        self.nodes.append(node)
        return node.outputs

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        return value
