"""What graphs take and give in ONNX Runtime's words, against what the contract says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from famexport.contract import GraphIO, TensorSpec
from famexport.errors import BundleError, raise_problems

# onnx.proto, TensorProto.DataType
ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7, "int32": 6, "bool": 9, "int8": 3, "uint8": 2}
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


def check_io(session: Any, io: GraphIO) -> None:
    """A session's graph takes and gives what the contract says of it, and nothing else.

    Raises:
        BundleError: it does not; every tensor that differs is named.
    """
    problems = _problems("takes", session.get_inputs(), io.taken)
    problems += _problems("gives", session.get_outputs(), io.given)
    raise_problems(BundleError, f"the graph {io.name} is not what the contract says; export again", problems)


def _problems(verb: str, values: Sequence[Any], specs: Sequence[TensorSpec]) -> list[str]:
    wanted, found = {spec.name: spec for spec in specs}, []
    for value in values:
        spec, got = wanted.pop(value.name, None), f"{verb} {value.name!r:.80} {value.type} {value.shape!r:.200}"
        if spec is None:
            found.append(f"it {got}")
        elif DTYPES.get(value.type) != spec.dtype or not _same_shape(value.shape, spec):
            found.append(f"it {got}, expected {spec}")
    return found + [f"it does not have {spec}" for spec in wanted.values()]


def _same_shape(shape: Sequence[Any], spec: TensorSpec) -> bool:
    """Dimensions that the contract leaves open may have any name, or none."""
    return isinstance(shape, list) and [n if isinstance(n, int) else None for n in shape] == [
        n if isinstance(n, int) else None for n in spec.shape
    ]
