"""The step contract: what a step graph takes and gives, by name. Pure Python, no torch, no onnx.

A step is ``(inputs, past_*) -> (logits, present_*)``. The batch is axis 0 of every tensor. Every state ``past_X`` has
an output ``present_X`` of the same shape and dtype, fed back as the next block's ``past_X``. An all-zero state is a
fresh stream. Sorted order of the state names is their order in the graph, so tools that pair states by order agree.

| graph | takes | gives |
|---|---|---|
| ``block_step`` | a block, ``states`` | logits, new ``states`` |
| ``append_step`` | a chunk, ``chunk_length``, ``states``, ``open_states`` | logits, new ``open_states`` |
| ``commit_block`` | ``states``, ``open_states`` | both, new where a row's open block is full, else as they were |

``append_step`` adds the first ``chunk_length`` positions of the chunk to each row's open block;
0 leaves a row as it is.
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

SCHEMA_VERSION = 2
METADATA_KEY = "famexport.contract"  # the contract inside an ONNX file's metadata_props
GRAPH_KEY = "famexport.graph"  # and which of its graphs the file is
PAST, PRESENT = "past_", "present_"
DYNAMIC = "batch"  # the symbolic batch dimension
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}
PRECISION_DTYPE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float32", "int4": "float32"}
MAX_DIM, MAX_AXES = 2**31, 8  # the product of many sizes takes time that grows with its square
QUANTIZED = ("int8", "int4")  # of these, products alone: all that a contract names is float32
GRAPHS = ("block_step", "append_step", "commit_block")
CHUNK_LENGTH, OPEN_LENGTH = "chunk_length", "past_open_length"


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
class GraphIO:
    """What one graph of a bundle takes and gives. ``new`` has states' names; the graph's own are ``present_*``."""

    name: str
    inputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...]
    logits: TensorSpec | None
    new: tuple[TensorSpec, ...]
    chunk: int | None = None  # of an append_step: positions it takes at once

    @property
    def taken(self) -> tuple[TensorSpec, ...]:
        return self.inputs + self.states

    @property
    def given(self) -> tuple[TensorSpec, ...]:
        """Outputs under the graph's own names."""
        present = tuple(TensorSpec(present_name(s.name), s.dtype, s.shape) for s in self.new)
        return ((self.logits,) if self.logits else ()) + present


@dataclass(frozen=True)
class StepContract:
    """What every graph of a bundle promises.

    Args:
        batch: a number, or ``"dynamic"``.
        logits: whether the step gives ``"all"`` rows of a block or the ``"last"``.
        inputs: what is fed fresh each block: ``tokens`` int64 [b, T] or ``inputs_embeds`` float32 [b, T, D].
        states: recurrent tensors, named ``past_*``, in graph order; they move at block boundaries.
        open_states: the open block's keys and values ``past_open_*`` and ``past_open_length`` int64 [b], where the
            bundle has ``append_step``.
        chunks: the widths of its ``append_step`` graphs, ascending.
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
    open_states: tuple[TensorSpec, ...] = ()
    chunks: tuple[int, ...] = ()
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
        specs = (*self.inputs, *self.states, *self.open_states)
        names, reserved = [spec.name for spec in specs], {"logits", CHUNK_LENGTH}
        reserved |= {present_name(spec.name) for spec in (*self.states, *self.open_states)}
        if len(set(names)) != len(names) or not all(names) or set(names) & reserved:
            found.append(f"tensor names must be there, differ, and not be an output's, got {names}")
        if not self.inputs:
            found.append("at least one input is needed")
        elif self.block_size >= 1 and self.inputs[0].shape[1:2] != (self.block_size,):
            got = list(self.inputs[0].shape)
            found.append(f"{self.inputs[0].name} must have block_size {self.block_size} as axis 1, got shape {got}")
        for group in (self.states, self.open_states):
            state_names = [s.name for s in group]
            if state_names != sorted(state_names):
                found.append(f"states must be in sorted order, got {state_names}")
            found += [f"state {name!r} must start with {PAST!r}" for name in state_names if not name.startswith(PAST)]
        found += self._open_problems()
        for spec in specs:
            if spec.dtype not in ITEM_BYTES:
                found.append(f"{spec.name} has unknown dtype {spec.dtype!r:.80}")
            if not spec.shape or spec.shape[0] != batch or type(spec.shape[0]) is not type(batch):
                found.append(f"{spec.name} must have the batch ({batch}) as axis 0, got shape {list(spec.shape)}")
            if len(spec.shape) > MAX_AXES:
                found.append(f"{spec.name!r:.80} has {len(spec.shape)} axes, expected at most {MAX_AXES}")
            elif any(type(dim) is not int or not 1 <= dim < MAX_DIM for dim in spec.shape[1:]):
                shown = f"{list(spec.shape)!r:.200}"
                found.append(
                    f"{spec.name} must have positive fixed dimensions after the batch, below 2**31, got {shown}"
                )
        return found

    def _open_problems(self) -> list[str]:
        """What is wrong with the parts that only bundles with an open block have."""
        parts = {
            "append_step": "append_step" in self.graphs,
            "commit_block": "commit_block" in self.graphs,
            "chunks": bool(self.chunks),
            "open_states": bool(self.open_states),
        }
        if len(set(parts.values())) > 1:
            absent = ", ".join(part for part, there in parts.items() if not there)
            return [f"append_step and commit_block go together, with chunks and open_states; there is no {absent}"]
        found = []
        if any(type(c) is not int or not 1 <= c <= self.block_size for c in self.chunks):
            found.append(f"chunks must be from 1 to block_size {self.block_size}, got {list(self.chunks)}")
        elif list(self.chunks) != sorted(set(self.chunks)):
            found.append(f"chunks must ascend, got {list(self.chunks)}")
        if self.open_states and OPEN_LENGTH not in [s.name for s in self.open_states if s.dtype == "int64"]:
            found.append(f"open_states must hold {OPEN_LENGTH}, int64")
        return found

    @property
    def input_names(self) -> list[str]:
        return [spec.name for spec in self.graph("block_step").taken]

    @property
    def output_names(self) -> list[str]:
        return [spec.name for spec in self.graph("block_step").given]

    @property
    def all_states(self) -> tuple[TensorSpec, ...]:
        """All that a stream carries from call to call, in sorted order."""
        return tuple(sorted(self.states + self.open_states, key=lambda spec: spec.name))

    @property
    def graph_names(self) -> tuple[str, ...]:
        """One name for each graph file: ``append_step`` is that of the narrowest chunk, others name theirs."""
        return tuple(
            name for kind in self.graphs for name in (self._append_names if kind == "append_step" else (kind,))
        )

    @property
    def _append_names(self) -> dict[str, int]:
        return {"append_step" if i == 0 else f"append_step_c{c}": c for i, c in enumerate(self.chunks)}

    def graph(self, name: str) -> GraphIO:
        """What the graph ``name`` (of ``graph_names``) takes and gives."""
        if name == "block_step":
            return GraphIO(name, self.inputs, self.states, self.outputs[0], self.states)
        if name == "commit_block":
            return GraphIO(name, (), self.all_states, None, self.all_states)
        fed, chunk = self.inputs[0], self._append_names[name]
        rows = chunk if self.logits == "all" else 1
        logits = TensorSpec("logits", "float32", (fed.shape[0], rows, self.vocab_size))
        inputs = (
            TensorSpec(fed.name, fed.dtype, (fed.shape[0], chunk, *fed.shape[2:])),
            TensorSpec(CHUNK_LENGTH, "int64", (fed.shape[0],)),
        )
        return GraphIO(name, inputs, self.all_states, logits, self.open_states, chunk)

    def state_bytes(self, batch: int | None = None) -> int:
        """Bytes of one copy of the state, the open block included, for ``batch`` rows (the static batch, or 1 where it
        is dynamic)."""
        rows = batch or (self.batch if isinstance(self.batch, int) else 1)
        return sum(spec.nbytes(rows) for spec in self.all_states)

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
            "open_states": specs(self.open_states),
            "graphs": list(self.graphs),
            "chunks": list(self.chunks),
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
            "open_states": list,
            "graphs": list,
            "chunks": list,
        }
        problems = _key_problems(data, expected)
        if not problems:
            for group in _SPEC_GROUPS:
                for i, spec in enumerate(data[group]):
                    kinds = {"name": str, "dtype": str, "shape": list}
                    problems += [f"{group}[{i}]: {p}" for p in _key_problems(spec, kinds)]
            if any(not isinstance(g, str) for g in data["graphs"]):
                problems.append("graphs must be names")
        raise_problems(ContractError, "step contract", problems)

        def specs(group: str) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in data[group])

        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**{**plain, **{group: specs(group) for group in _SPEC_GROUPS}})


_SPEC_GROUPS = ("inputs", "states", "open_states")


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
    chunks: tuple[int, ...] = (),
) -> StepContract:
    """The contract of a FAM model (fam-spec: "State, per stream row").

    Args:
        precision: a key of ``PRECISION_DTYPE``: dtype of keys and values. FAM has ``config.fam_state_dtype``.
        inputs: ``tokens`` or ``inputs_embeds``.
        chunks: widths of ``append_step``; none leaves it and ``commit_block`` out.
    """
    c, rows = config, DYNAMIC if batch == "dynamic" else batch
    dtype = PRECISION_DTYPE[precision]
    states = [TensorSpec("past_count", "int64", (rows,))]
    open_states = [TensorSpec(OPEN_LENGTH, "int64", (rows,))] if chunks else []
    for layer in range(c.num_hidden_layers):
        if c.fam_length:
            states.append(TensorSpec(f"past_fam_{layer:02d}", c.fam_state_dtype, (rows, c.fam_length, c.hidden_size)))
        if c.memory_segments:
            shape = (rows, c.num_key_value_heads, c.memory_segments * c.block_size, c.head_dim)
            states += [TensorSpec(f"past_{kv}_{layer:02d}", dtype, shape) for kv in ("key", "value")]
        if chunks:
            shape = (rows, c.num_key_value_heads, c.block_size, c.head_dim)
            open_states += [TensorSpec(f"past_open_{kv}_{layer:02d}", dtype, shape) for kv in ("key", "value")]
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
        open_states=tuple(sorted(open_states, key=lambda spec: spec.name)),
        graphs=GRAPHS if chunks else ("block_step",),
        chunks=tuple(sorted(set(chunks))),
    )
