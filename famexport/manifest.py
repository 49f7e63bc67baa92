"""A bundle's manifest: what the directory holds, as one strict JSON file (R1).

A manifest is at most one MiB, of a known schema version, without unknown or duplicate keys; every problem in it is
reported at once. A checksum inside it makes any damage an error, also where the damaged value would be a valid one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from famexport.contract import PRECISION_DTYPE, StepContract
from famexport.engines import entry_problems
from famexport.errors import BundleError, ContractError, raise_problems

MANIFEST, ENGINES, KIND, SCHEMA_VERSION = "manifest.json", "engines", "famexport-bundle", 1
MAX_MANIFEST_BYTES, MAX_DEPTH = 2**20, 32
AGAIN = "export again, or copy the bundle again"
MAKE_ONE = "make a bundle with: famexport export CKPT -o BUNDLE"
_KEYS: dict[str, tuple[type, ...]] = {
    "schema_version": (int,),
    "kind": (str,),
    "contract": (dict,),
    "config": (dict, NoneType),
    "fam_trained": (bool, NoneType),
    "precision": (str,),
    "opset": (int,),
    "ir_version": (int,),
    "graphs": (dict,),
    "weights": (str, NoneType),
    "tokenizer": (str, NoneType),
    "golden": (str, NoneType),
    "files": (dict,),
    "versions": (dict,),
    "parity": (dict,),
    "cost": (dict,),
    "engines": (dict,),
    "checksum": (str,),
}


@dataclass(frozen=True)
class GraphFiles:
    """The file of one graph, and of its variants by backend name (``{"ort-cpu": "block_step.ort-cpu.onnx"}``).

    ort-cuda has up to three: ``ort-cuda-start`` while memory fills, then ``ort-cuda``, or in its place
    ``ort-cuda-fused``, whose operators are those of ``famexport.kernels``.
    """

    file: str
    variants: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle is and holds. ``config``, ``parity`` and ``cost`` are JSON objects not looked into here.

    Args:
        config: the model configuration; None for a module of one's own.
        fam_trained: whether the FAM was trained; None where nobody knows.
        weights, tokenizer, golden: file names; ``weights`` is the graphs' one external-data file.
        files: size and hash of every file but the manifest, by name.
    """

    contract: StepContract
    config: dict[str, Any] | None
    fam_trained: bool | None
    precision: str
    opset: int
    ir_version: int
    graphs: dict[str, GraphFiles]
    weights: str | None
    tokenizer: str | None
    golden: str | None
    files: dict[str, FileEntry]
    versions: dict[str, str]
    parity: dict[str, Any]
    cost: dict[str, Any]
    engines: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    kind: str = KIND

    def to_bytes(self) -> bytes:
        """The manifest as JSON: the same manifest gives the same bytes.

        Raises:
            BundleError: it breaks the manifest's own rules.
        """
        data = dict(vars(self), contract=self.contract.to_dict())
        data["graphs"] = {name: vars(graph) for name, graph in self.graphs.items()}
        data["files"] = {name: vars(entry) for name, entry in self.files.items()}
        try:
            data = json.loads(json.dumps(data))  # tuples become lists, keys strings
            data["checksum"] = _checksum(data)
            text = json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        except (TypeError, ValueError, RecursionError) as exc:
            raise BundleError(
                f"{MANIFEST} cannot hold this: {exc}; use finite numbers, strings, lists and maps"
            ) from exc
        Manifest.parse(text.encode())
        return text.encode()

    @classmethod
    def parse(cls, data: bytes, subject: str = MANIFEST) -> Manifest:
        """The manifest in ``data``.

        A checksum over the content makes damage to any field an error, also where every value would do. It is no
        protection from someone who means harm: the bundle's id is.

        Raises:
            BundleError: naming everything that is wrong.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{subject} has {len(data)} bytes, expected at most {MAX_MANIFEST_BYTES}; {AGAIN}")
        tree = strict_json(data, subject)
        if not isinstance(tree, dict) or tree.get("kind") != KIND:
            raise BundleError(f"{subject} is not that of a bundle: expected kind {KIND!r}; {MAKE_ONE}")
        version = tree.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:  # then the rules below are not its rules
            got = f"schema version {version!r:.80}"
            raise BundleError(f"{subject} has {got}, expected {SCHEMA_VERSION}; export again or upgrade famexport")
        problems: list[str] = []
        contract = _check_tree(tree, problems)
        report_problems(subject, problems)
        del tree["checksum"]
        tree["contract"] = contract
        tree["graphs"] = {name: GraphFiles(**graph) for name, graph in tree["graphs"].items()}
        tree["files"] = {name: FileEntry(**entry) for name, entry in tree["files"].items()}
        return cls(**tree)

    def graph_files(self) -> set[str]:
        return {name for graph in self.graphs.values() for name in (graph.file, *graph.variants.values())}


def strict_json(data: bytes, subject: str) -> Any:
    """JSON without duplicate keys, NaN, infinities, numbers past 64 bits and deep nesting.

    Raises:
        BundleError: it is not that.
    """
    problems: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            counts = Counter(key for key, _ in items)
            problems.extend(f"key {key!r:.80} occurs {n} times" for key, n in counts.items() if n > 1)
        return found

    def integer(text: str) -> int:
        if len(text) > 19:
            raise ValueError(f"the number {text:.40} does not fit 64 bits")
        return int(text)

    def real(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"the number {text:.40} is not finite")
        return value

    try:
        hooks: Any = {"parse_int": integer, "parse_float": real, "parse_constant": real}
        tree = json.loads(data.decode(), object_pairs_hook=pairs, **hooks)
        _checksum(tree)  # half a character (a lone surrogate) in a string fails here
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{subject} is not valid JSON: {exc}; {AGAIN}") from exc
    if not _shallow(tree, MAX_DEPTH):
        problems.append(f"nests deeper than {MAX_DEPTH} levels")
    report_problems(subject, problems)
    return tree


def _shallow(tree: Any, levels: int) -> bool:
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return levels >= 0 and all(_shallow(item, levels - 1) for item in inside)


def _checksum(tree: Any) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def report_problems(subject: str, problems: list[str]) -> None:
    if len(problems) > 50:  # a megabyte of nonsense must not become a megabyte of message
        first = "; ".join(problems[:50])
        raise BundleError(f"{subject}: {len(problems)} problems, of which the first 50 are: {first}; {AGAIN}")
    if problems and "again" not in problems[-1]:
        problems = [*problems[:-1], f"{problems[-1]}; {AGAIN}"]
    raise_problems(BundleError, subject, problems)


def _check_object(where: str, data: Any, keys: Mapping[str, tuple[type, ...]], problems: list[str]) -> bool:
    """Note missing and unknown keys and wrong types; exact types, since True is also an int."""
    before = len(problems)
    if not isinstance(data, dict):
        problems.append(f"{where} must be an object, got {type(data).__name__}")
        return False
    problems += [f"{where} lacks the key {key!r}" for key in keys if key not in data]
    problems += [f"{where} has the unknown key {key!r:.80}" for key in data if key not in keys]
    for key, kinds in keys.items():
        if key in data and type(data[key]) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            problems.append(f"{key} of {where} must be {expected}, got {type(data[key]).__name__}")
    return len(problems) == before


def _check_tree(tree: dict[str, Any], problems: list[str]) -> StepContract | None:
    """Note everything that is wrong with a manifest's JSON in ``problems``; return its contract if that is sound."""
    _check_object("manifest", tree, _KEYS, problems)
    sound = {key: value for key, value in tree.items() if type(value) in _KEYS.get(key, ())}
    contract = None
    if "contract" in sound:
        try:
            contract = StepContract.from_dict(sound["contract"])
        except ContractError as exc:
            problems.append(str(exc))
    if sound.get("precision", "fp32") not in PRECISION_DTYPE:
        problems.append(f"precision is {sound['precision']!r:.80}, expected one of {', '.join(PRECISION_DTYPE)}")
    for key in ("opset", "ir_version"):
        if sound.get(key, 1) < 1:
            problems.append(f"{key} is {sound[key]}, expected at least 1")
    graphs, files = sound.get("graphs", {}), sound.get("files", {})
    if contract and set(graphs) != set(contract.graph_names):
        problems.append(f"graphs are {sorted(graphs)!r:.200}, the contract has {sorted(contract.graph_names)}")
    named = [(key, sound[key]) for key in ("weights", "tokenizer", "golden") if sound.get(key) is not None]
    for graph, value in graphs.items():
        if _check_object(f"graph {graph!r:.80}", value, {"file": (str,), "variants": (dict,)}, problems):
            named += [(f"graph {graph!r:.80}", name) for name in (value["file"], *value["variants"].values())]
    for where, name in named:
        if not isinstance(name, str) or name not in files:
            problems.append(f"{where} names the file {name!r:.80}, which is not in files")
        elif where.startswith("graph") and not name.endswith(".onnx"):  # onnxruntime goes by it: .ort is another format
            problems.append(f"{where} names the file {name!r:.80}, expected one that ends in .onnx")
    for name, entry in files.items():
        problems += name_problems(name)
        if _check_object(f"file {name!r:.80}", entry, {"bytes": (int,), "sha256": (str,)}, problems):
            if entry["bytes"] < 0:
                problems.append(f"file {name!r:.80} has {entry['bytes']} bytes")
            if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
                problems.append(
                    f"file {name!r:.80} has SHA-256 {entry['sha256']!r:.80}, expected 64 hexadecimal digits"
                )
    for name, value in sound.get("engines", {}).items():
        problems += entry_problems(name, value)
    if any(not isinstance(value, str) for value in sound.get("versions", {}).values()):
        problems.append("versions must be strings")
    if "checksum" in sound and sound["checksum"] != _checksum({k: v for k, v in tree.items() if k != "checksum"}):
        problems.append("content does not match its checksum: it was damaged or edited")
    return contract


def name_problems(name: str) -> list[str]:
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", name) and name not in (MANIFEST, ENGINES):
        return []
    return [f"file name {name!r:.80} is not allowed, expected 1 to 200 of A-Z a-z 0-9 . _ - and no dot first"]


def check_name(name: str) -> None:
    """Raise BundleError unless ``name`` may be a file of a bundle: one path component of plain characters."""
    report_problems("bundle", name_problems(name))
