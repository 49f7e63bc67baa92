"""Power, clocks and power mode of a Jetson, read from files and from NVIDIA's own commands, where they are there.

Formats: NVIDIA's Jetson Linux Developer Guide, "Power and Performance" (``nvpmodel``, ``jetson_clocks``, the INA3221
files) and "tegrastats Utility"; the files' units are those of the Linux kernel's ``hwmon/ina3221``. Tested on recorded
lines and made-up file trees, **not on a board**. NVML answers NotSupported on Jetson, so it is not asked.

A rail is a labelled channel of an INA3221: volts times amperes as the chip last converted them. What no INA3221
measures is not seen: on Thor the input ``VIN`` has another chip, and only ``tegrastats`` shows it. Rails can lie inside
one another (``VDD_CPU_GPU_CV`` within ``VDD_IN``), so a sum over all of them means nothing.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

Runner = Callable[[Sequence[str]], "str | None"]

INTERVAL_S = 0.1
_COMMAND_TIMEOUT_S = 5.0
_HWMON = "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*"
_CHANNELS = (1, 2, 3)  # in4 to in7 are shunt voltages of the same channels

_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (-?\d{1,9})mW(?:/(-?\d{1,9})mW)?(?!\S)")
_TEMPERATURE = re.compile(r"(?<!\S)([A-Za-z][A-Za-z0-9_]*)@(-?\d{1,4}(?:\.\d{1,9})?)C(?!\S)")
_RAM = re.compile(r"(?<!\S)RAM (\d{1,9})/(\d{1,9})MB(?!\S)")
_LOAD = re.compile(r"(?<!\S)(GR3D_FREQ|EMC_FREQ) (\d{1,3})%(?:@(?:\[(\d{1,9}(?:,\d{1,9})*)\]|(\d{1,9})))?(?!\S)")
_NO_SENSOR_C = -256.0  # what tegrastats prints for a sensor that is powered down
_CLOCK = re.compile(
    r"^\s*(cpu\d+|GPU|EMC)\b.*?\bMinFreq=(\d{1,12}) MaxFreq=(\d{1,12}) CurrentFreq=(\d{1,12})\b", re.MULTILINE
)
_RELEASE = re.compile(r"^# R(\d+) \(release\), REVISION: ([\d.]+)", re.MULTILINE)
_MODE = re.compile(r"^NV Power Mode:[ \t]*(\S.*?)[ \t\r]*$", re.MULTILINE)


def run_command(command: Sequence[str]) -> str | None:
    """What ``command`` prints; None where it is not there, fails or hangs."""
    try:
        done = subprocess.run(  # noqa: S603  the commands are the constants below
            list(command), capture_output=True, text=True, errors="replace", timeout=_COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def board_facts(root: Path = Path("/"), run: Runner = run_command) -> dict[str, Any]:
    """What decides a Jetson's speed, for reports.

    Args:
        root: where the file system starts.
        run: runs a command; gives its output, or None.
    Returns:
        ``model``, ``l4t`` (Jetson Linux release, "36.4.3"), ``power_mode``, ``clocks``: those found; {} on a machine
        that is no Jetson. ``clocks`` needs root; where the rest is there and it is not, it is None.
    """
    facts: dict[str, Any] = {}
    model = (_text(root / "proc/device-tree/model") or "").strip("\0\n ")
    release = _RELEASE.search(_text(root / "etc/nv_tegra_release") or "")
    mode = parse_power_mode(run(["nvpmodel", "-q"]) or "")
    if release is None and mode is None and not re.search(r"jetson|nvidia", model, re.IGNORECASE):
        return {}  # other boards have a device tree, too
    if model:
        facts["model"] = model
    if release:
        facts["l4t"] = f"{release[1]}.{release[2]}"
    if mode:
        facts["power_mode"] = mode
    facts["clocks"] = parse_clocks(run(["jetson_clocks", "--show"]) or "")
    return facts


def parse_power_mode(text: str) -> str | None:
    """The name in the output of ``nvpmodel -q``, as ``MAXN_SUPER``."""
    found = _MODE.search(text)
    return found[1] if found else None


def parse_clocks(text: str) -> dict[str, dict[str, int]] | None:
    """``jetson_clocks --show``: least, greatest and present frequency in Hz by clock (``cpu0``, ``GPU``, ``EMC``).

    The command gives kHz for processors and Hz for the rest. ``min`` equal to ``max`` means that clocks are held.
    """
    clocks = {}
    for name, *values in _CLOCK.findall(text):
        unit = 1000 if name.startswith("cpu") else 1
        clocks[name] = dict(zip(("min_hz", "max_hz", "now_hz"), (int(v) * unit for v in values), strict=True))
    return clocks or None


def parse_tegrastats(line: str) -> dict[str, Any]:
    """One line of ``tegrastats``, of JetPack 6 or 7; without root some fields are absent from it.

    Returns:
        those found of: ``rails`` (mW by name: ``now``, and ``average`` since tegrastats began), ``temperatures_c``,
        ``gpu`` and ``emc`` (``percent``, and ``mhz``: a list for the GPU, one for each of its clusters), ``ram_mb``
        (``used``, ``total``). What cannot be read is left out. A rail can be below zero at idle.
    """
    found: dict[str, Any] = {}
    rails = {}
    for name, now, average in _RAIL.findall(line):
        rails[name] = {"now": int(now)} | ({"average": int(average)} if average else {})
    temperatures = {name: float(value) for name, value in _TEMPERATURE.findall(line)}
    temperatures = {name: value for name, value in temperatures.items() if value != _NO_SENSOR_C}
    if rails:
        found["rails"] = rails
    if temperatures:
        found["temperatures_c"] = temperatures
    for name, percent, clusters, single in _LOAD.findall(line):
        load: dict[str, Any] = {"percent": int(percent)}
        mhz = [int(value) for value in (clusters or single).split(",") if value]  # none: "GR3D_FREQ 5%"
        if mhz:
            load["mhz"] = mhz if name == "GR3D_FREQ" else mhz[0]
        found["gpu" if name == "GR3D_FREQ" else "emc"] = load
    if ram := _RAM.search(line):
        found["ram_mb"] = {"used": int(ram[1]), "total": int(ram[2])}
    return found


def rails(root: Path = Path("/")) -> dict[str, tuple[Path, Path]]:
    """The INA3221 channels that have a label: the files of millivolts and milliamperes by label.

    A label that two chips share gets the chip's address behind it, as ``VDD_IN@1-0041``.
    """
    found: list[tuple[str, str, Path, Path]] = []
    for chip in sorted(root.glob(_HWMON)):
        for i in _CHANNELS:
            label = (_text(chip / f"in{i}_label") or "").strip()
            volts, amperes = chip / f"in{i}_input", chip / f"curr{i}_input"
            if label and label != "NC" and volts.exists() and amperes.exists():
                found.append((label, chip.parent.parent.name, volts, amperes))
    labels = [label for label, *_ in found]
    return {
        label if labels.count(label) == 1 else f"{label}@{address}": (volts, amperes)
        for label, address, volts, amperes in found
    }


class PowerMeter:
    """Samples the INA3221 rails in a thread, from ``with`` to the end of it.

    ``with PowerMeter() as meter: work()``, then ``meter.result()``. Where there are no rails it starts no thread and
    has no samples; a file that cannot be read for a moment is a sample less of its rail.

    Args:
        root: where the file system starts.
        interval_s: seconds between samples.
        clock: seconds, ascending.
    """

    def __init__(
        self, root: Path = Path("/"), interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._interval_s, self._clock = interval_s, clock
        self._rails = rails(root)
        self._samples: dict[str, list[tuple[float, float]]] = {name: [] for name in self._rails}  # seconds, mW
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PowerMeter:
        if self._rails:
            self._stop.clear()
            for taken in self._samples.values():
                taken.clear()
            self.sample()
            self._thread = threading.Thread(target=self._loop, name="famexport-power", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self.sample()  # so that the energy reaches to the end

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.sample()

    def sample(self) -> None:
        """Read every rail once."""
        for name, (volts, amperes) in self._rails.items():
            millivolts, milliamperes = _number(volts), _number(amperes)
            if millivolts is not None and milliamperes is not None:
                self._samples[name].append((self._clock(), millivolts * milliamperes / 1e3))

    def result(self) -> dict[str, dict[str, float]]:
        """By rail with at least one sample: ``mean_mw`` and ``max_mw`` of the samples, ``samples``, and ``energy_j``,
        the trapezoid sum over the time from its first sample to its last (0.0 for one sample)."""
        return {name: _summary(taken) for name, taken in self._samples.items() if taken}


def _summary(taken: Sequence[tuple[float, float]]) -> dict[str, float]:
    powers = [power for _, power in taken]
    energy_mj = sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(taken))
    return {
        "mean_mw": sum(powers) / len(powers),
        "max_mw": max(powers),
        "samples": len(powers),
        "energy_j": energy_mj / 1e3,
    }


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
