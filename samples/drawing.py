"""Plots as SVG by matplotlib, an optional dependency: the same data gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

SETTINGS: Any = {
    "svg.hashsalt": "famexport",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def svg(draw: Callable[[Any], None]) -> bytes:
    """What ``draw`` makes of an empty figure."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise SystemExit("plots need matplotlib: pip install matplotlib") from exc
    with rc_context(SETTINGS):
        figure = Figure(layout="constrained")
        draw(figure)
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()
