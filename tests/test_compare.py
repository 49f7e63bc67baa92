"""``famexport compare``: two backends over a closed loop, with Polygraphy's statistics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from famexport.cli import _run
from famexport.compare import compare
from famexport.errors import UsageError
from famexport.runtime import torch_loop
from famexport.runtime.selftest import report_line, verify


@pytest.mark.parametrize("name", ["plain", "all_rows", "embeds", "fp16"])
def test_backends_agree(bundles: Callable[[str], Path], name: str) -> None:
    found = compare(bundles(name), ("ort-cpu", "torch"), blocks=6)
    assert found["agree"]
    assert found["backends"] == ["ort-cpu", "torch"]
    assert "logits" in found["outputs"]
    assert "present_fam_00" in found["outputs"]
    for value in found["outputs"].values():
        assert 0 <= value["mean_abs"] <= value["max_abs"]
        assert value["relative"] < found["tolerance"]
        assert 0 <= value["worst_block"] < 6


def test_a_backend_that_loses_its_feedback_is_found(
    bundles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sabotage: FAM is not fed back on one of them. The first block agrees, later ones do not."""
    keep = torch_loop.TorchLoop._keep

    def forget(self: Any, new: dict[str, Any]) -> None:
        keep(self, {name: tensor * 0 if "fam" in name else tensor for name, tensor in new.items()})

    monkeypatch.setattr(torch_loop.TorchLoop, "_keep", forget)
    path = bundles("plain")
    found = compare(path, ("torch", "ort-cpu"), blocks=4)
    assert not found["agree"]
    assert found["outputs"]["logits"]["worst_block"] > 0
    assert _run(["compare", str(path), "--backend", "torch", "--backend", "ort-cpu", "--blocks", "4"], False) == 6
    said = capsys.readouterr()
    assert "torch and ort-cpu differ in present_fam" in said.err
    assert "worst block" in said.out


def test_the_command(bundles: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compare", str(bundles("plain")), "--backend", "ort-cpu", "--backend", "torch", "--blocks", "3", "--json"]
    assert _run(line, False) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 3
    assert _run(line[:4], False) == 2
    assert "--backend twice" in capsys.readouterr().err
    assert _run([*line[:5], "ort-cpu"], False) == 2


def test_wrong_calls(bundles: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="two different backends"):
        compare(bundles("plain"), ("torch", "torch"))
    with pytest.raises(UsageError, match="at least 1 block"):
        compare(bundles("plain"), ("torch", "ort-cpu"), blocks=0)


def test_the_row_of_a_device(bundles: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """It has the columns of the last table of docs/verified.md."""
    assert _run(["verify", str(bundles("plain")), "--report"], False) == 0
    row = capsys.readouterr().out.strip().split(" | ")
    page = (Path(__file__).parents[1] / "docs" / "verified.md").read_text()
    (header,) = [line for line in page.splitlines() if line.startswith("| date ")]
    assert len(row) == len(header.split(" | ")) == 7
    assert row[3] == "ort-cpu (CPUExecutionProvider)"
    assert "8 blocks executed, logits" in row[6]


@pytest.mark.parametrize(("kernels", "said"), [("fused", ", fused kernels"), ("not built: famexport kernels", "")])
def test_the_row_says_where_kernels_of_its_own_ran(bundles: Callable[[str], Path], kernels: str, said: str) -> None:
    facts = {**verify(bundles("plain")), "kernels": kernels}
    assert report_line(facts).split(" | ")[3] == f"ort-cpu (CPUExecutionProvider{said})"
