"""Interleaved measurement of a bundle on several backends.

Method: every backend first runs a few blocks on the same input, and its logits must agree with the first backend's
within the bundle's own tolerance; a wrong answer gets no number. Then block by block each backend takes its turn, so
that a change in the machine's speed meets all of them; at least M+1 blocks warm up and do not count. A sample is host
latency: input ready to logits ready. Outputs are compared again at regular blocks while timing. Resident memory is read
after every turn; its slope is a least-squares fit over the counted blocks of the whole process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from famexport.bench.power import PowerMeter
from famexport.bench.roofline import Ceilings, measure_ceilings
from famexport.bench.turns import COMPARE_EVERY, ON_CPU, backend_names, full_report, opened_turns, weight_bytes
from famexport.bundle import Bundle, open_bundle
from famexport.errors import UsageError
from famexport.runtime.score import percentiles

QUICK_BLOCKS = 50


def bench(
    path: str | Path,
    backends: Sequence[str] = (),
    *,
    blocks: int = QUICK_BLOCKS,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Measure ``path`` on ``backends`` in one interleaved run.

    Args:
        backends: names; none means the one that ``auto`` picks.
        blocks: counted samples per backend.
    Returns:
        the report (plain values, as the command line prints it) and the raw samples in ms by backend.
    Raises:
        UsageError: unknown or repeated backends, too few blocks.
        ParityError: backends disagree; nothing is reported.
    """
    if blocks < 2:
        raise UsageError(f"bench needs at least 2 blocks, got {blocks}")
    bundle = open_bundle(path)
    names = backend_names(backends)
    ceilings = measure_ceilings()
    with opened_turns(bundle, names, threads, seed) as turns, PowerMeter() as meter:
        samples: dict[str, list[float]] = {name: [] for name in turns.streams}
        memory: dict[str, list[int]] = {name: [] for name in turns.streams}
        size = bundle.contract.block_size
        for i in range(bundle.contract.memory_segments + 2):
            turns.take(turns.random(size), compare=True, at=f"block {i}")
        for i in range(blocks):
            times = turns.take(turns.random(size), compare=i % COMPARE_EVERY == 0, at=f"block {i}")
            for name, (seconds, rss) in times.items():
                samples[name].append(seconds * 1e3)
                memory[name].append(rss)
            if progress:
                progress(i + 1, blocks)
    results = [_result(bundle, name, samples[name], memory[name], ceilings) for name in samples]
    return full_report(path, bundle, results, meter.result()), samples


def _result(bundle: Bundle, name: str, samples: list[float], memory: list[int], ceilings: Ceilings) -> dict[str, Any]:
    contract, flops = bundle.contract, bundle.manifest.cost.get("flops_per_block")
    batch = contract.batch if isinstance(contract.batch, int) else 1
    floor = ceilings.floor(weight_bytes(bundle), int(flops) * batch if flops else None)
    latency = percentiles(samples)
    slope = float(np.polyfit(np.arange(len(memory)), np.array(memory, float), 1)[0]) * 1000
    return {
        "backend": name,
        "blocks": len(samples),
        "latency_ms": latency,
        "tokens_per_s": contract.block_size * batch / latency["p50"] * 1e3,
        "state_bytes": contract.state_bytes(),
        "rss_bytes": {"first": memory[0], "last": memory[-1], "slope_per_1000_blocks": round(slope)},
        # The ceilings are measured on the CPU, and say nothing of a GPU
        "roofline": {**floor, "share": floor["floor_ms"] / latency["p50"]} if name in ON_CPU else None,
    }
