"""A model whose whole step is expensive: its first layers are compared over many blocks, all of them over few."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from famexport.checkpoint import open_checkpoint
from famexport.errors import ParityError
from famexport.export import cut, parity, pipeline
from famexport.export.pipeline import export_bundle
from famexport.export.source import checkpoint_source
from famexport.runtime.ort import OrtCpu, OrtLoop
from tests.export.helpers import BASE, random_weights, save

CONFIG = replace(BASE, num_hidden_layers=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "checkpoint", CONFIG, random_weights(CONFIG, peak=1.0))


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> int:
    """What is allowed is less than two of this model's steps."""
    budget = int(1.9 * checkpoint_source(open_checkpoint(checkpoint), "fp32", 1).cost["flops_per_block"])
    for module in (cut, parity):
        monkeypatch.setattr(module, "FLOP_BUDGET", budget)
    monkeypatch.setattr(parity, "FULL_BLOCKS", 6)
    return budget


def test_the_plan_follows_the_budget_and_an_explicit_number(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = checkpoint_source(open_checkpoint(checkpoint), "fp32", 1)
    assert what.cut is not None
    flops, less = what.cost["flops_per_block"], what.cut(2).cost["flops_per_block"]
    assert less < flops
    assert cut.plan_parity(what, None) == (256, 0)  # a small model is compared whole, as ever
    for budget, plan in ((2 * flops, (2, 0)), (2 * flops - 1, (1, max(2, (2 * flops - 1) // less))), (1, (1, 2))):
        for module in (cut, parity):
            monkeypatch.setattr(module, "FLOP_BUDGET", budget)
        assert cut.plan_parity(what, None) == plan
        assert cut.plan_parity(what, 5) == (5, 0)
        assert cut.plan_parity(replace(what, cut=None), None).cut == 0  # a module of one's own
        assert cut.plan_parity(what.cut(2), None).cut == 0  # nothing to leave out
        assert cut.plan_parity(replace(what, cost={}), None) == (256, 0)


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16", "graphs": "all", "chunks": (3,)}, {"batch": "dynamic"}], ids=str
)
def test_the_manifest_says_what_was_compared(
    checkpoint: Path, tmp_path: Path, small_budget: int, options: dict[str, Any]
) -> None:
    bundle = export_bundle(checkpoint, tmp_path / "bundle", **options)
    whole = bundle.manifest.parity
    part = whole["cut"]
    assert (whole["blocks"], len(whole["logits_error"])) == (1, 1)
    assert part["layers"] == 2
    assert part["blocks"] == len(part["logits_error"]) == len(part["state_error"]) >= 2
    assert 0 < max(*part["logits_error"], *part["state_error"]) < parity.TOLERANCES[options.get("precision", "fp32")]
    assert ("append" in part) == ("graphs" in options)
    assert "append" not in whole
    calls = whole.get("calls", {})
    assert set(calls) == ({"append_step", "commit_block"} if "graphs" in options else set())
    assert all(0 < error < parity.TOLERANCES["bf16"] for error in calls.values())
    assert not [name for name in bundle.manifest.files if "cut" in name]
    assert not list(bundle.path.glob("cut*"))


def test_an_explicit_number_compares_the_whole_only(checkpoint: Path, tmp_path: Path, small_budget: int) -> None:
    found = export_bundle(checkpoint, tmp_path / "bundle", parity_blocks=3).manifest.parity
    assert found["blocks"] == 3
    assert "cut" not in found


def test_a_state_that_is_not_fed_back_shows_in_the_cut(
    checkpoint: Path, tmp_path: Path, small_budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of the whole could not see it."""
    monkeypatch.setattr(OrtLoop, "commit", lambda self: None)
    with pytest.raises(ParityError, match="past_"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "fam_init"])
def test_a_wrong_weight_beyond_the_cut_shows_in_the_whole_step(
    checkpoint: Path, tmp_path: Path, small_budget: int, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wanted, real = name if name == "fam_init" else f"model.layers.2.{name}", pipeline.checkpoint_source

    def wrong(*args: Any, **options: Any) -> Any:
        source = real(*args, **options)

        def load(tensor: str) -> Any:
            data = source.load(tensor)
            if tensor != wanted:
                return data
            values = np.array(data).view(np.float32)
            values[2 * values.size // 3 :] *= -1.5  # of F_0, the third layer's
            return values.view(np.uint8)

        return replace(source, load=load)

    monkeypatch.setattr(pipeline, "checkpoint_source", wrong)
    with pytest.raises(ParityError, match="at block 0"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("graph", ["append_step", "append_step_c4", "commit_block"])
@pytest.mark.parametrize("options", [{}, {"batch": "dynamic", "logits": "last"}], ids=str)
def test_a_graph_of_the_open_block_that_reads_another_layers_weight_is_found(
    checkpoint: Path,
    tmp_path: Path,
    small_budget: int,
    monkeypatch: pytest.MonkeyPatch,
    graph: str,
    options: dict[str, Any],
) -> None:
    """The third layer is in no cut graph, and the whole block step never reads this one."""
    real = pipeline.stamp

    def wrong(model: Any, io: Any, layers: int) -> bool:
        done = real(model, io, layers)
        if io.name == graph:
            weights = model.graph.initializers
            good, bad = (weights[f"model.layers.{i}.self_attn.q_proj.weight"] for i in (2, 1))
            good.replace_all_uses_with(bad)
        return done

    monkeypatch.setattr(pipeline, "stamp", wrong)
    with pytest.raises(ParityError, match=f"exported {graph} differs.*--precision, or with a larger --tol"):
        export_bundle(checkpoint, tmp_path / "bundle", graphs="all", chunks=(1, 4), **options)
    assert not list(tmp_path.iterdir())


def test_large_float16_weights_are_compared_without_being_folded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = export_bundle(checkpoint, tmp_path / "plain", precision="fp16", graphs="all", chunks=(3,), parity_blocks=3)
    loaded: list[Path] = []

    def noted(contract: Any, precision: str, graphs: Any, weights: Any) -> OrtCpu:
        loaded.extend(graphs.values())
        return OrtCpu(contract, precision, graphs, weights)

    monkeypatch.setattr(cut, "OrtCpu", noted)
    monkeypatch.setattr(cut, "UNFOLDED_BYTES", 1)
    other = export_bundle(checkpoint, tmp_path / "other", precision="fp16", graphs="all", chunks=(3,), parity_blocks=3)
    assert loaded
    assert all(path.name.startswith("unfolded.") for path in loaded)
    assert other.manifest.files == plain.manifest.files  # golden rollout too: the same results, no copy left behind
    assert {path.name for path in other.path.iterdir()} == {path.name for path in plain.path.iterdir()}


def test_an_unfolded_graph_has_the_same_nodes_and_its_weights_as_inputs(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(checkpoint, tmp_path / "bundle", precision="fp16", parity_blocks=2)
    graph = bundle.path / "block_step.onnx"
    copy = ir.load(cut.unfolded(graph)).graph
    plain = ir.load(graph).graph
    assert [str(node) for node in copy] == [str(node) for node in plain]
    added = [v.name for v in copy.inputs][len(plain.inputs) :]
    assert added == [v.name for v in plain.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    assert len(added) > 20
