"""What ``bench`` says of a GPU, on fakes: device time, throughput, ceilings, and the share of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from famexport.bench import roofline
from famexport.bench.measure import BACK_TO_BACK_BLOCKS, ROUNDS, bench
from famexport.bench.roofline import Ceilings, measure_gpu_ceilings, measure_limits
from famexport.bench.tokens import bench_tokens
from famexport.cli import _run
from famexport.errors import FamExportError, IncompatibleError, NonFiniteError
from famexport.runtime import ort
from famexport.runtime.score import percentiles
from tests.runtime.fake_cuda import FakeCuda

Bundles = Callable[[str], Path]
CPU, GPU = Ceilings(10.0, 100.0), Ceilings(1000.0, None)


class Counted(ort.OrtLoop):
    """A loop of which each call takes a known time on a device that is not there."""

    timed = False
    calls = 0
    rounds: list[int] = []  # noqa: RUF012 - shared by all of a test

    def time_device(self) -> None:
        self.timed = True

    def _took(self, ms: float) -> None:
        if self.timed:
            self.device_ms = ms

    def advance(self, fed: np.ndarray, out: np.ndarray) -> None:
        super().advance(fed, out)
        self.calls += 1
        self._took(self.calls / 1024)

    def append(self, fed: np.ndarray, length: np.ndarray, out: np.ndarray) -> None:
        super().append(fed, length, out)
        self._took(0.25)

    def end_block(self) -> None:
        super().end_block()
        self._took(0.5)

    def back_to_back(self, fed: np.ndarray, blocks: int) -> float | None:
        self.rounds.append(blocks)
        return blocks * (0.002, 0.004, 0.009)[(len(self.rounds) - 1) % ROUNDS]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    """ort-cpu, on what says that it is a GPU."""
    monkeypatch.setattr(Counted, "rounds", [])
    monkeypatch.setattr(ort, "OrtLoop", Counted)
    monkeypatch.setattr(ort.OrtCpu, "device", "cuda")
    monkeypatch.setattr(roofline, "measure_ceilings", lambda: CPU)
    monkeypatch.setattr(roofline, "Cuda", FactsCuda)
    monkeypatch.setattr(roofline, "measure_gpu_ceilings", lambda cuda, dtype: GPU)
    return Counted


class FactsCuda(FakeCuda):
    def facts(self) -> dict[str, Any]:
        return {"name": "a GPU"}


def test_blocks(bundles: Bundles, gpu: type[Counted]) -> None:
    report, samples = bench(bundles("plain"), ["ort-cpu", "torch"], blocks=6, threads=1)
    ours, theirs = report["results"]
    # M + 2 = 4 blocks warm up, and one its turn
    assert samples["ort-cpu"]["device"] == [i / 1024 for i in range(6, 12)]
    assert ours["device_ms"] == percentiles(samples["ort-cpu"]["device"])
    assert "device" not in samples["torch"]
    assert theirs["device_ms"] is None
    assert gpu.rounds == [6] * ROUNDS
    assert ours["throughput_blocks_per_s"] == pytest.approx(250)  # of the middle round
    assert ours["throughput_tokens_per_s"] == pytest.approx(250 * 8)
    assert theirs["throughput_blocks_per_s"] is theirs["throughput_tokens_per_s"] is None
    assert ours["roofline"]["of"] == "device"
    assert ours["roofline"]["copy_gb_per_s"] == 1000
    assert ours["roofline"]["product_gflop_per_s"] is None
    assert ours["roofline"]["bound"] == "bandwidth"
    assert ours["roofline"]["share"] == ours["roofline"]["floor_ms"] / ours["device_ms"]["p50"]
    assert theirs["roofline"]["of"] == "host"
    assert theirs["roofline"]["copy_gb_per_s"] == 10
    assert report["gpu"] == {"name": "a GPU"}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_back_to_back_is_bounded_and_looked_at(
    bundles: Bundles, gpu: type[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that is not finite after it gets no number."""
    bench(bundles("plain"), blocks=BACK_TO_BACK_BLOCKS + 10, threads=1)
    assert gpu.rounds == [BACK_TO_BACK_BLOCKS] * ROUNDS

    def spoil(self: Counted, fed: np.ndarray, blocks: int) -> float:
        self.write(
            {name: array * np.nan if array.dtype == np.float32 else array for name, array in self.read().items()}
        )
        return 1.0

    monkeypatch.setattr(gpu, "back_to_back", spoil)
    with pytest.raises(NonFiniteError):
        bench(bundles("plain"), blocks=2, threads=1)


def test_without_events_the_share_is_of_the_host(
    bundles: Bundles, gpu: type[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "time_device", lambda self: None)
    report, samples = bench(bundles("plain"), blocks=3, threads=1)
    (ours,) = report["results"]
    assert ours["device_ms"] is None
    assert set(samples["ort-cpu"]) == {"latency"}
    assert ours["roofline"]["of"] == "host"
    assert ours["roofline"]["share"] == ours["roofline"]["floor_ms"] / ours["latency_ms"]["p50"]
    assert ours["roofline"]["copy_gb_per_s"] == 1000


def test_tokens(bundles: Bundles, gpu: type[Counted]) -> None:
    """A token that completes a block is two calls on the device."""
    report, samples = bench_tokens(bundles("all"), ["ort-cpu", "torch"], tokens=16, prompt=8, threads=1)
    ours, theirs = report["results"]
    mine = samples["ort-cpu"]
    assert mine["token_device"] == [0.25] * 14
    assert mine["boundary_device"] == [0.75] * 2
    assert ours["device_ms"] == {"p50": 0.25, "p90": 0.25, "p99": 0.25, "max": 0.25}
    assert ours["boundary_device_ms"]["p50"] == 0.75
    assert theirs["device_ms"] is theirs["boundary_device_ms"] is None
    assert ours["roofline"]["share"] == ours["roofline"]["floor_ms"] / 0.25
    assert theirs["roofline"]["copy_gb_per_s"] == 10
    assert ours["rss_bytes"]["trace"][-1] == [15, ours["rss_bytes"]["last"]]


@pytest.mark.parametrize("mode", ["block", "token"])
@pytest.mark.parametrize("said", ["fused", "not built: famexport kernels", None])
def test_whether_kernels_of_its_own_ran(
    bundles: Bundles,
    gpu: type[Counted],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    said: str | None,
) -> None:
    """A figure of ort-cuda means little without it: in the header, and beside the figure in JSON."""
    monkeypatch.setattr(ort.OrtCpu, "kernels", said, raising=False)
    command = ["bench", str(bundles("all")), "--backend", "torch", "--backend", "ort-cpu", "--mode", mode]
    assert _run([*command, "--blocks", "2", "--tokens", "2"], False) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert [result["kernels"] for result in json.loads(last)["results"]] == [None, said]
    header = " ".join(table).partition("┏")[0]
    assert (f", a GPU, kernels: {said}" in header) == (said is not None)
    assert ("kernels" in header) == (said is not None)


@pytest.mark.parametrize("where", ["opening", "copying"])
def test_ceilings_that_fail_leave_the_rest(
    bundles: Bundles, gpu: type[Counted], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any) -> Any:
        raise IncompatibleError("cuda-python is not here" if where == "opening" else "device memory is full")

    monkeypatch.setattr(roofline, "Cuda" if where == "opening" else "measure_gpu_ceilings", fail)
    report, _ = bench(bundles("plain"), ["ort-cpu", "torch"], blocks=2, threads=1)
    ours, theirs = report["results"]
    assert ours["roofline"] is None
    assert theirs["roofline"]["copy_gb_per_s"] == 10
    assert ("not here" if where == "opening" else "memory is full") in report["gpu"]["problem"]
    assert report["gpu"].get("name") == (None if where == "opening" else "a GPU")


def test_only_what_is_used_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def unasked(*_: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(roofline, "measure_ceilings", unasked)
    monkeypatch.setattr(roofline, "measure_gpu_ceilings", lambda cuda, dtype: GPU)
    monkeypatch.setattr(roofline, "Cuda", FactsCuda)
    assert measure_limits({"cuda"}, "float16") == ({"cuda": GPU}, {"name": "a GPU"})
    monkeypatch.setattr(roofline, "measure_ceilings", lambda: CPU)
    monkeypatch.setattr(roofline, "Cuda", unasked)
    assert measure_limits({"cpu"}, "float32") == ({"cpu": CPU}, {})


class TimedCuda(FakeCuda):
    """Copies of which each takes the next of the given times."""

    def __init__(self, *times_ms: float) -> None:
        super().__init__()
        self.times = list(times_ms)

    def elapsed_ms(self, start: list[float], end: list[float]) -> float:
        assert 0 < start[0] < end[0]  # both were recorded, in this order
        return self.times.pop(0)


def test_copy_bandwidth_counts_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first copy does not count: it is where memory is touched for the first time."""
    assert roofline._GPU_COPY_BYTES >= 2**30
    monkeypatch.setattr(roofline, "_GPU_COPY_BYTES", 2**20)
    monkeypatch.setitem(sys.modules, "torch", None)
    cuda = TimedCuda(0.125, 4.0, 2.0, 3.0, 5.0)
    found = measure_gpu_ceilings(cuda, "float16")
    assert found == Ceilings(2 * 2**20 / 2e-3 / 1e9, None)
    assert cuda.calls == ["copy"] * 5
    assert cuda.live == {}
    assert cuda.events == 0


def test_a_failed_copy_gives_back_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_GPU_COPY_BYTES", 2**20)
    cuda = TimedCuda()

    def full(nbytes: int) -> int:
        if cuda.live:
            raise FamExportError("device memory is full")
        return FakeCuda.malloc(cuda, nbytes)

    monkeypatch.setattr(cuda, "malloc", full)
    with pytest.raises(FamExportError, match="full"):
        measure_gpu_ceilings(cuda, "float16")
    assert cuda.live == {}
    assert cuda.events == 0


class FakeTorch(SimpleNamespace):
    """As much of torch as a product on CUDA takes; each takes the next of the given times."""

    def __init__(self, *times_ms: float, available: bool = True) -> None:
        self.times, self.products = list(times_ms), list[Any]()
        matmul = SimpleNamespace(allow_tf32=True)
        super().__init__(
            float16="f16",
            backends=SimpleNamespace(cuda=SimpleNamespace(matmul=matmul)),
            cuda=SimpleNamespace(is_available=lambda: available, synchronize=lambda: None, Event=self.event),
            randn=lambda *shape, device, dtype: (*shape, device, dtype),
            empty_like=lambda a: ("out", a),
            mm=lambda a, b, out: self.products.append((a, b, matmul.allow_tf32)),
        )

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return SimpleNamespace(record=lambda: None, elapsed_time=lambda end: self.times.pop(0))


def test_product_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = FakeTorch(1.0, 4.0, 2.0, 3.0, 5.0)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert roofline._gpu_product_gflop_per_s("float16") == pytest.approx(2 * 8192**3 / 2e-3 / 1e9)
    operand = (8192, 8192, "cuda", "f16")
    assert torch.products == [(operand, operand, False)] * 5
    assert torch.backends.cuda.matmul.allow_tf32 is True  # as it was


def test_no_product_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch, without its CUDA, or where it runs out of memory."""
    monkeypatch.setitem(sys.modules, "torch", FakeTorch(available=False))
    assert roofline._gpu_product_gflop_per_s("float16") is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert roofline._gpu_product_gflop_per_s("float16") is None
    torch = FakeTorch()

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    torch.randn = full
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert roofline._gpu_product_gflop_per_s("float16") is None
    assert torch.backends.cuda.matmul.allow_tf32 is True
