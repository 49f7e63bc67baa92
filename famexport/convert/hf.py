"""Hugging Face directories, local or from the hub, to checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from famexport.checkpoint import (
    FAM_WEIGHT,
    TOKENIZER_FILES,
    Checkpoint,
    check_tensors,
    parameter_shapes,
    read_hf_config,
    tensor_files,
)
from famexport.convert.common import DEFAULTS, Options, cast, write_converted
from famexport.errors import CheckpointError, InvalidInputError, MissingDependencyError, UsageError
from famexport.hf_config import config_from_hf
from famexport.text import open_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

MAX_TOKENIZER_BYTES = 128 * 2**20
_DOWNLOADED = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.model", *TOKENIZER_FILES]
_NOT_DOWNLOADED = ["*/*", "consolidated*"]  # copies of the same weights in their makers' own layouts


def convert_directory(source: Path, target: Path, options: Options) -> Path:
    """See ``famexport.convert.convert``."""
    data = read_hf_config(source)
    files, tensors = tensor_files(source)
    stored: dict[str, Any] = data["fam"] if isinstance(data.get("fam"), dict) else {}
    embeddings = tensors.get(FAM_WEIGHT)
    present = {"fam_length": embeddings.shape[0]} if embeddings and embeddings.shape else {}
    own = {**present, **stored}
    config = config_from_hf(data, {**DEFAULTS, **own, **options.fam_over(own)})
    if config.fam_length == 0 or options.brings_embeddings:
        tensors.pop(FAM_WEIGHT, None)
    elif present and "fam_length" in options.fam and present["fam_length"] != config.fam_length:
        raise UsageError(
            f"{source} has FAM embeddings of length {present['fam_length']}, fam_length {config.fam_length} was asked "
            "for; leave fam_length out to keep them, or give 0 to drop them"
        )
    check_tensors(config, tensors, str(source), optional=FAM_WEIGHT)
    used = {name: tensors[name] for name in parameter_shapes(config) if name in tensors}
    opened = Checkpoint(source, config, False, used, files)

    def load(name: str, dtype: str) -> Tensor:
        return cast(name, opened.tensor(name), dtype)

    return write_converted(
        target,
        config,
        {name: entry.dtype for name, entry in used.items()},
        load,
        options,
        fam_trained=FAM_WEIGHT in used and bool(stored.get("trained", False)),
        extra=_tokenizer_files(source, config.vocab_size),
    )


def _tokenizer_files(source: Path, vocab_size: int) -> dict[str, bytes]:
    found = {}
    for name in TOKENIZER_FILES:
        file = source / name
        if file.is_file():
            if file.stat().st_size > MAX_TOKENIZER_BYTES:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes, expected at most {MAX_TOKENIZER_BYTES}")
            found[name] = file.read_bytes()
    if "tokenizer.json" in found:
        try:
            tokenizer = open_tokenizer(source / "tokenizer.json")
        except InvalidInputError as exc:
            raise CheckpointError(str(exc)) from exc
        check_vocabulary(tokenizer, vocab_size, str(source / "tokenizer.json"))
    elif (source / "tokenizer.model").is_file():
        warnings.warn(
            f"{source} has tokenizer.model but no tokenizer.json, so the checkpoint gets no tokenizer; "
            "save the tokenizer again as a fast one, or feed token ids",
            stacklevel=2,
        )
    return found


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, subject: str) -> None:
    """Refuse a tokenizer that can give ids the model has no embedding for."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{subject} has token ids up to {largest}, the model's vocabulary has {vocab_size}: "
            "this is another model's tokenizer; replace it with the one of this model"
        )


def download(name: str) -> Path:
    """The hub's snapshot of ``name``, weights as safetensors only; what was fetched before is not fetched again."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as exc:
        raise MissingDependencyError("huggingface_hub", "hf", "fetching a model from the hub") from exc
    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED))
    except Exception as exc:  # the hub client lets errors of its HTTP library through, which differ by version
        reason = (str(exc).strip().splitlines() or [""])[0]
        raise UsageError(
            f"{name} is no local path, and the hub does not give it: {type(exc).__name__}: {reason:.200}; "
            "check the name, your access and the network; offline, give a local directory or a .gguf file"
        ) from exc
