"""Each operator of the library for the CPU against numpy, and what it says to shapes that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.kernels.operators import (
    FLOAT,
    INT,
    Case,
    Shape,
    block_memory,
    cases,
    norm_thin,
    skip_norm,
    thin,
    token_attention,
)


def run(library: Path, case: Case) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    model = case.model(onnx.TensorProto.FLOAT)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {
        name: array.astype(np.int64 if kind == INT else np.float32) for name, (kind, array) in case.feeds().items()
    }
    return session.run(None, feeds)


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op} {case.label}")
def test_equals_numpy(kernels_for_cpu: Path, case: Case) -> None:
    for got, expected in zip(run(kernels_for_cpu, case), case.expected, strict=True):
        if expected is not None:
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


def resized(case: Case, index: int, shape: tuple[int, ...]) -> Case:
    inputs = list(case.inputs)
    pair = inputs[index]
    assert pair
    inputs[index] = pair[0], np.zeros(shape)
    return Case(case.op, inputs, case.outputs, case.expected, case.attributes)


BLOCK, TOKEN = block_memory(Shape(), True), token_attention(Shape(), [1], [1], 1)
WRONG = [
    (resized(skip_norm(1, 5, 64), 1, (63,)), r"weight of SkipNorm is \[63\], expected \[64\]"),
    (resized(skip_norm(1, 5, 64), 2, (1, 4, 64)), r"delta of SkipNorm is \[1, 4, 64\]"),
    (resized(skip_norm(1, 5, 64, fam=2), 3, (1, 3, 64)), r"FAM's state of SkipNorm is \[1, 3, 64\]"),
    (
        replace(skip_norm(1, 5, 64, fam=2), attributes={"fam": 6, "epsilon": 1e-5, "centered": 0}),
        "no number of its rows",
    ),
    (resized(BLOCK, 0, (1, 12, 95)), "qkv has no width"),
    (resized(BLOCK, 3, (47, 8)), r"key_cos is \[47, 8\], expected \[48, 8\]"),
    (resized(BLOCK, 6, (1, 11, 32)), r"a slot is \[1, 11, 32\]"),
    (Case(BLOCK.op, BLOCK.inputs[:-1], BLOCK.outputs, BLOCK.expected, BLOCK.attributes), "slots are not"),
    (resized(TOKEN, 1, (2,)), r"opened is \[2\]"),
    (resized(TOKEN, 8, (1, 3, 32)), r"open_value is \[1, 3, 32\]"),
    (resized(TOKEN, 3, (7, 8)), "token_cos"),
    (resized(thin(1, 1, 80, 37), 1, (37, 72)), "weight of ThinMatMul"),
    (thin(3, 3, 80, 37), "1 to 8 rows"),
    (norm_thin(1, 8, 1536, 24), "44 KB in all"),
    (resized(norm_thin(1, 1, 64, 24), 1, (63,)), "norm of NormThinMatMul"),
    (resized(norm_thin(1, 1, 64, 24), 3, (1, 1, 63)), "delta of NormThinMatMul"),
    (Case("GatedAct", [("T", np.zeros((1, 1, 30)))], "T", [None], {"act": 0}), "multiple of 8"),
    (Case("GatedAct", [("T", np.zeros((1, 1, 32)))], "T", [None], {"act": 4}), "act is none of"),
]


@pytest.mark.parametrize(("case", "said"), WRONG, ids=[said for _, said in WRONG])
def test_refuses_what_would_read_beyond_its_inputs(kernels_for_cpu: Path, case: Case, said: str) -> None:
    with pytest.raises(Exception, match=said):  # onnxruntime raises a class of its own per status code
        run(kernels_for_cpu, case)


def test_places_out_of_the_block_are_held_inside(kernels_for_cpu: Path) -> None:
    """``opened`` and ``length`` come from the device unchecked: nothing may be read or written out of bounds."""
    shape = Shape()
    for opened in (-(2**62), -1, shape.t, 2**62):
        case = token_attention(shape, [0], [0], 2)
        inputs = list(case.inputs)
        inputs[1], inputs[2] = (INT, np.array([opened])), (INT, np.array([2**62]))
        heads, key, value, _ = run(kernels_for_cpu, Case(case.op, inputs, case.outputs, case.expected, case.attributes))
        assert np.isfinite(heads).all()
        kept = case.inputs[7], case.inputs[8]
        for got, pair in zip((key, value), kept, strict=True):
            assert pair
            assert pair[0] != FLOAT
            if opened != -1:  # then its second row is the block's first
                np.testing.assert_array_equal(got, pair[1].astype(np.float32))
