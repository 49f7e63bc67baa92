"""Measurement of token-by-token generation: time to the first token, time per token, and block boundaries apart.

Method: every backend is fed the same random prompt and then the same random tokens, one at a time, each in its turn, so
that a change in the machine's speed meets all of them. A sample is host latency: token in to logits out, as greedy
generation would see it without the choice of the token. A *boundary* token completes a block: it also runs
``commit_block``, one more pass over the weights. Logits are compared at regular tokens; a wrong answer gets no number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from famexport.bench.power import PowerMeter
from famexport.bench.roofline import Ceilings, measure_ceilings
from famexport.bench.turns import COMPARE_EVERY, ON_CPU, Turns, backend_names, full_report, opened_turns, weight_bytes
from famexport.bundle import Bundle, open_bundle
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
) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
    """Measure generation from ``path`` on ``backends`` in one interleaved run.

    Args:
        backends: names; none means the one that ``auto`` picks.
        tokens: counted tokens per backend; two blocks unless given.
        prompt: tokens of the prompt; a block and a half unless given.
    Returns:
        the report, and the raw samples in ms by backend and kind (``first``, ``token``, ``boundary``).
    Raises:
        UsageError: unknown or repeated backends, too few tokens, a bundle without append_step.
        ParityError: backends disagree; nothing is reported.
    """
    bundle = open_bundle(path)
    names = backend_names(backends)
    contract = bundle.contract
    if not contract.chunks:
        raise UsageError(f"{path} has block_step alone; to measure tokens export it with --graphs all")
    size = contract.block_size
    tokens, prompt = 2 * size if tokens is None else tokens, size + size // 2 if prompt is None else prompt
    if tokens < 2 or prompt < 1:
        raise UsageError(f"bench needs at least 2 tokens after a prompt of at least 1, got {tokens} and {prompt}")
    ceilings = measure_ceilings()
    with opened_turns(bundle, names, threads, seed) as turns, PowerMeter() as meter:
        samples: dict[str, dict[str, list[float]]] = {
            n: {"first": [], "token": [], "boundary": []} for n in turns.streams
        }
        for i in range(PROMPTS + 1):
            for name, seconds in _prompts(turns, prompt).items():
                if i:  # the first touches what is touched for the first time
                    samples[name]["first"].append(seconds * 1e3)
        for i in range(tokens):
            kind = "boundary" if next(iter(turns.streams.values())).room == 1 else "token"
            for name, (seconds, _) in turns.take(
                turns.random(1), compare=not i % COMPARE_EVERY, at=f"token {i}"
            ).items():
                samples[name][kind].append(seconds * 1e3)
            if progress:
                progress(i + 1, tokens)
        batch = turns.batch
    results = [_result(bundle, name, samples[name], prompt, batch, ceilings) for name in samples]
    return full_report(path, bundle, results, meter.result()), samples


def _prompts(turns: Turns, length: int) -> dict[str, float]:
    """Seconds from a prompt of random tokens on a fresh stream to its last logits, by backend."""
    fed, taken = turns.random(length), {}
    for name, stream in turns.streams.items():
        stream.reset()
        start = time.perf_counter()
        for _ in stream.feed([fed]):
            pass
        taken[name] = time.perf_counter() - start
    return taken


def _result(
    bundle: Bundle, name: str, samples: dict[str, list[float]], prompt: int, batch: int, ceilings: Ceilings
) -> dict[str, Any]:
    contract, flops = bundle.contract, bundle.manifest.cost.get("flops_per_block")
    floor = ceilings.floor(weight_bytes(bundle), int(flops) * batch // contract.block_size if flops else None)
    steps = samples["token"] + samples["boundary"]
    return {
        "backend": name,
        "prompt_tokens": prompt,
        "first_token_ms": percentiles(samples["first"]),
        "tokens": len(steps),
        "token_ms": percentiles(samples["token"]),
        "boundary_tokens": len(samples["boundary"]),
        "boundary_ms": percentiles(samples["boundary"]),
        "tokens_per_s": batch * 1e3 / float(np.mean(steps)),
        "state_bytes": contract.state_bytes(),
        "roofline": {**floor, "share": floor["floor_ms"] / percentiles(samples["token"] or steps)["p50"]}
        if name in ON_CPU
        else None,
    }
