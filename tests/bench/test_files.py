"""The files that ``bench`` writes: samples as CSV and JSON, and the page."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from famexport.bench import roofline
from famexport.bench.files import html_page, samples_file
from famexport.cli import _run
from famexport.errors import MissingDependencyError

Bundles = Callable[[str], Path]
SAMPLES = {"ort-cpu": {"latency": [1.5, 0.1 + 0.2], "paced": [2.0]}, "torch-compile:cuda,tf32": {"device": [1e-7]}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure_ceilings", lambda: roofline.Ceilings(10.0, 100.0))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv() -> None:
    text = samples_file(Path("a.CSV"), SAMPLES).decode()
    assert text == (
        "backend,kind,index,ms\n"
        "ort-cpu,latency,0,1.5\n"
        "ort-cpu,latency,1,0.30000000000000004\n"
        "ort-cpu,paced,0,2.0\n"
        '"torch-compile:cuda,tf32",device,0,1e-07\n'
    )


@pytest.mark.parametrize("name", ["a", "a.json", "a.csv.txt", "csv"])
def test_all_else_is_json(name: str) -> None:
    assert json.loads(samples_file(Path(name), SAMPLES)) == SAMPLES


class Page(HTMLParser):
    """Cells of the table, text, and whatever a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.fetched: list[str] = []
        self._tag = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        assert tag not in ("img", "iframe", "object", "embed", "b")
        if tag == "link" or any(name in ("src", "href") for name, _ in attrs):
            self.fetched.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in ("td", "th"):
            self.rows[-1][-1] += data
        elif self._tag in ("p", "li", "h1", "title"):
            self.text.append(data)


def traces(text: str) -> dict[str, dict[str, Any]]:
    """What the page draws, by name."""
    found = re.search(r'Plotly\.newPlot\(\s*"chart",\s*', text)
    assert found
    data, _ = json.JSONDecoder().raw_decode(text, found.end())
    return {trace["name"]: trace for trace in data}


def values(axis: Any) -> list[float]:
    """Of a trace: a list, or what plotly packs arrays into."""
    assert isinstance(axis, list)
    return axis


RESULT = {
    "backend": "torch:cuda",
    "latency_ms": {"p50": 4.0, "p90": 5.0, "p99": 6.0, "max": 7.0},
    "device_ms": {"p50": 3.5, "p90": 3.6, "p99": 3.7, "max": 3.8},
    "paced": {
        "period_ms": 12.5,
        "blocks": 9,
        "late": 2,
        "latency_ms": {"p50": 4.5, "p90": 5.5, "p99": 6.5, "max": 7.5},
    },
    "state_bytes": 1234,
    "rss_bytes": {"first": 2**20, "last": 2**21, "slope_per_1000_blocks": 5, "trace": [[0, 2**20], [3, 2**21]]},
    "roofline": {"share": 0.5, "of": "device"},
}
REPORT = {
    "bundle": {"path": "<b>&.fam</title>", "id": "abc", "precision": "fp16"},
    "device": {"processor": "a CPU", "cores": 2, "system": "Linux x86_64"},
    "gpu": {"name": "a GPU"},
    "versions": {"numpy": "2"},
    "results": [RESULT],
}


def test_page() -> None:
    text = html_page(REPORT, {"torch:cuda": {"latency": [4.0, 5.0], "device": [3.5, 3.6]}}).decode()
    page = Page(text)
    assert page.fetched == []
    assert page.rows == [
        ["backend", "ms", "p50", "p90", "p99", "max", "of the limit", "late"],
        ["torch:cuda", "latency", "4.000", "5.000", "6.000", "7.000", "", ""],
        ["torch:cuda", "on the device", "3.500", "3.600", "3.700", "3.800", "50%", ""],
        ["torch:cuda", "paced, 12.5 ms", "4.500", "5.500", "6.500", "7.500", "", "2 of 9"],
    ]
    said = "\n".join(page.text)
    for part in (
        "<b>&.fam</title>",
        "bundle abc, fp16",
        "a CPU, 2 cores, a GPU",
        "numpy 2",
        "1.0 MiB resident at first",
    ):
        assert part in said
    drawn = traces(text)
    assert set(drawn) == {"torch:cuda latency", "torch:cuda device", "torch:cuda memory"}
    assert drawn["torch:cuda latency"]["y"] == [4.0, 5.0]
    assert drawn["torch:cuda latency"]["visible"] is True
    assert drawn["torch:cuda device"]["visible"] == "legendonly"
    assert (drawn["torch:cuda memory"]["x"], drawn["torch:cuda memory"]["y"]) == ([0, 3], [1.0, 2.0])
    assert re.search(r"plotly\.js v\d", text)  # the library itself is in it


def test_a_name_cannot_end_the_script() -> None:
    result = {**RESULT, "backend": "</script><b>"}
    text = html_page({**REPORT, "results": [result]}, {"</script><b>": {"latency": [1.0]}}).decode()
    Page(text)  # sees no <b>
    assert "</script><b> latency" in traces(text.replace("\\u003c", "<").replace("\\u003e", ">"))


def test_the_command(bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, samples = tmp_path / "new" / "page.html", tmp_path / "samples.csv"
    line = ["bench", str(bundles("plain")), "--backend", "ort-cpu", "--backend", "torch", "--blocks", "3"]
    assert _run([*line, "--paced", "5", "--html", str(page), "--samples", str(samples)], False) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    pace = report["results"][0]["paced"]
    cells = ["ort-cpu", *(f"{pace['latency_ms'][name]:.2f}" for name in ("p50", "p99")), f"{pace['late']} of 3"]
    assert any([cell.strip() for cell in line.strip("│").split("│")] == cells for line in out.splitlines())
    assert "every 5 ms: p50" in out
    rows = table(samples)
    assert [(r["backend"], r["kind"], r["index"]) for r in rows] == [
        (backend, kind, str(i)) for backend in ("ort-cpu", "torch") for kind in ("latency", "paced") for i in range(3)
    ]
    drawn = traces(page.read_text())
    assert drawn["torch latency"]["y"] == [
        float(r["ms"]) for r in rows if (r["backend"], r["kind"]) == ("torch", "latency")
    ]
    assert set(drawn) == {f"{b} {kind}" for b in ("ort-cpu", "torch") for kind in ("latency", "paced", "memory")}
    cells = Page(page.read_text()).rows
    assert [row[:2] for row in cells[1:]] == [[b, k] for b in ("ort-cpu", "torch") for k in ("latency", "paced, 5 ms")]
    assert cells[1][2] == f"{report['results'][0]['latency_ms']['p50']:.3f}"
    assert cells[1][6].endswith("%")
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_the_page_of_tokens(bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, samples = tmp_path / "page.html", tmp_path / "samples.csv"
    line = ["bench", str(bundles("all")), "--backend", "ort-cpu", "--mode", "token", "--tokens", "9", "--quiet"]
    assert _run([*line, "--html", str(page), "--samples", str(samples)], False) == 0
    assert set(traces(page.read_text())) == {f"ort-cpu {kind}" for kind in ("first", "token", "boundary", "memory")}
    assert [row[1] for row in Page(page.read_text()).rows[1:]] == ["first token", "token", "boundary"]
    assert {row["kind"] for row in table(samples)} == {"first", "token", "boundary"}


def test_a_missing_plotly_is_said_before_the_measurement(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*_: Any, **__: Any) -> Any:
        raise AssertionError("it measured")

    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.setattr("famexport.bench.measure.bench", measured)
    assert _run(["bench", str(bundles("plain")), "--html", str(tmp_path / "page.html")], False) == 5
    said = capsys.readouterr().err
    assert said == "error: bench --html needs the package 'plotly'; install it with: pip install 'famexport[report]'\n"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MissingDependencyError, match="famexport\\[report\\]"):
        html_page(REPORT, {})


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    page.write_text("the old one")

    def explode(*_: Any) -> bytes:
        raise RuntimeError("half-way")

    monkeypatch.setattr("famexport.bench.files.html_page", explode)
    assert _run(["bench", str(bundles("plain")), "--blocks", "2", "--html", str(page)], False) == 1
    assert page.read_text() == "the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("value", ["0", "-5", "nan", "inf", "1e9"])
def test_a_pace_that_cannot_be(bundles: Bundles, capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert _run(["bench", str(bundles("plain")), "--paced", value], False) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: --paced is the milliseconds from one block to the next, above 0 and at most 3600000; got"
    )


def test_a_pace_for_tokens(bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["bench", str(bundles("all")), "--mode", "token", "--paced", "5"], False) == 2
    assert capsys.readouterr().err == "error: --paced is about whole blocks; leave out --mode token, or --paced\n"
