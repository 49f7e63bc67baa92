from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from famexport import text as module
from famexport.errors import InvalidInputError, MissingDependencyError, UsageError
from famexport.text import (
    check_tokens,
    open_tokenizer,
    read_text,
    read_token_ids,
    stream_text,
    stream_tokens,
    token_ids,
)

TEXT = "the ship naïve Straße 日本語テキスト العربية 🎉 👨‍👩‍👧 e\u0301 ½\n\ttabs\r\n" * 40


def test_open_tokenizer(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(("the", "ship", "sailed", "past"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="the"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
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


def tokenizer_json(model: dict[str, Any], **more: Any) -> str:
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return json.dumps({"version": "1.0", "added_tokens": [], **dict.fromkeys(parts), "model": model} | more)


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}
EMPTY = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_a_tokenizer_that_panics_when_it_is_opened(tmp_path, capfd):
    """Rust's panics are no Exception."""
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json(BPE))
    assert token_ids(open_tokenizer(path), "ab") == [2]
    path.write_text(tokenizer_json(BPE | {"continuing_subword_prefix": "ByteLevel"}))
    with pytest.raises(
        InvalidInputError, match=r"tokenizer\.json is not a tokenizer.json: .*; copy it again"
    ) as caught:
        open_tokenizer(path)
    assert type(caught.value.__cause__).__name__ == "PanicException"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (tokenizer_json(BPE, normalizer=EMPTY, pre_tokenizer=BYTES), "PanicException"),
        (tokenizer_json(WORDS), "Exception"),
        (tokenizer_json(UNIGRAM), "Exception"),
    ],
    ids=["panic", "word", "unigram"],
)
def test_text_that_cannot_be_encoded(text, kind, tmp_path, capfd):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(text)
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    for encode in (token_ids, lambda tokenizer, text: list(stream_tokens(tokenizer, [text]))):
        with pytest.raises(
            InvalidInputError, match="the tokenizer cannot encode this text: .*; feed token ids"
        ) as caught:
            encode(tokenizer, "zzz")
        assert type(caught.value.__cause__).__name__ == kind


def test_ids_that_cannot_be_decoded(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(BPE))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    assert "".join(stream_text(tokenizer, [0, 1])) == "a b"
    with pytest.raises(InvalidInputError, match="the tokenizer cannot decode token -1: .*; feed token ids"):
        list(stream_text(tokenizer, [0, -1]))


def test_what_is_no_error_of_the_tokenizer_passes():
    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> None:
            raise error

    for error in (KeyboardInterrupt(), SystemExit(3), GeneratorExit()):
        with pytest.raises(type(error)) as caught:
            token_ids(Tokenizer(), "a")
        assert caught.value is error


def test_errors_of_whoever_gives_the_ids_or_takes_the_text_pass(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(BPE))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")

    def ids():
        yield 0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(stream_text(tokenizer, ids()))
    texts = stream_text(tokenizer, [0, 1])
    next(texts)
    with pytest.raises(ZeroDivisionError):
        texts.throw(ZeroDivisionError())


def test_text_is_read_in_pieces(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    text = TEXT + "\x00\x1b\r\n\ufeff"
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
