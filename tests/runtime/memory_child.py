"""Run a bundle in a process of its own and print its resident memory, one line ``blocks rss_bytes`` per thousand blocks.

    python memory_child.py BUNDLE BLOCKS LEAK

With LEAK, every committed block leaves one object of 64 bytes behind, as a cache that nobody empties would.
"""

from __future__ import annotations

import gc
import statistics
import sys

import numpy as np

import famexport as fx
from famexport.runtime.ort import OrtLoop
from famexport.runtime.process import rss_bytes

BYTES_OVERHEAD = sys.getsizeof(b"")


def main(bundle: str, blocks: int, leak: int) -> None:
    if leak:
        kept: list[bytes] = []
        commit = OrtLoop.commit

        def leaking(self: OrtLoop) -> None:
            kept.append(bytes(leak - BYTES_OVERHEAD))
            commit(self)

        OrtLoop.commit = leaking  # type: ignore[method-assign]
    session = fx.load(bundle, "ort-cpu", threads=1)
    tokens = np.random.default_rng(0).integers(0, session.contract.vocab_size, (64, *session.contract.inputs[0].shape))
    with session.stream() as stream:
        out = np.empty(session.contract.outputs[0].shape, np.float32)
        samples = []
        for block in range(1, blocks + 1):
            stream.step(tokens[block % 64], out)
            if block % 50 == 0:
                samples.append(rss_bytes())
            if block % 1000 == 0:
                gc.collect()  # garbage is no leak
                print(block, round(statistics.median(samples)), flush=True)
                samples.clear()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
