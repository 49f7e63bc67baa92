"""A stream's state as a thing of its own: a deep copy that can be saved, moved to another process, and continued (R10).

The file is safetensors: the contract's state tensors, oldest block first, the open block included, and one JSON object
in the header that says which model and engine it belongs to. Everything is checked before anything is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from famexport.contract import OPEN_LENGTH, StepContract, TensorSpec
from famexport.errors import InvalidInputError, SnapshotError, UsageError, raise_problems
from famexport.manifest import strict_json
from famexport.publish import staged_file
from famexport.runtime.backend import STORAGE, Arrays
from famexport.tensorfile import TensorEntry, read_header, read_metadata, read_tensor, write_tensors

SCHEMA_VERSION = 1
_KEY = "famexport.snapshot"
_OPEN_INPUTS, _LAST_LOGITS = "open_inputs", "last_logits"
_MAX_TEXT, _MAX_NAMED = 500, 20  # characters of a text in the header; problems
_FIELDS = {
    "schema_version": int,
    "model": str,
    "engine": str,
    "contract": dict,
    "batch": int,
    "blocks": int,
    "sha256": str,
}


@dataclass(frozen=True)
class Origin:
    """What a snapshot belongs to.

    Args:
        model: digest of weights and configuration.
        engine: what computes it: backend, graphs and rows of a call. Another engine rounds otherwise.
    """

    model: str
    engine: str
    contract: StepContract


@dataclass(frozen=True)
class Snapshot:
    """The state of ``batch`` rows at one moment. It shares no memory with the stream.

    Args:
        state: every state tensor of the contract, in its storage dtype (bfloat16 as its bits in uint16).
        open_inputs: where the bundle has no ``append_step``: what the open block holds, [b, n] or [b, n, D].
        last_logits: float32 [b, V] of the last position, where there is one.
        blocks: committed since the stream began.
    """

    origin: Origin
    batch: int
    blocks: int
    state: Arrays
    open_inputs: np.ndarray | None = None
    last_logits: np.ndarray | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state.values())

    def save(self, path: str | Path) -> Path:
        """Write the snapshot, atomically.

        Raises:
            UsageError, FamExportError: the path cannot be written; what was there is as it was.
        """
        path, arrays = Path(path), self._arrays()
        entries = [TensorEntry(name, dtype, array.shape) for name, (dtype, array) in arrays.items()]
        about = {
            "schema_version": SCHEMA_VERSION,
            "model": self.origin.model,
            "engine": self.origin.engine,
            "contract": self.origin.contract.to_dict(),
            "batch": self.batch,
            "blocks": self.blocks,
        }
        about["sha256"] = _digest(about, {name: array for name, (_, array) in arrays.items()})
        metadata = {_KEY: json.dumps(about, sort_keys=True)}
        with staged_file(path) as write:
            write_tensors(write, entries, lambda name: np.ascontiguousarray(arrays[name][1]), metadata=metadata)
        return path

    def _arrays(self) -> dict[str, tuple[str, np.ndarray]]:
        dtypes = {spec.name: spec.dtype for spec in self.origin.contract.all_states}
        found = {name: (dtypes[name], array) for name, array in self.state.items()}
        if self.open_inputs is not None and self.open_inputs.shape[1]:
            found[_OPEN_INPUTS] = self.origin.contract.inputs[0].dtype, self.open_inputs
        if self.last_logits is not None:
            found[_LAST_LOGITS] = "float32", self.last_logits
        return found

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read a snapshot file.

        Raises:
            UsageError: no such file.
            SnapshotError: not a snapshot, damaged, or of another schema version.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"no such file: {path}; write a snapshot with stream.snapshot().save(path)")
        try:
            text = read_metadata(path).get(_KEY)
            if text is None:
                raise InvalidInputError(f"{path.name} is not a snapshot: its header has no {_KEY}")
            about = _about(strict_json(text.encode(), path.name))
            contract = StepContract.from_dict(about["contract"])
            specs = _specs(contract, about["batch"])
            arrays = _read(path, specs)
            if _digest(about, arrays) != about["sha256"]:
                raise InvalidInputError("it does not match its checksum: it was damaged")
        except InvalidInputError as exc:
            raise SnapshotError(f"{path}: {exc}; take the snapshot again") from exc
        open_inputs, last = arrays.pop(_OPEN_INPUTS, None), arrays.pop(_LAST_LOGITS, None)
        origin = Origin(about["model"], about["engine"], contract)
        return cls(origin, about["batch"], about["blocks"], arrays, open_inputs, last)

    def check(self, here: Origin, batch: int, any_engine: bool) -> None:
        """Raise SnapshotError, naming what differs, unless ``batch`` rows at ``here`` can go on from this."""
        problems, there = [], self.origin
        if there.model != here.model:
            problems.append(f"it is of model {there.model:.12}, this is {here.model:.12}")
        if self.batch != batch:
            problems.append(f"it has a batch of {self.batch}, this stream has {batch}")
        mine, its = ({s.name: (s.dtype, s.shape[1:]) for s in c.states} for c in (here.contract, there.contract))
        problems += [f"its state {name} differs in dtype or shape" for name in mine if its.get(name) != mine[name]]
        problems += [f"it has the state {name!r:.80}, which this model lacks" for name in its if name not in mine]
        problems += self._open_problems(here.contract)
        if not problems and there.engine != here.engine and not any_engine:
            problems.append(
                f"it was taken on {there.engine}, this is {here.engine}, which rounds differently; "
                "to go on all the same, restore with any_engine=True (--any-engine)"
            )
        raise_problems(SnapshotError, "snapshot does not fit", problems)

    def _open_problems(self, contract: StepContract) -> list[str]:
        """What is wrong with the open block, which must have room left: a stream would wait for it for ever."""
        size, found = contract.block_size, []
        lengths = self.state.get(OPEN_LENGTH, np.zeros(1, np.int64))
        if lengths.min() < 0 or lengths.max() >= size:
            found.append(f"its {OPEN_LENGTH} is {lengths.tolist()}, expected 0 to {size - 1}")
        if (opened := self.open_inputs) is not None:
            fed = contract.inputs[0]
            shape = (self.batch, min(opened.shape[1], size - 1) if opened.ndim > 1 else 0, *fed.shape[2:])
            if opened.shape != shape or opened.dtype != STORAGE[fed.dtype]:
                found.append(f"its open inputs are {opened.dtype} {list(opened.shape)}, expected less than a {fed}")
        return found


def engine_name(backend: str, files: Mapping[str, str], batch: int) -> str:
    """One line for ``Origin.engine``: ``files`` are SHA-256 digests by name, of what the backend runs."""
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
    return f"{backend} {digest[:16]} batch {batch}"


def _about(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict) or set(tree) != set(_FIELDS):
        raise InvalidInputError(f"its header must have {sorted(_FIELDS)}")
    wrong = [key for key, kind in _FIELDS.items() if type(tree[key]) is not kind]
    raise_problems(InvalidInputError, "its header", [f"{key} is {type(tree[key]).__name__}" for key in wrong])
    for key, text in tree.items():  # errors show them
        if isinstance(text, str) and not (text.isprintable() and len(text) <= _MAX_TEXT):
            raise InvalidInputError(f"its header has {key} {text!r:.80}, expected at most {_MAX_TEXT} plain characters")
    if tree["schema_version"] != SCHEMA_VERSION:
        raise InvalidInputError(f"it has schema version {tree['schema_version']}, expected {SCHEMA_VERSION}")
    if tree["batch"] < 1 or tree["blocks"] < 0:
        raise InvalidInputError(f"its header has batch {tree['batch']} and blocks {tree['blocks']}")
    return tree


def _specs(contract: StepContract, batch: int) -> dict[str, TensorSpec]:
    """What a snapshot of ``batch`` rows may hold; one of a pool's row has fewer than the contract."""
    fed = contract.inputs[0]
    specs = {
        **{s.name: s for s in contract.all_states},
        _LAST_LOGITS: TensorSpec(_LAST_LOGITS, "float32", (batch, contract.vocab_size)),
        _OPEN_INPUTS: TensorSpec(_OPEN_INPUTS, fed.dtype, fed.shape),
    }
    return {name: TensorSpec(name, s.dtype, (batch, *s.shape[1:])) for name, s in specs.items()}


def _read(path: Path, specs: Mapping[str, TensorSpec]) -> Arrays:
    """The tensors of ``specs``. None is read before all are what they should be: a file may claim any size."""
    entries, problems = read_header(path), []
    for name, entry in entries.items():
        spec, named, shape = specs.get(name), f"{name!r:.80}", entry.shape
        if spec is None:
            problems.append(f"unknown tensor {named}")
            continue
        if name == _OPEN_INPUTS and len(shape) > 1 and 0 < shape[1] < spec.sized(1)[1]:
            shape = (shape[0], spec.sized(1)[1], *shape[2:])  # as many as the block holds so far
        if (entry.dtype, shape) != (spec.dtype, spec.shape):
            expected = f"{spec.dtype} {list(spec.shape)!r:.80}"
            problems.append(f"tensor {named} is {entry.dtype} {list(entry.shape)}, expected {expected}")
    optional = (_OPEN_INPUTS, _LAST_LOGITS)
    problems += [f"tensor {name!r:.80} is missing" for name in specs if name not in entries and name not in optional]
    if len(problems) > _MAX_NAMED:
        problems = [*problems[:_MAX_NAMED], f"and {len(problems) - _MAX_NAMED} more"]
    raise_problems(InvalidInputError, "it does not hold what its contract says", problems)
    return {
        name: read_tensor(path, entry).view(STORAGE[entry.dtype]).reshape(entry.shape)
        for name, entry in entries.items()
    }


def _digest(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over all that a snapshot says and holds."""
    said = {key: value for key, value in about.items() if key != "sha256"}
    total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(arrays):
        total.update(f"{name}\n".encode())
        total.update(np.ascontiguousarray(arrays[name]).data.cast("B") if arrays[name].size else b"")
    return total.hexdigest()
