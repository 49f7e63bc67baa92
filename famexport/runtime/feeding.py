"""From a file or stdin to checked token ids: text through the bundle's tokenizer, or ids as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from famexport.bundle import Bundle
from famexport.errors import UsageError
from famexport.text import check_tokens, open_tokenizer, read_text, read_token_ids, stream_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def token_source(bundle: Bundle, source: Path | IO[bytes], *, as_tokens: bool = False) -> Iterator[np.ndarray]:
    """Token ids int64 [n] of ``source``, in pieces, in memory that does not grow.

    A ``.npy`` file is token ids; so is everything where ``as_tokens`` or where the bundle has no tokenizer.

    Raises:
        UsageError: no such file.
        InvalidInputError: not text, not ids, or ids outside the vocabulary.
    """
    if isinstance(source, Path) and not source.exists():  # a pipe will do; a directory is refused where it is read
        raise UsageError(f"no such file: {source}")
    ids_given = bundle.manifest.tokenizer is None or as_tokens or (isinstance(source, Path) and source.suffix == ".npy")
    pieces = read_token_ids(source) if ids_given else stream_tokens(bundle_tokenizer(bundle), read_text(source))
    at = 0
    for ids in pieces:
        check_tokens(ids, bundle.contract.vocab_size, at)
        at += len(ids)
        yield ids


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer.

    Raises:
        UsageError: it has none.
    """
    name = bundle.manifest.tokenizer
    if name is None:
        raise UsageError(
            f"{bundle.path} has no tokenizer; put a tokenizer.json into the checkpoint and export it again"
        )
    return open_tokenizer(bundle.file(name))
