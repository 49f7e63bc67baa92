"""Safetensors files written and read as streams, one tensor in memory at a time.

The safetensors package writes only tensors that are all in memory at once, and does not tell where in the file a tensor
lies. famexport needs both: checkpoints larger than memory, and byte offsets, since a bundle's weight file is a
safetensors file that the ONNX graphs point into as external data.
Format: https://huggingface.co/docs/safetensors/index#format

A header is read at least as strictly as the package reads it, but for odd ways to write a number.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from famexport.contract import ITEM_BYTES, MAX_AXES
from famexport.errors import InvalidInputError

MAX_HEADER_BYTES = 16 * 2**20
ALIGNMENT = 64  # of the data section, in bytes
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "bool": "BOOL"}
_CODES |= {"int8": "I8", "uint8": "U8"}  # of quantised weights; no tensor of a contract has them
_ITEM_BYTES = {**ITEM_BYTES, "int8": 1, "uint8": 1}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_ENTRY = {"dtype", "shape", "data_offsets"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Buffer(Protocol):
    """Anything with the buffer protocol: bytes, or a C-contiguous numpy array."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file: ``offset`` and ``nbytes`` are bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = -1

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


def write_tensors(
    target: Path | Callable[[bytes], None],
    tensors: Iterable[TensorEntry],
    load: Callable[[str], Any],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TensorEntry]:
    """Write ``tensors`` to ``target``, asking ``load(name)`` for one buffer at a time.

    The order in the file is widest dtype first, then by name, so the same tensors give the same bytes.

    Args:
        target: a path, or what appends bytes to a file.
        load: gives a tensor's bytes in row-major order (bfloat16 as uint16).
        progress: called with (bytes written, bytes in all).
    Returns:
        The entries with their offsets.
    """
    ordered = sorted(tensors, key=lambda t: (-_ITEM_BYTES[t.dtype], t.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for t in ordered:
        header[t.name] = {
            "dtype": _CODES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [position, position + t.nbytes],
        }
        position += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    total, at = position, 8 + len(text)
    start, placed = at, dict[str, TensorEntry]()
    with open(target, "wb") if isinstance(target, Path) else nullcontext() as file:
        write: Callable[[Any], Any] = file.write if file else target  # type: ignore[assignment]
        write(len(text).to_bytes(8, "little") + text)
        for t in ordered:
            data = memoryview(load(t.name))
            if data.nbytes != t.nbytes:
                raise InvalidInputError(
                    f"{t.name}: got {data.nbytes} bytes, expected {t.nbytes} for {t.dtype} {t.shape}"
                )
            placed[t.name] = TensorEntry(t.name, t.dtype, t.shape, at)
            write(data.cast("B") if data.nbytes else b"")  # an empty view cannot be cast
            del data  # else it stays in memory beside the next
            at += t.nbytes
            if progress:
                progress(at - start, total)
    return placed


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors in a safetensors file and where they lie, every offset checked against the file's size.

    Raises:
        InvalidInputError: not a safetensors file, truncated, or a header that contradicts itself.
    """
    size, (entries, _, end) = os.stat(path).st_size, _header(path)
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != end:
            raise InvalidInputError(
                f"{path.name}: {entry.name!r:.100} starts at byte {entry.offset}, expected {end}; copy it again"
            )
        end += entry.nbytes
    if end != size:
        raise InvalidInputError(
            f"{path.name}: got {size} bytes, expected {end}: truncated or overwritten; copy it again"
        )
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in the header's ``__metadata__``.

    Raises:
        InvalidInputError: as ``read_header``.
    """
    return _header(path)[1]


def read_tensor(path: Path, entry: TensorEntry) -> np.ndarray:
    """The bytes (uint8) of one tensor. It may be as large as the file says it is: look at ``entry`` before.

    Raises:
        InvalidInputError: the file ends before the tensor does.
    """
    data = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.offset)
    if data.nbytes != entry.nbytes:
        raise InvalidInputError(f"{path.name}: {entry.name!r:.100} ends early: the file was cut while it was read")
    return data


def _header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str], int]:
    """The tensors, each by itself sound, the strings in ``__metadata__``, and the byte where the data begins."""
    text = _header_text(path)
    start = 8 + len(text)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_number)
        if _SURROGATE.search(text):  # half a character, unless its other half follows
            json.dumps(header, ensure_ascii=False).encode()
        metadata = header.pop("__metadata__", None)
        if metadata is None:
            metadata = {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is no object of strings")
        return {name: _entry(name, info, start) for name, info in header.items()}, metadata, start
    except (ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise InvalidInputError(f"{path.name}: damaged safetensors header: {exc}; copy it again") from exc


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(items)) != len(items):
        raise ValueError("a key is there twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _header_text(path: Path) -> bytes:
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise InvalidInputError(f"{path.name} is not a safetensors file, or it is truncated ({size} bytes)")
        return file.read(length)


def _entry(name: str, info: Mapping[str, Any], base: int) -> TensorEntry:
    named = f"{name!r:.100}"
    if set(info) != _ENTRY:
        raise ValueError(f"{named} has {sorted(info)!r:.100}, expected {sorted(_ENTRY)}")
    if not isinstance(info["shape"], list) or not isinstance(info["data_offsets"], list):
        raise ValueError(f"{named} has a shape or offsets that are no lists")
    shape = tuple(info["shape"])
    begin, end = info["data_offsets"]
    if info["dtype"] not in _DTYPES:
        raise ValueError(f"{named} has dtype {info['dtype']!r:.80}, supported are {sorted(_DTYPES)}")
    if len(shape) > MAX_AXES:
        raise ValueError(f"{named} has {len(shape)} axes, expected at most {MAX_AXES}")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise ValueError(f"{named} has a bad shape or offset")
    entry = TensorEntry(name, _DTYPES[info["dtype"]], shape, base + begin)
    if end - begin != entry.nbytes:
        raise ValueError(f"{named} spans {end - begin} bytes, its shape needs {entry.nbytes}")
    return entry
