"""Parity where a whole step is expensive: few blocks through all layers, more through the first layers alone.

The cut graph is what the whole graph was stamped from, over the very same weight file. Its loop shows what one step of
the whole cannot: a state fed back wrongly, memory and FAM read wrongly, a rounding that accumulates. The whole step
shows that every layer has its own weights, and gives the golden rollout; so does one call of append_step and of
commit_block, from a random state, since a block made of chunks reads all weights too often.

ONNX Runtime computes float16 in float32 on CPUs, and makes a float32 copy of every weight when it loads a graph: twice
the weights in memory, and minutes for a large model. A graph in which the weights could be overridden is not folded so.
Large float16 models are compared by such a copy of their graphs: the same nodes, the same weight file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from famexport.export import passes
from famexport.export.calls import PARITY_BATCH, compare_calls
from famexport.export.parity import FLOP_BUDGET, TOLERANCES, append_blocks, check_parity, default_blocks
from famexport.export.source import Source
from famexport.export.stamp import TRACED_LAYERS
from famexport.runtime.chunks import advance_by_chunks
from famexport.runtime.golden import Golden
from famexport.runtime.ort import OrtCpu
from famexport.tensorfile import read_header

UNFOLDED_BYTES = 2**30  # of float16 weights, from which on a graph is compared by a copy that is not folded


class ParityPlan(NamedTuple):
    """Blocks to compare, through all layers and through the first ones alone; the latter 0 where all are compared."""

    whole: int
    cut: int


def plan_parity(what: Source, asked: int | None) -> ParityPlan:
    """As many blocks as were asked for, or as the budget allows; where it does not allow 2, the model is cut."""
    flops = what.cost.get("flops_per_block")
    whole = asked or default_blocks(flops)
    if asked or not flops or not is_cut(what) or 2 * flops <= FLOP_BUDGET:
        return ParityPlan(whole, 0)
    assert what.cut is not None
    first = what.cut(TRACED_LAYERS)
    return ParityPlan(1, default_blocks(first.cost["flops_per_block"]))


def is_cut(what: Source) -> bool:
    """Whether ``what`` has more layers than are traced."""
    return what.cut is not None and what.layers > TRACED_LAYERS


def compare(
    what: Source,
    graphs: Mapping[str, Path],
    cuts: Mapping[str, ir.Model],
    weights: Path | None,
    precision: str,
    blocks: int | None,
    tolerance: float | None,
    seed: int,
    report: Callable[[str, int, int], None],
) -> tuple[dict[str, Any], Golden]:
    """Compare block_step, and where they are there append_step and commit_block, with the reference's block step.

    Args:
        graphs: the files that run on CPUs, by name.
        cuts: the graphs of the first layers, in case they are needed; changed.
        blocks: to compare, through all layers; None leaves it to the budget.
        report: called with (stage, done, in all).
    Returns:
        the manifest's ``parity``: curves over the blocks of the whole model, and where it was cut ``cut``, the same of
        its first ``layers``, with those of append_step, and ``calls``, the errors of one call of each graph of an open
        block; and the golden rollout.
    """
    contract, plan = what.contract, plan_parity(what, blocks)
    copies: dict[str, Path] = {}
    if precision == "fp16" and weights is not None and weights.stat().st_size >= UNFOLDED_BYTES:
        graphs = copies = {name: unfolded(path) for name, path in graphs.items()}
    allowed = TOLERANCES[precision] if tolerance is None else tolerance

    def closed_loop(
        stage: str, source: Source, graphs: Mapping[str, Path], blocks: int, chunked: bool = False
    ) -> tuple[dict[str, Any], Golden]:
        backend = OrtCpu(source.contract, precision, graphs, weights)
        loop = backend.open(PARITY_BATCH if contract.batch == "dynamic" else None)

        def release() -> None:
            loop.close()
            backend.close()

        parity, golden = check_parity(
            loop,
            source.reference(),
            blocks=blocks,
            tolerance=allowed,
            seed=seed,
            release=release,
            folder=graphs["block_step"].parent,
            advance=partial(advance_by_chunks, loop) if chunked else None,
            progress=lambda done, total: report(stage, done, total),
        )
        return parity.to_dict(), golden

    def by_chunks(source: Source, graphs: Mapping[str, Path], found: dict[str, Any]) -> None:
        if contract.chunks:
            wanted = min(found["blocks"], append_blocks(source.cost.get("weight_bytes_read"), contract))
            found["append"] = closed_loop("append", source, graphs, wanted, chunked=True)[0]

    cut: dict[str, Any] = {}
    if plan.cut:
        assert what.cut is not None
        assert weights is not None
        first = what.cut(TRACED_LAYERS)
        parts = _write_cut_graphs(cuts, first, weights, precision)
        cut = {"layers": first.layers, **closed_loop("cut", first, parts, plan.cut)[0]}
        by_chunks(first, parts, cut)
        for path in parts.values():
            path.unlink()
        del first  # and its float32 weights
    found, golden = closed_loop("parity", what, graphs, plan.whole)
    if cut:
        found["cut"] = cut
        if contract.chunks:
            found["calls"] = compare_calls(what, graphs, weights, precision, allowed, seed)
    else:
        by_chunks(what, graphs, found)
    for path in copies.values():
        path.unlink()
    return found, golden


def unfolded(path: Path) -> Path:
    """A copy of a graph, beside it, whose weights in a file are also inputs: none of them is folded into another."""
    model = ir.load(path)
    weights = [v for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    model.graph.inputs.extend(weights)
    copy = path.with_name(f"unfolded.{path.name}")
    copy.write_bytes(passes.serialize(model))
    return copy


def _write_cut_graphs(models: Mapping[str, ir.Model], first: Source, weights: Path, precision: str) -> dict[str, Path]:
    """Graphs of the first layers that run on CPUs, beside the weight file of them all; to be removed again.

    Args:
        models: clean, weights without data; changed.
        first: the model cut to those layers.
    """
    placed, files = read_header(weights), {}
    for name, model in models.items():
        if precision == "bf16":
            passes.infer_types(model)
        passes.bind_weights(model, placed, weights.name)
        passes.attach_contract(model, first.contract, name, {})
        if precision == "bf16":
            passes.emulate_bfloat16(model)
        files[name] = weights.with_name(f"cut.{name}.onnx")
        files[name].write_bytes(passes.serialize(model))
    return files
