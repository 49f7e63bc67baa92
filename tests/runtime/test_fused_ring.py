"""The fused graphs, with the kernel library built for the CPU, in the tests that the unfused ones are run in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_ring_adversarial as adversarial
import test_ring_loop as ring_loop
from cpu_ring import CpuRingBackend, RingBackend

import famexport as fx
from famexport.bundle import open_bundle
from famexport.checkpoint import init_checkpoint
from famexport.config import preset
from famexport.runtime.ort_ring import ring_files

# Heads as wide as the operators take them; but for "narrow", where most of a graph has ordinary operators
WIDE = {"head_dim": 32}
CASES: dict[str, dict[str, Any]] = {name: {**WIDE, **case} for name, case in ring_loop.CASES.items()}
CASES |= {"narrow": {}, "wider": {"head_dim": 64}, **{act: {**WIDE, "activation": act} for act in ("gelu", "relu")}}

Exported = Callable[..., Path]


def exporter(factory: pytest.TempPathFactory, cases: dict[str, dict[str, Any]]) -> Exported:
    made: dict[tuple[Any, ...], Path] = {}

    def get(case: str, **options: Any) -> Path:
        key = case, *sorted(options.items())
        if key not in made:
            folder = factory.mktemp("fused")
            init_checkpoint(folder / "ckpt", preset("tiny", model_type="fam", **cases[case]), seed=3)
            fx.export_bundle(folder / "ckpt", folder / "bundle", parity_blocks=2, **options)
            made[key] = folder / "bundle"
        return made[key]

    return get


@pytest.fixture
def ring_backend(kernels_for_cpu: Path) -> RingBackend:
    return lambda session: CpuRingBackend(session, kernels_for_cpu)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exporter(tmp_path_factory, CASES)


def test_fused_graphs_have_operators_of_the_library(exported: Exported) -> None:
    """Or all that follows would compare the unfused graphs again."""
    import onnx_ir as ir

    files = ring_files(open_bundle(exported("plain", **ring_loop.ALL)), fused=True)
    for name, wanted in (
        ("block_step", {"SkipNorm", "GatedAct"}),
        ("append_step", {"NormThinMatMul", "TokenAttention", "ThinMatMul", "NormThinGated"}),
        ("commit_block", {"SkipNorm", "GatedAct"}),
    ):
        found = {node.op_type for node in ir.load(files[name]).graph if node.domain == "famexport"}
        assert wanted <= found, name
    block = {node.op_type for node in ir.load(files["block_step"]).graph}
    assert block & {"BlockMemory", "BlockMemorySplit"}


@pytest.mark.parametrize("case", ["narrow", "wider", "gelu", "relu"])
def test_other_heads_and_activations(exported: Exported, ring_backend: RingBackend, case: str) -> None:
    ring_loop.test_open_blocks_equal_the_portable_graphs(exported, case, ring_loop.ALL, ring_backend)


@pytest.mark.parametrize("case", ["plain", "neither"])
def test_blocks_alone(exported: Exported, ring_backend: RingBackend, case: str) -> None:
    """Open blocks, below, have block_step between, but a model without any past has none of them."""
    ring_loop.test_equals_the_portable_graph(exported, case, {"batch": 3, "logits": "last"}, ring_backend)


test_snapshots_travel_between_layouts = ring_loop.test_snapshots_travel_between_layouts
test_a_row_that_is_not_finite_stays_where_it_was = ring_loop.test_a_row_that_is_not_finite_stays_where_it_was
test_a_failed_check_keeps_the_state = ring_loop.test_a_failed_check_keeps_the_state
test_weights_lie_on_the_device_once = ring_loop.test_weights_lie_on_the_device_once
test_open_blocks_equal_the_portable_graphs = ring_loop.test_open_blocks_equal_the_portable_graphs
test_rows_of_a_pool_take_turns = ring_loop.test_rows_of_a_pool_take_turns
test_an_open_block_is_taken_back_and_restored = ring_loop.test_an_open_block_is_taken_back_and_restored
test_a_chunk_that_is_not_finite_leaves_no_trace = ring_loop.test_a_chunk_that_is_not_finite_leaves_no_trace
test_two_streams_and_a_closed_backend = ring_loop.test_two_streams_and_a_closed_backend


class TestAdversarial:
    @pytest.fixture(scope="class")
    @classmethod
    def exported(cls, tmp_path_factory: pytest.TempPathFactory) -> Exported:
        get = exporter(tmp_path_factory, {name: {**WIDE, **case} for name, case in adversarial.CASES.items()})
        options = {"graphs": "all", "chunks": adversarial.CHUNKS, "batch": adversarial.ROWS}
        return lambda case="memory 2": get(case, **options)

    test_any_order_of_calls = staticmethod(adversarial.test_any_order_of_calls_equals_the_host_loop)
    test_streams_are_restored = staticmethod(adversarial.test_streams_of_a_pool_are_restored_in_the_middle_of_blocks)
    test_a_spoilt_row = staticmethod(adversarial.test_a_spoilt_row_of_a_pool_leaves_the_others_alone)
    test_a_count_beyond_what_is_saturated = staticmethod(adversarial.test_a_count_beyond_what_is_saturated)
