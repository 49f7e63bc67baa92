"""Loss and agreement on text: what is measured, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import famexport as fx
from famexport.cli import main
from famexport.contract import StepContract, TensorSpec
from famexport.errors import InvalidInputError, NumericError, UsageError
from famexport.export.quality import check_quality, quality_ids, unmeasured
from tests.conftest import tiny_tokenizer

VOCABULARY, SIZE = 16, 4
CONTRACT = StepContract(
    block_size=SIZE,
    memory_segments=0,
    fam_length=0,
    vocab_size=VOCABULARY,
    batch=1,
    logits="all",
    inputs=(TensorSpec("tokens", "int64", (1, SIZE)),),
    states=(TensorSpec("past_count", "int64", (1,)),),
)
IDS = np.random.default_rng(0).integers(0, VOCABULARY, 6 * SIZE)


class _Loop:
    """Gives the logits of ``sharpness`` for the token that comes next."""

    contract, batch = CONTRACT, 1

    def __init__(self, sharpness: float) -> None:
        self.at, self.sharpness = 0, sharpness

    def advance(self, fed: np.ndarray, out: np.ndarray) -> None:
        assert (fed[0] == IDS[self.at : self.at + SIZE]).all()
        out[...] = 0
        for row, token in enumerate(IDS[self.at + 1 : self.at + 1 + SIZE]):
            out[0, row, token] = self.sharpness
        self.at += SIZE

    def commit(self) -> None:
        pass


def _reference(sharpness: float) -> Any:
    loop = _Loop(sharpness)

    def step(fed: torch.Tensor, state: Any) -> Any:
        out = np.empty((1, SIZE, VOCABULARY), np.float32)
        loop.advance(fed.numpy(), out)
        return torch.from_numpy(out), state

    return step


def _loss(sharpness: float) -> float:
    return float(np.log(np.exp(sharpness) + VOCABULARY - 1) - sharpness)


def test_losses_are_those_of_the_text() -> None:
    loop: Any = _Loop(2.0)
    found = check_quality(loop, _reference(3.0), IDS, 10.0, text="a text")
    assert found.loss == pytest.approx(_loss(2.0), abs=1e-5)
    assert found.reference_loss == pytest.approx(_loss(3.0), abs=1e-5)
    assert found.loss_increase == pytest.approx(_loss(2.0) - _loss(3.0), abs=1e-5)
    assert found.argmax_agreement == 1.0
    assert found.tokens == len(IDS)


@pytest.mark.parametrize("sharpness", [0.0, float("nan")])
def test_past_the_limit_is_refused(sharpness: float) -> None:
    limit, loop = _loss(0.0) - _loss(3.0), _Loop(0.0)
    if np.isfinite(sharpness):
        check_quality(loop, _reference(3.0), IDS, limit + 0.01, text="t")  # type: ignore[arg-type]
    broken: Any = _Loop(sharpness)
    with pytest.raises(NumericError, match="nothing was published"):
        check_quality(broken, _reference(3.0), IDS, limit - 0.01, text="t")


def test_text_is_cut_to_whole_blocks(tmp_path: Path) -> None:
    tokenizer, text = tmp_path / "tokenizer.json", tmp_path / "text.txt"
    tokenizer.write_bytes(tiny_tokenizer())
    text.write_text("a stone falls " * 5)
    ids = quality_ids(CONTRACT, tokenizer, text, None)
    assert ids.shape == (12,)
    text.write_text("a stone falls")
    with pytest.raises(InvalidInputError, match=r"/text\.txt, has 3 tokens, expected at least 8 .*--quality-text"):
        quality_ids(CONTRACT, tokenizer, text, None)


def test_a_text_that_is_too_short_is_refused_before_what_takes_long(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(*_: Any) -> None:
        raise AssertionError("it was traced first")

    monkeypatch.setattr("famexport.export.pipeline._trace", traced)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("")
    with pytest.raises(InvalidInputError, match=r"/text\.txt, has 0 tokens"):
        fx.export_bundle(checkpoints("text"), out, precision="int8", quality_text=text)
    with pytest.raises(UsageError, match="cannot be used: the checkpoint has no tokenizer"):
        fx.export_bundle(checkpoints("plain"), out, precision="int8", quality_text=text)
    assert not out.exists()


def test_what_cannot_be_measured_says_why() -> None:
    assert unmeasured(CONTRACT, True) is None
    assert "no tokenizer" in str(unmeasured(CONTRACT, False))


def _export(checkpoint: Path, target: Path, *options: str) -> Any:
    with pytest.raises(SystemExit) as done:
        main(["export", str(checkpoint), "-o", str(target), "--parity-blocks", "2", *options])
    return done.value.code or 0


@pytest.mark.slow
def test_smollm2_keeps_its_loss_in_int8_and_not_in_int4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The limits by default: int8 is published, int4 is refused with exit code 6 and leaves nothing."""
    from samples.demo import fetch_model

    checkpoint = tmp_path / "checkpoint"
    fx.convert_checkpoint(fetch_model(), checkpoint, block_size=128, memory_segments=3, fam_length=0)
    capsys.readouterr()  # where the model had to be fetched, that was said
    assert _export(checkpoint, tmp_path / "int8", "--precision", "int8", "--json") == 0
    quality = json.loads(capsys.readouterr().out)["parity"]["quality"]
    print(quality)
    assert quality["reference_loss"] < 4.0  # it reads English
    assert -0.01 < quality["loss_increase"] <= 0.05
    assert quality["argmax_agreement"] > 0.85
    assert _export(checkpoint, tmp_path / "int4", "--precision", "int4", "--quiet") == 6
    assert "allowed is +0.1" in capsys.readouterr().err
    assert not (tmp_path / "int4").exists()
