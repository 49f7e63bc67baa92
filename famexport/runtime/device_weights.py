"""A bundle's weights in device memory, once, for all graphs that take them as inputs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from famexport.errors import BundleError
from famexport.runtime.enqueue import CudaLayer
from famexport.tensorfile import read_header

_ALIGNMENT = 256
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def parts(name: str) -> list[str]:
    """The tensors of the weight file that one input is, one after the other: query, key and value weights are one, and
    in some graphs gate and up weights."""
    for packed, kinds in _PACKED.items():
        if f".{packed}." in name:
            return [name.replace(f".{packed}.", f".{kind}.") for kind in kinds]
    return [name]


class DeviceWeights:
    """``address`` of each input, and ``nbytes`` of all. ``close`` once for each ``retain`` and once more: loops go on
    when their backend is closed.

    A tensor that one graph takes alone and another as part of a packed input lies inside that one, where it is aligned
    there.

    Args:
        file: a checked weight file.
        names: the inputs.
    Raises:
        BundleError: the file lacks a tensor.
        FamExportError: device memory is full.
    """

    def __init__(self, file: Path, names: Iterable[str], cuda: CudaLayer) -> None:
        self._cuda, self._base, self._owners, header = cuda, 0, 1, read_header(file)
        offsets: dict[str, int] = {}
        self.nbytes, self.sizes = 0, {}
        names = list(names)
        for name in names:
            if absent := [part for part in parts(name) if part not in header]:
                raise BundleError(f"{file.name} lacks {', '.join(absent)}, which a graph takes")
            self.sizes[name] = sum(header[part].nbytes for part in parts(name))
        inside: dict[str, tuple[str, int]] = {}  # of a part, the packed input and the offset
        for name in (name for name in names if len(parts(name)) > 1):
            at = 0
            for part in parts(name):
                if at % _ALIGNMENT == 0:
                    inside[part] = name, at
                at += header[part].nbytes
        own = [name for name in names if name not in inside]
        for name in own:
            offsets[name], self.nbytes = self.nbytes, self.nbytes + -(-self.sizes[name] // _ALIGNMENT) * _ALIGNMENT
        offsets |= {name: offsets[inside[name][0]] + inside[name][1] for name in names if name in inside}
        self._base = cuda.malloc(max(self.nbytes, 1))
        self.address = {name: self._base + offset for name, offset in offsets.items()}
        raw = np.memmap(file, np.uint8, "r")
        try:
            for name in own:
                at = self.address[name]
                for part in parts(name):
                    entry = header[part]
                    cuda.copy_in(at, raw[entry.offset : entry.offset + entry.nbytes])
                    at += entry.nbytes
            cuda.synchronize()
        except BaseException:
            self.close()
            raise

    def retain(self) -> None:
        """One more owner, who will ``close``."""
        self._owners += 1

    def close(self) -> None:
        self._owners -= 1
        if not self._owners and self._base:
            self._cuda.free(self._base)
            self._base = 0
