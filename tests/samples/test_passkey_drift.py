"""The drift of FAM over many blocks, and the plots, on a small random model: it knows no key, but its streams are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import famexport as fx
from samples.passkey import drift, plots
from samples.passkey.task import DIGITS, FILLERS, FORMS, Task
from samples.passkey.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
BLOCK, ROWS, BLOCKS = 256, 2, 7
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "block_size": BLOCK,
    "memory_segments": 1,
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import torch

    folder, made, threads = tmp_path_factory.mktemp("passkey"), {}, torch.get_num_threads()
    torch.set_num_threads(1)  # threads only cost time at these sizes
    for name, layers, fam_length, batch in (("fam", 2, 8, "dynamic"), ("bswa", 1, 0, 1)):
        config = fx.FamConfig(**SIZES, num_hidden_layers=layers, fam_length=fam_length)
        checkpoint = fx.init_checkpoint(folder / f"{name}-checkpoint", config)
        (checkpoint / "tokenizer.json").write_bytes(byte_tokenizer())
        made[name] = fx.export_bundle(checkpoint, folder / name, batch=batch, parity_blocks=8).path
    torch.set_num_threads(threads)
    return made


@pytest.fixture
def session(bundles: dict[str, Path]) -> Iterator[fx.Session]:
    with fx.load(bundles["fam"], "ort-cpu", threads=1) as session:
        yield session


@pytest.mark.parametrize(
    ("blocks", "expected"), [(1, [1]), (2, [1, 2]), (7, [1, 2, 5, 7]), (100, [1, 2, 5, 10, 20, 50, 100])]
)
def test_looks(blocks: int, expected: list[int]) -> None:
    assert drift.looks(blocks) == expected


@pytest.mark.parametrize("kind", FILLERS)
def test_the_key_is_said_once_and_never_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "TILE", 4)
    task, keys = Task("text"), np.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 0]])
    blocks = list(islice(drift.text(task, kind, keys, BLOCK, 3), 10))
    assert {block.shape for block in blocks} == {(2, BLOCK)}
    assert all(block.flags.carray for block in blocks)
    for row, key in enumerate(("12345", "98760")):
        first, *others = (bytes(block[row].astype(np.uint8)).decode() for block in blocks)
        assert FORMS["text"].statement.format(key=key) in first
        assert "pass key" not in "".join(others)
        assert len(set(others)) == len(others) or kind == "paper"  # the next tile is another
    again = list(islice(drift.text(task, kind, keys, BLOCK, 3), 10))
    assert all((a == b).all() for a, b in zip(blocks, again, strict=True))


def test_a_question_stands_in_one_block() -> None:
    task, keys = Task("text"), np.random.default_rng(0).integers(0, 10, (50, DIGITS))
    exam = drift.questions(task, "docs", keys, BLOCK, 1, 20)
    for tokens, begin, key in zip(exam.tokens, exam.begins, keys, strict=True):
        said = FORMS["text"].question + "".join(map(str, key))
        assert bytes(tokens.astype(np.uint8)).decode()[: begin + DIGITS].endswith(said)
    assert exam.tokens.shape == (50, BLOCK)
    assert len(set(exam.begins)) > 20
    assert (drift.questions(task, "docs", keys, BLOCK, 1, 50).tokens != exam.tokens).any()
    with pytest.raises(ValueError, match="a block of 32 tokens is too short for a question and its answer of"):
        drift.questions(task, "docs", keys, 32, 1, 20)


class Clairvoyant:
    """A stream that says the next token, but for one digit of the second row; and counts its blocks."""

    def __init__(self, wrong: int) -> None:
        self.wrong, self.blocks = wrong, 3

    def snapshot(self) -> int:
        return self.blocks

    def restore(self, saved: int) -> None:
        self.blocks = saved

    def step(self, tokens: np.ndarray, out: np.ndarray) -> None:
        self.blocks += 1
        out[...] = 0
        for row, ids in enumerate(tokens):
            out[row, np.arange(len(ids) - 1), ids[1:]] = 1
        out[1, self.wrong - 1, 0] = 2


def test_an_answer_is_read_where_it_is_given() -> None:
    task, keys = Task("compact"), np.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 0]])
    exam = drift.questions(task, "words", keys, 64, 1, 5)
    stream: Any = Clairvoyant(int(exam.begins[1]) + 4)
    right = drift.ask(stream, exam, np.empty((2, 64, 256), np.float32))
    assert right.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert stream.blocks == 3


def test_asking_leaves_the_streams_as_they_were(session: fx.Session) -> None:
    task = Task("text")
    found = list(drift.drift(session, task, "docs", BLOCKS, ROWS, seed=1))
    keys = np.random.default_rng([1, ROWS]).integers(0, 10, (ROWS, DIGITS))
    norms = []
    with session.stream(ROWS) as stream:
        for tokens in islice(drift.text(task, "docs", keys, BLOCK, 1), BLOCKS):
            stream.step(tokens)
            fam = [past for name, past in sorted(stream.state().items()) if "fam" in name]
            norms.append([np.sqrt((past.astype(np.float64) ** 2).sum(-1)).mean() for past in fam])
    assert [look["blocks"] for look in found] == [1, 2, 5, 7]
    for look in found:
        assert look["fam_norm"] == pytest.approx(norms[look["blocks"] - 1], rel=1e-4)
    assert norms[0] != pytest.approx(norms[-1], rel=0.1)


def test_memory_stays_constant(session: fx.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "TILE", 16)
    monkeypatch.setattr(drift, "looks", lambda blocks: list(range(50, blocks + 1, 50)))
    used = [look["rss_bytes"] for look in drift.drift(session, Task("text"), "docs", 300, ROWS, seed=1)]
    assert len(used) == 6
    assert used[-1] - used[1] < 10e6  # one block's logits, kept 200 times, would be 105 MB


def test_the_commands(bundles: dict[str, Path], tmp_path: Path) -> None:
    """As they are typed, drift where torch cannot be imported; the plots, byte for byte the same twice."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('drift needs no torch')\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for name, options in (("fam", ["--rows", str(ROWS)]), ("bswa", [])):
        command = [sys.executable, "samples/passkey/drift.py", str(bundles[name]), "--blocks", str(BLOCKS)]
        command += ["--filler", "docs", "--seed", "1", *options, "--out", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        report = json.loads((tmp_path / name).read_text())
        *lines, last = done.stdout.splitlines()
        assert json.loads(last) == report
        assert [line.partition(" blocks")[0] for line in lines] == ["1", "2", "5", "7"]
        assert (report["bundle"], report["precision"], report["block_size"]) == (name, "fp32", BLOCK)
        for look in report["looks"]:
            assert look["tokens"] == look["blocks"] * BLOCK
            assert look["keys"] == (ROWS if name == "fam" else 1)
            assert 0 <= look["exact"] <= look["digits"] < 1  # nobody taught it
            assert len(look["fam_norm"]) == (2 if name == "fam" else 0)
            assert all(norm > 0 for norm in (*look["fam_norm"], look["latency_ms_p50"]))
    options = ["--drift", str(tmp_path / "fam"), str(tmp_path / "bswa"), "--out"]
    command = [sys.executable, "samples/passkey/plots.py", *options, str(tmp_path / "once")]
    subprocess.run(command, cwd=ROOT, check=True)
    plots.main([*options, str(tmp_path / "twice")])
    drawn = [(tmp_path / folder / plots.NORM).read_bytes() for folder in ("once", "twice")]
    assert [path.name for path in (tmp_path / "once").iterdir()] == [plots.NORM]
    assert drawn[0] == drawn[1]
    shown = texts(drawn[0])
    assert {"fam, fp32, filler: docs", "layer 0", "layer 1", "a key was lost", "blocks"} <= shown
    assert not any("bswa" in word for word in shown)  # it has no norm


def texts(drawn: bytes) -> set[str]:
    found = ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")
    return {"".join(node.itertext()) for node in found}


def evaluation(*results: tuple[str, str, int, float], sabotage: str | None = None) -> dict[str, Any]:
    made = []
    for bundle, precision, tokens, exact in results:
        norm = [] if bundle.startswith("bswa") else [3.0, 4.0]
        one = {"bundle": bundle, "precision": precision, "filler": "docs", "tokens": tokens, "keys": 50}
        made.append({**one, "exact": exact, "digits": exact, "fam_norm": norm})
    return {"sabotage": sabotage, "form": "text", "results": made}


def test_recall_is_a_line_for_each_bundle_and_precision(tmp_path: Path) -> None:
    first = evaluation(("a", "fp32", 65_536, 0.9), ("a", "fp32", 1_024, 1.0), ("h", "fp16", 1_024, 1.0))
    second = evaluation(("a", "fp32", 65_536, 0.6), ("bswa", "fp32", 65_536, 0.0))
    second["results"][0]["keys"] = 100
    third = evaluation(("a", "fp32", 65_536, 0.0), sabotage="zero")
    lines = plots.recall_lines([first, second, third])
    assert list(lines.values()) == [
        {1_024: 1.0, 65_536: 0.7},
        {1_024: 1.0},
        {65_536: 0.0},
        {65_536: 0.0},
    ]
    names = ["FAM, fp32", "FAM, fp16", "BSWA, no FAM", "FAM cleared after every block, fp32"]
    assert plots.labels(list(lines)) == names
    files = []
    for report in (first, second, third):
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(json.dumps(report))
    for folder in ("once", "twice"):
        plots.main(["--evaluation", *map(str, files), "--out", str(tmp_path / folder)])
    drawn = (tmp_path / "once" / plots.RECALL).read_bytes()
    assert drawn == (tmp_path / "twice" / plots.RECALL).read_bytes()
    assert {*names, "1,024", "65,536", "keys answered exactly, %"} <= texts(drawn)
    assert b"dc:date" not in drawn


def test_labels_say_what_differs() -> None:
    two = evaluation(("a", "fp32", 1_024, 1.0), ("b", "fp32", 1_024, 1.0), ("bswa", "int8", 1_024, 0.0))
    two["results"][1]["filler"] = "words"
    assert plots.labels(list(plots.recall_lines([two]))) == [
        "FAM, fp32, docs",
        "FAM, fp32, words",
        "BSWA, no FAM, docs",
    ]
    two["results"][1]["filler"] = "docs"
    assert plots.labels(list(plots.recall_lines([two]))) == ["FAM, fp32 (a)", "FAM, fp32 (b)", "BSWA, no FAM"]


def test_the_plots_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        plots.main(["--out", str(tmp_path)])
    assert "give reports with --evaluation, --drift, or both" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "a.json").write_text(json.dumps(evaluation(("a", "fp32", 1_024, 1.0))))
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        plots.main(["--evaluation", str(tmp_path / "a.json"), "--out", str(tmp_path)])
