"""Measurement of token-by-token generation: time to the first token, time per token, and block boundaries apart.

Method: every backend is fed the same random prompt and then the same random tokens, one at a time, in turns of a few
tokens, so that a change in the machine's speed meets all of them; the first of a turn does not count, nor do those up
to the first end of a block, where ``commit_block`` runs for the first time. A sample is host latency: token in to
logits out, as greedy generation would see it without the choice of the token. A *boundary* token completes a block: it
also runs ``commit_block``, one more pass over the weights, and its device time is the sum of both. Logits are compared
after every round of turns; a wrong answer gets no number. The ceilings are measured when all backends have given back
their memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from famexport.bench.power import PowerMeter
from famexport.bench.roofline import Ceilings, measure_limits
from famexport.bench.tegrastats import Tegrastats
from famexport.bench.turns import (
    Cost,
    Samples,
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

PROMPTS = 5


def bench_tokens(
    path: str | Path,
    backends: Sequence[str] = (),
    *,
    tokens: int | None = None,
    prompt: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], Samples]:
    """Measure generation from ``path`` on ``backends`` in one interleaved run.

    Args:
        backends: names; none means the one that ``auto`` picks.
        tokens: counted tokens per backend; two blocks unless given.
        prompt: tokens of the prompt; a block and a half unless given.
    Returns:
        the report, and the raw samples in ms by backend and kind: ``first``, ``token`` and ``boundary``, and on a GPU
        ``token_device`` and ``boundary_device``.
    Raises:
        UsageError: unknown or repeated backends, too few tokens, a bundle without append_step.
        BundleError: damaged, or what it says of its cost is no number.
        ParityError: backends disagree; nothing is reported.
    """
    bundle = open_bundle(path)
    names, cost = backend_names(backends), step_cost(bundle)
    contract = bundle.contract
    if not contract.chunks:
        raise UsageError(f"{path} has block_step alone; to measure tokens export it with --graphs all")
    size = contract.block_size
    tokens, prompt = 2 * size if tokens is None else tokens, size + size // 2 if prompt is None else prompt
    if tokens < 2 or prompt < 1:
        raise UsageError(f"bench needs at least 2 tokens after a prompt of at least 1, got {tokens} and {prompt}")
    with ExitStack() as stack:
        turns = stack.enter_context(opened_turns(bundle, names, threads, seed))
        meter, stats = stack.enter_context(PowerMeter()), stack.enter_context(Tegrastats())
        samples: Samples = {n: {"first": [], "token": [], "boundary": []} for n in turns.streams}
        memory: dict[str, list[int]] = {n: [] for n in turns.streams}
        for i in range(PROMPTS + 1):
            for name, seconds in _prompts(turns, prompt).items():
                if i:  # the first touches what is touched for the first time
                    samples[name]["first"].append(seconds * 1e3)
        turns.warm_up(1, turns.room)
        done = 0
        for in_turn in turns.rounds(1, tokens):
            done += len(next(iter(in_turn.values())))
            for name, steps in in_turn.items():
                for each in steps:
                    kind = "boundary" if each.ends_block else "token"
                    samples[name][kind].append(each.seconds * 1e3)
                    memory[name].append(each.rss_bytes)
                    if each.device_ms is not None:
                        samples[name].setdefault(f"{kind}_device", []).append(each.device_ms)
            if progress:
                progress(done, tokens)
    ceilings, gpu = measure_limits(set(turns.devices.values()), PRECISION_DTYPE[bundle.manifest.precision])
    results = []
    for name in samples:
        limit = ceilings.get(turns.devices[name])
        result = _result(bundle, cost, name, samples[name], memory[name], prompt, turns.batch, limit)
        results.append({**result, "kernels": turns.kernels[name]})
    report = full_report(path, bundle, results, gpu=gpu, power=meter.result(), tegrastats=stats.result())
    return report, samples


def _prompts(turns: Turns, length: int) -> dict[str, float]:
    """Seconds from a prompt of random tokens on a fresh stream to its last logits, by backend."""
    fed, taken = turns.random(length), {}
    for name, stream in turns.streams.items():
        stream.reset()
        turns.settle()
        start = time.perf_counter()
        for _ in stream.feed([fed]):
            pass
        taken[name] = time.perf_counter() - start
    return taken


def _result(
    bundle: Bundle,
    cost: Cost,
    name: str,
    samples: dict[str, list[float]],
    memory: Sequence[int],
    prompt: int,
    batch: int,
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    contract = bundle.contract
    flops = cost.flops * batch // contract.block_size if cost.flops else None
    steps = samples["token"] + samples["boundary"]
    device, at_end = (percentiles(samples.get(f"{kind}_device", [])) or None for kind in ("token", "boundary"))
    limited = percentiles(samples["token"] or steps), device if samples["token"] else at_end
    return {
        "backend": name,
        "prompt_tokens": prompt,
        "first_token_ms": percentiles(samples["first"]),
        "tokens": len(steps),
        "token_ms": percentiles(samples["token"]),
        "device_ms": device,
        "boundary_tokens": len(samples["boundary"]),
        "boundary_ms": percentiles(samples["boundary"]),
        "boundary_device_ms": at_end,
        "tokens_per_s": batch * 1e3 / float(np.mean(steps)),
        "state_bytes": contract.state_bytes(),
        "rss_bytes": memory_facts(memory),
        "roofline": ceilings.share(cost.weight_bytes, flops, *limited) if ceilings else None,
    }
