"""The header of a GGUF file, read with every size checked against the file before it is believed.

``gguf.GGUFReader`` trusts the counts it reads (an array of 2**60 numbers keeps it busy until memory runs out) and makes
a numpy view of every token, which takes seconds. Types and block sizes come from the gguf package all the same.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from famexport.errors import CheckpointError, MissingDependencyError, UnsupportedModelError

MAX_HEADER_BYTES = 64 * 2**20  # of metadata and tensor names; the largest vocabularies take about 10 MiB
_MAX_AXES = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: ``kind`` is ggml's name of its type, ``offset`` and ``nbytes`` count from the start of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]  # rows first, as in numpy
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """Metadata (numbers, strings, numpy arrays and lists of strings) and tensors of a GGUF file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of ``path``.

    Raises:
        CheckpointError: not a GGUF file, truncated, or contradicting itself.
        UnsupportedModelError: another version or byte order, or a tensor type the gguf package does not know.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        cursor = _Cursor(file, size, path.name)
        if size < 24 or cursor.take(4) != b"GGUF":
            raise CheckpointError(f"{path.name} is not a GGUF file, or it is truncated ({size} bytes)")
        version = cursor.number("<u4")
        if version not in (2, 3):
            detail = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise UnsupportedModelError(f"{path.name}: {detail} GGUF files are not supported; expected version 2 or 3")
        tensor_count, key_count = cursor.number("<u8"), cursor.number("<u8")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.string()
            if key in metadata:
                raise CheckpointError(f"{path.name}: the key {key!r:.80} is there twice")
            metadata[key] = cursor.value()
        infos = [cursor.tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{path.name}: general.alignment must be a power of two, got {alignment!r:.80}")
        start = cursor.position + -cursor.position % alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in infos:
        tensor = _tensor(path.name, name, shape, kind, start + offset)
        if name in tensors:
            raise CheckpointError(f"{path.name}: the tensor {name!r:.80} is there twice")
        if tensor.offset + tensor.nbytes > size:
            raise CheckpointError(
                f"{path.name}: {name!r:.80} ends at byte {tensor.offset + tensor.nbytes}, the file has {size}: "
                "truncated; get it again"
            )
        tensors[name] = tensor
    return GGUFFile(path, metadata, tensors)


class _Cursor:
    """Reads forward; what would go past the end of the file, or of a sane header, is an error before it is read."""

    def __init__(self, file: IO[bytes], size: int, name: str) -> None:
        self.file, self.size, self.name, self.position = file, size, name, 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self.size:
            raise CheckpointError(
                f"{self.name}: the header needs {end} bytes at least, the file has {self.size}: truncated or damaged; "
                "get it again"
            )
        if end > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.name}: the header is longer than {MAX_HEADER_BYTES} bytes: damaged; get it again"
            )
        self.position = end
        return self.file.read(count)

    def number(self, code: str) -> Any:
        dtype = np.dtype(code)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise CheckpointError(f"{self.name}: a string before byte {self.position} is not UTF-8") from exc

    def value(self) -> Any:
        kind = self.number("<u4")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(f"{self.name}: unknown metadata type {kind} before byte {self.position}")
        item, count = self.number("<u4"), self.number("<u8")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise CheckpointError(f"{self.name}: an array of type {item} before byte {self.position} is not supported")
        dtype = np.dtype(_SCALARS[item])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self.string(), self.number("<u4")
        if not 1 <= axes <= _MAX_AXES:
            raise CheckpointError(f"{self.name}: {name!r:.80} has {axes} axes, expected 1 to {_MAX_AXES}")
        shape = tuple(self.number("<u8") for _ in range(axes))[::-1]
        return name, shape, self.number("<u4"), self.number("<u8")


def _tensor(file: str, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as exc:
        raise MissingDependencyError("gguf", "hf", "converting a GGUF file") from exc
    try:
        quantisation = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quantisation]
    except (ValueError, KeyError) as exc:
        raise UnsupportedModelError(f"{file}: {name!r:.80} has the unknown tensor type {kind}") from exc
    if min(shape) < 1 or shape[-1] % block:
        raise CheckpointError(
            f"{file}: {name!r:.80} has shape {list(shape)}, rows of {quantisation.name} come in {block}s"
        )
    return GGUFTensor(name, quantisation.name, shape, offset, prod(shape) // block * block_bytes)
