"""``append_step`` and ``commit_block`` as exported: T tokens appended and committed are one ``block_step``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import pytest
from safetensors.torch import load_file

import famexport as fx
from famexport.bundle import describe_files, open_bundle, write_manifest
from famexport.contract import GRAPH_KEY, METADATA_KEY, OPEN_LENGTH, GraphIO, StepContract, contract_for
from famexport.errors import BundleError, ContractError, ParityError, UsageError
from famexport.export import pipeline, trace
from famexport.export.pipeline import export_bundle
from famexport.export.trace import Step
from famexport.rotary import Rope
from famexport.runtime.backend import Arrays, Loop, to_public
from tests.export.helpers import BASE, Case, Export, half, random_weights, save
from tests.export.test_closed_loop import BOUNDS, row_errors
from tests.export.test_graph import specs
from tests.export.test_parity import Site

ONE = {"num_hidden_layers": 1}  # each graph more takes a second to trace
NO_FAM, NO_MEMORY = {"fam_length": 0}, {"memory_segments": 0}
CASES: dict[str, Case] = {
    "base": Case(ONE, {"chunks": (1,)}),
    "base_rows": Case({}, {"chunks": (1, 3), "batch": 3}),
    "no_fam": Case({**ONE, **NO_FAM}, {"chunks": (1,)}),
    "no_fam_rows": Case({**ONE, **NO_FAM}, {"chunks": (3,), "batch": 3}),
    "no_memory": Case({**ONE, **NO_MEMORY}, {"chunks": (1,)}),
    "no_memory_rows": Case({**ONE, **NO_MEMORY}, {"chunks": (3,), "batch": 3}),
    "neither": Case({**ONE, **NO_FAM, **NO_MEMORY}, {"chunks": (1, 3)}),
    "neither_rows": Case({**ONE, **NO_FAM, **NO_MEMORY}, {"chunks": (1,), "batch": 3}),
    "fp16": half({"chunks": (3,), "precision": "fp16"}, ONE),
    "bf16": half({"chunks": (3,), "precision": "bf16", "batch": 3}, ONE),
    "opset23": Case({**ONE, "model_type": "qwen3", "qk_norm": True}, {"chunks": (3,), "batch": 3, "opset": 23}),
    "last_embeds": Case(ONE, {"chunks": (3,), "batch": 3, "inputs": "inputs_embeds", "logits": "last"}),
}
BLOCKS = 12
# Largest relative error of one row's logits, or of one row of a state. Measured at worst: 5e-7, 6e-4, 0: the two ways
# differ where a product has one row and not several, which is summed in another order, and else not at all.
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}
Made = Callable[[str], Export]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    found: dict[str, Export] = {}

    def get(name: str) -> Export:
        if name not in found:
            case, folder = CASES[name], tmp_path_factory.mktemp(name)
            config = replace(BASE, **case.config)
            weights = random_weights(config, case.seed, case.peak)
            checkpoint = save(folder / "checkpoint", config, weights)
            bundle = export_bundle(checkpoint, folder / "bundle", graphs="all", parity_blocks=8, **case.options)
            found[name] = Export(case, config, weights, checkpoint, bundle, [])
        return found[name]

    return get


def random_input(contract: StepContract, positions: int, batch: int) -> np.ndarray:
    rng, fed = np.random.default_rng(3), contract.inputs[0]
    if fed.dtype == "int64":
        return rng.integers(0, contract.vocab_size, (batch, positions))
    return rng.standard_normal((batch, positions, *fed.shape[2:])).astype(np.float32)


# -- the graphs compute what block_step does


def block_steps(loop: Loop, tokens: np.ndarray) -> tuple[np.ndarray, list[Arrays]]:
    """Logits of every block [blocks, b, T or 1, V], and the state after it."""
    contract, size, states = loop.contract, loop.contract.block_size, []
    logits = np.empty((BLOCKS, *contract.outputs[0].sized(loop.batch)), np.float32)
    for block in range(BLOCKS):
        loop.advance(tokens[:, block * size : (block + 1) * size], logits[block])
        loop.commit()
        states.append(loop.read())
    return logits, states


def state_errors(contract: StepContract, row: int, got: Arrays, wanted: Arrays) -> Iterator[float]:
    for spec in contract.states:
        pair = (to_public(arrays[spec.name][row : row + 1], spec.dtype) for arrays in (got, wanted))
        yield from row_errors(*pair)


@pytest.mark.parametrize("name", CASES)
def test_a_block_step_is_its_tokens_appended_and_committed(made: Made, name: str) -> None:
    """Rows out of step: each takes what it likes of a chunk, or nothing, and the last starts again once."""
    contract, options = made(name).bundle.contract, made(name).case.options
    size, batch, total, every = (
        BASE.block_size,
        options.get("batch", 1),
        BLOCKS * BASE.block_size,
        contract.logits == "all",
    )
    tokens, rng, errors = random_input(contract, total, batch), np.random.default_rng(1), []
    with fx.load(made(name).bundle, threads=1) as session:
        loop, at, rounds, idle, parted = session.backend.open(), [0] * batch, 0, 0, 0
        wanted, states = block_steps(session.backend.open(), tokens)
        while min(at) < total:
            rounds += 1
            if rounds == 23:
                loop.zero([batch - 1])
                at[batch - 1] = 0
            width = contract.chunks[rng.integers(len(contract.chunks))]
            length = [int(rng.integers(0, min(width, size - a % size, total - a) + 1)) for a in at]
            fed = random_input(contract, width, batch)
            for r, n in enumerate(length):
                fed[r, :n] = tokens[r, at[r] : at[r] + n]
            logits = np.empty((batch, width if every else 1, contract.vocab_size), np.float32)
            before = loop.read()
            loop.append(fed, np.array(length), logits)
            loop.commit()
            appended, full = loop.read(), [n > 0 and (a + n) % size == 0 for a, n in zip(at, length, strict=True)]
            loop.end_block()
            loop.commit()
            committed = loop.read()
            for r, n in enumerate(length):
                block, start, at[r] = at[r] // size, at[r] % size, at[r] + n
                if n and every:
                    errors += row_errors(logits[r, :n], wanted[block, r, start : start + n])
                elif full[r]:
                    errors += row_errors(logits[r], wanted[block, r])
                if not n:
                    idle += 1
                    assert all(np.array_equal(before[key][r], appended[key][r]) for key in before)
                if full[r]:
                    errors += state_errors(contract, r, committed, states[block])
                    assert not any(committed[s.name][r].any() for s in contract.open_states)
                else:
                    assert all(np.array_equal(appended[key][r], committed[key][r]) for key in committed)
            parted += any(full) and not all(full)
    print(f"{name}: worst relative error {max(errors):.2e}")
    assert max(errors) < TOLERANCES[made(name).precision]
    assert idle > 5
    assert batch == 1 or parted > 5


@pytest.mark.parametrize("name", ["base", "base_rows", "bf16", "last_embeds"])
def test_the_manifest_has_the_figures_of_both_ways(made: Made, name: str) -> None:
    parity = made(name).bundle.manifest.parity
    for figures in (parity, parity["append"]):
        assert figures["blocks"] == len(figures["logits_error"]) == len(figures["state_error"]) == 8
        assert 0 < max(*figures["logits_error"], *figures["state_error"]) < BOUNDS[made(name).precision]


# -- files


@pytest.mark.parametrize("name", ["base", "base_rows", "no_fam_rows", "bf16", "opset23", "last_embeds"])
def test_graphs_manifest_and_contract_agree(made: Made, name: str) -> None:
    export, options = made(name), made(name).case.options
    given = {key: options[key] for key in ("batch", "inputs", "logits", "chunks") if key in options}
    contract, manifest = export.bundle.contract, export.bundle.manifest
    assert contract == contract_for(export.config, export.precision, **given)
    narrow, *wide = contract.chunks
    assert set(manifest.graphs) == {"block_step", "append_step", "commit_block", *(f"append_step_c{c}" for c in wide)}
    assert contract.graph("append_step").chunk == narrow
    for graph, files in manifest.graphs.items():
        assert files.file == f"{graph}.onnx"
        on_cpu = {"ort-cpu"} if export.precision == "bf16" else set()
        on_cuda = {"ort-cuda", "ort-cuda-start", "ort-cuda-fused"} if contract.batch != "dynamic" else set()
        assert set(files.variants) == on_cpu | on_cuda
        for path in (export.bundle.path / n for n in (files.file, *(files.variants[key] for key in on_cpu))):
            onnx.checker.check_model(path, full_check=True)
            model = onnx.load(path, load_external_data=False)
            metadata = {entry.key: entry.value for entry in model.metadata_props}
            assert metadata[GRAPH_KEY] == model.graph.name == graph
            assert metadata[METADATA_KEY] == contract.to_json()
            assert specs(model.graph.input) == list(contract.graph(graph).taken)
            assert specs(model.graph.output) == list(contract.graph(graph).given)
            assert [o.version for o in model.opset_import] == [export.opset]
            assert not {"If", "Loop", "Scan", "ScatterND", "NonZero"} & {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("name", ["base", "no_memory_rows", "fp16", "bf16", "last_embeds"])
def test_all_graphs_point_at_the_one_weight_file_which_has_no_byte_more(made: Made, name: str, tmp_path: Path) -> None:
    export, options = made(name), dict(made(name).case.options)
    del options["chunks"]
    alone = export_bundle(export.checkpoint, tmp_path / "alone", parity_blocks=2, **options)
    assert alone.manifest.files["weights.safetensors"] == export.bundle.manifest.files["weights.safetensors"]
    kinds = {path.suffix for path in export.bundle.path.iterdir()}
    assert kinds == {".onnx", ".json", ".safetensors"}
    places: dict[str, set[tuple[str, ...]]] = {}
    for path in export.graphs:
        inside = 0
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                places.setdefault(tensor.name, set()).add((where["location"], where["offset"], where["length"]))
            else:
                inside += len(tensor.raw_data)
        assert inside < 16 * 1024
    assert {place[0] for each in places.values() for place in each} == {"weights.safetensors"}
    assert all(len(each) == 1 for each in places.values())  # the same weight lies in one place for all
    assert places.keys() == load_file(export.bundle.path / "weights.safetensors").keys()


def test_graphs_exchanged_under_a_new_manifest_are_refused(made: Made, tmp_path: Path) -> None:
    """Every hash is right: only the graphs' own word can tell."""
    bundle = made("base_rows").bundle
    for swap in (("append_step", "commit_block"), ("append_step", "append_step_c3"), ("block_step", "append_step")):
        path = Path(shutil.copytree(bundle.path, tmp_path / "-".join(swap)))
        first, second = (path / f"{graph}.onnx" for graph in swap)
        data = first.read_bytes(), second.read_bytes()
        first.write_bytes(data[1]), second.write_bytes(data[0])
        write_manifest(path, replace(bundle.manifest, files=describe_files(path)))
        with pytest.raises(BundleError, match="2 problems") as caught:
            open_bundle(path)
        for name, other in (swap, swap[::-1]):
            assert f"{name}.onnx says it is '{other}', the manifest has it as {name}" in str(caught.value)
    for a, b in (("append_step", "commit_block"), ("append_step", "append_step_c3")):
        graphs = {**bundle.manifest.graphs, a: bundle.manifest.graphs[b], b: bundle.manifest.graphs[a]}
        path = Path(shutil.copytree(bundle.path, tmp_path / f"named {a} {b}"))
        write_manifest(path, replace(bundle.manifest, graphs=graphs))
        with pytest.raises(BundleError, match=f"{b}.onnx says it is '{b}', the manifest has it as {a}"):
            open_bundle(path)


# -- an export whose append_step or commit_block is wrong is refused


def wrong(change: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]) -> Callable[[Step], Step]:
    """A step whose new state is ``change(old, new)``."""

    def sabotage(step: Step) -> Step:
        def wrong_step(*args: Any) -> Any:
            given = step(*args)
            if isinstance(given, dict):
                return change(args[-1], given)
            return given[0], change(args[-1], given[1])

        return wrong_step

    return sabotage


def keep(*prefixes: str) -> Callable[[Step], Step]:
    """Those parts of the state are given back as they came."""
    return wrong(lambda old, new: {k: old[k].clone() if k.startswith(prefixes) else v for k, v in new.items()})


def logits_of_before(step: Step) -> Step:
    return lambda fed, length, state: step((fed + 1) % BASE.vocab_size, length, state)


SABOTAGE = {
    "keys are not written": ("append_step", keep("past_open_key")),
    "another token is appended": ("append_step", logits_of_before),
    "FAM is not updated": ("commit_block", keep("past_fam")),
    "memory does not move": ("commit_block", keep("past_value")),
    "the block stays open": ("commit_block", keep(OPEN_LENGTH)),
}


@pytest.fixture
def site(made: Made, tmp_path: Path) -> Site:
    return Site(made("base"), tmp_path)


def sabotaged(patch: pytest.MonkeyPatch, kind: str, sabotage: Callable[[Step], Step]) -> None:
    shared = pipeline.trace_step

    def trace_step(module: Any, step: Step, io: GraphIO, opset: int, device: str) -> Any:
        if io.name != kind:
            return shared(module, step, io, opset, device)
        return trace.trace_step(module, sabotage(step), io, opset, device)

    patch.setattr(pipeline, "trace_step", trace_step)


@pytest.mark.parametrize("what", SABOTAGE)
def test_a_wrong_graph_is_not_published(site: Site, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    sabotaged(monkeypatch, *SABOTAGE[what])
    site.refused(ParityError, "differs from the float32 torch step at block [01]: ", graphs="all", blocks=3)


def test_positions_off_by_one_are_not_published(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Rope.at
    sabotaged(monkeypatch, "append_step", lambda step: step)  # traced anew
    monkeypatch.setattr(Rope, "at", lambda self, positions: plain(self, (positions - 1).clamp(min=0)))
    site.refused(ParityError, "at block 0: ", graphs="all", blocks=3)


def test_a_state_that_append_step_may_not_give(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotaged(monkeypatch, "append_step", wrong(lambda old, new: {**new, "past_count": old["past_count"]}))
    site.refused(ContractError, "the new state has 'past_count', which the contract does not", graphs="all")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"graphs": "some"}, UsageError, "graphs must be one of block, all, got 'some'"),
        (
            {"chunks": (1, 4)},
            UsageError,
            r"chunks \[1, 4\] are of append_step, which graphs='block' leaves out; give 'all'",
        ),
        ({"graphs": "all", "chunks": ()}, UsageError, r"chunks must be positive numbers of positions, got \[\]"),
        ({"graphs": "all", "chunks": (0,)}, UsageError, r"chunks must be positive numbers of positions, got \[0\]"),
        ({"graphs": "all", "chunks": (True,)}, UsageError, r"chunks must be positive numbers"),
        (
            {"graphs": "all", "chunks": (1, 5)},
            UsageError,
            "a chunk of 5 does not fit a block of 4 positions; export with --chunk 4",
        ),
    ],
)
def test_options_that_cannot_be(site: Site, options: dict[str, Any], error: type[Exception], match: str) -> None:
    site.refused(error, match, **options)
