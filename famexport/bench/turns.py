"""What both measurements share: backends that take turns on the same input, and the report around their results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from famexport.bench.power import board_facts
from famexport.bundle import Bundle
from famexport.errors import ParityError, UsageError
from famexport.runtime.golden import relative_error
from famexport.runtime.inputs import random_input
from famexport.runtime.process import device_facts, rss_bytes, versions
from famexport.runtime.selftest import stated_number
from famexport.runtime.session import load
from famexport.runtime.stream import Stream

TURN = 8  # counted steps of one backend in a row
_SETTLE_S = 0.25  # at most
_TRACE = 64  # points of the memory's course in a report

Samples = dict[str, dict[str, list[float]]]  # ms, by backend and kind


class Taken(NamedTuple):
    """What one step took: seconds on the host, resident bytes after it, and ms on the device, None where that is not
    timed; and whether it ended a block."""

    seconds: float
    rss_bytes: int
    device_ms: float | None
    ends_block: bool


def backend_names(backends: Sequence[str]) -> list[str]:
    """The backends asked for, or ``auto``, which ``opened_turns`` calls by the name of what it picked."""
    names = list(backends) or ["auto"]
    if len(set(names)) != len(names):
        raise UsageError(f"a backend is named twice: {', '.join(names)}")
    return names


class Turns:
    """One stream per backend, all fed the same input into the same kind of buffer."""

    def __init__(
        self,
        bundle: Bundle,
        streams: dict[str, Stream],
        rng: np.random.Generator,
        devices: dict[str, str],
        kernels: dict[str, str | None],
    ) -> None:
        self.contract, self.streams, self._rng = bundle.contract, streams, rng
        self.devices = devices  # "cpu" or "cuda", by backend
        self.kernels = kernels  # what Session.info says of them, by backend
        self._tolerance = stated_number(bundle, "parity", "tolerance", 1e-3)
        self.batch = next(iter(streams.values())).batch
        self._outs = {n: np.zeros(self.contract.outputs[0].sized(self.batch), np.float32) for n in streams}
        self._given: dict[str, np.ndarray] = {}
        for stream in streams.values():
            stream.loop.time_device()

    def random(self, positions: int) -> np.ndarray:
        """Input for all rows: tokens, or embeddings."""
        return random_input(self.contract, self.batch, positions, self._rng)

    @property
    def room(self) -> int:
        """Positions that are left in the open block, which is the same one on all backends."""
        return next(iter(self.streams.values())).room

    def one(self, name: str, fed: np.ndarray) -> Taken:
        """One step of one backend. Device time is the sum over its calls: a token that completes a block is two."""
        stream, whole = self.streams[name], fed.shape[1] == self.contract.block_size
        loop, before, ends = stream.loop, stream.loop.device_total_ms, fed.shape[1] >= stream.room
        start = time.perf_counter()
        self._given[name] = (stream.step if whole else stream.add)(fed, self._outs[name])
        seconds = time.perf_counter() - start
        device_ms = None if loop.device_ms is None else loop.device_total_ms - before
        return Taken(seconds, rss_bytes(), device_ms, ends)

    def warm_up(self, positions: int, count: int) -> None:
        """``count`` steps of every backend that do not count, each compared.

        Raises:
            ParityError: two backends disagree.
        """
        for i in range(count):
            fed = self.random(positions)
            for name in self.streams:
                self.one(name, fed)
            self.compare(f"warm-up step {i}")

    def rounds(self, positions: int, count: int) -> Iterator[dict[str, list[Taken]]]:
        """``count`` counted steps of every backend, in rounds: some steps of one, the same of the next.

        Among several, the first step of a turn does not count: it starts when nothing of the backend before runs any
        more, and loads the caches with its own weights, as they are while a stream runs. A token that ends a block is
        never that first step, as there are few of them; the turn before is longer by one then.

        Raises:
            ParityError: two backends disagree at the end of a round.
        """
        lead, done = int(len(self.streams) > 1), 0
        while done < count:
            size = min(TURN, count - done)
            if (
                lead
                and positions == 1
                and (self.room - lead - size) % self.contract.block_size == 1
                and done + size < count
            ):
                size += 1
            given = [self.random(positions) for _ in range(lead + size)]
            taken = {}
            for name in self.streams:
                self.settle()
                taken[name] = [self.one(name, fed) for fed in given][lead:]
            done += size
            self.compare(f"counted step {done - 1}")
            yield taken

    def settle(self) -> None:
        """Wait until no thread of this process runs, for 0.25 s at most, where there are several backends.

        The workers of one spin for some milliseconds after its last step, and on a machine of few cores take the time
        of the next one's: on two, blocks of onnxruntime took 1.6 times as long right after torch's.
        """
        end = time.perf_counter() + _SETTLE_S
        while len(self.streams) > 1 and time.perf_counter() < end:
            before = time.process_time()
            time.sleep(2e-3)
            if time.process_time() - before < 5e-4:
                return

    def compare(self, at: str) -> None:
        """Compare the logits of every backend's last step.

        Raises:
            ParityError: two disagree.
        """
        first, *others = self.streams
        for name in others:
            error = relative_error(self._given[name], self._given[first])
            if not error <= self._tolerance:
                raise ParityError(
                    f"{name} and {first} disagree at {at} by {error:.3g} (relative), allowed is "
                    f"{self._tolerance:.3g}; a wrong answer gets no timing"
                )


@contextmanager
def opened_turns(bundle: Bundle, names: Sequence[str], threads: int | None, seed: int) -> Iterator[Turns]:
    """Sessions and streams on all backends, closed in the end."""
    with ExitStack() as stack:
        streams, devices, kernels = {}, {}, {}
        for name in names:
            session = stack.enter_context(load(bundle, name, threads=threads))
            if session.backend.name in streams:
                raise UsageError(f"a backend is named twice: {', '.join(names)}; {name} is {session.backend.name}")
            devices[session.backend.name] = session.backend.device
            kernels[session.backend.name] = session.info().get("kernels")
            streams[session.backend.name] = stack.enter_context(session.stream())
        yield Turns(bundle, streams, np.random.default_rng(seed), devices, kernels)


class Cost(NamedTuple):
    """Of one call on one row: bytes of weights that it must read, and its operations; None where nobody counted."""

    weight_bytes: int
    flops: int | None


def step_cost(bundle: Bundle) -> Cost:
    """What the manifest says of a block step. Ask before the measurement: it is read from a file, and may be nonsense.

    Raises:
        BundleError: it is no number.
    """
    manifest = bundle.manifest
    whole = manifest.files[manifest.weights].bytes if manifest.weights else 0
    read = int(stated_number(bundle, "cost", "weight_bytes_read")) if "weight_bytes_read" in manifest.cost else whole
    counted = manifest.cost.get("flops_per_block") is not None
    return Cost(read, int(stated_number(bundle, "cost", "flops_per_block")) if counted else None)


def memory_facts(memory: Sequence[int]) -> dict[str, Any]:
    """Resident bytes at the first and the last block, the slope of a least-squares fit, and the course between them as
    at most 64 pairs of block and bytes."""
    at = sorted(set(np.linspace(0, len(memory) - 1, min(_TRACE, len(memory))).round().astype(int).tolist()))
    slope = float(np.polyfit(np.arange(len(memory)), np.array(memory, float), 1)[0]) * 1000
    return {
        "first": memory[0],
        "last": memory[-1],
        "slope_per_1000_blocks": round(slope),
        "trace": [[i, memory[i]] for i in at],
    }


def full_report(
    path: str | Path,
    bundle: Bundle,
    results: list[dict[str, Any]],
    *,
    gpu: Mapping[str, Any],
    power: Mapping[str, Any],
    tegrastats: Mapping[str, Any],
) -> dict[str, Any]:
    """``results`` with the bundle, machine and versions that they belong to. What this machine has not is left out."""
    found = {"board": board_facts(), "gpu": dict(gpu), "power": dict(power), "tegrastats": dict(tegrastats)}
    return {
        **{name: facts for name, facts in found.items() if facts},
        "bundle": {"path": str(path), "id": bundle.id, "precision": bundle.manifest.precision},
        "device": device_facts(),
        "versions": versions(),
        "results": results,
    }
