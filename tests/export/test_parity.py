"""An export whose graph or loop is wrong is refused, whatever is wrong with it, and leaves nothing behind (R12, R9)."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import famexport as fx
from famexport.checkpoint import open_checkpoint
from famexport.contract import StepContract, TensorSpec, contract_for
from famexport.errors import CheckpointError, ContractError, NumericError, ParityError, UsageError
from famexport.export import pipeline, trace
from famexport.export.parity import FULL_BLOCKS, TOLERANCES, check_parity, default_blocks, growth_note
from famexport.export.pipeline import export_bundle
from famexport.model import FamModel, State
from famexport.runtime.golden import replay
from famexport.runtime.host import HostLoop
from famexport.runtime.ort import OrtLoop
from tests.export.helpers import BASE, Export, config_of, random_weights, save, tree

Exported = Callable[[str], Export]


class Site:
    """A place to export to, with and without an older bundle, that must not change when an export fails."""

    def __init__(self, export: Export, folder: Path) -> None:
        self.export, self.folder = export, folder
        shutil.copytree(export.bundle.path, folder / "older")
        self.before = tree(folder)

    def refused(
        self,
        error: type[BaseException] = ParityError,
        match: str | None = None,
        source: Any = None,
        blocks: int = 24,
        target: str = "older",
        **options: Any,
    ) -> BaseException:
        source = self.export.checkpoint if source is None else source
        with pytest.raises(error, match=match) as caught:
            export_bundle(source, self.folder / target, parity_blocks=blocks, **options)
        assert tree(self.folder) == self.before
        assert sorted(path.name for path in self.folder.iterdir()) == ["older"]  # and no litter
        return caught.value


@pytest.fixture
def site(exported: Exported, tmp_path: Path) -> Site:
    return Site(exported("base"), tmp_path)


# -- what is right passes


def test_the_same_export_without_sabotage_passes_and_its_figures_are_small(site: Site) -> None:
    """The control of every test below; the older bundle is replaced."""
    bundle = export_bundle(site.export.checkpoint, site.folder / "new")
    parity = bundle.manifest.parity
    assert (parity["blocks"], parity["batch"], parity["tolerance"]) == (256, 1, TOLERANCES["fp32"])
    assert len(parity["logits_error"]) == len(parity["state_error"]) == len(parity["fam_norm"]) == 256
    assert 0 < max(*parity["logits_error"], *parity["state_error"]) < 5e-5
    assert parity["argmax_agreement"] > 0.999
    with fx.load(bundle, threads=1) as session:
        result = replay(bundle.read("golden.safetensors"), session.backend.open(), 5e-5)
        assert (result.blocks, len(result.logits_error)) == (8, 8)
    assert export_bundle(site.export.checkpoint, site.folder / "older", parity_blocks=256).id == bundle.id
    assert sorted(path.name for path in site.folder.iterdir()) == ["new", "older"]
    assert tree(site.folder / "new") == tree(site.folder / "older")


# -- sabotage of the weights


SWAPS = {
    "keys_and_values": ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"),
    "one_weight_of_two_layers": ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    "gate_and_up": ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"),
    "norms": ("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"),
    "embeddings_and_head": ("model.embed_tokens.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_two_weights_swapped_in_the_weight_file(site: Site, monkeypatch: pytest.MonkeyPatch, swap: str) -> None:
    names, real = SWAPS[swap], pipeline.checkpoint_source

    def swapped(*args: Any, **options: Any) -> Any:
        source = real(*args, **options)
        other = dict(zip(names, reversed(names), strict=True))
        return replace(source, load=lambda name: source.load(other.get(name, name)))

    monkeypatch.setattr(pipeline, "checkpoint_source", swapped)
    site.refused()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(site: Site, tmp_path: Path, precision: str, value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    weights = dict(site.export.weights)
    weights[name] = weights[name].clone()
    weights[name][3, 5] = value
    checkpoint = save(tmp_path.parent / f"{tmp_path.name} damaged", BASE, weights)
    site.refused(NumericError, name.replace(".", r"\."), checkpoint, 2, precision=precision)


def test_a_weight_beyond_float16_is_named(site: Site, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    weights = dict(site.export.weights)
    weights[name] = weights[name].clone()
    weights[name][0, 0] = -70_000.0
    checkpoint = save(tmp_path.parent / f"{tmp_path.name} large", BASE, weights)
    error = site.refused(NumericError, "does not fit float16", checkpoint, 2, precision="fp16")
    assert name in str(error)
    assert "7e+04" in str(error)
    assert export_bundle(checkpoint, tmp_path / "fp32", parity_blocks=2).manifest.precision == "fp32"


# -- sabotage of the loop


def test_feedback_dropped(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrtLoop, "commit", lambda self: None)
    site.refused()
    site.refused(target="new")


@pytest.mark.parametrize("name", [spec.name for spec in contract_for(BASE).states])
def test_a_state_tensor_left_out_of_the_update(site: Site, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def commit(self: OrtLoop) -> None:
        old = self.buffers[self.current][name].copy()
        HostLoop.commit(self)
        self.buffers[self.current][name][...] = old

    monkeypatch.setattr(OrtLoop, "commit", commit)
    site.refused(match="past_|logits")


def test_constant_output(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is right throughout: only a comparison of the logits sees it."""
    first: dict[int, np.ndarray] = {}
    real = OrtLoop.advance

    def advance(self: OrtLoop, fed: np.ndarray, out: np.ndarray) -> None:
        real(self, fed, out)
        out[...] = first.setdefault(id(self), out.copy())

    monkeypatch.setattr(OrtLoop, "advance", advance)
    site.refused(match="at block 1: logits")


@pytest.mark.parametrize("block", [0, 37, 255])
@pytest.mark.parametrize("value", [float("nan"), 1e3])
def test_one_wrong_number_in_one_block(site: Site, monkeypatch: pytest.MonkeyPatch, block: int, value: float) -> None:
    seen: dict[int, int] = {}
    real = OrtLoop.advance

    def advance(self: OrtLoop, fed: np.ndarray, out: np.ndarray) -> None:
        real(self, fed, out)
        if seen.setdefault(id(self), 0) == block:
            out[0, 2, 5] = value
        seen[id(self)] += 1

    monkeypatch.setattr(OrtLoop, "advance", advance)
    site.refused(match=f"at block {block}: logits", blocks=block + 1)


def test_an_error_that_comes_late_and_builds_up_slowly(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block changes FAM by less than the tolerance: no single step shows it, nor do the first hundred blocks."""

    def commit(self: OrtLoop) -> None:
        HostLoop.commit(self)
        fam = self.buffers[self.current]["past_fam_01"]
        fam *= 1 + 1e-5

    monkeypatch.setattr(OrtLoop, "commit", commit)
    error = site.refused(blocks=FULL_BLOCKS)
    assert int(str(error).split("at block ")[1].split(":")[0]) > 64


# -- sabotage of the graph


def edited(monkeypatch: pytest.MonkeyPatch, edit: Callable[[ir.Graph], None]) -> None:
    """Change the traced graph before it is written."""
    real = pipeline.trace_step

    def trace_step(*args: Any, **options: Any) -> Any:
        model = real(*args, **options)
        edit(model.graph)
        return model

    monkeypatch.setattr(pipeline, "trace_step", trace_step)


def value(graph: ir.Graph, name: str) -> ir.Value:
    return next(v for v in (*graph.inputs, *graph.outputs) if v.name == name)


@pytest.mark.parametrize("layer", ["00", "01"])
def test_one_layers_fam_is_not_updated(site: Site, monkeypatch: pytest.MonkeyPatch, layer: str) -> None:
    def edit(graph: ir.Graph) -> None:
        keep = ir.node("Identity", [value(graph, f"past_fam_{layer}")])
        old = value(graph, f"present_fam_{layer}")
        at = list(graph.outputs).index(old)
        keep.outputs[0].name, old.name = old.name, f"{old.name}_dropped"
        keep.outputs[0].dtype, keep.outputs[0].shape = old.dtype, old.shape
        graph.append(keep)
        graph.outputs[at] = keep.outputs[0]

    edited(monkeypatch, edit)
    site.refused(match=f"at block 0: past_fam_{layer}")


def test_one_layers_fam_is_written_but_never_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 reads layer 0's: block 0, where F_0 is read, is right, and the next is not."""

    def edit(graph: ir.Graph) -> None:
        mine, other = value(graph, "past_fam_01"), value(graph, "past_fam_00")
        for node, index in list(mine.uses()):
            node.replace_input_with(index, other)

    edited(monkeypatch, edit)
    site.refused(match="at block 1:")


def test_keys_of_the_two_layers_exchanged(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(graph: ir.Graph) -> None:
        first, second = value(graph, "past_key_00"), value(graph, "past_key_01")
        uses = [(list(first.uses()), second), (list(second.uses()), first)]
        for places, other in uses:
            for node, index in places:
                node.replace_input_with(index, other)

    edited(monkeypatch, edit)
    site.refused()


def test_the_wrong_attention_scale(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """One percent off, in the translation to ONNX."""
    real, op = trace.primitive_translations, torch.ops.aten.scaled_dot_product_attention.default

    def table() -> Mapping[Any, Any]:
        right = real()

        @functools.wraps(right[op])
        def wrong(query: Any, *args: Any, **options: Any) -> Any:
            return right[op](query, *args, **{**options, "scale": 1.01 * query.shape[3] ** -0.5})

        return {**right, op: wrong}

    monkeypatch.setattr(trace, "primitive_translations", table)
    monkeypatch.setattr(pipeline, "trace_step", trace.trace_step)  # traced anew
    site.refused()


def test_all_of_memory_visible_from_the_start(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask that hides unfilled memory is missing in the graph alone; it matters in a stream's first M blocks."""
    right = FamModel._mask

    def trace_step(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(FamModel, "_mask", lambda self, count: right(self, count + 99))
            return trace.trace_step(*args, **options)

    monkeypatch.setattr(pipeline, "trace_step", trace_step)
    site.refused(match="at block 0:")


# -- what else can stop an export


@pytest.mark.parametrize("stage", ["trace", "weights", "parity"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_in_the_middle(site: Site, stage: str, stop: type[BaseException]) -> None:
    def progress(where: str, done: int, total: int) -> None:
        if where == stage and done:
            raise stop(stage)

    site.refused(stop, stage, progress=progress)
    site.refused(stop, stage, progress=progress, target="new")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"precision": "fp8"}, "precision must be one of fp32, fp16, bf16, int8, int4, got 'fp8'"),
        ({"inputs": "text"}, "inputs must be one of tokens, inputs_embeds, got 'text'"),
        ({"logits": "first"}, "logits must be one of all, last, got 'first'"),
        ({"batch": 0}, "batch must be a positive number or 'dynamic', got 0"),
        ({"batch": -1}, "batch"),
        ({"batch": True}, "batch"),
        ({"batch": "static"}, "batch must be a positive number or 'dynamic', got 'static'"),
        ({"batch": 1.5}, "batch"),
        ({"opset": 17}, "opset 17 is not supported; expected one of 18, 19, 20, 21, 22, 23"),
        ({"opset": 24}, "opset 24 is not supported"),
        ({"blocks": 0}, "parity_blocks must be at least 1, got 0"),
        ({"blocks": -3}, "parity_blocks must be at least 1, got -3"),
        ({"tolerance": float("inf")}, "tolerance must be a positive, finite number, got inf"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_options_that_cannot_be(site: Site, options: dict[str, Any], match: str) -> None:
    site.refused(UsageError, match, **options)


def test_a_tolerance_that_nothing_meets_and_sources_that_are_none(site: Site, tmp_path: Path) -> None:
    said = "allowed is 1e-12; nothing was published; export with a higher --precision, or with a larger --tolerance"
    site.refused(ParityError, said, tolerance=1e-12)
    site.refused(UsageError, "no such path", tmp_path / "nowhere")
    site.refused(CheckpointError, "is a bundle, expected a checkpoint", site.folder / "older")


def test_a_target_that_is_not_a_bundle_is_left_alone(site: Site, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a bundle"):
        export_bundle(site.export.checkpoint, theirs, parity_blocks=2)
    assert tree(theirs) == {"thesis.txt": b"years of work"}


# -- FAM's growth


def test_growth_is_noted_where_fam_grows_and_not_where_it_settles(site: Site, tmp_path: Path) -> None:
    grown = export_bundle(site.export.checkpoint, tmp_path / "grown").manifest.parity
    note = growth_note(grown)
    assert note is not None
    assert f"{grown['fam_growth']:.1f}x over 256 blocks" in note
    assert grown["fam_growth"] > 4  # nothing holds it back: a straight line from 0 gives (15/16) / (3/16) = 5

    # The feed-forward of these weights is -x/2 after the norm, which pulls FAM back.
    config = replace(
        BASE,
        num_hidden_layers=1,
        model_type="fam",
        gated_mlp=False,
        activation="relu",
        intermediate_size=32,
        norm_eps=1.0,
    )
    weights, eye, layer = random_weights(config, 1, 0.7), torch.eye(16), "model.layers.0"
    weights[f"{layer}.self_attn.o_proj.weight"] *= 0.5
    weights[f"{layer}.post_attention_layernorm.weight"] = torch.ones(16)
    weights[f"{layer}.mlp.up_proj.weight"] = torch.cat([eye, -eye])
    weights[f"{layer}.mlp.down_proj.weight"] = torch.cat([-eye, eye], 1) / 2
    settled = export_bundle(save(tmp_path / "calm", config, weights), tmp_path / "settled").manifest.parity
    assert min(settled["fam_norm"]) > 0.05  # it is there
    assert settled["fam_growth"] < 1.5
    assert growth_note(settled) is None


def test_a_model_without_fam_has_no_growth(exported: Exported) -> None:
    parity = exported("no_fam").bundle.manifest.parity
    assert parity["fam_growth"] is None
    assert growth_note(parity) is None


# -- the comparison itself, without ONNX


CONTRACT = StepContract(
    block_size=3,
    memory_segments=0,
    fam_length=1,
    vocab_size=5,
    batch=2,
    logits="all",
    inputs=(TensorSpec("tokens", "int64", (2, 3)),),
    states=(TensorSpec("past_count", "int64", (2,)), TensorSpec("past_fam_00", "float32", (2, 1, 4))),
)
TABLE = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def small_step(tokens: Tensor, state: State, growth: float = 0.5) -> tuple[Tensor, State]:
    x = TABLE[tokens]
    new = growth * state["past_fam_00"] + x.mean(1, keepdim=True)
    return (x + state["past_fam_00"]) @ TABLE.T, {"past_count": state["past_count"] + 1, "past_fam_00": new}


class SmallLoop(HostLoop):
    """``small_step`` in a loop; ``error`` is added to the logits."""

    def __init__(self, error: float = 0.0, growth: float = 0.5) -> None:
        super().__init__(CONTRACT, 2)
        self.error, self.growth, self.zeroed, self.blocks = error, growth, [], 0

    def advance(self, fed: np.ndarray, out: np.ndarray) -> None:
        past = {name: torch.from_numpy(array) for name, array in self.buffers[self.current].items()}
        logits, new = small_step(torch.from_numpy(fed), past, self.growth)
        out[...] = logits.numpy() * (1 + self.error)
        for name, tensor in new.items():
            self.buffers[1 - self.current][name][...] = tensor.numpy()
        self._computed(True, False)
        self.blocks += 1

    def append(self, fed: np.ndarray, length: np.ndarray, out: np.ndarray) -> None:
        raise AssertionError("the contract has no append_step")

    def end_block(self) -> None:
        raise AssertionError("the contract has no commit_block")

    def zero(self, rows: Any) -> None:
        self.zeroed.append((self.blocks, rows))
        super().zero(rows)


def test_the_measured_error_is_the_relative_one_and_the_tolerance_is_sharp() -> None:
    for error in (1e-3, 0.1):
        report, _ = check_parity(SmallLoop(error), small_step, blocks=20, tolerance=1.01 * error)
        assert np.allclose(report.logits_error, error, rtol=1e-3)
        assert max(report.state_error) == 0
        assert report.worst == max(report.logits_error)
        with pytest.raises(ParityError, match="at block 0: logits by"):
            check_parity(SmallLoop(error), small_step, blocks=20, tolerance=0.99 * error)


def test_rows_are_out_of_step_and_the_golden_rollout_ends_before_that() -> None:
    loop = SmallLoop()
    report, golden = check_parity(loop, small_step, blocks=12, tolerance=1e-9)
    assert loop.zeroed == [(4, [1])]
    assert len(golden.inputs) == 4
    assert golden.state["past_count"].tolist() == [4, 4]
    assert report.worst == 0
    # A loop whose reset does nothing is caught.
    stuck = SmallLoop()
    stuck.zero = lambda rows: None
    with pytest.raises(ParityError, match="at block 4: "):
        check_parity(stuck, small_step, blocks=12, tolerance=1e-9)


@pytest.mark.parametrize(("growth", "noted"), [(1.0, True), (0.5, False)])
def test_growth_of_a_known_recurrence(growth: float, noted: bool) -> None:
    """Without decay the state is a random walk with drift; with decay it stays where it is after a few blocks."""
    step = functools.partial(small_step, growth=growth)
    report, _ = check_parity(SmallLoop(growth=growth), step, blocks=256, tolerance=1e-5)
    assert (growth_note(report.to_dict()) is not None) == noted


def test_blocks_to_compare_are_256_and_fewer_only_for_large_models() -> None:
    assert default_blocks(None) == FULL_BLOCKS == 256
    assert default_blocks(1_000) == 256
    assert default_blocks(int(1e11)) == 15
    assert default_blocks(int(1e15)) == 2


def test_a_checkpoint_can_be_given_opened(exported: Exported, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(exported("base").checkpoint)
    assert export_bundle(checkpoint, tmp_path / "bundle", parity_blocks=2).id == exported("base").bundle.id
    assert config_of("base") == checkpoint.config
    with pytest.raises((ContractError, UsageError)):
        export_bundle(torch.nn.Linear(2, 2), tmp_path / "other", parity_blocks=2)
