"""The pass key: the task and its splits, the streams that train on it, LoRA, the evaluation, the two checkpoints."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

import famexport as fx
from famexport.checkpoint import FAM_WEIGHT, init_checkpoint, open_checkpoint, random_weight
from famexport.config import FamConfig
from famexport.convert import convert
from famexport.errors import UsageError
from famexport.model import FamModel
from famexport.text import open_tokenizer
from samples.passkey import evaluate, lora, streams, train
from samples.passkey.replay import Replayed
from samples.passkey.streams import Options, Streams, fresh, recall
from samples.passkey.task import DIGITS, FILLERS, FORMS, PAPER, Exam, Task
from samples.passkey.tokenizer import byte_tokenizer

CHECKPOINTS = Path(train.__file__).parent / "checkpoints"
KEY = np.array([7, 0, 4, 4, 1])
WINDOW = 64
BLOCK = 64
TINY = ["--width", "32", "--layers", "1", "--heads", "2", "--block-size", str(BLOCK), "--fam-length", "4"]
TINY += ["--form", "compact", "--batch", "4", "--blocks", "2", "--device", "cpu", "--lengths", "128"]


def windows(text: np.ndarray) -> set[bytes]:
    data = text.astype(np.uint8).tobytes()
    return {data[i : i + WINDOW] for i in range(len(data) - WINDOW + 1)}


# The task


@pytest.mark.parametrize("kind", FILLERS)
@pytest.mark.parametrize("form", FORMS)
def test_an_episode_says_the_key_once_and_ends_with_the_question(form: str, kind: str) -> None:
    task, places = Task(form), set()
    said, question = bytes(task.statement(KEY).tolist()), bytes(task.question.tolist())
    assert said.decode() == FORMS[form].statement.format(key="70441")
    assert [said[at : at + DIGITS] for at in task.mentions] == [b"70441"] * 2
    for seed in range(6):
        text = bytes(task.episode(kind, 700, KEY, seed, within=300).tolist())
        assert len(text) == 700
        assert text.count(said) == 1
        assert text.index(said) + len(said) <= 300
        assert text.endswith(question)
        if form == "text":
            assert text.count(b"pass key") == 4  # twice said, twice in the question: none in the filler
        places.add(text.index(said))
    assert len(places) > 3


@pytest.mark.parametrize("kind", FILLERS)
def test_an_episode_comes_from_its_seed(kind: str) -> None:
    task = Task("text")
    first, again, other = (task.episode(kind, 900, KEY, seed, within=400) for seed in (3, 3, 4))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    assert first.tobytes() != task.episode(kind, 900, KEY, 3, within=400, split="train").tobytes()


def test_an_episode_with_no_room_for_the_key_is_refused() -> None:
    task = Task("text")
    size = len(task.statement(KEY))
    shortest = size + len(task.question)
    text = task.episode("docs", shortest, KEY, 0, within=size)
    assert text.tolist() == [*task.statement(KEY), *task.question]
    for length, within in ((shortest, size - 1), (shortest - 1, size)):
        with pytest.raises(ValueError, match="too few"):
            task.episode("docs", length, KEY, 0, within)


def test_an_exam_has_its_answers_where_they_begin() -> None:
    task, size = Task("text"), 512
    exam = task.exam("docs", 1400, 8, seed=5, block=size)
    assert exam.tokens.shape == (8, 3 * size)
    assert len(set(exam.begins.tolist())) > 4
    assert exam.begins.max() <= 1400 < exam.begins.min() + size
    assert len({tuple(key) for key in exam.answers.tolist()}) == 8
    for row, begin, answer in zip(exam.tokens, exam.begins, exam.answers, strict=True):
        assert row[begin : begin + DIGITS].tolist() == answer.tolist()
        text, said = bytes(row[:begin].tolist()), bytes(task.statement(answer - ord("0")).tolist())
        assert text.endswith(FORMS["text"].question.encode())
        assert text.count(said) == 1
        assert text.index(said) + len(said) <= size


def test_the_keys_of_an_exam_come_from_its_seed() -> None:
    task = Task("compact")
    ours, again, *others = (
        task.exam("paper", 128, 20, seed, BLOCK) for seed in (1, 1, 2, train.LOOK, train.FINAL, train.LOOK + 1)
    )
    assert ours.answers.tobytes() == again.answers.tobytes()
    assert ours.tokens.tobytes() == again.tokens.tobytes()
    known = {tuple(key) for exam in others for key in exam.answers.tolist()}
    assert known.isdisjoint(map(tuple, ours.answers.tolist()))
    assert evaluate.arguments(["bundle"]).seed not in (train.LOOK, train.FINAL)


def test_a_tokenizer_without_a_token_for_each_digit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have a token for each digit, got .*\[32, 57\]"):
        Task("text", lambda text: [ord(c) for part in text for c in (" " + part if part == "9" else part)])
    task = Task("text", lambda text: [ord(c) + 1000 for c in text])
    assert task.digits.tolist() == list(range(1048, 1058))
    assert task.exam("docs", 600, 2, 0, 512).tokens.min() >= 1000


def test_nothing_of_the_documentation_for_tests_is_trained_on() -> None:
    task = Task("text")
    trained = windows(task.filler("docs", "train", 600_000, 0))  # all of it, joined in several orders
    for seed in (0, 1):
        trained |= windows(task.filler("docs", "train", 600_000, seed + 1))
        tested = windows(task.filler("docs", "test", 300_000, seed))
        assert len(tested) > 100_000
        assert trained.isdisjoint(tested)


def test_made_up_words_for_tests_are_another_vocabulary() -> None:
    """Short words are few, and so in every vocabulary; of those of three syllables hardly any is in two."""
    task = Task("text")
    texts = {
        (split, seed): task.filler("words", split, 60_000, seed) for split in ("train", "test") for seed in range(3)
    }
    assert len({text.tobytes() for text in texts.values()}) == len(texts)

    def words(text: np.ndarray) -> set[str]:
        found = {word.strip(".").lower() for word in bytes(text.tolist()).decode().split()[1:-1]}
        return {word for word in found if sum(letter in "aeiou" for letter in word) == 3}

    for one, other in itertools.combinations(texts, 2):
        assert len(words(texts[one])) > 300
        assert len(words(texts[one]) & words(texts[other])) < 5
        assert windows(texts[one]).isdisjoint(windows(texts[other]))


def test_the_filler_of_the_paper_is_its_sentences() -> None:
    text = bytes(Task("text").filler("paper", "test", 400, 8).tolist()).decode()
    assert text in PAPER * 6


# The tokenizer


def test_a_byte_is_a_token(tmp_path: Path) -> None:
    text = bytes(range(128)).decode()
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer())
    for tokenizer in (Tokenizer.from_buffer(byte_tokenizer()), open_tokenizer(tmp_path / "tokenizer.json")):
        assert tokenizer.get_vocab_size() == 256
        assert tokenizer.encode(text).ids == list(range(128))
        assert tokenizer.decode(list(range(128))) == text
        assert tokenizer.encode("déjà vu 123").ids == list("déjà vu 123".encode())
        assert tokenizer.decode(list("déjà vu 123".encode())) == "déjà vu 123"
    for name in ("fam", "bswa"):
        assert (CHECKPOINTS / name / "tokenizer.json").read_bytes() == byte_tokenizer()


# Training


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Little text, few keys, one thread; and torch's own settings as they were, afterwards."""

    def fewer(model: FamModel, task: Task, kind: str, length: int, count: int, seed: int, device: str) -> float:
        return recall(model, task, kind, length, 2, seed, device)

    monkeypatch.setattr(streams, "CORPUS", 20_000)
    monkeypatch.setattr(train, "recall", fewer)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def trained(monkeypatch: pytest.MonkeyPatch, output: Path, words: list[str], steps: int) -> list[dict[str, Any]]:
    """So many steps, by a clock that goes on by a second whenever it is asked: twice a step, as every step is logged."""
    ticks = itertools.count()
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    options = ["-o", str(output), *TINY, "--log", "1", "--look", "2", "--minutes", str(2 * steps / 60), *words]
    curve = train.train(train.arguments(options))
    assert [line["step"] for line in curve] == list(range(1, steps + 1))
    return curve


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "words", [["--layers", "2"], ["--fam-length", "0", "--memory-segments", "1"]], ids=["fam", "bswa"]
)
def test_training_gives_a_checkpoint_that_is_exported_and_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    path = tmp_path / "checkpoint"
    curve = trained(monkeypatch, path, [*words, "--lr", "0.5"], steps=4)  # 0.01 in the warm-up, at most
    losses = [line[name] for line in curve for name in ("answer", "language", "copy", "norm", "moved", "growth")]
    assert np.isfinite(losses).all()
    assert all(4 < line["language"] < 8 for line in curve)  # log(256) = 5.5
    assert [len(line.get("recall", [])) for line in curve] == [0, 1, 0, 1]  # after more than two seconds
    report = json.loads((path / "training.json").read_text())
    assert (report["steps"], report["curve"], report["device"]) == (4, curve, "cpu")
    assert set(report["recall"]) == {"tokens", *FILLERS}
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    fam = "--layers" in words
    assert (config.fam_length, config.memory_segments, config.num_hidden_layers) == ((4, 0, 2) if fam else (0, 1, 1))
    assert checkpoint.fam_trained is fam
    assert checkpoint.dtype == "float16"
    for name, entry in checkpoint.tensors.items():
        before = random_weight(name, entry.shape, 0, config.num_hidden_layers).half()
        assert not torch.equal(checkpoint.tensor(name), before), name

    bundle = fx.export_bundle(path, tmp_path / "bundle", batch="dynamic" if fam else 2, parity_blocks=2)
    capsys.readouterr()
    asked = ["--length", "128", "--length", "200", "--keys", "3", "--form", "compact", "--filler", "paper"]
    out = tmp_path / "out.json"
    found = evaluate.main([str(bundle.path), *asked, "--seed", "9", "--sabotage", "zero", "--out", str(out)])
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == json.loads(out.read_text()) == found
    assert [line.partition(": ")[0] for line in lines] == [
        f"bundle F={4 if fam else 0} paper {n} tokens, 3 keys" for n in (128, 200)
    ]
    assert (found["seed"], found["form"], found["sabotage"], found["backend"]) == (9, "compact", "zero", "ort-cpu")
    assert found["device"]
    assert found["versions"]["onnxruntime"]
    for result, length in zip(found["results"], (128, 200), strict=True):
        assert (result["bundle"], result["precision"], result["filler"]) == ("bundle", "fp32", "paper")
        assert (result["tokens"], result["keys"]) == (length, 3)
        assert 0 <= result["exact"] <= result["digits"] <= 1
        assert result["state_bytes"] == bundle.contract.state_bytes()
        assert result["rss_bytes_last"] > 1e7 < result["rss_bytes_first"]
        assert len(result["fam_norm"]) == (2 if fam else 0)


def tiny(words: list[str] | None = None, seed: int = 0) -> tuple[FamModel, Task]:
    options = train.arguments(["-o", "nowhere", *TINY, "--seed", str(seed), *(words or [])])
    torch.manual_seed(seed)
    return train.initial_model(options, None), Task("compact")


@pytest.mark.usefixtures("small")
def test_forty_steps_of_training_lower_the_losses() -> None:
    """Of text by a third, of the key's second mention to about log(10): that digits come, not yet which."""
    model, task = tiny()
    made = Streams(model, task, Options(16, 50, 0.02), "cpu")
    rng, optimizer, losses = np.random.default_rng(0), torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(40):
        found = made.losses(1, rng)
        optimizer.zero_grad()
        (found["answer"] + found["language"] + found["copy"]).backward()
        optimizer.step()
        losses.append([float(found[name].detach()) for name in ("language", "copy")])
    first, last = np.array(losses[:3]).mean(0), np.array(losses[-3:]).mean(0)
    print(first, last)
    assert last[0] < 0.7 * first[0]
    assert last[1] < 0.75 * first[1]


# LoRA


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small llama of bytes without FAM, in other blocks than those it is trained in."""
    config = FamConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        block_size=32,
        memory_segments=2,
        fam_length=0,
    )
    return init_checkpoint(tmp_path / "base", config, seed=3)


def started(path: Path, words: list[str] | None = None) -> FamModel:
    options: Namespace = train.arguments(["-o", "nowhere", *TINY, "--start", str(path), *(words or [])])
    return train.initial_model(options, open_checkpoint(path))


@torch.no_grad()
def rollout(model: FamModel, blocks: int = 3) -> Tensor:
    tokens = torch.randint(0, 256, (2, blocks * BLOCK), generator=torch.Generator().manual_seed(1))
    state, found = fresh(model, 2, "cpu"), []
    for part in tokens.split(BLOCK, 1):
        logits, state = model.step(part, state)
        found.append(logits)
    return torch.cat(found, 1)


def test_an_adapter_starts_as_nothing_and_freezes_all_else(base: Path) -> None:
    model = started(base)
    before = rollout(model)
    adapted = lora.attach(model, 2, 4)
    assert torch.equal(rollout(model), before)
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = {f"{name}.{half}" for name in adapted for half in "ab"}
    assert learnt == {FAM_WEIGHT} | parts
    assert len(adapted) == 2 * 7
    model.step(torch.zeros(1, BLOCK, dtype=torch.int64), fresh(model, 1, "cpu"))[0].sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == learnt


@pytest.mark.usefixtures("small")
def test_a_trained_adapter_is_merged_by_convert(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[FamModel] = []
    save = lora.save

    def noted(folder: Path, model: FamModel, *more: Any) -> None:
        models.append(model)
        save(folder, model, *more)

    monkeypatch.setattr(lora, "save", noted)
    words = ["--start", str(base), "--lora", "2", "--memory-segments", "1"]
    curve = trained(monkeypatch, tmp_path / "adapter", [*words, "--lr", "20"], steps=2)  # 0.1, 0.2 in the warm-up
    assert all(np.isfinite(line["answer"]) and "copy" not in line for line in curve)
    (model,) = models
    frozen = dict(model.named_parameters())
    start = open_checkpoint(base)
    assert all(torch.equal(frozen[name], start.tensor(name)) for name in start.tensors)

    adapter = tmp_path / "adapter"
    with pytest.raises(UsageError, match="trained with block_size 64, the source has 32; say block_size"):
        convert(base, tmp_path / "merged", lora=adapter)
    made = open_checkpoint(convert(base, tmp_path / "merged", lora=adapter, block_size=BLOCK, memory_segments=1))
    assert made.fam_trained
    assert made.config == model.config
    assert (made.config.block_size, made.config.memory_segments, made.config.fam_length) == (BLOCK, 1, 4)
    wanted = rollout(model)
    error = (rollout(started(made.path, words[4:])) - wanted).abs().max()
    moved = (rollout(started(base, words[4:])) - wanted).abs().max()
    print(error, moved, wanted.abs().max())
    assert moved > 0.1 * wanted.abs().max()
    assert error < 2e-3 * moved  # A, B and embeddings lie in float16, each of them 5e-4 off at most


def test_training_goes_on_from_an_adapter(base: Path, tmp_path: Path) -> None:
    models = [started(base, ["--memory-segments", "1"]) for _ in range(3)]
    first, second, other = (lora.attach(model, rank, 4) for model, rank in zip(models, (2, 2, 3), strict=True))
    for pair in first.values():
        torch.nn.init.normal_(pair.b)
    lora.save(tmp_path, models[0], first, 2, 4)
    assert (rollout(models[1]) - rollout(models[0])).abs().max() > 1
    lora.load(tmp_path, models[1], second)
    assert torch.allclose(rollout(models[1]), rollout(models[0]), rtol=0.02, atol=0.05)
    assert all(p.requires_grad for pair in second.values() for p in (pair.a, pair.b))
    with pytest.raises(SystemExit, match=r"lora_A.weight is \(2, 32\), --lora makes it \(3, 32\)"):
        lora.load(tmp_path, models[2], other)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora", "4"], "--lora adapts a checkpoint"),
        (["--lora", "4", "--start", "x", "--fam-length", "0"], "--lora adapts a checkpoint"),
        (["--start", "x", "--adapter", "y"], "it needs --start BASE --lora RANK"),
    ],
)
def test_an_adapter_needs_what_it_is_for(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.arguments(["-o", "nowhere", *words])
    assert said in capsys.readouterr().err


# Replayed steps


def replay_losses(model: FamModel, step: Any) -> tuple[Tensor, list[Tensor]]:
    """A loss over three blocks, each with a question to a copy of the state at other positions; what was learnt."""
    random = torch.Generator().manual_seed(2)
    tokens, at = (torch.randint(0, n, (3, 3 * BLOCK), generator=random) for n in (256, BLOCK))
    begun = state = {n: s.requires_grad_(s.is_floating_point()) for n, s in fresh(model, 3, "cpu").items()}
    loss = torch.zeros(())
    for part in tokens.split(BLOCK, 1):
        logits, state = step(part.contiguous(), state, at[:, :5].contiguous())
        asked, _ = step(part.flip(1).contiguous(), state, at[:, :2].contiguous())
        loss = loss + logits.square().mean() + asked.tanh().mean()
    return loss, [s for s in begun.values() if s.requires_grad]


@pytest.mark.parametrize("memory", [0, 1])
def test_a_replayed_step_has_the_gradients_of_the_step(base: Path, memory: int) -> None:
    model = started(base, ["--memory-segments", str(memory)])
    adapted = lora.attach(model, 2, 4)
    for pair in adapted.values():
        torch.nn.init.normal_(pair.b, std=0.3)
    learnt = [p for p in model.parameters() if p.requires_grad]
    loss, begun = replay_losses(model, model.step)
    loss.backward()
    wanted = [p.grad.clone() for p in (*learnt, *begun)]  # type: ignore[union-attr]
    assert all(bool(g.abs().max() > 0) for g in wanted[: len(learnt)])

    replayed = Replayed(model.step, learnt, "cpu")
    for _ in range(2):  # the second time, nothing is recorded any more
        torch._foreach_zero_([p.grad for p in learnt if p.grad is not None])
        again, begun = replay_losses(model, replayed)
        again.backward()
        assert torch.allclose(again, loss)
        for p, grad in zip((*learnt, *begun), wanted, strict=True):
            assert torch.allclose(p.grad, grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()))  # type: ignore[arg-type]


def test_a_step_gives_logits_of_positions(base: Path) -> None:
    model = started(base)
    tokens, at = torch.randint(0, 256, (2, BLOCK)), torch.tensor([[0, 9, 63], [5, 5, 1]])
    everything, _ = model.step(tokens, fresh(model, 2, "cpu"))
    found, _ = model.step(tokens, fresh(model, 2, "cpu"), at)
    assert torch.allclose(found, everything.gather(1, at[..., None].expand(-1, -1, 256)), atol=1e-5)


# Streams


def with_streams(blocks: int, **options: Any) -> tuple[Streams, FamModel, list[Any]]:
    """Streams that note what each step begins with: the text, the rows with a new key, where, and the state."""
    model, task = tiny(["--memory-segments", "1"])
    for name, p in model.named_parameters():
        if p.dim() > 1:  # so that text moves FAM, which at the start it hardly does
            p.data = random_weight(name, tuple(p.shape), 0, 1) * 5
    made, begun = Streams(model, task, Options(4, 50, 0.1, **options), "cpu"), []
    begin = made._begin

    def noted(count: int) -> Any:
        text, new, start = begin(count)
        begun.append((text.clone(), new.clone(), start.clone(), {n: s.clone() for n, s in made.state.items()}))
        return text, new, start

    made._begin = noted  # type: ignore[method-assign]
    return made, model, begun


@pytest.mark.usefixtures("small")
def test_the_question_never_enters_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made, model, begun = with_streams(2)
    asked: list[Tensor] = []
    ask = made._ask

    def noted(state: Any, *more: Any) -> Any:
        asked.append(state["past_fam_00"].clone())
        return ask(state, *more)

    made._ask = noted  # type: ignore[method-assign]
    rng = np.random.default_rng(0)
    for _ in range(3):
        made.losses(2, rng)
        text, _, _, state = begun[-1]
        with torch.no_grad():
            for part in text.split(BLOCK, 1):
                _, state = model.step(part, state)
        assert all(torch.equal(made.state[name], state[name]) for name in state)
        assert not state["past_fam_00"].requires_grad
        assert torch.equal(asked[-1], made.state["past_fam_00"])
    assert len(asked) >= 3
    assert float(made.state["past_fam_00"].std()) > 0

    after = []
    for answers in (True, False):  # asked, and not
        made, _, _ = with_streams(2)
        if not answers:
            everyone = torch.ones(4, dtype=torch.bool)
            made._ask = lambda *_, right=everyone: (torch.zeros(()), right)  # type: ignore[method-assign]
        torch.manual_seed(5)
        made.losses(2, np.random.default_rng(1))
        after.append(made.state)
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


@pytest.mark.usefixtures("small")
def test_a_wrong_answer_ends_a_stream_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, begun = with_streams(2)
    right = torch.ones(4, dtype=torch.bool)
    made._ask = lambda *_: (torch.zeros(()), right)  # type: ignore[method-assign]
    task, rng = Task("compact"), np.random.default_rng(0)

    def step(answers: list[bool], across: float = 0.0) -> tuple[list[list[int]], list[bool]]:
        nonlocal right
        right = torch.tensor(answers)
        monkeypatch.setattr(streams, "ACROSS", across)
        made.losses(2, rng)
        made.life[:] = 1e9
        text, new, start, _ = begun[-1]
        for i in range(4):
            said = bytes(task.statement(made.key[i].numpy()).tolist())
            assert bytes(text[i].tolist()).count(said) == int(new[i])
            assert not new[i] or bytes(text[i].tolist()).index(said) == start[i]
        return made.key.tolist(), new.tolist()

    first, new = step([True, False, True, False])
    assert new == [True] * 4
    second, new = step([True] * 4)
    assert new == [False, True, False, True]
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True, False]
    assert made.age.tolist() == [4, 2, 4, 2]
    third, new = step([False] * 4, across=1.0)  # a question across blocks ends no stream
    assert (third, new) == (second, [False] * 4)
    fourth, new = step([True] * 4)
    assert (fourth, new) == (second, [False] * 4)
    made.life[2] = made.age[2]  # the one that is old enough
    fifth, new = step([True] * 4)
    assert new == [False, False, True, False]
    assert [a == b for a, b in zip(fourth, fifth, strict=True)] == [True, True, False, True]


# The two checkpoints

WITH_ANSWER = {
    n: n - DIGITS for n in (1024, 2048, 4096, 8192)
}  # tokens: whole blocks, the answer being the last of them


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], fx.Session]]:
    """A session over a bundle of the checkpoint, shared by all tests."""
    made: dict[str, fx.Session] = {}

    def get(name: str) -> fx.Session:
        if name not in made:
            target = tmp_path_factory.mktemp("passkey") / name
            fx.export_bundle(CHECKPOINTS / name, target, precision="fp32", batch="dynamic", parity_blocks=1)
            made[name] = fx.load(target, "ort-cpu")
        return made[name]

    yield get
    for session in made.values():
        session.close()


def test_the_checkpoints_differ_in_their_memory_alone() -> None:
    fam, bswa = (open_checkpoint(CHECKPOINTS / name) for name in ("fam", "bswa"))
    for checkpoint in (fam, bswa):
        files = list(checkpoint.path.glob("*.safetensors"))
        assert [file.name for file in files] == ["model.safetensors"]
        assert files[0].stat().st_size <= 16 * 2**20
        assert json.loads((checkpoint.path / "training.json").read_text())["phases"]
    assert (fam.fam_trained, fam.config.fam_length > 0, fam.config.memory_segments) == (True, True, 0)
    assert (bswa.fam_trained, bswa.config.fam_length, bswa.config.memory_segments) == (False, 0, 1)
    assert set(fam.tensors) - set(bswa.tensors) == {FAM_WEIGHT}
    assert all(fam.tensors[name].shape == bswa.tensors[name].shape for name in bswa.tensors)
    assert fam.config.block_size == bswa.config.block_size == 1024


@pytest.mark.slow
def test_fam_keeps_the_key_and_loses_it_with_fam(shipped: Callable[[str], fx.Session]) -> None:
    session = shipped("fam")
    task = evaluate.bundle_task(session, "text")
    kept = evaluate.measure(session, task, "docs", WITH_ANSWER[4096], 6, seed=7)
    assert (kept["tokens"], kept["keys"]) == (WITH_ANSWER[4096], 6)
    assert kept["exact"] >= 0.9
    assert kept["state_bytes"] == session.contract.state_bytes()
    lost = evaluate.measure(session, task, "docs", WITH_ANSWER[4096], 6, seed=7, sabotage="zero")
    assert lost["exact"] <= 1 / 6


@pytest.mark.slow
def test_fam_loses_the_key_if_it_is_held_as_before_the_key(shipped: Callable[[str], fx.Session]) -> None:
    """Held is what the first block left behind: a key said in it is in there, one said in the second block is not."""
    session = shipped("fam")
    size = session.contract.block_size
    task = evaluate.bundle_task(session, "text")
    exam = task.exam("docs", WITH_ANSWER[2048], 4, 7, size)
    assert exam.begins.min() > size
    before = np.stack([task.filler("docs", "test", size, 50 + i) for i in range(4)])
    later = Exam(np.concatenate([before, exam.tokens], 1), exam.begins + size, exam.answers)
    right = {
        sabotage: (evaluate.answered(session, later, sabotage)[0] == later.answers).all(1).mean()
        for sabotage in (None, "hold")
    }
    assert right == {None: 1, "hold": 0}


@pytest.mark.slow
def test_the_state_is_as_large_at_any_length(shipped: Callable[[str], fx.Session]) -> None:
    session = shipped("fam")
    text = Task("text").filler("docs", "test", 4096, 0)[None]
    sizes, fams = [], []
    with session.stream(1) as stream:
        for part in np.split(text, 4, 1):
            stream.step(part)
            state = stream.state()
            sizes.append(sum(array.nbytes for array in state.values()))
            fams.append(state["past_fam_00"])
    assert sizes == [session.contract.state_bytes()] * 4
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(fams))


@pytest.mark.slow
def test_without_fam_the_key_is_gone_with_its_block(shipped: Callable[[str], fx.Session]) -> None:
    session = shipped("bswa")
    task = evaluate.bundle_task(session, "text")
    assert evaluate.measure(session, task, "docs", WITH_ANSWER[1024], 4, seed=7)["exact"] >= 0.75
    assert evaluate.measure(session, task, "docs", WITH_ANSWER[8192], 4, seed=7)["exact"] == 0


@pytest.mark.slow
def test_torch_counts_what_the_bundle_counts(
    shipped: Callable[[str], fx.Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All keys; and all but the one of which another digit is wanted than was said."""
    session = shipped("fam")
    task = evaluate.bundle_task(session, "text")
    checkpoint = open_checkpoint(CHECKPOINTS / "fam")
    model = FamModel(checkpoint.config)
    for name, p in model.named_parameters():
        p.data = checkpoint.tensor(name).float()
    exam = Task.exam

    def with_a_wrong_one(self: Task, *words: Any) -> Exam:
        made = exam(self, *words)
        made.answers[1, 3] = task.digits[(made.answers[1, 3] - task.digits[0] + 1) % 10]
        return made

    counts = []
    for _ in range(2):
        found = evaluate.measure(session, task, "docs", WITH_ANSWER[2048], 2, seed=3)["exact"]
        assert recall(model, task, "docs", WITH_ANSWER[2048], 2, 3, "cpu") == pytest.approx(found)
        counts.append(round(2 * found))
        monkeypatch.setattr(Task, "exam", with_a_wrong_one)
    assert counts == [2, 1]
