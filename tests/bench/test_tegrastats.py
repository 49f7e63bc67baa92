"""``tegrastats`` beside a measurement: a program of that name on the PATH that keeps printing, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from famexport.bench import roofline, tegrastats
from famexport.bench.measure import bench
from famexport.bench.tegrastats import Tegrastats
from famexport.bench.tokens import bench_tokens
from famexport.errors import ParityError

ROOT = Path(__file__).parents[2]
Bundles = Callable[[str], Path]
LINE = "RAM 13{n}/7620MB (lfb 1x4MB) CPU [1%@1] GR3D_FREQ 3%@[305] cpu@4{n}.5C VDD_IN 500{n}mW/5000mW"
FAKE = """#!{python}
import os, signal, sys, time
{before}
with open({log!r}, "a") as log:
    log.write(f"{{os.getpid()}} {{' '.join(sys.argv[1:])}}\\n")
n = 0
while True:
    print({line!r}.replace("{{n}}", str(n)), flush=True)
    n = min(n + 1, 9)
    time.sleep(0.005)
"""


class Program:
    """A tegrastats on the PATH, and who ran it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"

    def write(self, before: str = "", line: str = LINE) -> None:
        path = self.folder / "tegrastats"
        path.write_text(FAKE.format(python=sys.executable, before=before, log=str(self.log), line=line))
        path.chmod(0o755)

    def runs(self) -> list[tuple[int, str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(int(pid), rest) for pid, _, rest in (line.partition(" ") for line in lines)]

    def ended(self) -> bool:
        return bool(self.runs()) and not any(alive(pid) for pid, _ in self.runs())


def alive(pid: int) -> bool:
    """A zombie is not: who was killed and waits for its new parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    monkeypatch.setattr(roofline, "measure_ceilings", lambda: roofline.Ceilings(10.0, 100.0))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = Program(tmp_path)
    yield found
    for pid, _ in found.runs():
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_what_it_says_is_kept_and_it_ends(program: Program) -> None:
    program.write()
    threads = threading.active_count()
    with Tegrastats() as stats:
        until(lambda: stats.result().get("samples", 0) >= 12, "it says nothing")
    assert program.ended()
    assert threading.active_count() == threads
    assert [options for _, options in program.runs()] == ["--interval 500"]
    found = stats.result()
    assert found["temperatures_c"] == {"cpu": {"first": 40.5, "last": 49.5, "max": 49.5}}
    assert found["rails"]["VDD_IN"]["max_mw"] == 5009
    k = found["samples"]
    assert found["rails"]["VDD_IN"]["mean_mw"] == pytest.approx((sum(range(10)) + 9 * (k - 10)) / k + 5000)
    first, *_, last = found["lines"]
    assert first["rails"] == {"VDD_IN": {"now": 5000, "average": 5000}}
    assert first["ram_mb"] == {"used": 130, "total": 7620}
    assert first["gpu"] == {"percent": 3, "mhz": [305]}
    assert 0 <= first["at_s"] < last["at_s"] < 60
    assert json.loads(json.dumps(found)) == found
    time.sleep(0.05)
    assert stats.result() == found


def test_many_lines_are_thinned_evenly() -> None:
    stats = Tegrastats()
    for i in range(2000):
        stats._take(i, {"temperatures_c": {"cpu": float(i)}})
    found = stats.result()
    assert found["samples"] == 2000
    assert found["temperatures_c"]["cpu"] == {"first": 0, "last": 1999, "max": 1999}
    kept = [line["at_s"] for line in found["lines"]]
    assert len(kept) <= 256
    assert kept == list(range(0, 2000, 8))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_it_ends_when_the_work_fails(program: Program, error: type[BaseException]) -> None:
    program.write()
    with pytest.raises(error), Tegrastats():
        until(lambda: bool(program.runs()), "it did not start")
        raise error
    assert program.ended()


def test_one_that_ignores_sigterm_is_killed(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tegrastats, "_PATIENCE_S", 0.3)
    program.write("signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGPIPE, signal.SIG_IGN)")
    start = time.monotonic()
    with Tegrastats() as stats:
        until(lambda: bool(stats.result()), "it says nothing")
        inside = time.monotonic()
    assert program.ended()
    assert 0.3 <= time.monotonic() - inside < 10
    assert inside - start < 30


def test_what_it_started_ends_too(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell script around it, say: the child holds the pipe open when its parent is gone."""
    monkeypatch.setattr(tegrastats, "_PATIENCE_S", 0.5)
    program.write("if os.fork(): time.sleep(600)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)")
    with Tegrastats() as stats:
        until(lambda: bool(stats.result()), "it says nothing")
    until(program.ended, "the child lives")


def test_a_second_ctrl_c_while_it_ends(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program.write("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    stats = Tegrastats()
    stats.__enter__()
    until(lambda: bool(stats.result()), "it says nothing")
    assert stats._process is not None
    wait, calls = stats._process.wait, []

    def interrupted(timeout: float | None = None) -> int:
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(timeout)

    monkeypatch.setattr(stats._process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stats.__exit__(None, None, None)
    assert program.ended()


@pytest.mark.parametrize("kind", ["none", "no program", "ends at once", "says nothing of use"])
def test_one_that_does_not_work_is_left_out(program: Program, kind: str) -> None:
    path = program.folder / "tegrastats"
    if kind == "no program":
        path.write_bytes(b"\x7fELF")
        path.chmod(0o755)
    elif kind == "ends at once":
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
    elif kind == "says nothing of use":
        program.write(line="hello \\0 world")
    with Tegrastats() as stats:
        time.sleep(0.05)
    assert stats.result() == {}


def test_in_the_report(program: Program, bundles: Bundles) -> None:
    program.write()
    report, _ = bench(bundles("plain"), blocks=4, paced_ms=40, threads=1)
    assert report["tegrastats"]["rails"]["VDD_IN"]["max_mw"] >= 5000
    assert program.ended()
    report, _ = bench_tokens(bundles("all"), tokens=300, threads=1)
    assert report["tegrastats"]["samples"] == len(report["tegrastats"]["lines"]) > 0
    assert program.ended()
    assert len(program.runs()) == 2


def test_a_wrong_answer_ends_it(program: Program, bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    from famexport.bench.turns import Turns

    program.write()

    def disagree(self: Turns, at: str) -> None:
        until(lambda: bool(program.runs()), "it did not start")
        raise ParityError("they disagree")

    monkeypatch.setattr(Turns, "compare", disagree)
    with pytest.raises(ParityError):
        bench(bundles("plain"), ["ort-cpu", "torch"], blocks=4, threads=1)
    assert program.ended()


def test_ctrl_c_at_the_command(program: Program, bundles: Bundles) -> None:
    """Of a benchmark that would take hours."""
    program.write("signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGPIPE, signal.SIG_IGN)")
    command = [sys.executable, "-m", "famexport", "bench", str(bundles("plain")), "--blocks", "100", "--paced", "99999"]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            until(lambda: bool(program.runs()) or child.poll() is not None, "it did not start")
            time.sleep(0.2)
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=30)
        finally:
            child.kill()
    assert child.returncode == 130, said
    assert "interrupted" in said
    assert program.ended()
