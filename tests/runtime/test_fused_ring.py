"""The fused graphs, with the kernel library built for the CPU, in the tests that the unfused ones are run in.

Nearly all of the time is export, so there are few bundles, each with several things at once; graph by graph every
configuration is in ``tests/export/test_fused_graphs.py``.
"""

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
from famexport.export.cuda_fused import THIN_ROWS
from famexport.runtime.ort_ring import ring_files

WIDE = {"head_dim": 32}  # as the operators take heads; but for "tied", where most of a graph has ordinary operators
ALL = ring_loop.ALL
SHORT = {"graphs": "all", "chunks": (2,)}  # a chunk of another width is another graph to trace
# name -> (changes to the preset "tiny", options of the export)
BUNDLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (WIDE, ALL),
    "all heads": ({**WIDE, **ring_loop.CASES["all heads"]}, {"batch": 3}),
    "neither": ({**WIDE, **ring_loop.CASES["neither"]}, {"batch": 3, "logits": "last"}),
    "qk_norm": ({**WIDE, "num_hidden_layers": 1, "activation": "relu", **ring_loop.CASES["qk_norm"]}, SHORT),
    "layernorm": ({**WIDE, "num_hidden_layers": 1, **ring_loop.CASES["layernorm"]}, SHORT),
    "tied": ({"num_hidden_layers": 1, **ring_loop.CASES["tied"]}, {**SHORT, "batch": 2, "logits": "last"}),
}
ROWS = adversarial.ROWS  # with the wider chunk more than the operators for short chunks take
CORNERS: dict[str, dict[str, Any]] = {  # without FAM and memory there are no open blocks: "neither", above
    "memory 2": WIDE,
    "no memory": {"head_dim": 64, "activation": "gelu", **ring_loop.CASES["biases"]},
    "no fam": WIDE,
}
BUNDLES |= {
    case: ({**adversarial.CASES[case], **more}, {"graphs": "all", "chunks": adversarial.CHUNKS, "batch": ROWS})
    for case, more in CORNERS.items()
}

Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    made: dict[str, Path] = {}

    def get(case: str = "memory 2", **options: Any) -> Path:
        """The bundle of that name, which has what is asked for, and maybe more graphs."""
        config, given = BUNDLES[case]
        assert options.items() <= given.items()
        if case not in made:
            folder = tmp_path_factory.mktemp("fused")
            init_checkpoint(folder / "ckpt", preset("tiny", model_type="fam", **config), seed=3)
            fx.export_bundle(folder / "ckpt", folder / "bundle", parity_blocks=2, **given)
            made[case] = folder / "bundle"
        return made[case]

    return get


@pytest.fixture
def ring_backend(kernels_for_cpu: Path) -> RingBackend:
    return lambda session: CpuRingBackend(session, kernels_for_cpu)


def operators(bundle: Path) -> dict[str, set[str]]:
    """Those of the library, by graph."""
    import onnx_ir as ir

    files = ring_files(open_bundle(bundle), fused=True)
    return {
        name: {node.op_type for node in ir.load(file).graph if node.domain == "famexport"}
        for name, file in files.items()
    }


def test_fused_graphs_have_operators_of_the_library(exported: Exported) -> None:
    """Or all that follows would compare the unfused graphs again."""
    found = operators(exported("plain"))
    assert found["block_step"] >= {"SkipNorm", "GatedAct"}
    assert found["append_step"] >= {"NormThinMatMul", "TokenAttention", "ThinMatMul", "NormThinGated"}
    assert found["commit_block"] >= {"SkipNorm", "GatedAct"}
    assert found["block_step"] & {"BlockMemory", "BlockMemorySplit"}
    wider = operators(exported("memory 2"))
    one, three = (wider[f"append_step{suffix}"] for suffix in ("", "_c3"))
    assert ROWS * max(adversarial.CHUNKS) > THIN_ROWS >= ROWS
    assert {"ThinMatMul", "TokenAttention"} <= one
    assert not {name for name in three if "Thin" in name}
    assert not operators(exported("tied"))["append_step"] & {"TokenAttention"}


@pytest.mark.parametrize("case", ["all heads", "neither"])
def test_blocks_alone(exported: Exported, ring_backend: RingBackend, case: str) -> None:
    """Rows out of step: one is reset in the middle."""
    ring_loop.test_equals_the_portable_graph(exported, case, BUNDLES[case][1], ring_backend)


@pytest.mark.parametrize("case", ["plain", "qk_norm", "layernorm", "tied"])
def test_open_blocks(exported: Exported, ring_backend: RingBackend, case: str) -> None:
    ring_loop.test_open_blocks_equal_the_portable_graphs(exported, case, BUNDLES[case][1], ring_backend)


@pytest.mark.parametrize("case", CORNERS)
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_calls(exported: Exported, ring_backend: RingBackend, case: str, seed: int) -> None:
    adversarial.test_any_order_of_calls_equals_the_host_loop(exported, case, seed, ring_backend)


def test_weights_lie_on_the_device_once(exported: Exported, ring_backend: RingBackend) -> None:
    """Those with biases."""
    ring_loop.test_weights_lie_on_the_device_once(lambda case: exported("no memory"), ring_backend)


test_snapshots_travel_between_layouts = ring_loop.test_snapshots_travel_between_layouts
test_a_row_that_is_not_finite_stays_where_it_was = ring_loop.test_a_row_that_is_not_finite_stays_where_it_was
test_a_failed_check_keeps_the_state = ring_loop.test_a_failed_check_keeps_the_state
test_an_open_block_is_taken_back_and_restored = ring_loop.test_an_open_block_is_taken_back_and_restored
test_a_chunk_that_is_not_finite_leaves_no_trace = ring_loop.test_a_chunk_that_is_not_finite_leaves_no_trace
test_two_streams_and_a_closed_backend = ring_loop.test_two_streams_and_a_closed_backend
# Pools, whose rows are out of step:
test_streams_are_restored = adversarial.test_streams_of_a_pool_are_restored_in_the_middle_of_blocks
test_a_spoilt_row = adversarial.test_a_spoilt_row_of_a_pool_leaves_the_others_alone
test_a_count_beyond_what_is_saturated = adversarial.test_a_count_beyond_what_is_saturated
