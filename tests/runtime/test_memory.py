"""R11: memory does not grow with the number of blocks, nor with that of streams that came and went, and a block allocates
nothing where ``out`` is given.

The resident memory of a process of its own is sampled through 20,000 blocks, or streams. After the warm-up, in which
onnxruntime and the allocator take what they keep, a line is fitted to the medians of each thousand. Measured slopes: 0
to 0.8 bytes per block, 0 per stream, and 73 with a leak of 64 bytes a block, which the same check must report.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import random_input

COUNT, WARM_UP, LEAK_BYTES = 20_000, 5_000, 64
LIMIT_BYTES = 8.0
CHILD = Path(__file__).with_name("memory_child.py")
ROOT = Path(__file__).parents[2]


class MemoryGrows(AssertionError):
    pass


def require_flat(samples: np.ndarray) -> float:
    """The slope, bytes per unit, of rows (units, resident bytes).

    Raises:
        MemoryGrows: it is beyond the limit.
    """
    counted = samples[samples[:, 0] > WARM_UP]
    assert len(counted) >= 15
    slope = float(np.polyfit(counted[:, 0], counted[:, 1], 1)[0])
    if slope >= LIMIT_BYTES:
        raise MemoryGrows(f"resident memory grows by {slope:.1f} bytes per unit, allowed {LIMIT_BYTES}")
    return slope


@pytest.fixture(scope="module")
def samples(bundles: Callable[[str], Path]) -> Iterator[Callable[..., np.ndarray]]:
    """What the process of that unit with a leak of so many bytes measured. All run at once: each uses one core."""
    runs = {
        ("block", 0): "plain",
        ("block", LEAK_BYTES): "plain",
        ("stream", 0): "all_dynamic",
        ("row", 0): "all_dynamic",
    }
    children, printed = {}, {}
    for (unit, leak), name in runs.items():
        command = [sys.executable, str(CHILD), str(bundles(name)), unit, str(COUNT), str(leak)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        children[unit, leak] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)

    def get(unit: str, leak: int = 0) -> np.ndarray:
        key = unit, leak
        if key not in printed:
            printed[key], _ = children[key].communicate(timeout=300)
            assert children[key].returncode == 0
        rows = np.array([line.split() for line in printed[key].splitlines()], dtype=np.float64)
        assert rows[-1, 0] == COUNT
        return rows

    yield get
    for child in children.values():
        child.kill()
        child.communicate()


@pytest.mark.parametrize("unit", ["block", "stream", "row"])
def test_memory_is_flat(samples: Callable[..., np.ndarray], unit: str) -> None:
    require_flat(samples(unit))


def test_a_leak_of_64_bytes_is_reported(samples: Callable[..., np.ndarray]) -> None:
    with pytest.raises(MemoryGrows) as caught:
        require_flat(samples("block", LEAK_BYTES))
    assert float(str(caught.value).split()[4]) >= LEAK_BYTES * 0.8  # the leak, and not some accident


def held_and_peak(call: Callable[[int], Any], blocks: int = 300) -> tuple[float, float]:
    """Bytes that a call leaves behind, and that it has allocated at once.

    The interpreter's caches take and give back a few kilobytes as they like. What a block really leaves is left in each
    window of blocks, so the window with the least counts, and the median call.
    """
    left, peaks = [], []
    gc.freeze()  # what is there already need not be looked through again and again
    tracemalloc.start()
    try:
        for _ in range(5):
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            for block in range(blocks):
                call(block)
            gc.collect()
            left.append((tracemalloc.get_traced_memory()[0] - before) / blocks)
        for block in range(99):
            tracemalloc.reset_peak()
            held, _ = tracemalloc.get_traced_memory()
            call(block)
            peaks.append(tracemalloc.get_traced_memory()[1] - held)
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    return min(left), statistics.median(peaks)


HELD_BYTES = 8  # less than any object
PEAK_BYTES = 2560  # names, numbers and two generators; the logits of a block alone are 3072


@pytest.mark.parametrize("name", ["plain", "bf16"])
def test_a_block_allocates_nothing(sessions: Callable[..., Any], name: str) -> None:
    session = sessions(name)
    with session.stream() as stream:
        fed = [random_input(session.contract, 8, stream.batch, seed=i) for i in range(7)]
        logits = stream.step(fed[0])
        held, peak = held_and_peak(lambda i: stream.step(fed[i % 7], logits))
        assert held < HELD_BYTES
        assert peak < PEAK_BYTES < logits.nbytes
        if name == "plain":
            held, peak = held_and_peak(lambda i: [None for _ in stream.feed([fed[i % 7]], logits)])
            assert held < HELD_BYTES
            assert peak < PEAK_BYTES


def test_what_allocates_is_seen(sessions: Callable[..., Any]) -> None:
    """The same measurement on a stream that leaks a little, and on one that allocates its logits."""
    with sessions("plain").stream() as stream:
        fed = random_input(stream.contract, 8)
        out, kept = stream.step(fed), list[bytes]()
        held, _ = held_and_peak(lambda i: kept.append(bytes(31)) or stream.step(fed, out))
        assert held >= 64
        _, peak = held_and_peak(lambda i: stream.step(fed), 50)
        assert peak >= out.nbytes > PEAK_BYTES
