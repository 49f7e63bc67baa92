"""What a measurement is written to: samples as JSON or CSV, and a page of HTML for people."""

from __future__ import annotations

import csv
import io
import json
from html import escape
from pathlib import Path
from typing import Any

from famexport.bench.turns import Samples
from famexport.errors import MissingDependencyError

_HOST = ("latency", "token", "boundary")  # kinds that are shown at first; a click in the legend shows the others
_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2em;max-width:75em}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.25em .8em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}"
)


def samples_file(path: Path, samples: Samples) -> bytes:
    """``samples`` for a file of that name: CSV (backend, kind, index, ms) if it ends with ``.csv``, else JSON."""
    if path.suffix.lower() != ".csv":
        return json.dumps(samples, sort_keys=True).encode() + b"\n"
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("backend", "kind", "index", "ms"))
    for backend, kinds in samples.items():
        for kind, values in kinds.items():
            rows.writerows((backend, kind, i, value) for i, value in enumerate(values))
    return text.getvalue().encode()


def check_plotly() -> None:
    """Raise MissingDependencyError where ``html_page`` cannot work: before a measurement, not after it."""
    try:
        import plotly.graph_objects
        import plotly.subplots  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError("plotly", "report", "bench --html") from exc


def html_page(report: dict[str, Any], samples: Samples) -> bytes:
    """One page that needs nothing else and no network: latency over blocks or tokens, a table of percentiles, and
    resident memory.

    Raises:
        MissingDependencyError: there is no plotly.
    """
    check_plotly()
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    unit = "token" if "token_ms" in report["results"][0] else "block"
    figure = make_subplots(
        rows=2, cols=1, row_heights=[0.7, 0.3], subplot_titles=("latency, ms", "resident memory of the process, MiB")
    )
    for backend, kinds in samples.items():
        for kind, values in kinds.items():
            shown = True if kind in _HOST else "legendonly"
            mode = "lines" if len(values) > 1 else "markers"
            line = go.Scatter(y=values, name=f"{backend} {kind}", mode=mode, visible=shown)
            figure.add_trace(line, row=1, col=1)
    for result in report["results"]:
        at, bytes_ = zip(*result["rss_bytes"]["trace"], strict=True)
        line = go.Scatter(x=at, y=[b / 2**20 for b in bytes_], name=f"{result['backend']} memory", mode="lines+markers")
        figure.add_trace(line, row=2, col=1)
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(title_text=unit, row=2, col=1)
    figure.update_layout(height=800, template="plotly_white")
    chart = figure.to_html(full_html=False, include_plotlyjs=True, div_id="chart", config={"displaylogo": False})
    bundle, title = report["bundle"], escape(f"famexport bench: {report['bundle']['path']}")
    facts = [f"bundle {bundle['id']}, {bundle['precision']}", _machine(report)]
    facts.append(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    lines = "".join(f"<p>{escape(fact)}</p>" for fact in facts)
    memory = "".join(f"<li>{escape(_memory(result))}</li>" for result in report["results"])
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{title}</h1>{lines}{_table(report)}<ul>{memory}</ul>{chart}</body></html>\n"
    )
    return page.encode()


def _machine(report: dict[str, Any]) -> str:
    device = report["device"]
    gpu, board = report.get("gpu", {}).get("name"), report.get("board", {}).get("model")
    parts = board, f"{device['processor']}, {device['cores']} cores", gpu, device["system"]
    return ", ".join(part for part in parts if part)


def _table(report: dict[str, Any]) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for result in report["results"]
        for row in _rows(result)
    )
    columns = ("backend", "ms", "p50", "p90", "p99", "max", "of the limit", "late")
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in columns)}</tr>{rows}</table>"


def _rows(result: dict[str, Any]) -> list[list[str]]:
    """A line for each kind of time that there is; the share of the limit beside the one that it is of."""
    paced, roofline, rows = result.get("paced"), result["roofline"], []
    host = "token" if "token_ms" in result else "latency"
    kinds = {
        "first token": result.get("first_token_ms"),
        host: result.get(f"{host}_ms"),
        "on the device": result["device_ms"],
        "boundary": result.get("boundary_ms"),
        "boundary, on the device": result.get("boundary_device_ms"),
        f"paced, {paced['period_ms']:g} ms" if paced else "": paced and paced["latency_ms"],
    }
    for kind, ms in kinds.items():
        if ms:
            limited = roofline and kind == ("on the device" if roofline["of"] == "device" else host)
            late = f"{paced['late']} of {paced['blocks']}" if paced and kind.startswith("paced") else ""
            values = [f"{ms[name]:.3f}" for name in ("p50", "p90", "p99", "max")]
            rows.append([result["backend"], kind, *values, f"{roofline['share']:.0%}" if limited else "", late])
    return rows


def _memory(result: dict[str, Any]) -> str:
    rss = result["rss_bytes"]
    return (
        f"{result['backend']}: {rss['first'] / 2**20:,.1f} MiB resident at first, "
        f"{rss['last'] / 2**20:,.1f} MiB at last, "
        f"slope {rss['slope_per_1000_blocks']:,} bytes per 1,000; state {result['state_bytes']:,} bytes"
    )
