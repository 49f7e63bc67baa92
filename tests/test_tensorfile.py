"""Safetensors files: what is written is read by the safetensors package and the other way, and damage is refused."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from famexport.errors import InvalidInputError
from famexport.tensorfile import (
    MAX_AXES,
    MAX_HEADER_BYTES,
    TensorEntry,
    read_header,
    read_metadata,
    read_tensor,
    write_tensors,
)

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.layers.0.weight": ("bfloat16", (3, 5)),
    "model.layers.1.weight": ("bfloat16", (7,)),
    "a": ("float32", (2, 3, 4)),
    "flags": ("bool", (5,)),
    "half": ("float16", (1, 9)),
    "ids": ("int64", (4,)),
    "small": ("int32", (3,)),
    "scalar": ("float32", ()),
    "empty": ("float32", (0, 4)),
    'größe "x"\n': ("float16", (2,)),
}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-9, 9, shape, generator=generator).to(getattr(torch, dtype))
        for name, (dtype, shape) in SHAPES.items()
    }


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


def entries() -> list[TensorEntry]:
    return [TensorEntry(name, dtype, shape) for name, (dtype, shape) in SHAPES.items()]


def write(path: Path, **options: Any) -> dict[str, TensorEntry]:
    data = tensors()
    return write_tensors(path, entries(), lambda name: raw(data[name]), **options)


def test_what_is_written_the_safetensors_package_reads(tmp_path: Path) -> None:
    placed = write(tmp_path / "w", metadata={"format": "pt"})
    stored, data = load_file(tmp_path / "w"), tensors()
    assert stored.keys() == data.keys() == placed.keys()
    for name, tensor in data.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(stored[name], tensor), name
    with safe_open(tmp_path / "w", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    write(tmp_path / "plain")
    with safe_open(tmp_path / "plain", "pt") as file:
        assert not file.metadata()


def test_offsets_are_where_the_bytes_are(tmp_path: Path) -> None:
    path, data = tmp_path / "w", tensors()
    placed = write(path, metadata={"format": "pt"})
    assert read_header(path) == placed
    content = path.read_bytes()
    for name, entry in placed.items():
        assert content[entry.offset : entry.offset + entry.nbytes] == raw(data[name]).tobytes(), name
    assert min(entry.offset for entry in placed.values()) % 64 == 0
    sizes = {"int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1}
    assert all(entry.offset % sizes[entry.dtype] == 0 for entry in placed.values())  # so that they can be mapped


@pytest.mark.parametrize("count", range(1, 12))
def test_the_data_section_is_aligned_whatever_the_headers_length(tmp_path: Path, count: int) -> None:
    name = "x" * count
    placed = write_tensors(tmp_path / "w", [TensorEntry(name, "int64", (2,))], lambda _: np.arange(2))
    assert placed[name].offset % 64 == 0
    assert load_file(tmp_path / "w")[name].tolist() == [0, 1]


def test_what_the_safetensors_package_writes_is_read(tmp_path: Path) -> None:
    path, data = tmp_path / "w", tensors()
    save_file(data, path, metadata={"format": "pt", "note": "ä"})
    header, content = read_header(path), path.read_bytes()
    assert {name: (e.dtype, e.shape) for name, e in header.items()} == SHAPES
    for name, entry in header.items():
        assert content[entry.offset : entry.offset + entry.nbytes] == raw(data[name]).tobytes(), name
    save_file({}, tmp_path / "nothing")
    assert read_header(tmp_path / "nothing") == {}


def test_the_same_tensors_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one")
    data, shuffled = tensors(), entries()
    random.Random(0).shuffle(shuffled)
    write_tensors(tmp_path / "two", shuffled, lambda name: raw(data[name]))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_one_tensor_is_asked_for_at_a_time_and_progress_is_in_bytes(tmp_path: Path) -> None:
    data, asked, reports = tensors(), [], []

    def load(name: str) -> np.ndarray:
        asked.append(name)
        return raw(data[name])

    def progress(done: int, total: int) -> None:
        reports.append((done, total))
        assert len(asked) == len(reports)

    write_tensors(tmp_path / "w", entries(), load, progress=progress)
    assert sorted(asked) == sorted(SHAPES)
    total = sum(entry.nbytes for entry in entries())
    assert reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


@pytest.mark.parametrize("size", [0, 23, 25, 48])
def test_a_buffer_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(InvalidInputError, match=rf"w: got {size} bytes, expected 24 for float32 \(2, 3\)"):
        write_tensors(tmp_path / "w", [TensorEntry("w", "float32", (2, 3))], lambda _: bytes(size))


def test_arrays_of_any_dtype_are_taken_as_bytes(tmp_path: Path) -> None:
    array = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
    write_tensors(tmp_path / "w", [TensorEntry("w", "bfloat16", (2, 3))], lambda _: array.view(np.uint16))
    assert load_file(tmp_path / "w")["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


# -- damage


def make(path: Path, header: Any, data: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def spec(begin: int, end: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_header_made_by_hand_is_read(tmp_path: Path) -> None:
    """The control of the tests below."""
    read = read_header(make(tmp_path / "w", {"a": spec(0, 32), "b": spec(32, 64), "__metadata__": {"x": "y"}}))
    assert {name: (e.shape, e.nbytes) for name, e in read.items()} == {"a": ((8,), 32), "b": ((8,), 32)}


DAMAGED: dict[str, Any] = {
    "overlap": {"a": spec(0, 36), "b": spec(32, 64)},
    "the same bytes twice": {"a": spec(0, 64), "b": spec(0, 64)},
    "hole": {"a": spec(0, 28), "b": spec(32, 64)},
    "hole at the start": {"a": spec(4, 64)},
    "bytes left at the end": {"a": spec(0, 60)},
    "past the end": {"a": spec(0, 68)},
    "nothing": {},
    "backwards": {"a": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}},
    "negative offset": {"a": spec(-4, 60, shape=[16])},
    "negative size": {"a": spec(0, 64, shape=[-16])},
    "two negative sizes": {"a": spec(0, 64, shape=[-4, -4])},
    "shape too large": {"a": spec(0, 64, shape=[17])},
    "shape beyond 64 bits": {"a": spec(0, 64, shape=[2**62, 2**62])},
    "fractional size": {"a": spec(0, 64, shape=[16.0])},
    "size as text": {"a": spec(0, 64, shape=["16"])},
    "size true": {"a": spec(0, 4, shape=[True]), "b": spec(4, 64)},
    "shape as number": {"a": spec(0, 64, shape=16)},
    "shape as text": {"a": spec(0, 64, shape="16")},
    "shape null": {"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 64]}},
    "offset as text": {"a": {"dtype": "F32", "shape": [16], "data_offsets": ["0", "64"]}},
    "one offset": {"a": {"dtype": "F32", "shape": [16], "data_offsets": [64]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 32, 64]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [16]}},
    "no dtype": {"a": {"shape": [16], "data_offsets": [0, 64]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 64]}},
    "unknown dtype": {"a": spec(0, 64, "F5", [64])},
    "dtype in another case": {"a": spec(0, 64, "f32")},
    "dtype as list": {"a": {"dtype": ["F32"], "shape": [16], "data_offsets": [0, 64]}},
    "tensor as number": {"a": 5},
    "tensor null": {"a": None},
    "a list": [spec(0, 64)],
    "a number": 12345,
    "a text": "header",
    "null": None,
    "not JSON": b"{'a': 1}",
    "half a JSON": b'{"a": {"dtype": "F32"',
    "not UTF-8": b'{"\xff": {}}',
    "deeply nested": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "zeros": bytes(40),
    "UTF-16": json.dumps({"a": spec(0, 64)}).encode("utf-16"),
    "UTF-16 without a mark": json.dumps({"a": spec(0, 64)}).encode("utf-16-le"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps({"a": spec(0, 64)}).encode(),
    "metadata of numbers": {"a": spec(0, 64), "__metadata__": {"x": 1}},
    "metadata null inside": {"a": spec(0, 64), "__metadata__": {"x": None}},
    "metadata as list": {"a": spec(0, 64), "__metadata__": []},
    "metadata as text": {"a": spec(0, 64), "__metadata__": ""},
    "half a character in metadata": {"a": spec(0, 64), "__metadata__": {"x": "\ud800"}},
    "half a character as name": {"\udfff": spec(0, 64)},
    "NaN in a further key": {"a": spec(0, 64) | {"x": float("nan")}},
    "infinity in a further key": b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], "x": 1e999}}',
    "a key twice": b'{"a": {"dtype": "F32", "shape": [16], "shape": [16], "data_offsets": [0, 64]}}',
    "metadata twice": b'{"__metadata__": {}, "__metadata__": {}, "a": ' + json.dumps(spec(0, 64)).encode() + b"}",
    "NaN offsets": b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, NaN]}}',
    "a number of a million digits": b'{"a": ' + b"1" * 10**6 + b"}",
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_header_is_refused(tmp_path: Path, what: str) -> None:
    path = make(tmp_path / "weights.safetensors", DAMAGED[what])
    with pytest.raises(InvalidInputError, match=r"^weights\.safetensors"):
        read_header(path)
    with pytest.raises((SafetensorError, OSError, ValueError)):  # the package agrees
        load_file(path)


STRICTER: dict[str, Any] = {  # than the package is
    "a tensor twice": (b'{"a": %s, "a": %s}' % ((json.dumps(spec(0, 64)).encode(),) * 2), "a key is there twice"),
    "a further key": ({"a": spec(0, 64) | {"x": 1}}, r"'a' has \[.*'x'\], expected"),
    "many axes": ({"a": spec(0, 64, shape=[16] + [1] * MAX_AXES)}, "'a' has 9 axes, expected at most 8"),
}


@pytest.mark.parametrize("what", STRICTER)
def test_what_the_package_takes_and_famexport_does_not(tmp_path: Path, what: str) -> None:
    header, says = STRICTER[what]
    path = make(tmp_path / "w", header)
    assert load_file(path)["a"].numel() == 16
    with pytest.raises(InvalidInputError, match=f"{says}.*; copy it again"):
        read_header(path)


def test_a_shape_of_many_axes_costs_no_time(tmp_path: Path) -> None:
    """Half a megabyte of header: their product has 200,000 digits, and took 13 seconds."""
    began = time.process_time()
    with pytest.raises(InvalidInputError, match="has 200000 axes, expected at most 8"):
        read_header(make(tmp_path / "w", {"a": spec(0, 64, shape=[9] * 200_000)}))
    assert time.process_time() - began < 2


def test_as_many_axes_as_there_may_be(tmp_path: Path) -> None:
    path = make(tmp_path / "w", {"a": spec(0, 64, shape=[2, 2, 2, 2, 1, 1, 1, 1])})
    assert len(read_header(path)["a"].shape) == MAX_AXES


def test_whole_characters_in_escapes_are_read(tmp_path: Path) -> None:
    path = make(tmp_path / "w", {"\U0001f389": spec(0, 64), "__metadata__": {"x": "\U0001f389"}})
    assert rb"\ud83c\udf89" in path.read_bytes()
    assert list(read_header(path)) == list(load_file(path)) == ["\U0001f389"]
    assert read_metadata(path) == {"x": "\U0001f389"}
    assert read_metadata(make(tmp_path / "w", {"a": spec(0, 64), "__metadata__": None})) == {}


@pytest.mark.parametrize("what", ["metadata of numbers", "half a character in metadata", "byte order mark"])
def test_damaged_metadata_is_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(InvalidInputError, match=r"^weights: damaged safetensors header"):
        read_metadata(make(tmp_path / "weights", DAMAGED[what]))


def test_names_that_are_a_terminals_commands_are_shown_as_text(tmp_path: Path) -> None:
    name = "\x1b]0;owned\x07" + "x" * 1000
    for entry in (spec(4, 64), spec(0, 64, "F5"), spec(0, 64, shape=[17]), spec(0, 64, shape=["\x1b"])):
        with pytest.raises(InvalidInputError, match=r"'\\x1b\]0;owned\\x07x") as caught:
            read_header(make(tmp_path / "w", {name: entry}))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 300


def test_one_tensor_is_read_and_a_file_cut_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w"
    placed, data = write(path), tensors()
    for name, entry in placed.items():
        assert read_tensor(path, entry).tobytes() == raw(data[name]).tobytes(), name
    last = max(placed.values(), key=lambda e: e.offset)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInputError, match="ends early: the file was cut while it was read"):
        read_tensor(path, last)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w"
    write(path)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(InvalidInputError, match="w"):
            read_header(path)
    path.write_bytes(content + b"x")
    with pytest.raises(InvalidInputError, match="copy it again"):
        read_header(path)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_cannot_be_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "w"
    path.write_bytes(length.to_bytes(8, "little") + bytes(1000))
    with pytest.raises(InvalidInputError, match="not a safetensors file"):
        read_header(path)


def test_flipped_bits_give_an_error_or_entries_inside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w"
    write(path)
    content = path.read_bytes()
    header_bits = 8 * (8 + int.from_bytes(content[:8], "little"))
    rng, refused = random.Random(0), 0
    for _ in range(600):
        bit = rng.randrange(header_bits)
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = read_header(path)
        except InvalidInputError:
            refused += 1
        else:
            assert all(0 <= e.offset <= e.offset + e.nbytes <= len(content) for e in found.values())
    assert 100 < refused < 600
