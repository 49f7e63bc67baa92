"""``run --generate``, ``run --save-state``, ``chat`` and ``bench --mode token``, as they are typed."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_commands import Command

import famexport as fx
from famexport.errors import InvalidInputError
from tests.chatting import WORDS, talking_checkpoint

Bundles = Callable[[str], Path]


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """Exported by the command line itself."""
    folder = tmp_path_factory.mktemp("talk")
    checkpoint = talking_checkpoint(folder / "checkpoint", make_checkpoint)
    options = ["--graphs", "all", "--chunk", "4", "--chunk", "1", "--parity-blocks", "2", "-q"]
    from famexport.cli import _run

    assert _run(["export", str(checkpoint), "-o", str(folder / "bundle"), *options], False) == 0
    return folder / "bundle"


@pytest.fixture
def famexport(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def give(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return give


def greedy(bundle: Path, prompt: list[int], count: int) -> list[int]:
    """What the library generates, the end token left out."""
    with fx.load(bundle, threads=1) as session, session.stream() as stream:
        return list(stream.generate(prompt, count, stop={WORDS.index("<|end|>")}))


def test_export_says_which_graphs(famexport: Command, talking: Path) -> None:
    facts = famexport.json("inspect", talking)
    assert facts["chunks"] == [1, 4]
    assert sorted(facts["graphs"]) == ["append_step", "append_step_c4", "block_step", "commit_block"]
    assert facts["parity"]["append_error"] < 1e-4
    verified = famexport.json("verify", talking)
    assert verified["append_blocks"] == 2
    assert verified["append_error"] < 1e-4


def test_generate_text(famexport: Command, talking: Path, stdin: Callable[[str], None]) -> None:
    prompt = "what is the sea made of and why"
    ids = [WORDS.index(word) for word in prompt.split()]
    wanted = greedy(talking, ids, 30)
    stdin(prompt)
    result = famexport.json("run", talking, "--generate", 30)
    assert result["tokens_generated"] == wanted
    assert result["generated"] == len(wanted) > 0
    assert result["tokens"] == len(ids)
    stdin(prompt)
    text = famexport("run", talking, "--generate", 30)
    assert text == result["text"] + "\n"
    assert f"{len(wanted)} tokens, ms per token p50" in famexport.err  # figures do not mix with the text
    stdin(prompt)
    assert famexport("run", talking, "--generate", 30, "--quiet") == text


def test_generate_ids(famexport: Command, bundles: Bundles, stdin: Callable[[str], None]) -> None:
    stdin("5 6 7")
    with fx.load(bundles("all"), threads=1) as session, session.stream() as stream:
        wanted = list(stream.generate([5, 6, 7], 12))
    assert [int(i) for i in famexport("run", bundles("all"), "--generate", 12, "-q").split()] == wanted


def test_generate_on_block_step_alone_is_slow_and_says_so(
    famexport: Command, bundles: Bundles, stdin: Callable[[str], None]
) -> None:
    stdin("5 6 7")
    assert len(famexport("run", bundles("plain"), "--generate", 5).split()) == 5
    assert "each token costs a block; export it with --graphs all" in famexport.err


def test_sampling_options_reach_the_sampler(famexport: Command, talking: Path, stdin: Callable[[str], None]) -> None:
    made = []
    for options in (
        (),
        ("--temperature", 2, "--seed", 1),
        ("--temperature", 2, "--seed", 1),
        ("--temperature", 2, "--top-k", 1),
    ):
        stdin("what is rain")
        made.append(famexport.json("run", talking, "--generate", 20, *options)["tokens_generated"])
    plain, drawn, again, best = made
    assert plain == best != drawn == again
    famexport("run", talking, "--generate", 5, "--top-p", 1.5, code=2)  # before any input is read
    assert "top_p must be above 0 and at most 1, got 1.5" in famexport.err
    famexport("run", talking, "--save-state", talking / "none" / "state", code=2)
    assert "no such directory" in famexport.err


def test_saved_state_goes_on(famexport: Command, talking: Path, tmp_path: Path, stdin: Callable[[str], None]) -> None:
    """Cut in the middle of a block: what follows, scores too, is what an uncut stream fed the same pieces gives."""
    first, second, state = "what is the sea made of " * 3, "and why rain", tmp_path / "state"
    stdin(first)
    famexport("run", talking, "--save-state", state, "-q")
    saved = state.read_bytes()
    stdin(second)
    got = famexport.json("run", talking, "--load-state", state, "--generate", 9)
    tokens = [[WORDS.index(word) for word in text.split()] for text in (first, second)]
    with fx.load(talking, threads=1) as session, session.stream() as stream:
        for part in tokens:
            for _ in stream.feed([np.array(part)]):
                pass
        wanted = list(stream.generate([], 9, stop={WORDS.index("<|end|>")}))
    assert got["tokens_generated"] == wanted
    assert got["tokens"] == 3
    assert state.read_bytes() == saved
    stdin("")
    assert famexport.json("run", talking, "--load-state", state, "--generate", 2)["generated"] > 0  # nothing to add
    for options in ((), ("--generate", 2)):
        stdin("")
        shown = famexport("run", talking, "--load-state", state, *options) + famexport.err
        assert "0 in 0 whole blocks" in shown
        assert "after the first block" not in shown
        assert "at the end" in shown


@pytest.mark.parametrize(
    ("name", "says"), [("last", "logits at block ends only"), ("embeds", "it cannot generate"), ("rows", "--batch 1")]
)
def test_what_cannot_generate_is_said_before_the_input_is_read(
    famexport: Command, bundles: Bundles, stdin: Callable[[str], None], name: str, says: str
) -> None:
    stdin("1 2 3")
    famexport("run", bundles(name), "--generate", 3, code=2)
    assert says in famexport.err
    assert sys.stdin.buffer.read() == b"1 2 3"


def test_end_tokens_are_found_before_the_input_is_read(
    famexport: Command, talking: Path, stdin: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: Any) -> None:
        raise InvalidInputError("no such token")

    monkeypatch.setattr("famexport.chat_template.stop_ids", damaged)
    stdin("what is rain")
    famexport("run", talking, "--generate", 3, code=3)
    assert sys.stdin.buffer.read() == b"what is rain"


def test_states_that_do_not_fit(
    famexport: Command, talking: Path, bundles: Bundles, tmp_path: Path, stdin: Callable[[str], None]
) -> None:
    state = tmp_path / "state"
    stdin("what is rain")
    famexport("run", talking, "--save-state", state, "-q")
    famexport("run", bundles("all"), "--load-state", state, code=3)
    assert "snapshot does not fit" in famexport.err
    assert "it is of model" in famexport.err
    stdin("why")
    famexport("run", talking, "--load-state", state, "--backend", "torch", code=3)
    assert "it was taken on ort-cpu" in famexport.err
    assert "--any-engine" in famexport.err
    stdin("why")
    famexport("run", talking, "--load-state", state, "--backend", "torch", "--any-engine", "-q")
    state.write_bytes(state.read_bytes()[:-1])
    famexport("run", talking, "--load-state", state, code=3)
    famexport("run", talking, "--load-state", tmp_path / "none", code=2)
    assert "no such file" in famexport.err


def test_chat(famexport: Command, talking: Path, stdin: Callable[[str], None]) -> None:
    stdin("what is rain\n\n  and why \n")
    lines = [json.loads(line) for line in famexport("chat", talking, "--json", "--max-new-tokens", 40).splitlines()]
    assert [line["message"] for line in lines] == ["what is rain", "and why"]
    ids = [WORDS.index(word) for word in ["<|user|>", "what", "is", "rain", "<|end|>", "<|assistant|>"]]
    wanted = [WORDS[i] for i in greedy(talking, ids, 40) if not WORDS[i].startswith("<|")]
    assert lines[0]["answer"].replace(" ", "") == "".join(wanted)
    stdin("what is rain\nand why\n")
    plain = famexport("chat", talking, "--max-new-tokens", 40).splitlines()
    assert plain == [line["answer"] for line in lines]


@pytest.mark.parametrize(
    "form", [{"encoding": "utf-8"}, {"encoding": "ascii", "errors": "surrogateescape"}, {"encoding": "latin-1"}]
)
def test_chat_takes_utf_8_whatever_the_locale(
    famexport: Command, talking: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, str]
) -> None:
    given = "what is rain\r\né\n".encode() + b"ab caf\xe9\nand why\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), **form))
    printed = famexport("chat", talking, "--json", "--max-new-tokens", 2, code=3)
    assert [json.loads(line)["message"] for line in printed.splitlines()] == ["what is rain", "é"]
    assert "line 3 of the input: invalid UTF-8 at byte 6" in famexport.err
    assert famexport.err.endswith("; give the text as UTF-8\n")


def test_chat_needs_a_template(famexport: Command, bundles: Bundles, stdin: Callable[[str], None]) -> None:
    stdin("hello\n")
    famexport("chat", bundles("text"), code=2)
    assert "has no chat template" in famexport.err
    famexport("chat", bundles("plain"), code=2)
    assert "has no tokenizer" in famexport.err


def test_bench_token(famexport: Command, bundles: Bundles, tmp_path: Path) -> None:
    arguments: list[Any] = [
        "--mode",
        "token",
        "--tokens",
        20,
        "--prompt",
        11,
        "--backend",
        "ort-cpu",
        "--backend",
        "torch",
    ]
    samples, saved = tmp_path / "samples.json", tmp_path / "report.json"
    printed = famexport("bench", bundles("all"), *arguments, "--samples", samples, "--json", saved)
    report = json.loads(printed.splitlines()[-1])
    assert json.loads(saved.read_text()) == report
    assert "boundary" in printed
    raw = json.loads(samples.read_text())
    for result in report["results"]:
        mine = raw[result["backend"]]
        # the first of each turn of 9, 9 and 5 does not count; tokens 8 and 16 of the 23 complete a block
        assert [len(mine[kind]) for kind in ("first", "token", "boundary")] == [5, 18, 2]
        assert result["tokens"] == 20
        assert result["boundary_tokens"] == 2
        assert result["prompt_tokens"] == 11
        assert result["boundary_ms"]["max"] == max(mine["boundary"])
        assert 0 < result["roofline"]["share"] < 1
    famexport("bench", bundles("plain"), "--mode", "token", code=2)
    assert "export it with --graphs all" in famexport.err


def test_bench_token_refuses_a_wrong_answer(
    famexport: Command, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    from famexport.runtime.torch_loop import TorchLoop

    append = TorchLoop.append

    def wrong(self: TorchLoop, fed: np.ndarray, length: np.ndarray, out: np.ndarray) -> None:
        append(self, fed, length, out)
        out[...] += 1

    monkeypatch.setattr(TorchLoop, "append", wrong)
    famexport("bench", bundles("all"), "--mode", "token", "--backend", "ort-cpu", "--backend", "torch", code=6)
    assert "disagree at warm-up step 0" in famexport.err


def test_chunk_needs_append_step(famexport: Command, tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    famexport("export", checkpoints("plain"), "-o", tmp_path / "b", "--chunk", 4, code=2)
    assert "add --graphs all" in famexport.err
    famexport("export", checkpoints("plain"), "-o", tmp_path / "b", "--graphs", "all", "--chunk", 9, code=2)
    assert "a chunk of 9 does not fit a block of 8 positions" in famexport.err
    assert not (tmp_path / "b").exists()
