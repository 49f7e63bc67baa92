"""Whether FAM drifts over very many blocks: its norm, the key, resident memory and latency, in streams that go on.

    python -m samples.passkey.drift BUNDLE --blocks 10000 --filler docs --seed 1 --out drift.json

Each row hears a key in its first block, then filler, drawn a tile at a time so that memory stays constant. After 1, 2,
5, 10, 20 ... blocks and after the last, the key is asked for in one more block, from a snapshot that is restored: the
stream itself never hears a question or an answer. The right answer is fed while it is asked for: an answer is exact
under that if and only if it is exact when generated greedily. Needs no torch. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import famexport as fx
from famexport.errors import exit_on_error
from famexport.runtime.process import rss_bytes
from samples.passkey.evaluate import about, bundle_task, fam_norms, save
from samples.passkey.task import DIGITS, FILLERS, FORMS, Exam, Ids, Task

TILE = 256  # blocks of filler that are drawn at once
ROWS = 4  # side by side, where the bundle's batch is dynamic


def looks(blocks: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 and so on below ``blocks``, then ``blocks``."""
    marks = (first * 10**power for power in range(len(str(blocks))) for first in (1, 2, 5))
    return [*(mark for mark in marks if mark < blocks), blocks]


def text(task: Task, kind: str, keys: Ids, size: int, seed: int) -> Iterator[Ids]:
    """Blocks [b, T] without end, with the keys [b, DIGITS] in the first."""
    rng = np.random.default_rng([seed, FILLERS.index(kind)])
    length = TILE * size
    asked = length + len(task.question)  # an episode ends with the question, which is cut off
    rows = [task.episode(kind, asked, key, _drawn(rng), size)[:length] for key in keys]
    while True:
        tile = np.stack(rows).reshape(len(keys), TILE, size)
        for k in range(TILE):
            yield np.ascontiguousarray(tile[:, k])
        rows = [task.filler(kind, "test", length, _drawn(rng)) for _ in keys]


def questions(task: Task, kind: str, keys: Ids, size: int, seed: int, blocks: int) -> Exam:
    """One block that asks for each key somewhere in filler; another one for other ``blocks``."""
    rng = np.random.default_rng([seed, FILLERS.index(kind), blocks])
    before = len(task.question)
    if before + DIGITS > size:
        raise ValueError(f"a block of {size} tokens is too short for a question and its answer of {before + DIGITS}")
    begins = rng.integers(before, size - DIGITS + 1, len(keys))
    tokens = np.stack([task.filler(kind, "test", size, _drawn(rng)) for _ in keys])
    for row, begin, key in zip(tokens, begins, keys, strict=True):
        row[begin - before : begin + DIGITS] = np.concatenate([task.question, task.digits[key]])
    return Exam(tokens, begins, task.digits[keys])


def ask(stream: fx.Stream, exam: Exam, logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which digits [b, DIGITS] are answered right. The stream is left as it was; ``logits`` [b, T, V] is scratch."""
    saved = stream.snapshot()
    stream.step(exam.tokens, logits)
    stream.restore(saved)
    found: NDArray[np.bool_] = logits[np.arange(len(exam.begins))[:, None], exam.places].argmax(-1) == exam.answers
    return found


def drift(session: fx.Session, task: Task, kind: str, blocks: int, rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """One look at the streams after the other.

    Args:
        rows: how many streams, where the bundle's batch is dynamic.
    """
    contract = session.contract
    dynamic = isinstance(contract.batch, str)
    count = rows if dynamic else int(contract.batch)
    size = contract.block_size
    keys = np.random.default_rng([seed, count]).integers(0, 10, (count, DIGITS))
    logits = np.empty((count, size, contract.vocab_size), np.float32)
    due, latencies, began = looks(blocks), np.zeros(blocks), time.monotonic()
    since = 0
    with session.stream(count if dynamic else None) as stream:
        for done, tokens in enumerate(text(task, kind, keys, size, seed), 1):
            start = time.perf_counter()
            stream.step(tokens, logits)
            latencies[done - 1] = (time.perf_counter() - start) * 1e3
            if done < due[0]:
                continue
            used = rss_bytes()  # before what a look itself needs
            right = ask(stream, questions(task, kind, keys, size, seed, done), logits)
            yield {
                "blocks": done,
                "tokens": done * size,
                "keys": count,
                "exact": float(right.all(1).mean()),
                "digits": float(right.mean()),
                "fam_norm": [float(f"{norm:.5g}") for norm in fam_norms(stream.state())],
                "rss_bytes": used,
                "latency_ms_p50": round(float(np.median(latencies[since:done])), 2),  # since the look before
                "seconds": round(time.monotonic() - began, 1),
            }
            since = due.pop(0)
            if not due:
                return


def _drawn(rng: np.random.Generator) -> int:
    return int(rng.integers(0, 2**31))


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--blocks", type=int, default=10_000)
    parser.add_argument(
        "--rows", type=int, default=ROWS, help="streams with a key each; ignored where a batch is fixed"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--form", choices=FORMS, default="text")
    parser.add_argument("--filler", choices=FILLERS, default="docs")
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--out", type=Path, help="the report, JSON, written at every look")
    options = parser.parse_args(words)
    if options.blocks < 1 or options.rows < 1:
        parser.error("--blocks and --rows must be 1 or more")
    return options


def main(words: list[str] | None = None) -> dict[str, Any]:
    options = arguments(words)
    found: list[dict[str, Any]] = []
    with fx.load(options.bundle, backend=options.backend) as session:
        task, manifest = bundle_task(session, options.form), session.bundle.manifest
        report = {
            "bundle": options.bundle.name,
            "precision": manifest.precision,
            "fam_length": (manifest.config or {}).get("fam_length"),
            "block_size": session.contract.block_size,
            "state_bytes": session.contract.state_bytes(),
            "filler": options.filler,
            "looks": found,
            **about(options),
        }
        for look in drift(session, task, options.filler, options.blocks, options.rows, options.seed):
            found.append(look)
            norms = " ".join(f"{norm:.1f}" for norm in look["fam_norm"]) or "none"
            print(
                f"{look['blocks']:,} blocks, {look['tokens']:,} tokens: FAM norm {norms}, {look['exact']:.0%} of keys "
                f"exact, {look['rss_bytes'] / 1e6:.0f} MB, {look['latency_ms_p50']:.1f} ms a block",
                flush=True,
            )
            save(report, options.out)
    print(json.dumps(report, sort_keys=True))
    return report


if __name__ == "__main__":
    with exit_on_error():
        main()
