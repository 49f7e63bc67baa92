"""Reports as a plot and as a table, with the paper's points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from samples import drawing

Report = Mapping[str, Any]

# arXiv 2404.09173, FAM on TPUv4; only the ends were published: tokens, seconds, GB
PAPER = ((26_000, 16.5, 4.5), (258_000, 154.9, 16.1))
GB = 1e9
TICKS = (1, 4, 16, 64, 256)  # thousand tokens
COLORS = {"fam": "#0b6e4f", "attention": "#c8553d"}
NAMES = {"fam": "FAM, famexport", "attention": "full attention, torch"}


def svg(reports: Sequence[Report]) -> bytes:
    """A column for each preset: seconds above (log-log: a straight line is a power), memory below, over tokens.

    The same reports give the same bytes.
    """
    return drawing.svg(lambda figure: _columns(figure, reports))


def _columns(figure: Any, reports: Sequence[Report]) -> None:
    from matplotlib.ticker import NullLocator

    presets = list(dict.fromkeys(report["preset"] for report in reports))
    figure.set_size_inches(4 * len(presets), 6.4)
    axes = figure.subplots(2, len(presets), squeeze=False)
    for (time, memory), preset in zip(axes.T, presets, strict=True):
        for report in (report for report in reports if report["preset"] == preset):
            _draw(time, memory, report)
        k, seconds, used = ([point[i] for point in PAPER] for i in range(3))
        style = {"color": "#777777", "marker": "s", "markersize": 4, "linestyle": ":", "label": "the paper, TPUv4"}
        time.plot([tokens / 1e3 for tokens in k], seconds, **style)
        memory.plot([tokens / 1e3 for tokens in k], used, **style)
        time.set_title(preset)
        memory.set_xlabel("thousand tokens")
        memory.set_ylim(bottom=0)
        time.set(xscale="log", yscale="log")
        time.set_xticks(TICKS, labels=map(str, TICKS), minor=False)
        time.xaxis.set_minor_locator(NullLocator())
        for axis in (time, memory):
            axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("memory in use, GB")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(" · ".join(dict.fromkeys(_where(report) for report in reports)), fontsize=9)


def _draw(time: Any, memory: Any, report: Report) -> None:
    size, last = report["config"]["block_size"], max(at["tokens"] for at in _points(report))
    style = {"color": COLORS[report["mode"]], "label": NAMES[report["mode"]]}
    k, seconds = [0.0], [0.0]  # log axes leave the first out
    for latency in report["latencies_ms"][: last // size]:
        k.append(k[-1] + size / 1e3)
        seconds.append(seconds[-1] + latency / 1e3)
    time.plot(k, seconds, **style)
    tokens, used = zip(*((at["tokens"] / 1e3, at["used_bytes"] / GB) for at in _points(report)), strict=True)
    memory.plot(tokens, used, marker="o", markersize=3, **style)
    if report["stopped"]:
        memory.annotate("out of memory", (tokens[-1], used[-1]), (-8, -3), textcoords="offset points", ha="right")


def _points(report: Report) -> list[Report]:
    """Where memory was looked at, up to the longest length that was asked for."""
    lengths = report["at_tokens"]
    blocks = [at for at in report["at_block"].values() if not lengths or at["tokens"] <= lengths[-1]["tokens"]]
    return sorted([*lengths, *blocks], key=lambda at: at["tokens"])


def _where(report: Report) -> str:
    return f"{report['gpu'] or report['machine']['processor']}, {report['precision']}"


def table(reports: Sequence[Report]) -> list[str]:
    """Markdown: seconds and GB at each length, a line for each report, and the paper's."""
    lengths = sorted({at["length"] for report in reports for at in report["at_tokens"]} | {point[0] for point in PAPER})
    rows = [["s / GB", *(f"{length / 1e3:.0f}k" for length in lengths)], ["---"] * (len(lengths) + 1)]
    for report in reports:
        found = {at["length"]: f"{at['seconds']:.2f} / {at['used_bytes'] / GB:.2f}" for at in report["at_tokens"]}
        end = f"out of memory after {report['stopped']['tokens'] / 1e3:.0f}k" if report["stopped"] else "-"
        rows.append([f"{report['preset']}, {NAMES[report['mode']]}", *(found.get(length, end) for length in lengths)])
    paper = {tokens: f"{seconds} / {used}" for tokens, seconds, used in PAPER}
    rows.append(["the paper, TPUv4", *(paper.get(length, "-") for length in lengths)])
    return [f"| {' | '.join(cells)} |" for cells in rows]
