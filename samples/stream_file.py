"""Stream a text of any length through a bundle and score it, saving the state now and then: kill it, and run it again.

python samples/stream_file.py BUNDLE TEXT STATE
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import famexport as fx
from famexport.runtime.feeding import token_source
from famexport.runtime.score import log_probabilities

SAVE_EVERY = 8  # blocks


def main(bundle: str, text: str, state: str) -> None:
    with fx.load(bundle) as session, session.stream() as stream:
        if Path(state).exists():
            stream.restore(fx.Snapshot.load(state))
        size = session.contract.block_size
        done, total, count = stream.blocks * size, 0.0, 0
        print(f"from token {done} on")
        ids = np.concatenate([np.zeros(0, np.int64), *token_source(session.bundle, Path(text))])
        for start in range(done, len(ids) - size + 1, size):
            block = ids[start : start + size]
            logits = stream.step(block[None])[0]
            total -= log_probabilities(logits[:-1], block[1:]).sum()
            count += size - 1
            if stream.blocks % SAVE_EVERY == 0:
                stream.snapshot().save(state)
        stream.snapshot().save(state)
        loss = f"{total / count:.3f} nats per token" if count else "nothing new"
        print(f"{stream.blocks} blocks, {loss}, state {stream.snapshot().nbytes} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
