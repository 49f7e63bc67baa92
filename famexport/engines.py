"""What a manifest says of each engine: what it was built from, with and for. Pure Python, no tensorrt."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

KEY_LENGTH = 16
_HEX = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class DeviceTuple:
    """What an engine is tied to (reliability R6). ``gpu`` is None where it was built ahead of time, without one."""

    tensorrt: str
    cuda: str | None
    compute_capability: str
    gpu: str | None
    os: str
    arch: str


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine of a bundle; the file is ``engines/<target>/<file>``.

    Args:
        graph: of the contract's ``graph_names``.
        engine: ``tensorrt`` or ``tensorrt-rtx``.
        key: digest of what goes into a build; an unchanged key is not built again.
        options: what the builder was told.
        layers: output dtypes of the network's layers by kind, ``{"MATRIX_MULTIPLY": {"HALF": 23}}``.
        io: how many inputs and outputs have which dtype.
        checked: ``network`` where the types were read off the strongly typed network, ``engine`` where off the plan.
        attention: ``fused``, ``decomposable``, or None for a graph without Attention nodes.
    """

    file: str
    graph: str
    target: str
    engine: str
    bytes: int
    sha256: str
    key: str
    options: dict[str, Any]
    device: DeviceTuple
    layers: dict[str, Any]
    io: dict[str, int]
    checked: str
    attention: str | None
    build_seconds: float

    @property
    def name(self) -> str:
        return f"{self.target}/{self.file}"

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("file", "target")}


_TYPES: dict[str, tuple[type, ...]] = {
    "graph": (str,),
    "engine": (str,),
    "bytes": (int,),
    "sha256": (str,),
    "key": (str,),
    "options": (dict,),
    "device": (dict,),
    "layers": (dict,),
    "io": (dict,),
    "checked": (str,),
    "attention": (str, type(None)),
    "build_seconds": (float, int),
}
_DEVICE_KEYS = ("tensorrt", "cuda", "compute_capability", "gpu", "os", "arch")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}/[a-z0-9_]{1,64}-[0-9a-f]{16}\.plan")


def entry_problems(name: str, data: Any) -> list[str]:
    """What is wrong with one entry of a manifest's ``engines``."""
    where = f"engine {name!r:.80}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return [f"{where}: its name is not target/graph-key.plan"]
    if not isinstance(data, dict):
        return [f"{where} must be an object, got {type(data).__name__}"]
    found = [f"{where} lacks the key {key!r}" for key in _TYPES if key not in data]
    found += [f"{where} has the unknown key {key!r:.80}" for key in data if key not in _TYPES]
    found += [
        f"{key} of {where} has the wrong type {type(data[key]).__name__}"
        for key, kinds in _TYPES.items()
        if key in data and type(data[key]) not in kinds
    ]
    if found:
        return found
    device = data["device"]
    if set(device) != set(_DEVICE_KEYS) or any(not isinstance(v, (str, type(None))) for v in device.values()):
        found.append(f"device of {where} must have the text values {', '.join(_DEVICE_KEYS)}")
    if not _HEX.fullmatch(data["sha256"]) or data["bytes"] < 1:
        found.append(f"{where} has no valid size and SHA-256")
    if data["engine"] not in ("tensorrt", "tensorrt-rtx"):
        found.append(f"{where} is of the unknown kind {data['engine']!r:.80}")
    return found


def read_entries(engines: Mapping[str, Any]) -> list[EngineEntry]:
    """The entries of a checked manifest."""
    found = []
    for name, data in sorted(engines.items()):
        target, file = name.split("/")
        found.append(EngineEntry(**{**data, "device": DeviceTuple(**data["device"])}, target=target, file=file))
    return found


def build_key(**parts: Any) -> str:
    """Digest of everything that decides what a build gives."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]
