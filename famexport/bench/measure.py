"""Interleaved measurement of a bundle on several backends.

Method: every backend first runs a few blocks on the same input, and its logits must agree with the first backend's
within the bundle's own tolerance; a wrong answer gets no number. Then block by block each backend takes its turn, so
that a change in the machine's speed meets all of them; at least M+1 blocks warm up and do not count. A sample is host
latency: input ready to logits ready. Outputs are compared again at regular blocks while timing. Resident memory is read
after every turn; its slope is a least-squares fit over the counted blocks of the whole process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from famexport.bench.roofline import Ceilings, measure_ceilings
from famexport.bundle import Bundle, open_bundle
from famexport.errors import ParityError, UsageError
from famexport.runtime.backend import STORAGE
from famexport.runtime.golden import relative_error
from famexport.runtime.process import device_facts, rss_bytes, versions
from famexport.runtime.score import percentiles
from famexport.runtime.session import BACKENDS, load
from famexport.runtime.stream import Stream

QUICK_BLOCKS = 50
_COMPARE_EVERY = 16


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
    names = list(backends) or [BACKENDS[0]]
    if len(set(names)) != len(names):
        raise UsageError(f"a backend is named twice: {', '.join(names)}")
    if blocks < 2:
        raise UsageError(f"bench needs at least 2 blocks, got {blocks}")
    bundle = open_bundle(path)
    ceilings = measure_ceilings()
    samples: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[int]] = {name: [] for name in names}
    with ExitStack() as stack:
        streams = {}
        for name in names:
            session = stack.enter_context(load(bundle, name, threads=threads))
            streams[name] = stack.enter_context(session.stream())
        runs = _Runs(bundle, streams, np.random.default_rng(seed))
        for i in range(bundle.contract.memory_segments + 2):
            runs.block(compare=True, block=i)
        for i in range(blocks):
            times = runs.block(compare=i % _COMPARE_EVERY == 0, block=i)
            for name, (seconds, rss) in times.items():
                samples[name].append(seconds * 1e3)
                memory[name].append(rss)
            if progress:
                progress(i + 1, blocks)
    report = {
        "bundle": {"path": str(path), "id": bundle.id, "precision": bundle.manifest.precision},
        "device": device_facts(),
        "versions": versions(),
        "results": [_result(bundle, name, samples[name], memory[name], ceilings) for name in names],
    }
    return report, samples


class _Runs:
    """One stream per backend, all fed the same blocks into the same kind of buffer."""

    def __init__(self, bundle: Bundle, streams: dict[str, Stream], rng: np.random.Generator) -> None:
        self.contract, self.streams, self.rng = bundle.contract, streams, rng
        self.tolerance = float(bundle.manifest.parity.get("tolerance", 1e-3))
        batch = next(iter(streams.values())).batch
        self.outs = {name: np.empty(self.contract.outputs[0].sized(batch), np.float32) for name in streams}
        self.shape = self.contract.inputs[0].sized(batch)

    def block(self, *, compare: bool, block: int) -> dict[str, tuple[float, int]]:
        """Seconds and resident bytes after, by backend."""
        spec, contract = self.contract.inputs[0], self.contract
        if spec.dtype == "int64":
            fed = self.rng.integers(0, contract.vocab_size, self.shape, dtype=np.int64)
        else:
            fed = self.rng.standard_normal(self.shape).astype(STORAGE[spec.dtype])
        taken = {}
        for name, stream in self.streams.items():
            start = time.perf_counter()
            stream.step(fed, self.outs[name])
            taken[name] = (time.perf_counter() - start, rss_bytes())
        if compare:
            self._compare(block)
        return taken

    def _compare(self, block: int) -> None:
        first, *others = self.outs
        for name in others:
            error = relative_error(self.outs[name], self.outs[first])
            if not error <= self.tolerance:
                raise ParityError(
                    f"{name} and {first} disagree at block {block} by {error:.3g} (relative), allowed is "
                    f"{self.tolerance:.3g}; a wrong answer gets no timing"
                )


def _result(bundle: Bundle, name: str, samples: list[float], memory: list[int], ceilings: Ceilings) -> dict[str, Any]:
    manifest, contract = bundle.manifest, bundle.contract
    batch = contract.batch if isinstance(contract.batch, int) else 1
    weights = manifest.files[manifest.weights].bytes if manifest.weights else 0
    weights = int(manifest.cost.get("weight_bytes_read", weights))
    flops = manifest.cost.get("flops_per_block")
    floor = ceilings.floor(weights, int(flops) * batch if flops else None)
    latency = percentiles(samples)
    slope = float(np.polyfit(np.arange(len(memory)), np.array(memory, float), 1)[0]) * 1000
    return {
        "backend": name,
        "blocks": len(samples),
        "latency_ms": latency,
        "tokens_per_s": contract.block_size * batch / latency["p50"] * 1e3,
        "state_bytes": contract.state_bytes(),
        "rss_bytes": {"first": memory[0], "last": memory[-1], "slope_per_1000_blocks": round(slope)},
        "roofline": {**floor, "share": floor["floor_ms"] / latency["p50"]},
    }
