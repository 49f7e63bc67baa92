"""``inspect``, ``verify`` and ``bench`` on manifests whose unchecked parts hold anything that JSON can say."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from famexport.bench.measure import bench
from famexport.bench.tokens import bench_tokens
from famexport.bundle import open_bundle
from famexport.contract import QUANTIZED
from famexport.errors import BundleError, IncompatibleError
from famexport.inspection import inspect, layer_counts
from famexport.runtime.selftest import verify
from famexport.runtime.session import load, precision_problem

Bundles = Callable[[str], Path]
NONSENSE: list[Any] = [[], {}, 0, -1, True, "many", None, [None], [[1.0]], ["x"], [{}], {"a": 1}]


@pytest.fixture
def altered(bundles: Bundles, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a bundle with parts of its manifest put in place of its own."""

    def make(name: str, **parts: Any) -> Path:
        path = tmp_path / name
        if not path.exists():
            shutil.copytree(bundles(name), path)
        manifest = replace(open_bundle(bundles(name)).manifest, **parts)
        (path / "manifest.json").write_bytes(manifest.to_bytes())
        return path

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_what_runs_here_is_what_loads(altered: Callable[..., Path], precision: str) -> None:
    path = altered("plain", precision=precision)
    found = inspect(path)["runs_here"]
    assert found == (["ort-cpu"] if precision in QUANTIZED else ["ort-cpu", "torch"])
    for backend in ("ort-cpu", "torch", "torch-compile", "ort-cuda", "tensorrt"):
        assert (precision_problem(precision, backend) is None) == (precision not in QUANTIZED or backend == "ort-cpu")
    if "torch" not in found:
        with pytest.raises(IncompatibleError, match=f"an {precision} bundle .* which torch does not run; use ort-cpu"):
            load(path, "torch")


def test_curves_that_are_none_are_unknown(altered: Callable[..., Path], bundles: Bundles) -> None:
    known = inspect(bundles("all"))["parity"]
    assert 0 < known["logits_error"] < 1e-4
    assert known["append_error"] > 0
    assert known["cut_error"] is None
    curves = ("logits_error", "state_error", "append", "cut")
    for value in NONSENSE:
        found = inspect(altered("all", parity={**dict.fromkeys(curves, value), "blocks": value}))["parity"]
        assert found["blocks"] == value
        assert [found[key] for key in ("logits_error", "state_error", "append_error", "cut_error")] == [None] * 4
        inner = {"logits_error": value, "state_error": value}
        assert inspect(altered("all", parity={"append": inner, "cut": inner}))["parity"]["cut_error"] is None
    cut = {"layers": 2, "logits_error": [1.0, 3], "state_error": [2.0], "append": {"logits_error": [5.0]}}
    found = inspect(altered("all", parity={"cut": cut}))["parity"]
    assert (found["cut_error"], found["append_error"], found["logits_error"]) == (3.0, 5.0, None)


@pytest.mark.parametrize("key", ["batch", "tolerance"])
def test_verify_says_what_is_wrong_with_its_numbers(altered: Callable[..., Path], bundles: Bundles, key: str) -> None:
    good = open_bundle(bundles("dynamic")).manifest.parity
    assert verify(altered("dynamic", parity={**good, key: good[key]}))["golden_blocks"] > 0
    missing = {name: value for name, value in good.items() if name != key}
    for parity in (missing, *({**good, key: value} for value in NONSENSE if value != 0)):
        with pytest.raises(
            BundleError, match=f"parity.{key} of its manifest is .*, expected a number of at least 0; export"
        ):
            verify(altered("dynamic", parity=parity))
    for rows in (0, 1.5, 2**62, good["batch"] * 1000) if key == "batch" else ():
        with pytest.raises(BundleError, match="expected the rows of its golden rollout of .* bytes; export it again"):
            verify(altered("dynamic", parity={**good, key: rows}))


@pytest.mark.parametrize("measure", [bench, bench_tokens])
def test_bench_says_what_is_wrong_before_it_measures(
    altered: Callable[..., Path], bundles: Bundles, monkeypatch: pytest.MonkeyPatch, measure: Callable[..., Any]
) -> None:
    module = f"{measure.__module__}.measure_limits"
    monkeypatch.setattr(module, lambda *_: pytest.fail("it measured first"))
    manifest = open_bundle(bundles("all")).manifest
    for key in ("flops_per_block", "weight_bytes_read"):
        for value in ("dynamic", [], {"a": 1}, True, -1):
            with pytest.raises(BundleError, match=f"cost.{key} of its manifest is .*, expected a number of at least 0"):
                measure(altered("all", cost={**manifest.cost, key: value}), ["ort-cpu"])
    with pytest.raises(BundleError, match="parity.tolerance of its manifest is 'none'"):
        measure(altered("all", parity={**manifest.parity, "tolerance": "none"}), ["ort-cpu"])


def test_layers_of_an_engine_that_are_not_counted(altered: Callable[..., Path]) -> None:
    plan = b"a plan"
    name = f"l4/block_step-{'0' * 16}.plan"
    entry = {
        "graph": "block_step",
        "engine": "tensorrt",
        "bytes": len(plan),
        "sha256": hashlib.sha256(plan).hexdigest(),
        "key": "0" * 16,
        "options": {},
        "device": dict.fromkeys(("tensorrt", "cuda", "compute_capability", "gpu", "os", "arch"), "1"),
        "layers": {"a": 1, "b": [], "c": {"HALF": 3}},
        "io": {},
        "checked": "network",
        "attention": None,
        "build_seconds": 1,
    }
    path = altered("plain", engines={name: entry})
    (path / "engines" / "l4").mkdir(parents=True)
    (path / "engines" / name).write_bytes(plan)
    assert inspect(path / "engines" / name)["layers"] == {"a": "-", "b": "-", "c": "3 HALF"}
    assert inspect(path / "engines" / ".." / "engines" / name)["kind"] == "engine"
    assert layer_counts({"HALF": 2, "FLOAT": 1}) == "2 HALF, 1 FLOAT"
    assert layer_counts(None) == "-"  # of ``famexport build`` where there is no such kind
