"""Blocks at a steady pace, as a camera or a microphone gives them: idle gaps cause the worst outliers.

Method: a block is due every so many milliseconds, and is not begun before. Backends take turns of 16 blocks, so that
each has its idle gaps to itself; in each turn all get the same input, and the last logits of it must agree. A sample is
host latency: for a block that is due while the one before still runs, from when it was due, so the wait counts;
otherwise from when the sleep ended. A block is late if its logits come after the next block is due.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from famexport.bench.turns import Turns
from famexport.errors import UsageError
from famexport.runtime.score import percentiles

LONGEST_MS = 3_600_000.0
TURN = 16  # blocks of one backend in a row


@dataclass
class Paced:
    """Latency in ms of each block of one backend, and how many were late."""

    period_ms: float
    samples: list[float] = field(default_factory=list)
    late: int = 0

    def report(self) -> dict[str, Any]:
        return {
            "period_ms": self.period_ms,
            "blocks": len(self.samples),
            "latency_ms": percentiles(self.samples),
            "late": self.late,
        }


def check_period(period_ms: float | None) -> None:
    """Raise UsageError unless blocks can come every ``period_ms`` milliseconds, or at no pace (None)."""
    if period_ms is not None and not (math.isfinite(period_ms) and 0 < period_ms <= LONGEST_MS):
        raise UsageError(
            f"--paced is the milliseconds from one block to the next, above 0 and at most {LONGEST_MS:.0f}; "
            f"got {period_ms:g}"
        )


def run_paced(
    turns: Turns,
    blocks: int,
    period_ms: float,
    progress: Callable[[int], None] | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Paced]:
    """Run ``blocks`` blocks on every backend of ``turns``, which are at the end of a block.

    Args:
        progress: called with the number of blocks that all backends have done.
        clock, sleep: in seconds.
    Raises:
        ParityError: backends disagree.
    """
    found = {name: Paced(period_ms) for name in turns.streams}
    for done in range(0, blocks, TURN):
        fed = [turns.random(turns.contract.block_size) for _ in range(min(TURN, blocks - done))]
        for name, paced in found.items():
            turns.settle()
            due = clock() + period_ms / 1e3
            for block in fed:
                free = clock()
                if free < due:
                    sleep(due - free)
                    began = clock()
                else:
                    began = due
                turns.one(name, block)
                end = clock()
                paced.samples.append((end - began) * 1e3)
                due += period_ms / 1e3
                paced.late += end > due
        turns.compare(f"paced block {done + len(fed) - 1}")
        if progress:
            progress(done + len(fed))
    return found
