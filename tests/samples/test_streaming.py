"""The samples over streams: each does its one job, on a small model, in under 60 lines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import famexport as fx
from samples import generate, many_streams, stream_file
from tests.chatting import talking_checkpoint
from tests.conftest import TEXT

Bundles = Callable[[str], Path]


@pytest.mark.parametrize("module", [generate, many_streams, stream_file])
def test_it_is_short(module: object) -> None:
    assert len(Path(str(module.__file__)).read_text().splitlines()) < 60  # type: ignore[attr-defined]


def test_stream_file_goes_on_where_it_stopped(
    bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, state = tmp_path / "text", tmp_path / "state"
    text.write_text(TEXT * 10)  # 150 words
    stream_file.main(str(bundles("text")), str(text), str(state))
    first, last = capsys.readouterr().out.splitlines()
    assert first == "from token 0 on"
    assert last.startswith("18 blocks, 150 new tokens, ")
    assert "nats per token" in last
    text.write_text(TEXT * 15)
    stream_file.main(str(bundles("text")), str(text), str(state))
    again = capsys.readouterr().out.splitlines()
    assert again[0] == "from token 150 on"  # in the middle of a block
    assert again[1].startswith("28 blocks, 75 new tokens, ")
    whole = fx.Snapshot.load(state)
    state.unlink()
    stream_file.main(str(bundles("text")), str(text), str(state))
    once = fx.Snapshot.load(state)
    assert whole.blocks == once.blocks == 28
    assert whole.open_inputs is not None
    assert np.array_equal(whole.open_inputs, once.open_inputs)
    assert {n: a.tobytes() for n, a in whole.state.items()} == {n: a.tobytes() for n, a in once.state.items()}


def test_many_streams_serves_everyone(bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    many_streams.main(str(bundles("all_dynamic")), 6, 5)
    *users, total = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in users] == [f"user {i}" for i in range(6)]
    assert total.startswith("30 tokens in ")
    many_streams.main(str(bundles("all_dynamic")), 6, 5)
    assert capsys.readouterr().out.splitlines()[:-1] == users  # whoever shared a batch with whom


def test_generate_reads_the_prompt_once(
    tmp_path: Path, make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = talking_checkpoint(tmp_path / "checkpoint", make_checkpoint)
    bundle = fx.export_bundle(checkpoint, tmp_path / "bundle", graphs="all", parity_blocks=2)
    generate.main(str(bundle.path), "what is rain", 12)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines] == ["[temperature 0.0", "[temperature 0.8", "[temperature 0.8"]
    assert all("] what is rain" in line for line in lines)
    assert len(set(lines)) == 3


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["samples/stream_file.py"], 2, "the following arguments are required: bundle, text, state"),
        (["samples/generate.py", "nowhere", "x"], 2, "error: there is no bundle at 'nowhere'"),
        (["samples/many_streams.py", "README.md"], 3, "error: README.md is a file, expected the directory of a bundle"),
        (["samples/many_streams.py", "nowhere", "some"], 2, "argument users: invalid int value: 'some'"),
        (["-m", "samples.passkey.evaluate", "nowhere"], 2, "error: there is no bundle at 'nowhere'"),
        (["-m", "samples.passkey.drift", "nowhere"], 2, "error: there is no bundle at 'nowhere'"),
    ],
)
def test_what_cannot_be_is_said_without_a_traceback(words: list[str], code: int, said: str) -> None:
    root = Path(generate.__file__).parents[1]
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
