"""Run a bundle in a process of its own and print its resident memory, one line ``units rss_bytes`` per thousand units.

    python memory_child.py BUNDLE UNIT COUNT LEAK

UNIT is ``block``, of one stream that goes on and on; or ``stream`` or ``row``, of a pool: each is opened, fed more than
a block and closed. With LEAK, every unit leaves one object of so many bytes behind, as a cache that nobody empties would.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import famexport as fx
from famexport.runtime.process import rss_bytes

BYTES_OVERHEAD = sys.getsizeof(b"")


def blocks(session: Any) -> Callable[[int], None]:
    tokens = np.random.default_rng(0).integers(0, session.contract.vocab_size, (64, *session.contract.inputs[0].shape))
    stream, out = session.stream(), np.empty(session.contract.outputs[0].shape, np.float32)
    return lambda i: stream.step(tokens[i % 64], out)


def streams(session: Any, opened: Callable[[], Any]) -> Callable[[int], None]:
    fed = np.random.default_rng(0).integers(0, session.contract.vocab_size, (1, session.contract.block_size * 4 // 3))

    def once(_: int) -> None:
        with opened() as stream:
            for _ in stream.feed([fed]):
                pass

    return once


def main(bundle: str, unit: str, count: int, leak: int) -> None:
    session = fx.load(bundle, "ort-cpu", threads=1)
    if unit == "block":
        once = blocks(session)
    else:
        once = streams(session, session.pool(2).open if unit == "row" else session.stream)
    samples, kept = [], []
    for i in range(1, count + 1):
        once(i)
        if leak:
            kept.append(bytes(leak - BYTES_OVERHEAD))
        if i % 50 == 0:
            samples.append(rss_bytes())
        if i % 1000 == 0:
            gc.collect()  # garbage is no leak
            print(i, round(statistics.median(samples)), flush=True)
            samples.clear()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
