"""Two plots from reports of ``evaluate.py`` and ``drift.py``: what is still known, and how FAM's norm fares.

    python -m samples.passkey.plots --evaluation A.json B.json --drift D.json --out docs/

``memory-recall.svg`` has exact recall over tokens, a line for each bundle and precision; ``memory-norm.svg`` has the
norm of FAM in each layer over blocks. The same reports give the same bytes. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from famexport.errors import exit_on_error
from samples.drawing import svg

Report = Mapping[str, Any]

RECALL, NORM = "memory-recall.svg", "memory-norm.svg"
HEIGHT = 4.2  # inches
# Okabe and Ito's colours, which the colour-blind tell apart; form and width differ as well, as lines may coincide
COLORS = {"fp32": "#0072b2", "fp16": "#e69f00", "bf16": "#009e73", "int8": "#cc79a7", "int4": "#56b4e9"}
MARKERS = {"fp32": "o", "fp16": "s", "bf16": "^", "int8": "D", "int4": "v"}
WITHOUT_FAM, OTHER = "#d55e00", "#000000"
SABOTAGE = {"zero": "FAM cleared after every block", "hold": "FAM held after the first block"}
NAMED_LAYERS = 6  # in the legend; of more, some
MOST_TICKS = 8


class Line(NamedTuple):
    """What a line of recall is about."""

    fam: bool  # or Block Sliding Window Attention alone
    precision: str
    sabotage: str | None
    bundle: str
    filler: str
    form: str


def recall_lines(reports: Sequence[Report]) -> dict[Line, dict[int, float]]:
    """The share of keys answered exactly, by tokens. Results on the same are pooled."""
    pooled: dict[Line, dict[int, list[Report]]] = defaultdict(lambda: defaultdict(list))
    for report in reports:
        for r in report["results"]:
            fam = bool(r["fam_norm"])
            line = Line(fam, r["precision"], report["sabotage"], r["bundle"], r["filler"], report["form"])
            pooled[line][r["tokens"]].append(r)
    return {line: {n: _exact(points[n]) for n in sorted(points)} for line, points in pooled.items()}


def _exact(results: Sequence[Report]) -> float:
    return float(sum(r["exact"] * r["keys"] for r in results) / sum(r["keys"] for r in results))


def labels(lines: Sequence[Line]) -> list[str]:
    """A name for each line, with no more in it than tells them apart."""
    fillers, forms = {line.filler for line in lines}, {line.form for line in lines}
    without = {line.precision for line in lines if not line.fam}
    names = []
    for line in lines:
        parts = [SABOTAGE[line.sabotage] if line.sabotage else "FAM" if line.fam else "BSWA, no FAM"]
        parts += [line.precision] if line.fam or len(without) > 1 else []
        parts += [line.filler] if len(fillers) > 1 else []
        parts += [line.form] if len(forms) > 1 else []
        names.append(", ".join(parts))
    return [f"{n} ({line.bundle})" if names.count(n) > 1 else n for n, line in zip(names, lines, strict=True)]


def draw_recall(figure: Any, reports: Sequence[Report]) -> None:
    from matplotlib.ticker import NullLocator

    figure.set_size_inches(6.8, HEIGHT)
    lines = recall_lines(reports)
    axis = figure.subplots()
    for i, (line, label) in enumerate(zip(lines, labels(list(lines)), strict=True)):
        above = len(lines) - 1 - i  # lines that may lie on this one: it is so much wider, and stays to be seen
        axis.plot(
            list(lines[line]),
            [100 * exact for exact in lines[line].values()],
            color=COLORS.get(line.precision, OTHER) if line.fam else WITHOUT_FAM,
            marker=MARKERS.get(line.precision, "o") if line.fam else "X",
            linestyle=("--" if line.sabotage else "-") if line.fam else ":",
            linewidth=1.4 + 0.9 * above,
            markersize=5 + 2.2 * above,
            markerfacecolor="white" if line.fam else None,
            markeredgewidth=1.4,
            label=label,
            clip_on=False,
        )
    tokens = sorted({n for points in lines.values() for n in points})
    axis.set_xscale("log")
    if len(tokens) <= MOST_TICKS:
        axis.set_xticks(tokens, labels=[f"{n:,}" for n in tokens], minor=False)
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="tokens; the key is in the first block", ylabel="keys answered exactly, %", ylim=(0, 104))
    axis.spines["left"].set_bounds(0, 100)
    axis.set_yticks(range(0, 101, 20))
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=min(3, len(lines)), frameon=False, handlelength=3.5)


def draw_norm(figure: Any, reports: Sequence[Report]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure.set_size_inches(1.4 + 4.2 * len(reports), HEIGHT)
    panels = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for axis, report in zip(panels, reports, strict=True):
        looks = report["looks"]
        layers = list(zip(*(look["fam_norm"] for look in looks), strict=True))
        last, shown = max(len(layers) - 1, 1), min(NAMED_LAYERS, len(layers))
        named = {round(i * (len(layers) - 1) / max(shown - 1, 1)) for i in range(shown)}
        blocks = [look["blocks"] for look in looks]
        for i, norms in enumerate(layers):
            style = {"color": colormaps["viridis"](0.92 * i / last), "label": f"layer {i}" if i in named else None}
            axis.plot(blocks, norms, marker="os^Dv"[i % 5], markersize=4, linewidth=1.4, **style)
        lost = [(look["blocks"], max(look["fam_norm"])) for look in looks if look["exact"] < 1]
        if lost:
            x, y = zip(*lost, strict=True)
            above = [1.25 * norm for norm in y]
            axis.plot(x, above, "x", color=WITHOUT_FAM, markersize=6, markeredgewidth=1.6, label="a key was lost")
        axis.set(xscale="log", yscale="log", xlabel="blocks")
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{report['bundle']}, {report['precision']}, filler: {report['filler']}", fontsize=9)
        axis.grid(alpha=0.25, which="both")
        axis.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("L2 norm of a FAM vector, mean")
    low, high = panels[0].get_ylim()  # at least a decade, or noise would look like drift
    middle = (low * high) ** 0.5
    panels[0].set_ylim(min(low, middle / 10**0.5), max(high, middle * 10**0.5))


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--evaluation", type=Path, nargs="+", default=[], help="reports of evaluate.py")
    parser.add_argument("--drift", type=Path, nargs="+", default=[], help="reports of drift.py")
    parser.add_argument("--out", type=Path, required=True, help="the folder for both plots")
    options = parser.parse_args(words)
    if not options.evaluation and not options.drift:
        parser.error("give reports with --evaluation, --drift, or both")
    return options


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    options.out.mkdir(parents=True, exist_ok=True)
    evaluations, drifts = ([json.loads(path.read_text()) for path in p] for p in (options.evaluation, options.drift))
    if evaluations:
        (options.out / RECALL).write_bytes(svg(lambda figure: draw_recall(figure, evaluations)))
        print(options.out / RECALL)
    drifts = [report for report in drifts if report["fam_length"]]  # without FAM there is no norm
    if drifts:
        (options.out / NORM).write_bytes(svg(lambda figure: draw_norm(figure, drifts)))
        print(options.out / NORM)


if __name__ == "__main__":
    with exit_on_error():
        main()
