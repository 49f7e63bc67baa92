"""What both modes measure: the time of every block, and memory at some of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from famexport.runtime.process import device_facts, rss_bytes, versions
from famexport.runtime.score import percentiles

BLOCKS = (10, 100, 1000)  # to look at memory after
SAY_EVERY = 15.0  # seconds


class Phases:
    """Seconds of what is done once, said when it is done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        say(f"{name}: {self.seconds[name]:.1f} s")


class Stages:
    """Seconds of the stages that a long call reports as (stage, done, in all), said as they go."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._before = self._said = time.perf_counter()
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0) + now - self._before, 3)
        if stage != self._stage or now - self._said > SAY_EVERY or done == total:
            say(f"  {stage} {done / total:.0%}: {self.seconds[stage]:.1f} s, {rss_bytes() / 1e9:.1f} GB resident")
            self._said = now
        self._before, self._stage = now, stage


def say(text: str) -> None:
    print(text, flush=True)


def memory(device: str) -> dict[str, int]:
    """Bytes in use on the device, and free there; on a CPU those of the process."""
    rss = rss_bytes()
    if device != "cuda":
        return {"used_bytes": rss, "rss_bytes": rss}
    free, total = torch.cuda.mem_get_info()
    return {"used_bytes": total - free, "free_bytes": free, "rss_bytes": rss}


def stream(
    step: Callable[[], Any], *, blocks: int, block_size: int, lengths: Sequence[int], device: str
) -> dict[str, Any]:
    """Call ``step`` for each block, until it has no more memory, and measure.

    Returns:
        the report's ``latencies_ms`` and their summary, ``at_tokens`` (seconds from the first block on, and memory) and
        ``at_block`` (memory); ``stopped`` is null unless memory ran out.
    """
    at = {max(1, round(length / block_size)): length for length in lengths}
    at_tokens, at_block, taken = list[dict[str, Any]](), dict[str, Any](), list[float]()
    stopped, said = None, time.perf_counter()
    for block in range(1, blocks + 1):
        start = time.perf_counter()
        try:
            step()
        except torch.OutOfMemoryError as exc:
            stopped = {"tokens": (block - 1) * block_size, "reason": str(exc).partition(". ")[0]}
            say(f"  out of memory after {stopped['tokens']} tokens")
            break
        taken.append(time.perf_counter() - start)
        if block in at or block in BLOCKS:
            found = {"block": block, "tokens": block * block_size, "seconds": round(sum(taken), 3), **memory(device)}
            at_tokens += [{"length": at[block], **found}] if block in at else []
            at_block |= {str(block): found} if block in BLOCKS else {}
        if block in at or block in BLOCKS or time.perf_counter() - said > SAY_EVERY:
            used = memory(device)["used_bytes"] / 1e9
            say(f"  block {block}: {sum(taken):.2f} s, {taken[-1] * 1e3:.2f} ms this one, {used:.2f} GB in use")
            said = time.perf_counter()
    latencies = [round(seconds * 1e3, 4) for seconds in taken]
    return {
        "blocks": len(taken),
        "latency_ms": percentiles(latencies) if latencies else None,
        "tokens_per_s": block_size * len(taken) / sum(taken) if taken else None,
        "at_tokens": at_tokens,
        "at_block": at_block,
        "stopped": stopped,
        "latencies_ms": latencies,
    }


def machine(device: str) -> dict[str, Any]:
    """What it was measured on, and what ``used_bytes`` counts."""
    return {
        "memory": "in use on the device, of all processes" if device == "cuda" else "resident memory of the process",
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "machine": device_facts(),
        "versions": versions(),
    }
