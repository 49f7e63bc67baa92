"""How an engine keeps a stream's states on the device: as the contract has them, or in a form that saves it copies.

A state is ``slots`` buffers, oldest first; a call computes one more, and after it the oldest is free. So a group of
states lives in a ring of ``positions`` buffers each, and nothing is ever moved: going on by one block turns the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from famexport.contract import ITEM_BYTES, OPEN_LENGTH, GraphIO, StepContract, TensorSpec, present_name

COUNT = "past_count"
HOST = (COUNT, OPEN_LENGTH)  # states that the host keeps where a layout is counted
START = "_start"  # ends the name of a graph that is right for every row, also where the other is not yet


@dataclass(frozen=True)
class Stored:
    """One state as the engine keeps it.

    Args:
        spec: what the contract says of it.
        shape: of one slot, after the batch.
        names: the engine's inputs, one for each slot, oldest first.
        public: slots [b, *shape] as the contract's tensor; ``slots`` is the inverse.
    """

    spec: TensorSpec
    shape: tuple[int, ...]
    names: tuple[str, ...]
    public: Callable[[Sequence[np.ndarray]], np.ndarray]
    slots: Callable[[np.ndarray], Sequence[np.ndarray]]

    @property
    def row_bytes(self) -> int:
        """Of one row of one slot."""
        return prod(self.shape) * ITEM_BYTES[self.spec.dtype]

    @property
    def new(self) -> str:
        """The engine's output."""
        return present_name(self.spec.name)


@dataclass(frozen=True)
class Layout:
    """All states of a contract, and the graphs that work on them.

    Args:
        positions: of the ring of states that move at block boundaries; the open block's has two.
        graphs: what each takes and gives; states by the contract's names.
        counted: the host keeps ``past_count`` and ``past_open_length`` and gives them to graphs that take them. Such
            graphs come in two: one for rows whose memory is full, and whose open slot has FAM's keys and values; and
            a ``START`` one, which is right for all.
    """

    stored: Mapping[str, Stored]
    positions: int
    graphs: Mapping[str, GraphIO]
    counted: bool = False


def plain_layout(contract: StepContract, names: Sequence[str]) -> Layout:
    """States as the contract has them, in pairs of buffers."""
    stored = {s.name: _as_it_is(s) for s in contract.all_states}
    return Layout(stored, 2, {name: contract.graph(name) for name in names})


def ring_layout(contract: StepContract, rows: int) -> Layout:
    """What the graphs of ``export/cuda_steps.py`` work on.

    FAM is as the contract has it. Memory is M slots [b, F+T, Hkv*Dh] of keys, as the projection gave them, those of FAM
    before the block's; values likewise. The open block is one more such slot.

    Args:
        rows: F + T.
    """
    t, m = contract.block_size, contract.memory_segments
    stored = {}
    for spec in contract.all_states:
        if spec.name in HOST or spec.name.startswith("past_fam"):
            stored[spec.name] = _as_it_is(spec)
        elif spec in contract.open_states:
            stored[spec.name] = _memory(spec, rows, t, 1, (spec.name,))
        else:
            stored[spec.name] = _memory(spec, rows, t, m, [f"{spec.name}.{j}" for j in range(m)])
    graphs = {}
    for name in contract.graph_names:
        io = contract.graph(name)
        kept = {s.name: s for s in io.states if s.name in HOST}
        steady = replace(
            io,
            inputs=(*io.inputs, *([kept[OPEN_LENGTH]] if io.chunk else [])),
            states=tuple(s for s in io.states if s.name not in HOST),
            new=tuple(s for s in io.new if s.name not in HOST and (io.chunk or s not in contract.open_states)),
        )
        graphs[name] = steady
        graphs[name + START] = replace(steady, name=name + START, inputs=(*steady.inputs, kept[COUNT]))
    return Layout(stored, max(m + 1, 2), graphs, counted=True)


def _as_it_is(spec: TensorSpec) -> Stored:
    return Stored(spec, tuple(int(n) for n in spec.shape[1:]), (spec.name,), lambda slots: slots[0], lambda a: [a])


def _memory(spec: TensorSpec, rows: int, t: int, m: int, names: Sequence[str]) -> Stored:
    _, heads, _, width = (int(n) if isinstance(n, int) else 0 for n in spec.shape)

    def public(kept: Sequence[np.ndarray]) -> np.ndarray:
        blocks = [slot[:, rows - t :].reshape(-1, t, heads, width).transpose(0, 2, 1, 3) for slot in kept]
        return np.concatenate(blocks, 2)

    def slots(array: np.ndarray) -> list[np.ndarray]:
        found = []
        for block in np.split(array, m, 2):
            whole = np.zeros((len(array), rows, heads * width), array.dtype)
            whole[:, rows - t :] = block.transpose(0, 2, 1, 3).reshape(len(array), t, heads * width)
            found.append(whole)
        return found

    return Stored(spec, (rows, heads * width), tuple(names), public, slots)
