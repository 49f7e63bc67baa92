"""The GPU report, tried out on the CPU: its tables and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from samples import gpu_report


def rows(text: str) -> list[list[str]]:
    """Cells of the lines of backends, of all tables."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| backend")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_tables_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "tiny", "--device", "cpu", "--precision", "fp32", "--blocks", "4", "--tokens", "9"]
    gpu_report.main([*words, "--logits", "last", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert [line.partition(" (")[0] for line in printed.splitlines() if line.startswith("tiny")] == [
        "tiny, fp32, block",
        "tiny, fp32, token",
    ]
    cells = rows(printed)
    assert [row[0] for row in cells] == ["torch", "ort-cpu"] * 2
    assert all(0 < float(row[1]) <= float(row[2]) for row in cells)
    assert all(row[3:5] == ["-", "-"] and row[5].endswith("%") for row in cells)  # no GPU, no torch-compile
    block, token = (json.loads((tmp_path / "out" / f"tiny-fp32-last-{m}.json").read_text()) for m in ("block", "token"))
    assert {name: len(kinds["latency"]) for name, kinds in block["samples_ms"].items()} == {"torch": 4, "ort-cpu": 4}
    assert len(token["samples_ms"]["torch"]["token"]) + len(token["samples_ms"]["torch"]["boundary"]) == 9
    assert f"{block['results'][0]['latency_ms']['p50']:.3f}" == cells[0][1]


def test_the_table_of_a_gpu() -> None:
    """Ratio to torch-compile on the host, the device's time, the share of the limit."""

    def result(backend: str, host: float, device: float | None, share: float | None) -> dict[str, Any]:
        times = {"p50": device} if device else None
        limit = {"share": share} if share else None
        return {"backend": backend, "latency_ms": {"p50": host, "p99": 9.0}, "device_ms": times, "roofline": limit}

    results = [
        result("torch:cuda", 4.0, 3.5, 0.1),
        result("torch-compile:cuda", 2.0, 1.75, 0.25),
        result("ort-cuda", 1.5, None, None),
    ]
    report = {"results": results}
    assert rows("\n".join(gpu_report.table(report, "block", "torch-compile:cuda"))) == [
        ["torch:cuda", "4.000", "9.000", "3.500", "2.000", "10.0%"],
        ["torch-compile:cuda", "2.000", "9.000", "1.750", "1.000", "25.0%"],
        ["ort-cuda", "1.500", "9.000", "-", "0.750", "-"],
    ]


def test_block_mode_alone_exports_block_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[dict[str, Any]] = []

    def stop(checkpoint: Path, bundle: Path, **options: Any) -> None:
        exported.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_report, "export_bundle", stop)
    words = ["--shape", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    for more in (["--mode", "block"], ["--mode", "block", "--graphs", "all", "--parity-blocks", "2"], []):
        with pytest.raises(KeyboardInterrupt):
            gpu_report.main([*words, *more])
    assert [(options["graphs"], options["parity_blocks"]) for options in exported] == [
        ("block", 9),
        ("all", 2),
        ("all", 9),
    ]
    with pytest.raises(SystemExit):
        gpu_report.main([*words, "--graphs", "block"])
    assert len(exported) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "init_checkpoint", lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(SystemExit) as done:
        gpu_report.main(["--shape", "edge", "--out", str(tmp_path / "out")])
    assert done.value.code == 2
    assert "torch sees no GPU here; --device cpu" in capsys.readouterr().err
