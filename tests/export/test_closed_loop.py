"""The exported graphs against the torch step: each runs free on its own state, and every block is compared.

All four corners of F and M; batch 1, 3 and dynamic with rows that start again at different blocks; grouped, single and
full key/value heads; the options of each family; opsets 20 and 23; three precisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import famexport as fx
from famexport.contract import StepContract, TensorSpec
from famexport.model import FamModel, State
from tests.export.helpers import CASES, Export, reference_model, zero_state

BLOCKS = 260
# Largest relative error of one row of logits or of one state tensor, in any block. Measured at worst: 3e-6, 3e-3, 5e-2.
BOUNDS = {"fp32": 5e-5, "fp16": 1e-2, "bf16": 1e-1}
RESETS = {3: 1, 100: 2, 101: 1, 200: 0}  # block -> the row that starts again before it


def row_errors(got: np.ndarray, wanted: np.ndarray) -> list[float]:
    """||got - wanted|| / ||wanted|| of each row of the batch, so that one row's error cannot hide in the others."""
    rows = zip(got.astype(np.float64), wanted.astype(np.float64), strict=True)
    return [float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)) for a, b in rows]


def inputs(contract: StepContract, batch: int, blocks: int, seed: int = 3) -> Iterator[np.ndarray]:
    rng, spec = np.random.default_rng(seed), contract.inputs[0]
    for _ in range(blocks):
        if spec.dtype == "int64":
            yield rng.integers(0, contract.vocab_size, spec.sized(batch))
        else:
            yield rng.standard_normal(spec.sized(batch)).astype(np.float32)


def torch_step(model: FamModel, fed: np.ndarray, state: State, contract: StepContract) -> tuple[np.ndarray, State]:
    with torch.no_grad():
        logits, state = model.step(torch.from_numpy(fed), state, logits=contract.logits)
    return logits.numpy(), state


def closed_loop(export: Export, blocks: int = BLOCKS) -> float:
    """The worst relative error of any row of logits or of any state tensor over the roll-out."""
    contract = export.bundle.contract
    batch = 3 if contract.batch == "dynamic" else int(contract.batch)
    model, worst = reference_model(export.config, export.weights), 0.0
    state = zero_state(model, batch)
    with fx.load(export.bundle, threads=1) as session:
        stream = session.stream(3) if contract.batch == "dynamic" else session.stream()
        for block, fed in enumerate(inputs(contract, batch, blocks)):
            if block in RESETS:
                row = min(RESETS[block], batch - 1)
                stream.reset([row])
                state = {name: tensor.clone() for name, tensor in state.items()}
                for tensor in state.values():
                    tensor[row] = 0
            got = stream.step(fed)
            wanted, state = torch_step(model, fed, state, contract)
            assert got.dtype == np.float32
            errors = row_errors(got, wanted)
            for name, array in stream.state().items():
                if name == "past_count":
                    assert array.tolist() == state[name].tolist()
                errors += row_errors(array, state[name].numpy())
            assert np.isfinite(errors).all(), block
            worst = max(worst, *errors)
        stream.close()
    return worst


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_the_torch_step_over_a_long_closed_loop(exported: Callable[[str], Export], name: str) -> None:
    export = exported(name)
    worst = closed_loop(export)
    print(f"{name}: worst relative error {worst:.2e}")
    assert worst < BOUNDS[export.precision]


@pytest.mark.parametrize("name", ["bf16", "bf16_opset23"])
def test_the_portable_bfloat16_graph_gives_what_its_cpu_variant_gives(
    exported: Callable[[str], Export], name: str
) -> None:
    """ONNX Runtime has no bfloat16 arithmetic on CPUs, so the graph for other devices runs in ONNX's own evaluator."""
    export = exported(name)
    contract, batch = export.bundle.contract, int(export.bundle.contract.batch)
    evaluators = [ReferenceEvaluator(onnx.load(path)) for path in export.graphs]
    assert len(evaluators) == 2
    model = reference_model(export.config, export.weights)
    state, states = zero_state(model, batch), [None, None]
    for fed in inputs(contract, batch, 12):
        wanted, state = torch_step(model, fed, state, contract)
        for which, evaluator in enumerate(evaluators):
            past = states[which] or {s.name: zeros(s, batch) for s in contract.states}
            got, *new = evaluator.run(None, {"tokens": fed, **past})
            assert max(row_errors(got, wanted)) < BOUNDS["bf16"]
            states[which] = dict(zip([s.name for s in contract.states], new, strict=True))
            for spec in contract.states:
                array = states[which][spec.name]
                assert (str(array.dtype), array.shape) == (spec.dtype, spec.sized(batch))
                assert max(row_errors(array, state[spec.name].numpy())) < BOUNDS["bf16"]


def zeros(spec: TensorSpec, batch: int) -> np.ndarray:
    return np.zeros(spec.sized(batch), ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else spec.dtype)


@pytest.mark.parametrize("name", ["base", "opset23", "fam_family", "no_memory", "fp16", "bf16"])
def test_a_row_of_zeros_is_a_fresh_stream_bit_for_bit(exported: Callable[[str], Export], name: str) -> None:
    export = exported(name)
    contract = export.bundle.contract
    batch = 3 if contract.batch == "dynamic" else int(contract.batch)
    row, memory = batch - 1, export.config.memory_segments
    with fx.load(export.bundle, threads=1) as session:
        open_stream = (lambda: session.stream(3)) if contract.batch == "dynamic" else session.stream
        with open_stream() as used, open_stream() as forgot, open_stream() as fresh:
            for fed in inputs(contract, batch, 5, seed=8):
                used.step(fed)
                forgot.step(fed)
            before = used.state()
            used.reset([row])
            # Only the count says that a row is fresh: what is left in memory and FAM must not be seen.
            forgot.load_state({**before, "past_count": np.zeros_like(before["past_count"])})
            for name, array in used.state().items():
                assert not array[row].any(), name
                assert np.array_equal(array[:row], before[name][:row]), name
            for block, fed in enumerate(inputs(contract, batch, memory + 3, seed=9)):
                wanted = fresh.step(fed)
                assert np.array_equal(used.step(fed)[row], wanted[row]), block
                assert np.array_equal(forgot.step(fed), wanted), block
            for name, array in fresh.state().items():
                assert np.array_equal(used.state()[name][row], array[row]), name
                assert np.array_equal(forgot.state()[name], array), name
