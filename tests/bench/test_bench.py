"""``bench``: the report's shape, what its figures mean, and that a wrong answer gets no number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from famexport.bench import roofline
from famexport.bench.measure import ROUNDS, bench
from famexport.bench.roofline import Ceilings
from famexport.bench.tokens import PROMPTS, bench_tokens
from famexport.bundle import open_bundle
from famexport.errors import BundleError, NonFiniteError, ParityError, UsageError
from famexport.runtime.ort import OrtLoop
from famexport.runtime.score import percentiles

Bundles = Callable[[str], Path]
CEILINGS = Ceilings(copy_gb_per_s=10.0, product_gflop_per_s=100.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings as given: measuring them takes seconds and half a gigabyte."""
    monkeypatch.setattr(roofline, "measure_ceilings", lambda: CEILINGS)


def shape(value: Any) -> Any:
    """Keys and kinds of a report, without its values."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


RESULT = {
    "backend": "str",
    "blocks": "int",
    "latency_ms": {"p50": "float", "p90": "float", "p99": "float", "max": "float"},
    "device_ms": "NoneType",
    "paced": "NoneType",
    "tokens_per_s": "float",
    "throughput_blocks_per_s": "NoneType",
    "throughput_tokens_per_s": "NoneType",
    "state_bytes": "int",
    "rss_bytes": {"first": "int", "last": "int", "slope_per_1000_blocks": "int", "trace": [["int", "int"]] * 20},
    "roofline": {
        "copy_gb_per_s": "float",
        "product_gflop_per_s": "float",
        "floor_ms": "float",
        "bound": "str",
        "of": "str",
        "share": "float",
    },
    "kernels": "NoneType",
}


@pytest.mark.parametrize("name", ["plain", "rows", "dynamic", "embeds", "last", "bf16"])
def test_report(bundles: Bundles, name: str) -> None:
    seen: list[tuple[int, int]] = []
    backends = ["ort-cpu", "torch"]
    report, samples = bench(bundles(name), backends, blocks=20, threads=1, progress=lambda *at: seen.append(at))
    bundle = open_bundle(bundles(name))
    assert set(report) == {"bundle", "device", "versions", "results"}
    assert report["bundle"] == {"path": str(bundles(name)), "id": bundle.id, "precision": bundle.manifest.precision}
    assert set(report["device"]) == {"processor", "cores", "memory_bytes", "system", "python"}
    assert {"numpy", "onnxruntime", "torch"} <= set(report["versions"])
    assert shape(report["results"]) == [RESULT, RESULT]
    assert [result["backend"] for result in report["results"]] == list(samples) == backends
    assert seen == [(8, 20), (16, 20), (20, 20)]  # by rounds
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for result in report["results"]:
        assert set(samples[result["backend"]]) == {"latency"}
        ms = samples[result["backend"]]["latency"]
        assert len(ms) == result["blocks"] == 20
        assert min(ms) > 0
        assert result["latency_ms"] == percentiles(ms)
        rows = 3 if name == "rows" else 1
        assert result["tokens_per_s"] == pytest.approx(8 * rows / result["latency_ms"]["p50"] * 1e3)
        assert result["state_bytes"] == bundle.contract.state_bytes()
        floor = result["roofline"]
        assert floor["of"] == "host"
        assert floor["share"] == pytest.approx(floor["floor_ms"] / result["latency_ms"]["p50"])
        assert 0 < floor["share"] < 1


def test_one_backend_by_default(bundles: Bundles) -> None:
    report, samples = bench(str(bundles("plain")), blocks=2)
    assert [result["backend"] for result in report["results"]] == list(samples) == ["ort-cpu"]


@pytest.mark.parametrize(
    ("backends", "blocks", "says"),
    [
        (["ort-cpu", "torch", "ort-cpu"], 5, "named twice: ort-cpu, torch, ort-cpu"),
        (
            ["ort-cpu", "cuda"],
            5,
            "no backend 'cuda'; expected auto, tensorrt, tensorrt-rtx, ort-cuda, ort-tensorrt, ort-cpu, torch",
        ),
        (["ort-cpu"], 1, "at least 2 blocks, got 1"),
        (["ort-cpu"], 0, "at least 2 blocks, got 0"),
    ],
)
def test_usage(bundles: Bundles, backends: list[str], blocks: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        bench(bundles("plain"), backends, blocks=blocks)


def test_a_damaged_bundle_is_not_measured(bundles: Bundles, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        bench(tmp_path)
    with pytest.raises(UsageError, match="there is no bundle"):
        bench(tmp_path / "none")


advance = OrtLoop.advance


@pytest.mark.parametrize("name", ["plain", "bf16"])
@pytest.mark.parametrize("from_block", [0, 9])
@pytest.mark.parametrize("wrong", ["scaled", "constant", "nan", "stale"])
def test_backends_that_disagree_get_no_number(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, name: str, from_block: int, wrong: str
) -> None:
    """Also where they did agree at first: outputs are compared again after each round (block 9 of all is timed)."""
    blocks = 0

    def sabotaged(self: Any, fed: np.ndarray, out: np.ndarray) -> None:
        nonlocal blocks
        before = out.copy()
        advance(self, fed, out)
        if blocks >= from_block:
            if wrong == "scaled":
                out *= 1.5
            elif wrong == "constant":
                out[...] = 1
            elif wrong == "nan":
                out[..., 0] = np.nan
            else:
                out[...] = before  # the step's result is not there yet, as where a synchronisation is missing
        blocks += 1

    monkeypatch.setattr(OrtLoop, "advance", sabotaged)
    for backends in (["ort-cpu", "torch"], ["torch", "ort-cpu"]):
        blocks = 0
        first, second = backends
        says = (
            rf"{second} and {first} disagree at (warm-up|counted) step \d+ by .* \(relative\), allowed is .*; a wrong"
        )
        if wrong == "nan":  # the stream itself refuses it
            with pytest.raises(NonFiniteError, match="NaN or infinity in row 0"):
                bench(bundles(name), backends, blocks=40, threads=1)
            continue
        with pytest.raises(ParityError, match=says):
            bench(bundles(name), backends, blocks=40, threads=1)
    if wrong == "nan":
        return
    blocks = 0
    bench(bundles(name), ["ort-cpu"], blocks=2, threads=1)  # alone there is nothing to compare with


def test_backends_take_turns(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same input, so that a change in the machine's speed meets all of them, and with nothing of the one before
    still running: on few cores, the workers of one that spin for work take the time of the next."""
    from famexport.bench.turns import Turns
    from famexport.runtime.stream import Stream

    calls: list[tuple[str, bytes]] = []
    step = Stream.step

    def noted(self: Stream, inputs: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        calls.append((type(self._loop).__name__, inputs.tobytes()))
        return step(self, inputs, out)

    monkeypatch.setattr(Stream, "step", noted)
    monkeypatch.setattr(Turns, "settle", lambda self: calls.append(("settled", b"")))
    _, samples = bench(bundles("plain"), ["ort-cpu", "torch"], blocks=11, threads=1)
    warm_up = open_bundle(bundles("plain")).contract.memory_segments + 2
    rounds = [
        *("settled", *["OrtLoop"] * 9, "settled", *["TorchLoop"] * 9),  # 8, and one that does not count
        *("settled", *["OrtLoop"] * 4, "settled", *["TorchLoop"] * 4),
    ]
    assert [name for name, _ in calls] == ["OrtLoop", "TorchLoop"] * warm_up + rounds + ["settled"] * 2 * ROUNDS
    mine, theirs = ([fed for name, fed in calls if name == loop] for loop in ("OrtLoop", "TorchLoop"))
    assert mine == theirs
    assert len(set(mine)) == len(mine) == warm_up + 13
    assert len(samples["ort-cpu"]["latency"]) == len(samples["torch"]["latency"]) == 11


@pytest.mark.parametrize(
    ("backends", "busy_s", "waited_s"),
    [(["ort-cpu", "torch"], 0.05, 0.052), (["ort-cpu", "torch"], 9, 0.25), (["ort-cpu"], 9, 0)],
)
def test_a_turn_begins_when_nothing_runs(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, backends: list[str], busy_s: float, waited_s: float
) -> None:
    """A thread that spins for 50 ms is waited for, one that never stops for a while; alone there is nothing to wait
    for."""
    from famexport.bench import turns as module

    clock = SimpleNamespace(now=0.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    fake = SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: min(clock.now, busy_s), sleep=sleep)
    with module.opened_turns(open_bundle(bundles("plain")), backends, 1, 0) as turns:
        monkeypatch.setattr(module, "time", fake)
        turns.settle()
    assert clock.now == pytest.approx(waited_s, abs=0.003)


@pytest.mark.parametrize("backends", [["ort-cpu"], ["ort-cpu", "torch"]])
@pytest.mark.parametrize("tokens", [2, 9, 32, 64, 100])
def test_no_end_of_a_block_is_lost_between_turns(bundles: Bundles, backends: list[str], tokens: int) -> None:
    """Whatever step of a turn it falls on."""
    from famexport.bench.turns import opened_turns

    with opened_turns(open_bundle(bundles("all")), backends, 1, 0) as turns:
        for _ in range(3):  # the turns fall differently on the blocks
            while turns.room != turns.contract.block_size:
                turns.warm_up(1, 1)
            given = dict.fromkeys(turns.streams, 0)
            before = {name: stream.blocks for name, stream in turns.streams.items()}
            counted = dict.fromkeys(turns.streams, 0)
            for in_turn in turns.rounds(1, tokens):
                for name, steps in in_turn.items():
                    given[name] += len(steps)
                    counted[name] += sum(step.ends_block for step in steps)
            assert set(given.values()) == {tokens}
            for name, stream in turns.streams.items():
                assert counted[name] == stream.blocks - before[name]


def test_the_floor_is_the_larger_of_two_times() -> None:
    memory = CEILINGS.floor(10**9, 10**9)  # 1 GB at 10 GB/s is 100 ms; 1 GFLOP at 100 GFLOP/s is 10 ms
    assert (memory["floor_ms"], memory["bound"]) == (pytest.approx(100), "bandwidth")
    arithmetic = CEILINGS.floor(10**6, 10**9)
    assert (arithmetic["floor_ms"], arithmetic["bound"]) == (pytest.approx(10), "arithmetic")
    unknown = CEILINGS.floor(10**6, None)
    assert (unknown["floor_ms"], unknown["bound"]) == (pytest.approx(0.1), "bandwidth")
    assert memory["copy_gb_per_s"] == 10


def test_flops_and_bytes_of_the_floor(bundles: Bundles) -> None:
    """The tiny model's products, counted by hand: 2 layers, D=32, 4 query and 2 key heads of 8, FF=64, T=8, F=4, M=2."""
    report, _ = bench(bundles("plain"), blocks=2, threads=1)
    weights = 32 * (2 * 32 + 2 * 16) + 3 * 32 * 64  # q and o, k and v; gate, up, down
    scores = 2 * 32 * (8 * (16 + 4 + 8) + 4 * (4 + 8))  # q.k and p.v: the block sees memory, FAM, itself; FAM sees both
    flops = 2 * (2 * (weights * (8 + 4) + scores) + 96 * 32 * 8)
    manifest = open_bundle(bundles("plain")).manifest
    assert manifest.cost["flops_per_block"] == flops
    assert report["results"][0]["roofline"]["floor_ms"] == pytest.approx(
        max(flops / 100e9, manifest.cost["weight_bytes_read"] / 10e9) * 1e3
    )


@pytest.mark.parametrize(("name", "rows"), [("all", 1), ("all_rows", 3)])
def test_the_floor_of_a_token_is_its_share_of_a_block(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    """Of the operations: the weights are read for every token."""
    cost = open_bundle(bundles(name)).manifest.cost
    floors = []
    for ceilings in (Ceilings(1e9, 1.0), Ceilings(1.0, 1e9)):  # only the one counts, then only the other
        monkeypatch.setattr(roofline, "measure_ceilings", lambda given=ceilings: given)
        report, samples = bench_tokens(bundles(name), tokens=2, prompt=1, threads=1)
        assert len(samples["ort-cpu"]["first"]) == PROMPTS  # and not the one before them, which warms up
        floors.append(report["results"][0]["roofline"]["floor_ms"])
    assert floors == pytest.approx([cost["flops_per_block"] * rows / 8 / 1e6, cost["weight_bytes_read"] / 1e6])


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the ceilings as given
    monkeypatch.setattr(roofline, "_COPY_BYTES", 2**24)
    monkeypatch.setattr(roofline, "_PRODUCT_SIZE", 256)
    found = roofline.measure_ceilings()
    assert 0.05 < found.copy_gb_per_s < 10_000
    assert 0.05 < found.product_gflop_per_s < 100_000
