"""What both measurements share: backends that take turns on the same input, and the report around their results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from famexport.bench.power import board_facts
from famexport.bundle import Bundle
from famexport.errors import ParityError, UsageError
from famexport.runtime.backend import STORAGE
from famexport.runtime.golden import relative_error
from famexport.runtime.process import device_facts, rss_bytes, versions
from famexport.runtime.session import load
from famexport.runtime.stream import Stream

COMPARE_EVERY = 16


ON_CPU = ("ort-cpu", "torch")


def backend_names(backends: Sequence[str]) -> list[str]:
    """The backends asked for, or ``auto``, which ``opened_turns`` calls by the name of what it picked."""
    names = list(backends) or ["auto"]
    if len(set(names)) != len(names):
        raise UsageError(f"a backend is named twice: {', '.join(names)}")
    return names


class Turns:
    """One stream per backend, all fed the same input into the same kind of buffer."""

    def __init__(self, bundle: Bundle, streams: dict[str, Stream], rng: np.random.Generator) -> None:
        self.contract, self.streams, self._rng = bundle.contract, streams, rng
        self._tolerance = float(bundle.manifest.parity.get("tolerance", 1e-3))
        self.batch = next(iter(streams.values())).batch
        self._outs = {n: np.zeros(self.contract.outputs[0].sized(self.batch), np.float32) for n in streams}

    def random(self, positions: int) -> np.ndarray:
        """Input for all rows: tokens, or embeddings."""
        spec = self.contract.inputs[0]
        batch, _, *width = spec.sized(self.batch)
        if spec.dtype == "int64":
            return self._rng.integers(0, self.contract.vocab_size, (batch, positions), dtype=np.int64)
        return np.asarray(self._rng.standard_normal((batch, positions, *width)), STORAGE[spec.dtype])

    def take(self, fed: np.ndarray, *, compare: bool, at: str) -> dict[str, tuple[float, int]]:
        """Seconds and resident bytes after, by backend.

        Raises:
            ParityError: with ``compare``, where two backends disagree.
        """
        taken, given, whole = {}, {}, fed.shape[1] == self.contract.block_size
        for name, stream in self.streams.items():
            start = time.perf_counter()
            given[name] = (stream.step if whole else stream.add)(fed, self._outs[name])
            taken[name] = (time.perf_counter() - start, rss_bytes())
        if compare:
            self._compare(given, at)
        return taken

    def _compare(self, given: dict[str, np.ndarray], at: str) -> None:
        first, *others = given
        for name in others:
            error = relative_error(given[name], given[first])
            if not error <= self._tolerance:
                raise ParityError(
                    f"{name} and {first} disagree at {at} by {error:.3g} (relative), allowed is "
                    f"{self._tolerance:.3g}; a wrong answer gets no timing"
                )


@contextmanager
def opened_turns(bundle: Bundle, names: Sequence[str], threads: int | None, seed: int) -> Iterator[Turns]:
    """Sessions and streams on all backends, closed in the end."""
    with ExitStack() as stack:
        streams = {}
        for name in names:
            session = stack.enter_context(load(bundle, name, threads=threads))
            if session.backend.name in streams:
                raise UsageError(f"a backend is named twice: {', '.join(names)}; {name} is {session.backend.name}")
            streams[session.backend.name] = stack.enter_context(session.stream())
        yield Turns(bundle, streams, np.random.default_rng(seed))


def weight_bytes(bundle: Bundle) -> int:
    """Bytes of weights that one call must read."""
    manifest = bundle.manifest
    whole = manifest.files[manifest.weights].bytes if manifest.weights else 0
    return int(manifest.cost.get("weight_bytes_read", whole))


def full_report(
    path: str | Path, bundle: Bundle, results: list[dict[str, Any]], power: Mapping[str, Any]
) -> dict[str, Any]:
    """``results`` with the bundle, machine and versions that they belong to."""
    board = board_facts()
    return {
        # of a Jetson; elsewhere there is nothing to read
        **({"board": board} if board else {}),
        **({"power": dict(power)} if power else {}),
        "bundle": {"path": str(path), "id": bundle.id, "precision": bundle.manifest.precision},
        "device": device_facts(),
        "versions": versions(),
        "results": results,
    }
