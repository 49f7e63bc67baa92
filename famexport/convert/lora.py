"""LoRA adapters merged into the weights while a checkpoint is written, one weight in memory at a time.

W + scaling * B @ A in float32, then the checkpoint's dtype (Hu et al. 2021, section 4.1). An adapter is used whole or
refused: whatever cannot be merged plainly is named, all at once, and nothing is approximated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from famexport.checkpoint import EMBED_WEIGHT, FAM_WEIGHT, parameter_shapes
from famexport.config import FamConfig
from famexport.convert.common import DTYPES, cast
from famexport.convert.lora_file import WEIGHTS, Adapter, read_adapter
from famexport.errors import CheckpointError, UsageError, raise_problems
from famexport.tensorfile import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Adapter", "fam_settings", "merged", "read_adapter", "summary"]
CHUNK_BYTES = 4 * 2**20  # of float32, merged at once
_MAX_NAMED = 20  # problems
Load = Callable[[str, str], "Tensor"]


def fam_settings(adapter: Adapter, source: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What goes before the ``source``'s FAM settings: the adapter's, and before them what was ``asked`` for.

    Raises:
        UsageError: adapter and source contradict each other, or what was asked for and the adapter's embeddings do.
    """
    problems = []
    for key, value in adapter.fam.items():
        if key == "fam_length" and adapter.embeddings:  # they replace the source's
            if asked.get(key, value) != value:
                got = f"FAM embeddings of length {value}, fam_length {asked[key]} was asked for"
                problems.append(f"it has {got}; leave fam_length out to keep them")
        elif key not in asked and source.get(key, value) != value:
            problems.append(f"it was trained with {key} {value}, the source has {source[key]}; say {key}")
    raise_problems(UsageError, f"LoRA adapter {adapter.path}", problems)
    return {**adapter.fam, **asked}


def merged(adapter: Adapter, config: FamConfig, dtypes: Mapping[str, str], load: Load) -> tuple[dict[str, str], Load]:
    """``dtypes`` and ``load``, as ``write_converted`` takes them, of the same weights with the adapter in them.

    Raises:
        CheckpointError: names everything that speaks against merging this adapter into this model.
    """
    problems = [*adapter.problems, *_misfits(adapter, config)]
    if len(problems) > _MAX_NAMED:
        problems = [*problems[:_MAX_NAMED], f"and {len(problems) - _MAX_NAMED} more"]
    raise_problems(CheckpointError, f"LoRA adapter {adapter.path} cannot be merged", problems)
    weights = {f"{module}.weight": module for module in adapter.pairs}
    own = {FAM_WEIGHT: adapter.embeddings} if adapter.embeddings else {}

    def weight(name: str, dtype: str) -> Tensor:
        if name in own:
            return cast(name, _tensor(adapter, own[name]), dtype)
        return _merge(adapter, weights[name], load, dtype) if name in weights else load(name, dtype)

    return {**dtypes, **{name: entry.dtype for name, entry in own.items()}}, weight


def summary(adapter: Adapter) -> dict[str, Any]:
    """What there is to merge, as plain values."""
    return {
        "path": str(adapter.path),
        "weights": len(adapter.pairs),
        "modules": sorted({module.rpartition(".")[2] for module in adapter.pairs}),
        "ranks": sorted({pair["A"].shape[0] for pair in adapter.pairs.values()}),
        "fam_embeddings": adapter.embeddings is not None,
    }


def _merge(adapter: Adapter, module: str, load: Load, dtype: str) -> Tensor:
    import torch

    a, b = (_tensor(adapter, adapter.pairs[module][half]).float() for half in "AB")
    rank, alpha = _of(adapter.ranks, module), _of(adapter.alphas, module)
    scaling = alpha / (math.sqrt(rank) if adapter.rank_stabilised else rank)
    base = load(f"{module}.weight", "float32")
    result = torch.empty(base.shape, dtype=getattr(torch, dtype))
    parts = min(-(-4 * base.numel() // CHUNK_BYTES), base.shape[0])  # even ones: one row alone is rounded otherwise
    for rows, old, new in zip(*(whole.tensor_split(parts) for whole in (b, base, result)), strict=True):
        new.copy_(cast(f"{module}.weight with its LoRA", (rows @ a).mul_(scaling).add_(old), dtype))
    return result


def _of(numbers: Mapping[str, Any], module: str) -> Any:
    """The first number whose name is ``module`` or its end, as PEFT matches ``(.*\\.)?(name)$``; that of "" else."""
    ends = {"", f"^{module}"} | _ends((module,))
    return next(number for name, number in numbers.items() if name in ends)


def _tensor(adapter: Adapter, entry: TensorEntry) -> Tensor:
    import torch

    data = np.fromfile(adapter.path / WEIGHTS, np.uint8, entry.nbytes, offset=entry.offset)
    if data.nbytes != entry.nbytes:
        raise CheckpointError(f"{adapter.path / WEIGHTS}: {entry.name} ends early: the file was cut while it was read")
    return torch.from_numpy(data).view(getattr(torch, entry.dtype)).view(entry.shape)


def _misfits(adapter: Adapter, config: FamConfig) -> list[str]:
    """What is wrong with the adapter for this model; tensors of the right shape are read, and must be finite."""
    shapes = {name: shape for name, shape in parameter_shapes(config).items() if len(shape) == 2}
    linear = {name.removesuffix(".weight"): s for name, s in shapes.items() if name not in (EMBED_WEIGHT, FAM_WEIGHT)}
    # Of the adapter's names only those that the model has: the ends of any name take memory with its length squared.
    known, here = _ends(linear), _ends(module for module in adapter.pairs if module in linear)
    problems = [
        f"the model has no linear layer {name!r:.80} to target" for name in adapter.targets if name not in known
    ]
    problems += [f"target module {name!r:.80} has no tensors" for name in adapter.targets if name in known - here]
    expected: dict[TensorEntry, tuple[int, int]] = {}
    for module, pair in adapter.pairs.items():
        rank = _of(adapter.ranks, module) if module in linear else 0
        if module not in linear:
            problems.append(f"the model has no linear layer {module!r:.120}")
        for half, entry in pair.items():
            if rank:
                expected[entry] = (rank, linear[module][1]) if half == "A" else (linear[module][0], rank)
    if adapter.embeddings:
        expected[adapter.embeddings] = (config.fam_length, config.hidden_size)
    for entry, shape in expected.items():
        if entry.shape != shape:
            problems.append(f"{entry.name} has shape {list(entry.shape)!r:.80}, expected {list(shape)}")
        elif entry.dtype in DTYPES and entry.nbytes:
            try:
                cast(entry.name, _tensor(adapter, entry), "float32")
            except CheckpointError as exc:
                problems.append(str(exc))
    return problems


def _ends(modules: Iterable[str]) -> set[str]:
    """The names of modules and their ends: what one of them may be called by."""
    return {".".join(parts[i:]) for parts in (name.split(".") for name in modules) for i in range(len(parts))}
