"""SmolLM2-135M's real weights on real text: streaming, generation and chat against transformers' own model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import famexport as fx
from famexport.chat_template import chat_template, stop_ids
from famexport.runtime.feeding import bundle_tokenizer, token_source
from famexport.runtime.score import log_probabilities
from samples.demo import fetch_model, long_text
from samples.passkey import task
from samples.passkey.streams import recall
from samples.passkey.task import Task
from samples.passkey.train import arguments, encoder, initial_model
from tests.runtime.cpu_ring import CpuRingBackend

TOKENS, NEW_TOKENS = 2048, 48
QUESTIONS = ["What is the capital of France?", "Write one sentence about the sea."]
ADAPTER = Path(task.__file__).parent / "checkpoints" / "smollm2-adapter"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """F = 0 and memory for every block: an ordinary causal model."""
    target = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    return fx.convert_checkpoint(fetch_model(), target, block_size=128, memory_segments=TOKENS // 128, fam_length=0)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> fx.Bundle:
    target = checkpoint.parent / "bundle"
    return fx.export_bundle(checkpoint, target, graphs="all", chunks=(1, 16), parity_blocks=2)


@pytest.fixture(scope="module")
def peer(checkpoint: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    opened = fx.open_checkpoint(checkpoint)
    hf = json.loads((checkpoint / "config.json").read_text())
    hf.pop("fam")
    model = LlamaForCausalLM(LlamaConfig(**hf)).float().eval()
    weights = {name: opened.tensor(name).float() for name in opened.tensors}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    model.tie_weights()
    return model


def test_stream_equals_transformers_on_real_text(bundle: fx.Bundle, peer: Any, tmp_path: Path) -> None:
    """Argmax agrees on 99.9 % of 2,048 tokens, the mean loss within 1e-3."""
    text = tmp_path / "text.txt"
    text.write_text(long_text()[:20_000])
    ids = np.concatenate(list(token_source(bundle, text)))[:TOKENS]
    assert len(ids) == TOKENS
    with fx.load(bundle, "ort-cpu") as session, session.stream() as stream:
        got = np.concatenate([logits[0] for logits in stream.feed([ids[:100], ids[100:777], ids[777:]])])
    with torch.inference_mode():
        wanted = peer(torch.from_numpy(ids[None])).logits[0].numpy()
    agreement = float((got.argmax(-1) == wanted.argmax(-1)).mean())
    loss, peer_loss = (-log_probabilities(x[:-1], ids[1:]).mean() for x in (got, wanted))
    print(f"argmax agreement {agreement:.4%}, loss {loss:.6f} against {peer_loss:.6f}")
    assert agreement >= 0.999
    assert abs(loss - peer_loss) < 1e-3
    assert peer_loss < 4.0  # it reads English: the weights are in their places on both sides


@pytest.mark.parametrize("message", QUESTIONS)
def test_greedy_tokens_equal_transformers(bundle: fx.Bundle, peer: Any, message: str) -> None:
    """Token for token, while the window holds everything."""
    tokenizer = bundle_tokenizer(bundle)
    stop = stop_ids(bundle, tokenizer)
    prompt = tokenizer.encode(chat_template(bundle).opening(message), add_special_tokens=False).ids
    with fx.load(bundle, "ort-cpu") as session, session.stream() as stream:
        got = list(stream.generate(prompt, NEW_TOKENS, stop=stop))
    with torch.inference_mode():
        given = torch.tensor([prompt])
        made = peer.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=sorted(stop),
            pad_token_id=min(stop),
        )
    wanted = [token for token in made[0, len(prompt) :].tolist() if token not in stop]
    assert got == wanted
    assert got


def test_graphs_made_for_cuda_choose_the_same_tokens(bundle: fx.Bundle) -> None:
    """In float32 on the CPU, over a block's end."""
    opening = chat_template(bundle).opening(QUESTIONS[0])
    prompt = (bundle_tokenizer(bundle).encode(opening, add_special_tokens=False).ids * 8)[:124]
    with fx.load(bundle, "ort-cpu") as session:
        ring = fx.Session(bundle, CpuRingBackend(session))
        with session.stream() as portable, ring.stream() as made:
            got, wanted = (list(stream.generate(prompt, 8)) for stream in (made, portable))
    assert got == wanted


def test_chat_answers_a_short_prompt(bundle: fx.Bundle) -> None:
    """The command as it is typed; the second question is understood from the first."""
    asked = f"{QUESTIONS[0]}\nAnd of Italy?\n"
    command = [sys.executable, "-m", "famexport", "chat", str(bundle.path), "--max-new-tokens", "24"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, timeout=300)
    first, second = done.stdout.splitlines()
    assert "Paris" in first
    assert "Rome" in second


@pytest.mark.parametrize("adapted", [True, False])
def test_the_adapter_gives_it_a_memory(tmp_path: Path, adapted: bool) -> None:
    """With M = 0, nothing of the first block is left in the second but what FAM keeps."""
    options: dict[str, Any] = {"lora": ADAPTER} if adapted else {"fam_length": 32}
    made = fx.convert_checkpoint(fetch_model(), tmp_path / "made", block_size=256, memory_segments=0, **options)
    words = ["-o", "nowhere", "--start", str(made), "--block-size", "256", "--fam-length", "32"]
    start = fx.open_checkpoint(made)
    model, asked = initial_model(arguments(words), start), Task("text", encoder(start))
    found = recall(model, asked, "paper", 2 * 256, 4 if adapted else 2, 7, "cpu")
    assert found >= 0.75 if adapted else found == 0
