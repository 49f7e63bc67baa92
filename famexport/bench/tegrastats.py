"""``tegrastats`` beside a measurement: NVIDIA's monitor of a Jetson, started and stopped here where it is there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from famexport.bench.power import parse_tegrastats

PROGRAM = "tegrastats"
INTERVAL_MS = 500
_KEPT_LINES = 256
_LONGEST_LINE = 65536
_PATIENCE_S = 2.0  # from SIGTERM to SIGKILL, and from there to giving up


class Tegrastats:
    """Runs ``tegrastats`` from ``with`` to the end of it and keeps what its lines say.

    Where there is none on the PATH, or it does not start, nothing happens and ``result`` is empty. It runs in a process
    group of its own, so that Ctrl-C reaches it through here alone, and that what it starts ends with it. If this
    process is killed, the pipe ends, and the next line that it prints ends it.
    """

    def __init__(self, interval_ms: int = INTERVAL_MS) -> None:
        self._interval_ms = interval_ms
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._lines: list[dict[str, Any]] = []
        self._count, self._every = 0, 1
        self._rails: dict[str, list[float]] = {}  # sum, most, number
        self._temperatures: dict[str, list[float]] = {}  # first, last, most

    def __enter__(self) -> Tegrastats:
        if program := shutil.which(PROGRAM):
            try:
                self._start([program, "--interval", str(self._interval_ms)])
            except OSError:
                self._process = None
            except BaseException:
                self._stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self, command: list[str]) -> None:
        self._process = process = subprocess.Popen(  # noqa: S603 - the program's own path, and a number
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._read, args=(process,), name="famexport-tegrastats", daemon=True)
        self._thread.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        began, pipe = time.perf_counter(), process.stdout
        assert pipe is not None
        with pipe, suppress(OSError, ValueError):
            while line := pipe.readline(_LONGEST_LINE):  # without a limit a line that never ends would fill the memory
                if found := parse_tegrastats(line):
                    with self._lock:
                        self._take(time.perf_counter() - began, found)

    def _take(self, at_s: float, found: dict[str, Any]) -> None:
        for name, rail in found.get("rails", {}).items():
            total, most, number = self._rails.get(name, (0.0, float("-inf"), 0))
            self._rails[name] = [total + rail["now"], max(most, rail["now"]), number + 1]
        for name, value in found.get("temperatures_c", {}).items():
            first, _, most = self._temperatures.get(name, (value, value, value))
            self._temperatures[name] = [first, value, max(most, value)]
        if self._count % self._every == 0:
            self._lines.append({"at_s": round(at_s, 3), **found})
        if len(self._lines) > _KEPT_LINES:
            self._lines, self._every = self._lines[::2], self._every * 2
        self._count += 1

    def _stop(self) -> None:
        process, thread = self._process, self._thread
        self._process = self._thread = None
        if process is None:
            return
        try:
            _signal_group(process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE_S)
        finally:  # after a second Ctrl-C, too; the group outlives its leader if that left something behind
            _signal_group(process, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE_S)
            if thread is not None:
                thread.join(_PATIENCE_S)

    def result(self) -> dict[str, Any]:
        """{} without a line that says something; else ``samples``; ``rails`` (``mean_mw``, ``max_mw``) and
        ``temperatures_c`` (``first``, ``last``, ``max``) over all of them; and ``lines``: as ``parse_tegrastats`` reads
        them, with ``at_s``, thinned evenly where there are many."""
        with self._lock:
            if not self._count:
                return {}
            return {
                "samples": self._count,
                "rails": {n: {"mean_mw": total / k, "max_mw": most} for n, (total, most, k) in self._rails.items()},
                "temperatures_c": {
                    name: dict(zip(("first", "last", "max"), values, strict=True))
                    for name, values in self._temperatures.items()
                },
                "lines": list(self._lines),
            }


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
