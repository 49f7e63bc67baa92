"""Stream a text of any length through a bundle and score it, saving the state now and then: kill it, and run it again.

python samples/stream_file.py BUNDLE TEXT STATE
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

import famexport as fx
from famexport.errors import exit_on_error
from famexport.runtime.feeding import token_source
from famexport.runtime.score import RunReport, run_tokens

SAVE_EVERY = 8  # blocks


def after(pieces: Iterable[np.ndarray], done: int) -> Iterator[np.ndarray]:
    """Token ids without the first ``done``."""
    for ids in pieces:
        yield ids[done:]
        done = max(done - len(ids), 0)


def main(bundle: str, text: str, state: str) -> None:
    with fx.load(bundle) as session, session.stream() as stream:
        if Path(state).exists():
            stream.restore(fx.Snapshot.load(state))
        done = stream.blocks * session.contract.block_size + stream.held
        print(f"from token {done} on")

        def save(report: RunReport) -> None:
            if report.blocks and report.blocks % SAVE_EVERY == 0:
                stream.snapshot().save(state)

        ids = after(token_source(session.bundle, Path(text)), done)
        report = run_tokens(session, ids, stream=stream, progress=save)
        stream.snapshot().save(state)
        loss = "no loss" if report.loss is None else f"{report.loss:.3f} nats per token"  # of last logits alone
        print(f"{stream.blocks} blocks, {report.tokens} new tokens, {loss}, state {stream.snapshot().nbytes} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for word in ("bundle", "text", "state"):
        parser.add_argument(word)
    with exit_on_error():
        main(**vars(parser.parse_args()))
