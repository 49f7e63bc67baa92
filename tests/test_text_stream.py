from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from famexport import text as module
from famexport.text import stream_tokens

tokenizers = pytest.importorskip("tokenizers")

WORDS = [
    "the",
    "ship",
    "sailed",
    "past",
    "a",
    "lighthouse",
    "when",
    "1822",
    "gulls",
    "followed",
    "it",
    "into",
    "harbour,",
    "and",
    "they'll",
    "say:",
    "\"it's",
    'done!"',
    "def",
    "step(x):",
    "return",
    "x",
    "**",
    "2",
    "#",
    "squared",
    "naïve",
    "Straße",
    "日本語テキスト",
    "한국어",
    "العربية",
    "🎉",
    "👨\u200d👩\u200d👧",
    "é",
    "½",
    "foo_bar",
    "http://a.b/c?d=e",
    "don't",
    "42",
    "3.14",
    "--",
    "...",
    "<|im_end|>",
    "<s>",
]
SEPARATORS = (
    [" "] * 30 + ["\n"] * 6 + ["\n\n", "  ", "\t", "\r\n", " \n", "\n ", "\n    ", "\n\n\n", "", "\u00a0", "\u3000"]
)


def random_text(seed: int, words: int = 1500) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(SEPARATORS) for _ in range(words))


CORPUS = [random_text(seed, 500) for seed in range(4)]


def trained(model: Any, trainer: Any, corpus: list[str] = CORPUS, **parts: Any) -> Any:
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def bpe_trainer(**options: Any) -> Any:
    return tokenizers.trainers.BpeTrainer(vocab_size=700, show_progress=False, **options)


def byte_level(split: str | None = None) -> Any:
    pre = tokenizers.pre_tokenizers
    words: list[Any] = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    if split:
        words = [pre.Split(tokenizers.Regex(split), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer = trained(
        tokenizers.models.BPE(),
        bpe_trainer(initial_alphabet=pre.ByteLevel.alphabet(), special_tokens=["<|im_end|>"]),
        pre_tokenizer=pre.Sequence(words),
        decoder=tokenizers.decoders.ByteLevel(),
    )
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    return tokenizer


def llama3_like() -> Any:
    return byte_level(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def sentencepiece_like(prefix: str, whole_lines: bool = False) -> Any:
    """Byte fallback and "▁" for a space, as in Llama 2; ``whole_lines`` has merges that cross newlines, which it has not."""
    pre, norm = tokenizers.pre_tokenizers, tokenizers.normalizers
    corpus = CORPUS if whole_lines else [line for text in CORPUS for line in text.splitlines()]
    learned = trained(tokenizers.models.BPE(), bpe_trainer(), corpus, pre_tokenizer=pre.Metaspace())
    model = json.loads(learned.to_str())["model"]
    tokens = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in tokens]
    merges = [tuple(pair) for pair in model["merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if prefix == "normalizer":
        made.normalizer = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre.Metaspace(prepend_scheme=prefix, split=False)
    made.add_special_tokens(["<s>"])
    return made


def wordpiece() -> Any:
    return trained(
        tokenizers.models.WordPiece(unk_token="[UNK]"),
        tokenizers.trainers.WordPieceTrainer(vocab_size=500, show_progress=False, special_tokens=["[UNK]"]),
        normalizer=tokenizers.normalizers.BertNormalizer(),
        pre_tokenizer=tokenizers.pre_tokenizers.BertPreTokenizer(),
    )


def word_level() -> Any:
    return trained(
        tokenizers.models.WordLevel(unk_token="[UNK]"),
        tokenizers.trainers.WordLevelTrainer(show_progress=False, special_tokens=["[UNK]"]),
        pre_tokenizer=tokenizers.pre_tokenizers.WhitespaceSplit(),
    )


def unigram() -> Any:
    return trained(
        tokenizers.models.Unigram(),
        tokenizers.trainers.UnigramTrainer(
            vocab_size=500, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>"
        ),
        normalizer=tokenizers.normalizers.NFKC(),
        pre_tokenizer=tokenizers.pre_tokenizers.Metaspace(),
    )


KINDS = {
    "byte-level": byte_level,
    "llama3-like": llama3_like,
    "metaspace-first": lambda: sentencepiece_like("first"),
    "metaspace-always": lambda: sentencepiece_like("always"),
    "prepend-normalizer": lambda: sentencepiece_like("normalizer"),
    "merges-across-newlines": lambda: sentencepiece_like("first", whole_lines=True),
    "wordpiece": wordpiece,
    "word-level": word_level,
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Any:
    return KINDS[request.param]()


def cut(text: str, seed: int, longest: int) -> Iterator[str]:
    rng, at = random.Random(seed), 0
    while at < len(text):
        size = rng.randrange(longest)
        yield text[at : at + size]
        at += size


def streamed(tokenizer: Any, pieces: Iterator[str]) -> list[int]:
    return [int(i) for part in stream_tokens(tokenizer, pieces) for i in part]


@pytest.mark.parametrize("seed", range(4))
def test_streamed_equals_whole(tokenizer, seed, monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARS", 300)
    monkeypatch.setattr(module, "MAX_PIECE_CHARS", 900)
    text = random_text(100 + seed)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    parts = list(stream_tokens(tokenizer, cut(text, seed, 400)))
    assert np.concatenate(parts).tolist() == whole
    assert all(part.dtype == np.int64 and part.ndim == 1 for part in parts)
    assert len(parts) > len(text) / 2000
    for longest in (3, 5000):
        assert streamed(tokenizer, cut(text, seed, longest)) == whole
    assert streamed(tokenizer, iter([text])) == whole


def test_streamed_equals_whole_at_full_size(tokenizer):
    text = random_text(7, 40_000)
    assert len(text) > 3 * module.PIECE_CHARS
    parts = list(stream_tokens(tokenizer, cut(text, 1, 100_000)))
    assert np.concatenate(parts).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("separator", [" ", "\n\n", ". "])
def test_text_without_single_newlines(tokenizer, separator, monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARS", 300)
    monkeypatch.setattr(module, "MAX_PIECE_CHARS", 900)
    rng = random.Random(3)
    text = separator.join(rng.choice(WORDS[:20]) for _ in range(1500))
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    parts = list(stream_tokens(tokenizer, iter([text])))
    assert np.concatenate(parts).tolist() == whole
    assert len(parts) > 3


def test_text_that_cannot_be_cut_is_cut_regardless(monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARS", 300)
    monkeypatch.setattr(module, "MAX_PIECE_CHARS", 900)
    tokenizer = byte_level()
    for text in ("x" * 5000, "\n" * 5000, "日" * 5000, " " * 5000):
        parts = list(stream_tokens(tokenizer, iter([text])))
        assert max(map(len, parts)) < 4 * 900
        assert tokenizer.decode([int(i) for part in parts for i in part]) == text
        # The parts do not depend on the pieces, so neither do the tokens.
        assert streamed(tokenizer, cut(text, 1, 50)) == [int(i) for part in parts for i in part]


def test_small_texts(tokenizer):
    for text in ("", "a", "\n", " ", "a\nb", "\n\n"):
        assert streamed(tokenizer, iter([text])) == tokenizer.encode(text, add_special_tokens=False).ids
        assert streamed(tokenizer, iter(["", *text, ""])) == tokenizer.encode(text, add_special_tokens=False).ids
    assert streamed(tokenizer, iter([])) == []


def test_input_without_end():
    tokenizer, taken = byte_level(), 0

    def pieces() -> Iterator[str]:
        nonlocal taken
        for text in itertools.repeat(CORPUS[0]):
            taken += len(text)
            yield text

    parts = stream_tokens(tokenizer, pieces())
    characters = 0
    for _ in range(12):
        characters += len(tokenizer.decode(next(parts).tolist(), skip_special_tokens=False))
    assert characters > 6 * module.PIECE_CHARS
    assert taken - characters < 3 * module.PIECE_CHARS
