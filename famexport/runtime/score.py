"""Stream token ids through a session and score them: loss, latency per block, memory. What ``famexport run`` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from famexport.errors import ContractError, InvalidInputError, UsageError
from famexport.runtime.process import rss_bytes
from famexport.runtime.session import Session
from famexport.runtime.stream import Stream

SETTLED = 32  # blocks, after which an engine has all the memory that it wants; in the first it has not
_ROWS = 16  # of logits whose exponentials are in memory at once


@dataclass
class RunReport:
    """Figures of one run. ``loss`` is in nats per token, over every token but the first; latency is per whole block.
    ``rss_bytes``: ``first``, after the first block, or the input where that is shorter or nothing; ``settled``, after
    ``SETTLED``, where there are so many; ``last``; ``max``."""

    backend: str
    precision: str
    block_size: int
    tokens: int = 0
    blocks: int = 0
    loss: float | None = None
    tokens_per_s: float = 0.0
    latency_ms: dict[str, float] = field(default_factory=dict)
    state_bytes: int = 0
    generated: int = 0
    token_ms: dict[str, float] = field(default_factory=dict)
    rss_bytes: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def percentiles(samples: list[float]) -> dict[str, float]:
    """p50, p90, p99 and max of ``samples``, in their unit; empty where there are none."""
    if not samples:
        return {}
    p50, p90, p99 = np.percentile(samples, (50, 90, 99))
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": max(samples)}


def log_probabilities(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log softmax(logits)[i, targets[i]]: logits [n, V], targets [n] -> float64 [n], a few rows at a time."""
    result = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS]
        top = rows.max(-1, keepdims=True)
        total = np.log(np.exp(rows - top).sum(-1, dtype=np.float64))
        chosen = rows[np.arange(len(rows)), targets[start : start + _ROWS]]
        result[start : start + _ROWS] = (chosen - top[:, 0]) - total
    return result


def run_tokens(
    session: Session,
    ids: Iterable[np.ndarray],
    *,
    stream: Stream | None = None,
    scores: Callable[[bytes], None] | None = None,
    progress: Callable[[RunReport], None] | None = None,
) -> RunReport:
    """Stream ``ids`` of any length in constant memory.

    Args:
        ids: int64 arrays [n], of any lengths.
        stream: one of the session's to go on with, also in the middle of a block; it stays open. None: a fresh one.
        scores: appends bytes: a line per token, its log-probability given all before it; the first is ``nan``.
        progress: called after every block with the figures so far.
    Raises:
        UsageError: the bundle cannot be run on one row of tokens, or gives too few logits for scores.
        InvalidInputError: no tokens at all, for a fresh stream.
        ContractError: an array that holds no token ids, or ids outside the vocabulary.
    """
    contract = session.contract
    if contract.inputs[0].name != "tokens":
        raise UsageError(f"this bundle takes {contract.inputs[0]}, not tokens; drive it from Python")
    if contract.batch not in (1, "dynamic"):
        raise UsageError(f"run streams one row, this bundle has a batch of {contract.batch}; export with --batch 1")
    if scores is not None and contract.logits != "all":
        raise UsageError("scores need the logits of every token; export with --logits all")
    report = RunReport(session.backend.name, session.backend.precision, contract.block_size)
    report.state_bytes = contract.state_bytes()
    scorer = _Scorer(scores) if contract.logits == "all" else None
    seconds: list[float] = []
    started = time.perf_counter()
    with nullcontext(stream) if stream else session.stream() as running:
        if scorer and running.last_logits is not None:
            scorer.go_on(running.last_logits)
        for block, logits, elapsed in _timed_blocks(running, ids):
            if elapsed is not None:
                seconds.append(elapsed)
                report.blocks += 1
            report.tokens += len(block)
            if scorer:
                scorer.add(block, logits)
                report.loss = scorer.loss
            report.tokens_per_s = report.tokens / (time.perf_counter() - started)
            _note_memory(report)
            if progress:
                progress(report)
        if not (report.tokens or running.blocks or running.held):
            raise InvalidInputError("the input is empty; expected at least one token")
    if not report.rss_bytes:  # nothing new for a stream to go on with
        _note_memory(report)
    report.latency_ms = {name: value * 1e3 for name, value in percentiles(seconds).items()}
    return report


def _note_memory(report: RunReport) -> None:
    memory, now = report.rss_bytes, rss_bytes()
    memory.setdefault("first", now)
    if report.blocks == SETTLED:
        memory.setdefault("settled", now)
    memory["last"], memory["max"] = now, max(memory.get("max", 0), now)


def _timed_blocks(stream: Stream, ids: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray, float | None]]:
    """(tokens, their logits, seconds of the step); what is less than a block has no time: it is no block's latency."""
    size = stream.contract.block_size
    out = np.empty(stream.contract.outputs[0].sized(1), np.float32)
    for rows in stream.regroup(_checked(ids)):
        start = time.perf_counter()
        logits = stream.add(rows, out)
        elapsed = time.perf_counter() - start
        yield rows[0], logits[0], elapsed if rows.shape[1] == size else None


def _checked(ids: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for piece in ids:
        if piece.ndim != 1 or piece.dtype.kind not in "iu":  # a batch of one would take [1, n], too
            raise ContractError(f"token ids are {piece.dtype} {list(piece.shape)}, expected integers [n]")
        yield piece


def timed_tokens(report: RunReport, tokens: Iterable[int]) -> Iterator[int]:
    """Pass ``tokens`` on as they are generated, and note their number and times: ms from one to the next."""
    seconds: list[float] = []
    before = time.perf_counter()
    for token in tokens:
        now = time.perf_counter()
        seconds.append(now - before)
        report.generated, before = len(seconds), now
        yield token
    report.token_ms = {name: value * 1e3 for name, value in percentiles(seconds).items()}


class _Scorer:
    """Scores each token by the logits of the one before it, across blocks."""

    def __init__(self, write: Callable[[bytes], None] | None) -> None:
        self._write = write
        self._before: np.ndarray | None = None  # the last logits of the block before
        self._total, self._count = 0.0, 0

    @property
    def loss(self) -> float | None:
        return -self._total / self._count if self._count else None

    def go_on(self, logits: np.ndarray) -> None:
        """Take up after a position whose logits [1, V] these are."""
        self._before = logits.copy()

    def add(self, tokens: np.ndarray, logits: np.ndarray) -> None:
        parts = [log_probabilities(logits[:-1], tokens[1:])]
        if self._before is not None:
            parts.insert(0, log_probabilities(self._before, tokens[:1]))
        scored = np.concatenate(parts)
        if self._write is not None:
            lines = [] if self._before is not None else ["nan\n"]
            self._write("".join([*lines, *(f"{value:.6f}\n" for value in scored)]).encode())
        self._total += float(scored.sum())
        self._count += len(scored)
        self._before = logits[-1:].copy()
