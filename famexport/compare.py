"""Two backends side by side in a closed loop: each goes on from its own state, so drift shows.

The statistics are Polygraphy's (``SimpleCompareFunc``); the loop is ours, since its runners carry no state.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from famexport.bundle import open_bundle
from famexport.contract import present_name
from famexport.errors import BundleError, MissingDependencyError, UsageError
from famexport.runtime.backend import Arrays
from famexport.runtime.golden import relative_error
from famexport.runtime.inputs import random_input
from famexport.runtime.session import Session, load

DEFAULT_BLOCKS = 16


def compare(
    path: str | Path,
    backends: tuple[str, str],
    *,
    blocks: int = DEFAULT_BLOCKS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run the same random input through a bundle on two backends and compare every output of every block.

    Args:
        backends: names; the second is what the first is compared with.
        blocks: how many blocks each runs, from a fresh state.
    Returns:
        ``outputs``: by the graph's own names, over all blocks, the largest and the mean absolute difference, and the
        largest relative error ||a - b|| / ||b|| of a block; ``worst_block``: where that was.
        ``agree``: whether every output stays within the bundle's tolerance.
    Raises:
        UsageError: not two different backends, no blocks.
        BundleError: the bundle says no tolerance.
        MissingDependencyError, IncompatibleError: a backend cannot run it here.
    """
    if len(set(backends)) != 2:
        raise UsageError(f"compare needs two different backends, got {', '.join(backends)}")
    if blocks < 1:
        raise UsageError(f"compare needs at least 1 block, got {blocks}")
    try:
        from polygraphy.comparator import IterationResult, SimpleCompareFunc
        from polygraphy.logger import G_LOGGER
    except ImportError as exc:
        raise MissingDependencyError("polygraphy", "export", "comparing backends") from exc
    bundle = open_bundle(path)
    tolerance = bundle.manifest.parity.get("tolerance")
    if not isinstance(tolerance, float):
        raise BundleError(f"{path} says no tolerance of its parity; export it again")
    names, kept = [], []
    for i, backend in enumerate(backends):
        with load(bundle, backend) as session:
            names.append(session.backend.name)
            kept.append(_roll(session, blocks, seed))
            if progress:
                progress(i + 1, 2)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        function = SimpleCompareFunc(check_error_stat="max", atol=tolerance, rtol=tolerance)
        compared = [
            function(IterationResult(a, runner_name=names[0]), IterationResult(b, runner_name=names[1]))
            for a, b in zip(*kept, strict=True)
        ]
    found = {}
    for name in kept[0][0]:
        errors = [relative_error(a[name], b[name]) for a, b in zip(*kept, strict=True)]
        each = [block[name] for block in compared]
        found[name] = {
            "max_abs": max(float(result.max_absdiff) for result in each),
            "mean_abs": float(np.mean([float(result.mean_absdiff) for result in each])),
            "relative": max(errors),
            "worst_block": int(np.argmax(errors)),
        }
    agree = all(value["relative"] <= tolerance for value in found.values())
    return {"backends": names, "blocks": blocks, "tolerance": tolerance, "agree": agree, "outputs": found}


def _roll(session: Session, blocks: int, seed: int) -> list[Arrays]:
    """Logits and new state of each block."""
    rng, contract, outputs = np.random.default_rng(seed), session.contract, []
    with session.stream() as stream:
        for _ in range(blocks):
            fed = random_input(contract, stream.batch, contract.block_size, rng)
            given = {"logits": stream.step(fed).copy()}
            state = stream.state()
            given |= {present_name(s.name): state[s.name] for s in contract.states if s.dtype != "int64"}
            outputs.append(given)
    return outputs
