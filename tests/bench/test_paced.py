"""Blocks at a steady pace: when they begin, what their latency is, and which are late."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from famexport.bench import paced as module
from famexport.bench import roofline
from famexport.bench.measure import bench
from famexport.bench.paced import run_paced
from famexport.errors import ParityError, UsageError
from famexport.runtime.ort import OrtLoop
from famexport.runtime.score import percentiles

Bundles = Callable[[str], Path]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure_ceilings", lambda: roofline.Ceilings(10.0, 100.0))


class Machine:
    """A clock that moves where somebody sleeps or computes, and turns whose blocks take the given seconds."""

    def __init__(self, **seconds: list[float]) -> None:
        self.now, self.begun = 100.0, list[tuple[str, int, float]]()
        self.seconds = {name: iter(each) for name, each in seconds.items()}
        self.streams, self.contract = dict.fromkeys(seconds), SimpleNamespace(block_size=8)
        self.compared: list[str] = []
        self.inputs = itertools.count()
        self.oversleep, self.settled = 0.0, 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + self.oversleep

    def random(self, positions: int) -> int:
        assert positions == 8
        return next(self.inputs)

    def one(self, name: str, fed: int) -> None:
        self.begun.append((name, fed, round(self.now - 100, 6)))
        self.now += next(self.seconds[name])

    def settle(self) -> None:
        self.settled += 1

    def compare(self, at: str) -> None:
        self.compared.append(at)

    def run(self, blocks: int, period_ms: float) -> Any:
        return run_paced(self, blocks, period_ms, clock=self.clock, sleep=self.sleep)  # type: ignore[arg-type]


def test_each_block_waits_until_it_is_due() -> None:
    machine = Machine(a=[0.002] * 4)
    found = machine.run(4, 10)["a"]
    assert [at for _, _, at in machine.begun] == [0.01, 0.02, 0.03, 0.04]
    assert found.samples == pytest.approx([2.0] * 4)
    assert found.late == 0
    assert found.report() == {
        "period_ms": 10,
        "blocks": 4,
        "latency_ms": percentiles(found.samples),
        "late": 0,
    }


def test_a_slow_block_makes_the_next_wait() -> None:
    """25 ms at a pace of 10: the two after it begin late, and their wait counts; then it has caught up."""
    machine = Machine(a=[0.001, 0.025, 0.004, 0.001, 0.001])
    found = machine.run(5, 10)["a"]
    assert [at for _, _, at in machine.begun] == [0.01, 0.02, 0.045, 0.049, 0.05]
    # due at 30 and done at 49; due at 40 and done at 50, when the next is due
    assert found.samples == pytest.approx([1, 25, 19, 10, 1])
    assert found.late == 2


def test_the_clock_waking_late_is_no_latency() -> None:
    machine = Machine(a=[0.002] * 3)
    machine.oversleep = 0.001
    found = machine.run(3, 10)["a"]
    assert found.samples == pytest.approx([2.0] * 3)
    assert [at for _, _, at in machine.begun] == [0.011, 0.021, 0.031]  # the pace stays


def test_turns_of_backends() -> None:
    """Each has 16 blocks to itself, on the same input, compared after each turn; 20 is a turn of 16 and one of 4."""
    machine = Machine(a=[0.001] * 20, b=[0.03] * 20)
    found = machine.run(20, 10)
    names = [name for name, _, _ in machine.begun]
    assert names == ["a"] * 16 + ["b"] * 16 + ["a"] * 4 + ["b"] * 4
    fed = {name: [block for n, block, _ in machine.begun if n == name] for name in "ab"}
    assert fed["a"] == fed["b"] == list(range(20))
    assert machine.compared == ["paced block 15", "paced block 19"]
    assert machine.settled == 4
    assert (found["a"].late, found["b"].late) == (0, 20)
    assert found["b"].samples[:3] == pytest.approx([30, 50, 70])
    assert found["b"].samples[16] == pytest.approx(30)  # a turn of its own


def test_bench(bundles: Bundles) -> None:
    seen: list[tuple[int, int]] = []
    report, samples = bench(
        bundles("plain"), ["ort-cpu", "torch"], blocks=5, paced_ms=30, threads=1, progress=lambda *at: seen.append(at)
    )
    for result in report["results"]:
        ms = samples[result["backend"]]["paced"]
        paced = result["paced"]
        assert len(ms) == paced["blocks"] == 5
        assert paced["latency_ms"] == percentiles(ms)
        assert min(ms) > 0
        assert paced["period_ms"] == 30
        assert 0 <= paced["late"] <= 5
    assert seen == [(5, 10), (10, 10)]


def test_real_time_passes(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(run_paced, "__kwdefaults__", {**run_paced.__kwdefaults__, "sleep": slept.append})
    report, _ = bench(bundles("plain"), blocks=3, paced_ms=3_600_000, threads=1)
    assert len(slept) == 3
    assert 3_500 < slept[0] <= 3_600
    assert report["results"][0]["paced"]["late"] == 0


def test_a_wrong_answer_gets_no_number(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is wrong at a pace alone."""
    advance, run = OrtLoop.advance, module.run_paced

    def sabotaged(*arguments: Any, **options: Any) -> Any:
        def wrong(self: Any, fed: np.ndarray, out: np.ndarray) -> None:
            advance(self, fed, out)
            out *= 1.5

        monkeypatch.setattr(OrtLoop, "advance", wrong)
        return run(*arguments, **options)

    monkeypatch.setattr("famexport.bench.measure.run_paced", sabotaged)
    with pytest.raises(ParityError, match="disagree at paced block 1 by"):
        bench(bundles("plain"), ["ort-cpu", "torch"], blocks=2, paced_ms=1, threads=1)


@pytest.mark.parametrize("period", [0, -1, -0.0, float("nan"), float("inf"), float("-inf"), 1e300, 3_600_001])
def test_a_pace_that_cannot_be(bundles: Bundles, tmp_path: Path, period: float) -> None:
    """Before anything is loaded: that path holds no bundle."""
    with pytest.raises(UsageError, match="--paced is the milliseconds from one block to the next, above 0"):
        bench(tmp_path, paced_ms=period)
