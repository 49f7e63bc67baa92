"""Interleaved measurement of a bundle on several backends.

Method: every backend first runs a few blocks on the same input, and its logits must agree with the first backend's
within the bundle's own tolerance; a wrong answer gets no number. Then they take turns of a few blocks, so that a change
in the machine's speed meets all of them; at least M+1 blocks warm up and do not count, nor does the first of a turn. A
sample is host latency: input ready to logits ready. Backends on a GPU also give the device's own time, by events: from
the first copy to the last. Outputs are compared again after every round of turns. Resident memory is read after every
block; its slope is a least-squares fit over the counted blocks of the whole process.

Then come, where asked for, blocks at a steady pace (``paced.py``), and last, on backends that can, blocks back to back,
without a wait of the host in between: their rate is throughput, and no latency. The ceilings are measured when all
backends have given back their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from famexport.bench.paced import Paced, check_period, run_paced
from famexport.bench.power import PowerMeter
from famexport.bench.roofline import Ceilings, measure_limits
from famexport.bench.tegrastats import Tegrastats
from famexport.bench.turns import (
    Cost,
    Samples,
    Taken,
    Turns,
    backend_names,
    full_report,
    memory_facts,
    opened_turns,
    step_cost,
)
from famexport.bundle import Bundle, open_bundle
from famexport.contract import PRECISION_DTYPE
from famexport.errors import UsageError
from famexport.runtime.score import percentiles

QUICK_BLOCKS = 50
BACK_TO_BACK_BLOCKS = 50
ROUNDS = 3


def bench(
    path: str | Path,
    backends: Sequence[str] = (),
    *,
    blocks: int = QUICK_BLOCKS,
    paced_ms: float | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], Samples]:
    """Measure ``path`` on ``backends`` in one interleaved run.

    Args:
        backends: names; none means the one that ``auto`` picks.
        blocks: counted samples per backend.
        paced_ms: also measure as many blocks at this distance in time.
    Returns:
        the report (plain values, as the command line prints it), and the raw samples in ms by backend and kind:
        ``latency``, and where there are any ``device`` and ``paced``.
    Raises:
        UsageError: unknown or repeated backends, too few blocks, a pace that cannot be.
        BundleError: damaged, or what it says of its cost is no number.
        ParityError: backends disagree; nothing is reported.
    """
    if blocks < 2:
        raise UsageError(f"bench needs at least 2 blocks, got {blocks}")
    check_period(paced_ms)
    bundle = open_bundle(path)
    names, cost = backend_names(backends), step_cost(bundle)
    say, total = progress or (lambda done, total: None), blocks * (1 if paced_ms is None else 2)
    with ExitStack() as stack:
        turns = stack.enter_context(opened_turns(bundle, names, threads, seed))
        meter, stats = stack.enter_context(PowerMeter()), stack.enter_context(Tegrastats())
        taken: dict[str, list[Taken]] = {name: [] for name in turns.streams}
        size = bundle.contract.block_size
        turns.warm_up(size, bundle.contract.memory_segments + 2)
        for in_turn in turns.rounds(size, blocks):
            for name, steps in in_turn.items():
                taken[name] += steps
            say(len(next(iter(taken.values()))), total)
        paced: dict[str, Paced] = {}
        if paced_ms is not None:
            paced = run_paced(turns, blocks, paced_ms, lambda done: say(blocks + done, total))
        rates = _back_to_back(turns, min(blocks, BACK_TO_BACK_BLOCKS))
    ceilings, gpu = measure_limits(set(turns.devices.values()), PRECISION_DTYPE[bundle.manifest.precision])
    samples: Samples = {}
    results = []
    for name in taken:
        samples[name] = _samples(taken[name], paced.get(name))
        limit = ceilings.get(turns.devices[name])
        result = _result(bundle, cost, name, taken[name], samples[name], paced.get(name), rates[name], limit)
        results.append({**result, "kernels": turns.kernels[name]})
    report = full_report(path, bundle, results, gpu=gpu, power=meter.result(), tegrastats=stats.result())
    return report, samples


def _back_to_back(turns: Turns, blocks: int) -> dict[str, float | None]:
    """Blocks per second of each backend, the median of a few interleaved rounds; None where it waits in each call. A
    step after each round sees that the state is finite: nothing looks at it in between."""
    seconds: dict[str, list[float]] = {name: [] for name in turns.streams}
    for _ in range(ROUNDS):
        fed = turns.random(turns.contract.block_size)
        for name, stream in turns.streams.items():
            turns.settle()
            if (taken := stream.loop.back_to_back(fed, blocks)) is not None:
                seconds[name].append(taken)
                turns.one(name, fed)
    return {name: blocks / median(taken) if taken else None for name, taken in seconds.items()}


def _samples(taken: Sequence[Taken], paced: Paced | None) -> dict[str, list[float]]:
    found = {"latency": [each.seconds * 1e3 for each in taken]}
    if device := [each.device_ms for each in taken if each.device_ms is not None]:
        found["device"] = device
    if paced is not None:
        found["paced"] = paced.samples
    return found


def _result(
    bundle: Bundle,
    cost: Cost,
    name: str,
    taken: Sequence[Taken],
    samples: dict[str, list[float]],
    paced: Paced | None,
    rate: float | None,
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    contract = bundle.contract
    batch = contract.batch if isinstance(contract.batch, int) else 1
    latency, device = percentiles(samples["latency"]), percentiles(samples.get("device", [])) or None
    flops = cost.flops * batch if cost.flops else None
    return {
        "backend": name,
        "blocks": len(taken),
        "latency_ms": latency,
        "device_ms": device,
        "paced": paced.report() if paced else None,
        "tokens_per_s": contract.block_size * batch / latency["p50"] * 1e3,
        "throughput_blocks_per_s": rate,
        "throughput_tokens_per_s": rate * contract.block_size * batch if rate else None,
        "state_bytes": contract.state_bytes(),
        "rss_bytes": memory_facts([each.rss_bytes for each in taken]),
        "roofline": ceilings.share(cost.weight_bytes, flops, latency, device) if ceilings else None,
    }
