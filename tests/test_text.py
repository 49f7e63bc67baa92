from __future__ import annotations

import io
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from famexport import text as module
from famexport.errors import InvalidInputError, MissingDependencyError, UsageError
from famexport.text import check_tokens, open_tokenizer, read_text, read_token_ids, stream_tokens

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
    for _ in range(20):
        characters += len(tokenizer.decode(next(parts).tolist(), skip_special_tokens=False))
    assert characters > 10 * module.PIECE_CHARS
    assert taken - characters < 3 * module.PIECE_CHARS


def test_open_tokenizer(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    tokenizer = word_level()
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=3)
    tokenizer.save(str(path))
    assert len(open_tokenizer(path).encode("the ship sailed past").ids) == 4
    for damaged in (b"", b"{", b"[]", b'{"model": 1}', path.read_bytes()[:-20], b"\xff" * 9):
        path.write_bytes(damaged)
        with pytest.raises(InvalidInputError, match="is not a tokenizer.json"):
            open_tokenizer(path)
    with pytest.raises(UsageError, match="no such file"):
        open_tokenizer(tmp_path / "none.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"famexport\[text\]"):
        open_tokenizer(path)


def test_text_is_read_in_pieces(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    text = random_text(5) + "\x00\x1b\r\n\ufeff"
    path.write_bytes(text.encode())
    for size in (1, 2, 3, 7, 1000, 10**6):
        monkeypatch.setattr(module, "READ_BYTES", size)
        assert "".join(read_text(path)) == text
        assert all(len(piece) <= size for piece in read_text(str(path)))
        assert "".join(read_text(io.BytesIO(text.encode()))) == text
        assert "".join(read_text(io.StringIO(text))) == text


def test_invalid_utf8_names_the_byte(tmp_path, monkeypatch):
    good = "aé日🎉".encode()
    cases = {good + b"\xff" + good: 10, good + b"\xe6\x97": 10, b"\x80": 0, good + b"\xe6\x97a": 10, b"\xc0\xaf": 0}
    for data, offset in cases.items():
        for size in (1, 2, 3, 5, 100):
            monkeypatch.setattr(module, "READ_BYTES", size)
            (tmp_path / "a.txt").write_bytes(data)
            with pytest.raises(InvalidInputError, match=rf"a\.txt: invalid UTF-8 at byte {offset}:"):
                list(read_text(tmp_path / "a.txt"))


@pytest.mark.parametrize("read", [read_text, read_token_ids])
def test_paths_that_cannot_be_read(read, tmp_path):
    for path in (tmp_path / "none", tmp_path / "none.npy", tmp_path):
        with pytest.raises(UsageError, match="no such file|cannot read"):
            list(read(path))


def ids_of(source: Any) -> list[int]:
    return [int(i) for part in read_token_ids(source) for i in part]


def test_token_ids_as_text(tmp_path, monkeypatch):
    expected = [0, 7, -3, 2**62, *range(500)]
    rng = random.Random(0)
    data = "".join(f"{i}{rng.choice([' ', chr(10), chr(9), '  ', chr(13) + chr(10)])}" for i in expected).encode()
    path = tmp_path / "ids.txt"
    path.write_bytes(data)
    for size in (1, 2, 5, 64, 10**6):
        monkeypatch.setattr(module, "READ_BYTES", size)
        assert ids_of(path) == ids_of(io.BytesIO(data.rstrip())) == ids_of(io.StringIO(data.decode())) == expected
    assert all(part.dtype == np.int64 and part.size for part in read_token_ids(path))
    assert ids_of(io.BytesIO(b" \n ")) == ids_of(io.BytesIO(b"")) == []


@pytest.mark.parametrize(
    ("data", "line", "word"),
    [
        (b"1 2\n3 four 5", 2, "four"),
        (b"Once upon a time", 1, "Once"),
        (b"1\n\n2 3.5", 3, "3.5"),
        (b"1-2", 1, "1-2"),
        (b"1 -", 1, "-"),
        (b"1_000", 1, "1_000"),
        (b"+1", 1, "\\+1"),
        (b"99999999999999999999 1", 1, "9" * 20),
        (b"\n" + b"7" * 9000 + b" 1", 2, "7" * 32),
        ("1\n²".encode(), 2, ""),
        (b"1 2,3", 1, "2,3"),
        (b"0x10", 1, "0x10"),
    ],
)
def test_text_where_ids_are_expected(data, line, word, monkeypatch):
    for size in (1, 3, 64, 10**6):
        monkeypatch.setattr(module, "READ_BYTES", size)
        with pytest.raises(InvalidInputError, match=rf"line {line}: text where token ids are expected: '{word}"):
            ids_of(io.BytesIO(data))


def test_a_word_without_end_is_not_gathered():
    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size: int = -1) -> bytes:
            self.taken += size
            return b"7" * size

    source = Endless()
    with pytest.raises(InvalidInputError, match="token ids are expected"):
        ids_of(source)
    assert source.taken == module.READ_BYTES


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", "uint8", ">i4"])
def test_token_ids_as_npy(dtype, tmp_path):
    expected = np.arange(100_000) % 200
    np.save(tmp_path / "ids.npy", expected.astype(dtype))
    parts = list(read_token_ids(tmp_path / "ids.npy"))
    assert len(parts) > 1
    assert all(part.dtype == np.int64 and part.dtype.isnative for part in parts)
    assert np.array_equal(np.concatenate(parts), expected)
    (tmp_path / "ids.npy").rename(tmp_path / "ids")  # known by its first bytes
    assert np.array_equal(np.concatenate(list(read_token_ids(str(tmp_path / "ids")))), expected)


def test_npy_files_that_are_no_ids(tmp_path):
    path = tmp_path / "ids.npy"
    for array in (np.zeros((2, 3), np.int64), np.zeros(3), np.zeros((), np.int64), np.zeros(3, bool)):
        np.save(path, array)
        with pytest.raises(InvalidInputError, match="expected token ids, one axis of integers"):
            ids_of(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidInputError, match=r"is not a \.npy array of token ids"):
        ids_of(path)
    np.save(path, np.array([2**63], np.uint64))
    with pytest.raises(InvalidInputError, match="is no token id"):
        ids_of(path)
    np.save(path, np.zeros(0, np.int64))
    assert ids_of(path) == []
    np.save(path, np.arange(1000))
    whole = path.read_bytes()
    for size in (0, 5, 9, 50, 127, 129, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidInputError, match=r"is not a \.npy array of token ids"):
            ids_of(path)


def test_check_tokens():
    check_tokens(np.array([0, 95]), 96)
    check_tokens(np.array([], np.int64), 96)
    for ids, wrong, position in (([1, 96, 97], 96, 1), ([5, 5, -1], -1, 2)):
        with pytest.raises(
            InvalidInputError, match=f"id {wrong} at position {position} is outside the vocabulary of 96"
        ):
            check_tokens(np.array(ids), 96)
    with pytest.raises(InvalidInputError, match="position 1001 "):
        check_tokens(np.array([1, 96]), 96, start=1000)
    with pytest.raises(InvalidInputError, match="must be integers, got float64"):
        check_tokens(np.array([1.0]), 96)


def test_import_is_light():
    code = "import sys, famexport.text; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "tokenizers", "onnxruntime"} & set(done.stdout.split())
