"""Jetson power and clocks: recorded lines, file trees as the drivers lay them out, and commands that answer badly."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from famexport.bench import power
from famexport.bench.power import (
    PowerMeter,
    board_facts,
    parse_clocks,
    parse_power_mode,
    parse_tegrastats,
    rails,
    run_command,
)

ORIN_NANO_JP6 = (
    "10-08-2026 04:38:21 RAM 1343/7620MB (lfb 157x4MB) SWAP 165/3810MB (cached 3MB) "
    "CPU [0%@1497,0%@729,0%@729,0%@729,off,off] EMC_FREQ 15%@204 GR3D_FREQ 3%@[305] NVDEC off NVJPG off VIC off OFA off "
    "APE 200 cpu@48.562C soc2@46.593C gpu@49.625C tj@49.312C CV0@-256C "
    "VDD_IN 5432mW/5400mW VDD_CPU_GPU_CV 512mW/1944mW VDD_SOC 2720mW/3659mW"
)
THOR_JP7 = (
    "RAM 117456/125772MB (lfb 9x4MB) CPU [0%@1890,5%@1890,2%@972] GR3D_FREQ 12%@[1575,1575,1575] cpu@43.812C "
    "tj@44.218C soc012@42.5C gpu@43.968C soc345@44.187C "
    "VDD_GPU -392mW/10mW VDD_CPU_SOC_MSS 7484mW/7001mW VIN_SYS_5V0 6309mW/6309mW VIN 28548mW/28000mW"
)
CLOCKS_JP6 = """SOC family:tegra234  Machine:NVIDIA Jetson Orin NX Engineering Reference Developer Kit
Online CPUs: 0-1
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1510400 CurrentFreq=1497600 IdleStates: WFI=1 c7=1
cpu1:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1510400 CurrentFreq=729600 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=624750000 CurrentFreq=306000000
Active GPU TPCs: 2
EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=0
FAN Dynamic Speed Control=nvfancontrol hwmon1_pwm1=88
NV Power Mode: MAXN_SUPER
"""
CLOCKS_JP7 = """SOC family:tegra264  Machine:NVIDIA Jetson AGX Thor Developer Kit
Online CPUs: 0, Offline CPUs:
cpu0:  Governor=schedutil MinFreq=2601000 MaxFreq=2601000 CurrentFreq=2601000 IdleStates: WFI=0 cc7=0
"""
RELEASE = "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, DATE: Mon Jun 16 2025\n"
NX = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"


def chip(root: Path, address: str, channels: Mapping[int, tuple[str | None, int, int]]) -> Path:
    """An INA3221 as the kernel's driver shows it: channel -> label, mV, mA."""
    folder = root / f"sys/bus/i2c/drivers/ina3221/{address}/hwmon/hwmon{address[-1]}"
    folder.mkdir(parents=True)
    for i, (label, millivolts, milliamperes) in channels.items():
        if label is not None:
            (folder / f"in{i}_label").write_text(label + "\n")
        (folder / f"in{i}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{i}_input").write_text(f"{milliamperes}\n")
    (folder / "in7_label").write_text("sum of shunt voltages\n")
    (folder / "in7_input").write_text("680\n")
    (folder / "curr4_input").write_text("99\n")
    return folder


@pytest.fixture
def board(tmp_path: Path) -> Path:
    chip(
        tmp_path,
        "1-0040",
        {1: ("VDD_IN", 5000, 1000), 2: ("VDD_CPU_GPU_CV", 5000, 200), 3: ("VDD_SOC", 4936, 300)},
    )
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_bytes(NX.encode() + b"\0")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(RELEASE + "# KERNEL_VARIANT: oot\n")
    return tmp_path


def answers(**texts: str) -> Callable[[Sequence[str]], str | None]:
    def run(command: Sequence[str]) -> str | None:
        assert tuple(command) in {("nvpmodel", "-q"), ("jetson_clocks", "--show")}
        return texts.get(command[0])

    return run


def ticking(step: float) -> Callable[[], float]:
    """A clock that goes on by ``step`` seconds each time somebody looks."""
    ticks: Iterator[float] = (i * step for i in range(10**9))
    return lambda: next(ticks)


def test_board_facts_of_an_orin(board: Path) -> None:
    facts = board_facts(board, answers(nvpmodel="NV Power Mode: MAXN_SUPER\n2\n", jetson_clocks=CLOCKS_JP6))
    gpu = {"min_hz": 306_000_000, "max_hz": 624_750_000, "now_hz": 306_000_000}
    assert facts["model"] == NX
    assert facts["l4t"] == "36.4.4"
    assert facts["power_mode"] == "MAXN_SUPER"
    assert facts["clocks"]["GPU"] == gpu
    assert facts["clocks"]["cpu1"] == {"min_hz": 729_600_000, "max_hz": 1_510_400_000, "now_hz": 729_600_000}
    assert set(facts["clocks"]) == {"cpu0", "cpu1", "GPU", "EMC"}


def test_without_root_the_clocks_are_none_and_the_rest_is_there(board: Path) -> None:
    facts = board_facts(board, answers(nvpmodel="NV Power Mode: 15W\n0\n"))
    assert facts == {"model": NX, "l4t": "36.4.4", "power_mode": "15W", "clocks": None}


def test_in_a_container_without_nvpmodel_files_suffice(board: Path) -> None:
    assert board_facts(board, answers()) == {"model": NX, "l4t": "36.4.4", "clocks": None}


@pytest.mark.parametrize("model", [None, b"Raspberry Pi 5 Model B Rev 1.0\0", b"\xff\xfe\0"])
def test_another_machine_has_no_facts(tmp_path: Path, model: bytes | None) -> None:
    if model is not None:
        (tmp_path / "proc/device-tree").mkdir(parents=True)
        (tmp_path / "proc/device-tree/model").write_bytes(model)
    assert board_facts(tmp_path, answers()) == {}


def test_damaged_files_are_left_out(board: Path) -> None:
    (board / "etc/nv_tegra_release").write_bytes(b"# R36 (rel\xff\n")
    (board / "proc/device-tree/model").unlink()
    facts = board_facts(board, answers(nvpmodel="NV Power Mode: 25W\n1\n", jetson_clocks="Segmentation fault\n"))
    assert facts == {"power_mode": "25W", "clocks": None}


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: MAXN\n0\n", "MAXN"),
        ("NVPM VERB: parsing done\nNV Power Mode: MODE_30W \r\n2\n", "MODE_30W"),
        ("NV Power Mode:\n0\n", None),
        ("NVPM ERROR: Error opening /etc/nvpmodel.conf\n", None),
        ("", None),
    ],
)
def test_power_mode(text: str, mode: str | None) -> None:
    assert parse_power_mode(text) == mode


def test_clocks_of_both_jetpacks() -> None:
    assert parse_clocks(CLOCKS_JP7) == {
        "cpu0": {"min_hz": 2_601_000_000, "max_hz": 2_601_000_000, "now_hz": 2_601_000_000}
    }
    assert parse_clocks("Error: Run this script(/usr/bin/jetson_clocks) as a root user\n") is None
    assert parse_clocks("GPU MinFreq= MaxFreq=1 CurrentFreq=x\ncpu0: Online=0 Governor=schedutil\n") is None


def test_tegrastats_of_jetpack_6() -> None:
    assert parse_tegrastats(ORIN_NANO_JP6) == {
        "rails": {
            "VDD_IN": {"now": 5432, "average": 5400},
            "VDD_CPU_GPU_CV": {"now": 512, "average": 1944},
            "VDD_SOC": {"now": 2720, "average": 3659},
        },
        "temperatures_c": {"cpu": 48.562, "soc2": 46.593, "gpu": 49.625, "tj": 49.312},  # CV0 is powered down
        "gpu": {"percent": 3, "mhz": [305]},
        "emc": {"percent": 15, "mhz": 204},
        "ram_mb": {"used": 1343, "total": 7620},
    }


def test_tegrastats_of_jetpack_7() -> None:
    found = parse_tegrastats(THOR_JP7)
    assert found["rails"] == {
        "VDD_GPU": {"now": -392, "average": 10},
        "VDD_CPU_SOC_MSS": {"now": 7484, "average": 7001},
        "VIN_SYS_5V0": {"now": 6309, "average": 6309},
        "VIN": {"now": 28548, "average": 28000},
    }
    assert found["gpu"] == {"percent": 12, "mhz": [1575, 1575, 1575]}
    assert found["temperatures_c"]["soc012"] == 42.5
    assert found["ram_mb"] == {"used": 117456, "total": 125772}
    assert "emc" not in found


def test_tegrastats_without_root_has_no_clocks_and_no_averages() -> None:
    found = parse_tegrastats("RAM 1313/30697MB (lfb 37x4MB) GR3D_FREQ 0% EMC_FREQ 7% VDD_IN 5432mW")
    expected = {"gpu": {"percent": 0}, "emc": {"percent": 7}, "rails": {"VDD_IN": {"now": 5432}}}
    assert found == {**expected, "ram_mb": {"used": 1313, "total": 30697}}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\0\0\n",
        "tegrastats: command not found",
        "RAM ?/7620MB VDD_IN mW/mW GR3D_FREQ off EMC_FREQ %@204 cpu@C",
        "RAM 12/34 VDD_IN 5432 mW vdd_in 12mW/12mW GR3D_FREQ 5 cpu@48.5",
        "VDD_IN 1mW/2mW/ GR3D_FREQ 3%@[305",
        f"VDD_IN {'9' * 5000}mW RAM {'9' * 5000}/1MB cpu@{'9' * 5000}C GR3D_FREQ {'9' * 5000}%",
    ],
)
def test_a_malformed_line_gives_nothing(line: str) -> None:
    assert parse_tegrastats(line) == {}


def test_a_cut_line_gives_what_is_whole() -> None:
    cut = ORIN_NANO_JP6[: ORIN_NANO_JP6.index("mW/1944mW") + 4]  # ... VDD_CPU_GPU_CV 512mW/1
    found = parse_tegrastats(cut)
    assert found["rails"] == {"VDD_IN": {"now": 5432, "average": 5400}}
    assert found["ram_mb"] == {"used": 1343, "total": 7620}


def test_rails_are_the_labelled_channels(tmp_path: Path) -> None:
    chip(tmp_path, "1-0040", {1: ("VDD_GPU_SOC", 19824, 100), 2: (None, 5000, 10), 3: ("NC", 5000, 0)})
    second = chip(tmp_path, "1-0041", {2: ("VDDQ_VDD2_1V8AO", 5000, 100), 3: ("GONE", 5000, 1)})
    (second / "curr3_input").unlink()
    assert set(rails(tmp_path)) == {"VDD_GPU_SOC", "VDDQ_VDD2_1V8AO"}


def test_a_label_of_two_chips_stays_two_rails(tmp_path: Path) -> None:
    chip(tmp_path, "1-0040", {1: ("VDD_IN", 5000, 1000)})
    chip(tmp_path, "1-0041", {1: ("VDD_IN", 5000, 2000)})
    with PowerMeter(tmp_path) as meter:
        pass
    means = {name: result["mean_mw"] for name, result in meter.result().items()}
    assert means == {"VDD_IN@1-0040": 5000.0, "VDD_IN@1-0041": 10_000.0}


def test_mean_max_and_energy_by_hand(board: Path) -> None:
    """5 W, 15 W, 10 W at 0, 2 and 4 seconds: 20 + 25 = 45 joules."""
    current = board / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon0/curr1_input"
    for other in (2, 3):
        current.with_name(f"in{other}_label").unlink()
    meter = PowerMeter(board, interval_s=3600, clock=ticking(2.0))
    with meter:
        current.write_text("3000\n")
        meter.sample()
        current.write_text("2000\n")
    assert meter.result() == {"VDD_IN": {"mean_mw": 10_000.0, "max_mw": 15_000.0, "samples": 3, "energy_j": 45.0}}


def test_the_thread_samples_by_itself_and_ends(board: Path) -> None:
    before = threading.active_count()
    start = time.perf_counter()
    with PowerMeter(board, interval_s=0.002) as meter:
        while not all(rail["samples"] >= 10 for rail in meter.result().values()):
            assert time.perf_counter() - start < 30, "the thread does not sample"
            time.sleep(0.005)
    elapsed = time.perf_counter() - start
    assert threading.active_count() == before
    first = meter.result()
    assert set(first) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    assert first["VDD_IN"]["mean_mw"] == pytest.approx(5000)
    assert 0 < first["VDD_IN"]["energy_j"] <= 5.0 * elapsed
    assert first["VDD_SOC"]["max_mw"] == pytest.approx(4936 * 0.3)
    time.sleep(0.02)
    assert meter.result() == first


def test_the_meter_stops_when_the_work_fails(board: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), PowerMeter(board):
        _ = 1 // 0
    assert threading.active_count() == before


def test_a_meter_used_twice_counts_the_second_time_only(board: Path) -> None:
    meter = PowerMeter(board, interval_s=3600)
    for _ in range(2):
        with meter:
            pass
        assert meter.result()["VDD_IN"]["samples"] == 2


def test_no_files_no_samples_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with PowerMeter(tmp_path / "nowhere", interval_s=0.001) as meter:
        assert threading.active_count() == before
    assert meter.result() == {}


@pytest.mark.parametrize("damage", ["", "n/a\n", "\xff", None])
def test_a_file_that_cannot_be_read_costs_its_samples_only(board: Path, damage: str | None) -> None:
    path = board / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon0/curr1_input"
    meter = PowerMeter(board, interval_s=3600)
    with meter:
        path.unlink()
        if damage is not None:
            path.write_text(damage, encoding="latin-1")
    samples = {name: rail["samples"] for name, rail in meter.result().items()}
    assert samples == {"VDD_IN": 1, "VDD_CPU_GPU_CV": 2, "VDD_SOC": 2}
    assert meter.result()["VDD_IN"]["energy_j"] == 0.0


def test_commands_that_are_absent_fail_or_hang_say_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run_command([sys.executable, "-c", "print('NV Power Mode: 15W')"]) == "NV Power Mode: 15W\n"
    assert run_command([str(tmp_path / "nvpmodel"), "-q"]) is None
    assert run_command([sys.executable, "-c", "print('half'); raise SystemExit(1)"]) is None
    monkeypatch.setattr(power, "_COMMAND_TIMEOUT_S", 0.2)
    assert run_command([sys.executable, "-c", "import time; time.sleep(60)"]) is None
