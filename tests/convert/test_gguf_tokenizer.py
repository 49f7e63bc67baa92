from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from famexport.checkpoint import open_checkpoint
from famexport.convert import convert
from famexport.errors import CheckpointError
from famexport.text import open_tokenizer

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

CORPUS = [
    "The ship sailed past the lighthouse in 1822, and 12345 gulls followed it.\n",
    "def step(x):\n    return x ** 2  # squared\n\n",
    "Straße, naïve, 日本語, 🎉 and e\u0301; it's what they'll say they've done.\n",
]
TEXTS = [
    *CORPUS,
    "in 2024: 7 + 35 = 42\r\n\ttabs  and   spaces \n \n end ",
    "العربية 한국어 👨‍👩‍👧 ½ ² \u200b\ufeff\x00\x7f",
    "don't I'LL 'tis\n\n\n\nx",
]


@pytest.fixture(scope="module")
def trained() -> tuple[list[str], list[str]]:
    """A small byte-level BPE vocabulary, three control tokens first, and its merges."""
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return [*tokens, "<think>"], [" ".join(pair) for pair in model["merges"]]


@pytest.fixture
def make(tmp_path, make_model, write_gguf, trained):
    """Convert a GGUF file with this tokenizer metadata; gives the checkpoint's path."""

    def convert_with(**changed: Any) -> Path:
        tokens, merges = trained
        types = [3, 3, 3, *[1] * (len(tokens) - 4), 4]
        fields = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": types, "merges": merges}
        fields |= {"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2} | changed

        def meta(writer: Any) -> None:
            for key, value in fields.items():
                name = f"tokenizer.ggml.{key}"
                if isinstance(value, list):
                    writer.add_array(name, value)
                elif isinstance(value, bool):
                    writer.add_bool(name, value)
                elif isinstance(value, int):
                    writer.add_uint32(name, value)
                elif value is not None:
                    writer.add_string(name, value)
            writer.add_chat_template("{{ messages }}")

        model = make_model("llama", vocab_size=fields.get("rows", len(tokens)), num_hidden_layers=1)
        fields.pop("rows", None)
        return convert(write_gguf(tmp_path / "m.gguf", model, "llama", meta=meta), tmp_path / "out")

    return convert_with


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_round_trip(pre, make, trained):
    path = make(pre=pre)
    tokenizer = open_tokenizer(open_checkpoint(path).tokenizer)
    for text in TEXTS:
        if pre == "qwen2":
            text = tokenizers.normalizers.NFC().normalize_str(text)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == len(trained[0])
    assert [tokenizer.id_to_token(i) for i in range(len(trained[0]))] == trained[0]


def test_smollm_splits_digits_one_by_one(make):
    tokenizer = open_tokenizer(make() / "tokenizer.json")
    tokens = tokenizer.encode("in 12345", add_special_tokens=False).tokens
    assert tokens[-5:] == list("12345")
    assert "Ġthe" in tokenizer.get_vocab()
    assert "Ġthe" in tokenizer.encode("past the ship").tokens


def test_pre_tokenizers_split_as_their_originals_do(make):
    text = "I'LL buy 12345 apples!\n\n  OK"
    expected = {
        "gpt-2": ["I", "'", "LL", "Ġbuy", "Ġ12345", "Ġapples", "!", "ĊĊĠ", "ĠOK"],
        "llama-bpe": ["I", "'LL", "Ġbuy", "Ġ", "123", "45", "Ġapples", "!ĊĊ", "Ġ", "ĠOK"],
        "qwen2": ["I", "'LL", "Ġbuy", "Ġ", "1", "2", "3", "4", "5", "Ġapples", "!ĊĊ", "Ġ", "ĠOK"],
        "smollm": ["I", "'", "LL", "Ġbuy", "Ġ", "1", "2", "3", "4", "5", "Ġapples", "!", "ĊĊĠ", "ĠOK"],
    }
    for pre, words in expected.items():
        tokenizer = open_tokenizer(make(pre=pre) / "tokenizer.json")
        assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == words, pre


def test_control_and_user_defined_tokens_stay_whole(make):
    tokenizer = open_tokenizer(make() / "tokenizer.json")
    ids = tokenizer.encode("<|im_start|>a<think><|im_end|>", add_special_tokens=False).ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>"  # only control tokens are special


def test_tokenizer_config(make):
    config = json.loads((make() / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|im_start|>"
    assert config["eos_token"] == config["pad_token"] == "<|im_end|>"
    assert config["chat_template"] == "{{ messages }}"
    assert "unk_token" not in config


def test_transformers_reads_it(make):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(make())
    assert loaded.eos_token_id == 2
    assert loaded.decode(loaded(TEXTS[0], add_special_tokens=False).input_ids) == TEXTS[0]


def test_bos_is_added_where_the_file_says_so(make):
    for changed, begins in (({"add_bos_token": True}, True), ({}, False), ({"pre": "llama-bpe"}, True)):
        tokenizer = open_tokenizer(make(**changed) / "tokenizer.json")
        assert (tokenizer.encode("a").ids[0] == 1) is begins
        assert tokenizer.encode("a", add_special_tokens=False).ids[0] != 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": "bert"}, "'bert' is not known"),
        ({"pre": "dbrx"}, "'dbrx' is not known"),
        ({"model": None}, "the file has none"),
    ],
)
def test_unknown_kinds_warn_and_convert_without(changed, named, make):
    with pytest.warns(UserWarning, match=rf"no tokenizer\.json was written: .*{named}"):
        path = make(**changed)
    assert open_checkpoint(path).tokenizer is None
    assert not (path / "tokenizer_config.json").exists()


def test_an_unnamed_pre_tokenizer_is_gpt2s_with_a_warning(make):
    with pytest.warns(UserWarning, match="does not say how its tokenizer splits words"):
        path = make(pre=None)
    words = open_tokenizer(path / "tokenizer.json").pre_tokenizer.pre_tokenize_str("a 12")
    assert [word for word, _ in words] == ["a", "Ġ12"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"token_type": [1, 2]}, "but 2 token types"),
        ({"token_type": 1}, "token_type is int, expected an array of integers"),
        ({"token_type": True}, "token_type is bool, expected an array of integers"),
        ({"token_type": "1"}, "token_type is str, expected an array of integers"),
        ({"token_type": ["1"] * 400}, "token_type is list, expected an array of integers"),
        ({"token_type": [math.nan] * 400}, "token_type is float32, expected an array of integers"),
        ({"token_type": [True] * 400}, "token_type is bool, expected an array of integers"),
        ({"merges": ["a b c"]}, "is not two tokens"),
        ({"merges": ["zz qq"]}, "tokens and merges do not fit"),
        ({"tokens": [1, 2]}, "tokens is missing or not a list of strings"),
        ({"rows": 50}, "another model's tokenizer"),
        ({"add_bos_token": True, "bos_token_id": 10**6}, "bos_token_id=1000000 is not one of"),
    ],
)
def test_contradicting_metadata_is_refused(changed, named, make):
    with pytest.raises(CheckpointError, match=named):
        make(**changed)


def test_sentencepiece_through_transformers(make):
    pytest.importorskip("transformers")
    pieces = ["▁", *"abcdehlorwt", "ll", "he", "llo", "▁w", "▁he", "▁hello", "or", "ld", "orld", "▁world"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        path = make(
            **{"model": "llama", "pre": "default", "merges": None, "tokens": tokens, "token_type": types},
            scores=scores,
            rows=len(tokens),
            bos_token_id=1,
            eos_token_id=2,
            padding_token_id=None,
        )
    tokenizer = open_tokenizer(path / "tokenizer.json")
    assert [tokenizer.id_to_token(i) for i in range(len(tokens))] == tokens
    assert tokenizer.encode("hello world\n日", add_special_tokens=False).tokens == [
        "▁hello",
        "▁world",
        "<0x0A>",
        "<0xE6>",
        "<0x97>",
        "<0xA5>",
    ]
    for text in ("hello world", "hello  world\nhello", "日本 é"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
