"""The measurement at scale, tried out on the CPU at the smallest size: on a GPU only sizes differ."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch

from famexport.config import preset
from samples.scale import attention, fam, meter
from samples.scale.__main__ import main

LENGTHS = (16, 64, 96)
SIZES = ["--preset", "tiny", "--block-size", "8", "--lengths", *map(str, LENGTHS)]
FAM = ["fam", *SIZES, "--fam-length", "4", "--memory-segments", "2", "--backend", "ort-cpu", "--blocks", "12"]


def report_of(path: Path, printed: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    summary = json.loads(printed.splitlines()[-1])
    assert summary == {name: value for name, value in report.items() if name != "latencies_ms"}
    return report


def check_stream(report: dict[str, Any]) -> None:
    assert [(at["length"], at["tokens"]) for at in report["at_tokens"]] == [(n, n) for n in LENGTHS]
    assert [at["seconds"] for at in report["at_tokens"]] == sorted(at["seconds"] for at in report["at_tokens"])
    assert report["at_tokens"][-1]["seconds"] == pytest.approx(sum(report["latencies_ms"]) / 1e3, abs=2e-3)
    assert list(report["at_block"]) == ["10"]
    assert len(report["latencies_ms"]) == report["blocks"] == 12
    assert report["tokens_per_s"] == pytest.approx(96e3 / sum(report["latencies_ms"]), rel=0.01)
    assert report["memory"] == "resident memory of the process"
    assert all(at["used_bytes"] == at["rss_bytes"] > 1e7 for at in (*report["at_tokens"], report["at_block"]["10"]))


@pytest.mark.parametrize("more", [[], ["--unwritten", "--precision", "bf16"]], ids=["written", "unwritten"])
def test_a_stream_from_a_random_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    out, places = tmp_path / "fam.json", tmp_path / "places"
    places.mkdir()
    main([*FAM, *more, "--dir", str(places), "--out", str(out)])
    printed = capsys.readouterr().out
    report = report_of(out, printed)
    check_stream(report)
    assert report["checkpoint"] == ("unwritten" if more else "written")
    assert set(report["phases_s"]) == {"checkpoint", "export", "load", "warm up", "stream"}
    assert set(report["export_s"]) == {"trace", "weights", "parity"}
    assert report["parity"]["blocks"] == 1
    assert report["constant_to_the_byte"] is None  # of a device's memory alone
    assert list(places.iterdir()) == []
    assert "weights 100%" in printed


def test_a_bundle_that_is_kept_is_streamed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FAM, "--dir", str(tmp_path), "--bundle", str(tmp_path / "kept" / "bundle")]
    main([*words, "--out", str(tmp_path / "first.json")])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("famexport")] == []
    main([*words, "--out", str(tmp_path / "again.json")])
    printed = capsys.readouterr().out
    again = report_of(tmp_path / "again.json", printed)
    check_stream(again)
    assert set(again["phases_s"]) == {"open", "load", "warm up", "stream"}
    with pytest.raises(SystemExit, match="another model or precision"):
        main([*words, "--memory-segments", "1", "--out", str(tmp_path / "other.json")])


class Usage(NamedTuple):
    free: int


def test_where_the_checkpoint_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first place with room, beside a bundle that is not there yet; none where there is none."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100))
    assert fam.with_room([tmp_path], 99) == tmp_path
    assert fam.with_room([tmp_path], 100) is None
    assert fam.with_room([tmp_path], 60, beside=tmp_path) is None
    assert fam.with_room([tmp_path], 40, beside=tmp_path) == tmp_path


def test_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FAM, "--dir", str(tmp_path), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(300_000_000))
    main(words)  # one, not both
    printed = capsys.readouterr().out
    assert "a checkpoint beside the bundle has no room" in printed
    assert report_of(tmp_path / "out.json", printed)["checkpoint"] == "unwritten"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100_000_000))
    with pytest.raises(SystemExit, match="no room for a bundle of 0.2 GB: .* has 0.1 GB free"):
        main(words)


def test_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["attention", *SIZES, "--precision", "fp32", "--device", "cpu", "--out", str(tmp_path / "a.json")])
    report = report_of(tmp_path / "a.json", capsys.readouterr().out)
    check_stream(report)
    assert report["stopped"] is None
    assert report["cache_bytes_per_token"] == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, Dh, float32


def test_attention_in_pieces_is_attention_in_one() -> None:
    """Over a cache that has grown several times, in a model of grouped heads."""
    config = preset("tiny", fam_length=0, memory_segments=0)
    torch.manual_seed(0)
    decoder = attention.Decoder(config, torch.float32, "cpu")
    for weights in decoder.layers:
        for matrix in (weights.qkv, weights.out, weights.gate_up, weights.down):
            matrix.mul_(20)
    tokens = torch.randint(0, config.vocab_size, (1, 20 * 8))
    pieces = [decoder.step(piece) for piece in tokens.split(8, 1)]
    assert decoder.caches[0].shape[1] > attention.GROWTH * 8 * 2
    decoder.at = 0
    whole = decoder.step(tokens)
    torch.testing.assert_close(pieces[-1], whole, rtol=1e-4, atol=1e-5)
    decoder.at = 0
    other = decoder.step(tokens.roll(1, 1))
    assert not torch.allclose(other, whole, rtol=1e-2)  # all of them count


def test_the_end_of_memory_is_reported() -> None:
    calls = iter([None, None, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")])

    def step() -> None:
        if error := next(calls):
            raise error

    report = meter.stream(step, blocks=9, block_size=8, lengths=(8, 64), device="cpu")
    assert report["blocks"] == 2
    assert report["stopped"] == {"tokens": 16, "reason": "CUDA out of memory"}
    assert [at["length"] for at in report["at_tokens"]] == [8]


def test_the_plot_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: list[Path] = []
    runs = (("8b", "fam", None), ("8b", "attention", {"tokens": 104_000}), ("1b", "fam", None))
    for name, mode, stopped in runs:
        at = {"tokens": 25_600, "length": 26_000, "seconds": 1.5, "used_bytes": 20_000_000_000}
        late = {"tokens": 103_424, "length": 103_000, "seconds": 6.0, "used_bytes": 21_000_000_000}
        report: dict[str, Any] = {"mode": mode, "preset": name, "precision": "fp16", "stopped": stopped}
        report |= {"gpu": "a <GPU>"}
        report |= {
            "config": {"block_size": 1024},
            "at_tokens": [at, late],
            "at_block": {"10": {**at, "tokens": 10_240}},
        }
        report["latencies_ms"] = [60.0] * 200
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(json.dumps(report))
    out = tmp_path / "scale.svg"
    main(["plot", *map(str, files), "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| s / GB | 26k | 103k | 258k |"
    assert lines[2] == "| 8b, FAM, famexport | 1.50 / 20.00 | 6.00 / 21.00 | - |"
    assert lines[3].endswith("| 6.00 / 21.00 | out of memory after 104k |")
    assert lines[-1] == "| the paper, TPUv4 | 16.5 / 4.5 | - | 154.9 / 16.1 |"
    drawn = out.read_bytes()
    root = ElementTree.fromstring(drawn)
    text = " ".join("".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text"))
    for words in ("8b", "1b", "seconds", "memory in use, GB", "thousand tokens", "out of memory", "a <GPU>, fp16"):
        assert words in text
    assert b'href="http' not in drawn
    main(["plot", *map(str, files), "--out", str(out)])
    assert out.read_bytes() == drawn


def test_the_plot_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        main(["plot", str(tmp_path / "a.json"), "--out", str(tmp_path / "a.svg")])
