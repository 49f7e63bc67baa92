"""The tokenizer in a GGUF file's metadata, as ``tokenizer.json`` and ``tokenizer_config.json``."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from famexport.convert.gguf_file import GGUFFile
from famexport.convert.hf import check_vocabulary
from famexport.errors import CheckpointError, MissingDependencyError
from famexport.text import tokenizer_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Where the words of Llama 3 and Qwen2 end: the patterns of their published tokenizers, which differ in digits only.
_LLAMA3_SPLIT = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2_SPLIT = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_PRE_TOKENIZERS = ("smollm", "gpt-2", "default", "llama-bpe", "qwen2")
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class _NoTokenizerError(Exception):
    """Why this file's tokenizer cannot be had, though the file is sound."""


def tokenizer_files(file: GGUFFile, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer's files by name; none, and a warning, for a kind that famexport does not know.

    Raises:
        CheckpointError: a vocabulary that contradicts itself or the model.
    """
    try:
        tokenizer = _build(file)
    except _NoTokenizerError as exc:
        warnings.warn(
            f"{file.path.name}: no tokenizer.json was written: {exc}; "
            "put the original model's tokenizer.json into the checkpoint, or feed token ids",
            stacklevel=2,
        )
        return {}
    check_vocabulary(tokenizer, vocab_size, file.path.name)
    config = json.dumps(_tokenizer_config(file.metadata), indent=2, ensure_ascii=False)
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (config + "\n").encode(),
    }


def _build(file: GGUFFile) -> Tokenizer:
    try:
        import tokenizers
    except ImportError as exc:
        raise MissingDependencyError("tokenizers", "hf", "converting a GGUF file's tokenizer") from exc
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise _NoTokenizerError("the file has none")
    tokens = _strings(file, "tokenizer.ggml.tokens")
    types = file.metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens), np.int32))
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu":
        got = types.dtype if isinstance(types, np.ndarray) else type(types).__name__
        raise CheckpointError(
            f"{file.path.name}: tokenizer.ggml.token_type is {got}, expected an array of integers; get the file again"
        )
    if len(types) != len(tokens):
        raise CheckpointError(f"{file.path.name}: {len(tokens)} tokens but {len(types)} token types")
    if isinstance(kind, str) and kind == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif isinstance(kind, str) and kind == "llama":
        tokenizer = _sentencepiece(file)
    else:
        raise _NoTokenizerError(f"tokenizer.ggml.model={kind!r:.80} is not known, expected gpt2 or llama")
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [t for t, n in zip(tokens, types.tolist(), strict=True) if n == wanted]
        tokenizer.add_tokens([tokenizers.AddedToken(t, special=special, normalized=False) for t in added if t])
    return tokenizer


def _byte_level(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise _NoTokenizerError(
            f"tokenizer.ggml.pre={pre!r:.80} is not known, expected one of {', '.join(_PRE_TOKENIZERS)}"
        )
    if pre == "default":
        warnings.warn(
            f"{file.path.name} does not say how its tokenizer splits words; GPT-2's way is taken, which may give other "
            "tokens than the original model's tokenizer.json",
            stacklevel=2,
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise _NoTokenizerError("tokens repeat")
    pairs = [merge.split(" ") for merge in _strings(file, "tokenizer.ggml.merges")]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(f"{file.path.name}: a merge in tokenizer.ggml.merges is not two tokens")
    with tokenizer_errors(f"{file.path.name}: tokens and merges do not fit", "get the file again", CheckpointError):
        model = models.BPE(vocab=vocab, merges=[(a, b) for a, b in pairs], ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        from tokenizers import normalizers

        tokenizer.normalizer = normalizers.NFC()
    _add_bos(tokenizer, file, tokens, default=pre == "llama-bpe")
    return tokenizer


def _pre_tokenizer(pre: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if pre in ("llama-bpe", "qwen2"):
        split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT if pre == "llama-bpe" else _QWEN2_SPLIT), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _add_bos(tokenizer: Tokenizer, file: GGUFFile, tokens: list[str], default: bool) -> None:
    """Begin a text with the BOS token where special tokens are asked for, as the original tokenizer does."""
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    if file.metadata.get("tokenizer.ggml.add_bos_token", default) is not True or bos is None:
        return
    from tokenizers import processors

    name = _token(tokens, bos)
    if name is None:
        raise CheckpointError(
            f"{file.path.name}: tokenizer.ggml.bos_token_id={bos!r:.80} is not one of {len(tokens)} tokens"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="bos $A", pair="bos $A bos $B", special_tokens=[{"id": "bos", "ids": [bos], "tokens": [name]}]
    )


def _sentencepiece(file: GGUFFile) -> Tokenizer:
    """SentencePiece vocabularies the way transformers converts them, through its public loader."""
    try:
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as alone:  # it would also read a config.json next to the file
            (Path(alone) / "model.gguf").symlink_to(file.path.resolve())
            loaded: Any = AutoTokenizer.from_pretrained(
                alone, gguf_file="model.gguf", local_files_only=True, trust_remote_code=False
            )
        tokenizer: Tokenizer = loaded.backend_tokenizer
        return tokenizer
    except Exception as exc:  # whatever an optional conversion runs into, the weights still convert
        raise _NoTokenizerError(f"transformers cannot convert it ({type(exc).__name__}: {exc!s:.200})") from exc


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in _SPECIAL.items():
        token = _token(tokens, metadata.get(f"tokenizer.ggml.{key}"))
        if token is not None:
            found[name] = token
    template = metadata.get("tokenizer.chat_template")
    return found | ({"chat_template": template} if isinstance(template, str) else {})


def _token(tokens: list[str], index: Any) -> str | None:
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None


def _strings(file: GGUFFile, key: str) -> list[str]:
    value = file.metadata.get(key)
    if not isinstance(value, list):
        raise CheckpointError(f"{file.path.name}: {key} is missing or not a list of strings")
    return value
