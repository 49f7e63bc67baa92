"""The step contract: what a step graph takes and gives, by name. Pure Python, no torch, no onnx.

A step is ``(inputs, past_*) -> (logits, present_*)``. The batch is axis 0 of every tensor. Every state ``past_X`` has
an output ``present_X`` of the same shape and dtype, fed back as the next block's ``past_X``. An all-zero state is a
fresh stream. Sorted order of the state names is their order in the graph, so tools that pair states by order agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from famexport.errors import ContractError, raise_problems

if TYPE_CHECKING:
    from famexport.config import FamConfig

SCHEMA_VERSION = 1
METADATA_KEY = "famexport.contract"  # the contract inside an ONNX file's metadata_props
PAST, PRESENT = "past_", "present_"
DYNAMIC = "batch"  # the symbolic batch dimension
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}
PRECISION_DTYPE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
GRAPHS = ("block_step", "append_step", "commit_block")


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor; only axis 0 may be symbolic (``"batch"``)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape with the batch filled in."""
        return tuple(batch if isinstance(dim, str) else dim for dim in self.shape)

    def nbytes(self, batch: int) -> int:
        return prod(self.sized(batch)) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


def present_name(past: str) -> str:
    """``past_fam_00`` -> ``present_fam_00``."""
    return PRESENT + past.removeprefix(PAST)


@dataclass(frozen=True)
class StepContract:
    """What every graph of a bundle promises.

    Args:
        batch: a number, or ``"dynamic"``.
        logits: whether the step gives ``"all"`` rows of a block or the ``"last"``.
        inputs: what is fed fresh each block: ``tokens`` int64 [b, T] or ``inputs_embeds`` float32 [b, T, D].
        states: recurrent tensors, named ``past_*``, in graph order.
    """

    block_size: int
    memory_segments: int
    fam_length: int
    vocab_size: int
    batch: int | str
    logits: str
    inputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...]
    graphs: tuple[str, ...] = ("block_step",)
    schema_version: int = SCHEMA_VERSION
    outputs: tuple[TensorSpec, ...] = field(init=False)

    def __post_init__(self) -> None:
        batch = DYNAMIC if self.batch == "dynamic" else self.batch
        rows = self.block_size if self.logits == "all" else 1
        object.__setattr__(self, "outputs", (TensorSpec("logits", "float32", (batch, rows, self.vocab_size)),))
        raise_problems(ContractError, "step contract", self._problems(batch))

    def _problems(self, batch: int | str) -> list[str]:
        found = []
        if self.schema_version != SCHEMA_VERSION:
            found.append(f"schema version {self.schema_version}, expected {SCHEMA_VERSION}")
        for name in ("block_size", "vocab_size"):
            if getattr(self, name) < 1:
                found.append(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("memory_segments", "fam_length"):
            if getattr(self, name) < 0:
                found.append(f"{name} must not be negative, got {getattr(self, name)}")
        if self.batch != "dynamic" and (type(self.batch) is not int or self.batch < 1):
            found.append(f"batch must be a positive number or 'dynamic', got {self.batch!r}")
        if self.logits not in ("all", "last"):
            found.append(f"logits must be 'all' or 'last', got {self.logits!r}")
        if unknown := [g for g in self.graphs if g not in GRAPHS]:
            found.append(f"unknown graphs {unknown}, known are {list(GRAPHS)}")
        if not self.graphs or len(set(self.graphs)) != len(self.graphs):
            found.append(f"graphs must be named once each, got {list(self.graphs)}")
        names = [spec.name for spec in (*self.inputs, *self.states)]
        if len(set(names)) != len(names) or not all(names) or set(names) & set(self.output_names):
            found.append(f"tensor names must be there, differ, and not be an output's, got {names}")
        if not self.inputs:
            found.append("at least one input is needed")
        state_names = [s.name for s in self.states]
        if state_names != sorted(state_names):
            found.append(f"states must be in sorted order, got {state_names}")
        for spec in self.states:
            if not spec.name.startswith(PAST):
                found.append(f"state {spec.name!r} must start with {PAST!r}")
        for spec in (*self.inputs, *self.states):
            if spec.dtype not in ITEM_BYTES:
                found.append(f"{spec.name} has unknown dtype {spec.dtype!r}")
            if not spec.shape or spec.shape[0] != batch or type(spec.shape[0]) is not type(batch):
                found.append(f"{spec.name} must have the batch ({batch}) as axis 0, got shape {list(spec.shape)}")
            if any(type(dim) is not int or dim < 1 for dim in spec.shape[1:]):
                found.append(f"{spec.name} must have positive fixed dimensions after the batch, got {list(spec.shape)}")
        return found

    @property
    def input_names(self) -> list[str]:
        return [spec.name for spec in (*self.inputs, *self.states)]

    @property
    def output_names(self) -> list[str]:
        return ["logits", *(present_name(spec.name) for spec in self.states)]

    def state_bytes(self, batch: int | None = None) -> int:
        """Bytes of one copy of the state for ``batch`` rows (the static batch, or 1 where it is dynamic)."""
        rows = batch or (self.batch if isinstance(self.batch, int) else 1)
        return sum(spec.nbytes(rows) for spec in self.states)

    def to_dict(self) -> dict[str, Any]:
        def specs(group: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
            return [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in group]

        return {
            "schema_version": self.schema_version,
            "block_size": self.block_size,
            "memory_segments": self.memory_segments,
            "fam_length": self.fam_length,
            "vocab_size": self.vocab_size,
            "batch": self.batch,
            "logits": self.logits,
            "inputs": specs(self.inputs),
            "states": specs(self.states),
            "graphs": list(self.graphs),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepContract:
        """The contract in ``data``, as ``to_dict`` wrote it.

        Raises:
            ContractError: missing, unknown or wrongly typed keys, or values that break the contract's own rules.
        """
        expected = {
            "schema_version": int,
            "block_size": int,
            "memory_segments": int,
            "fam_length": int,
            "vocab_size": int,
            "batch": (int, str),
            "logits": str,
            "inputs": list,
            "states": list,
            "graphs": list,
        }
        problems = _key_problems(data, expected)
        if not problems:
            for group in ("inputs", "states"):
                for i, spec in enumerate(data[group]):
                    kinds = {"name": str, "dtype": str, "shape": list}
                    problems += [f"{group}[{i}]: {p}" for p in _key_problems(spec, kinds)]
            if any(not isinstance(g, str) for g in data["graphs"]):
                problems.append("graphs must be names")
        raise_problems(ContractError, "step contract", problems)

        def specs(group: str) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in data[group])

        plain = {key: data[key] for key in expected if key not in ("inputs", "states", "graphs")}
        return cls(**plain, inputs=specs("inputs"), states=specs("states"), graphs=tuple(data["graphs"]))


def _key_problems(data: Any, expected: Mapping[str, Any]) -> list[str]:
    if not isinstance(data, Mapping):
        return [f"expected an object, got {type(data).__name__}"]
    found = [f"missing key {key!r}" for key in expected if key not in data]
    found += [f"unknown key {key!r}" for key in data if key not in expected]
    for key, kind in expected.items():
        if key in data and (not isinstance(data[key], kind) or isinstance(data[key], bool)):
            found.append(f"{key} has the wrong type {type(data[key]).__name__}")
    return found


def contract_for(
    config: FamConfig,
    precision: str = "fp32",
    batch: int | str = 1,
    *,
    inputs: str = "tokens",
    logits: str = "all",
    graphs: tuple[str, ...] = ("block_step",),
) -> StepContract:
    """The contract of a FAM model (fam-spec: "State, per stream row").

    Args:
        precision: ``fp32``, ``fp16`` or ``bf16``: dtype of keys and values. FAM has ``config.fam_state_dtype``.
        inputs: ``tokens`` or ``inputs_embeds``.
    """
    c, rows = config, DYNAMIC if batch == "dynamic" else batch
    dtype = PRECISION_DTYPE[precision]
    states = [TensorSpec("past_count", "int64", (rows,))]
    for layer in range(c.num_hidden_layers):
        if c.fam_length:
            states.append(TensorSpec(f"past_fam_{layer:02d}", c.fam_state_dtype, (rows, c.fam_length, c.hidden_size)))
        if c.memory_segments:
            shape = (rows, c.num_key_value_heads, c.memory_segments * c.block_size, c.head_dim)
            states += [TensorSpec(f"past_{kv}_{layer:02d}", dtype, shape) for kv in ("key", "value")]
    fed = {
        "tokens": TensorSpec("tokens", "int64", (rows, c.block_size)),
        "inputs_embeds": TensorSpec("inputs_embeds", "float32", (rows, c.block_size, c.hidden_size)),
    }
    return StepContract(
        block_size=c.block_size,
        memory_segments=c.memory_segments,
        fam_length=c.fam_length,
        vocab_size=c.vocab_size,
        batch=batch,
        logits=logits,
        inputs=(fed[inputs],),
        states=tuple(sorted(states, key=lambda spec: spec.name)),
        graphs=graphs,
    )
