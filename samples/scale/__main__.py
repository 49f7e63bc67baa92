"""The paper's models at their own sizes: a stream's seconds and memory, beside attention whose cache grows.

    PYTHONPATH=. python3 -m samples.scale fam --preset paper-1b --out 1b-fam.json
    PYTHONPATH=. python3 -m samples.scale attention --preset paper-1b --compile --out 1b-attention.json
    PYTHONPATH=. python3 -m samples.scale plot 1b-fam.json 1b-attention.json --out docs/scale.svg

``fam`` makes a random checkpoint, exports it, and streams blocks through the public API. ``attention`` decodes with
full attention at the same sizes, a block's worth of tokens at a time. Both write one report: the latency of every
block, and seconds and memory at the lengths of the paper's own measurement. ``plot`` draws reports beside the paper's
points and prints them as a table. ``--device cpu`` and ``--backend ort-cpu`` are for trying it out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from famexport.config import PRESETS, preset
from famexport.errors import exit_on_error
from famexport.publish import write_output
from samples.scale import attention, fam, plot

LENGTHS = (26_000, 52_000, 103_000, 155_000, 206_000, 258_000)  # tokens, the paper's


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="samples.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--preset", choices=PRESETS, required=True)
    both.add_argument("--precision", choices=("fp16", "bf16", "fp32"), default="fp16")
    both.add_argument("--block-size", type=int, default=1024, help="T, and what attention takes at a time")
    both.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens to report seconds and memory at")
    both.add_argument("--out", type=Path, required=True, help="the report, JSON")

    one = modes.add_parser("fam", parents=[both], help="checkpoint, export, stream")
    one.add_argument("--fam-length", type=int, default=64, help="F")
    one.add_argument("--memory-segments", type=int, default=3, help="M")
    one.add_argument("--blocks", type=int, default=1000, help="to stream")
    one.add_argument("--backend", default="ort-cuda")
    one.add_argument("--parity-blocks", type=int, default=1, help="compared in the export, through all layers")
    one.add_argument(
        "--dir", type=Path, action="append", help="where checkpoint and bundle may go, the first with room"
    )
    one.add_argument("--unwritten", action="store_true", help="make each weight when it is asked for: no checkpoint")
    one.add_argument("--bundle", type=Path, help="export to here and keep it; where it is already, only stream it")

    other = modes.add_parser("attention", parents=[both], help="full attention, a cache that grows")
    other.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    other.add_argument("--compile", action="store_true", help="all between the attention calls by torch.compile")

    last = modes.add_parser("plot", help="reports -> SVG, and a table")
    last.add_argument("reports", type=Path, nargs="+")
    last.add_argument("--out", type=Path, required=True, help="the plot, SVG")
    return parser.parse_args(words)


def write(report: dict[str, Any], out: Path) -> None:
    """The report to a file; to stdout without the samples, as its last line."""
    write_output(out, json.dumps(report, sort_keys=True).encode() + b"\n")
    print(json.dumps({name: value for name, value in report.items() if name != "latencies_ms"}, sort_keys=True))


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    if options.mode == "plot":
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in options.reports]
        write_output(options.out, plot.svg(reports))
        print("\n".join(plot.table(reports)))
    elif options.mode == "attention":
        config = preset(options.preset, block_size=options.block_size, fam_length=0, memory_segments=0)
        write(attention.measure(config, options), options.out)
    else:
        sizes = {name: getattr(options, name) for name in ("block_size", "fam_length", "memory_segments")}
        write(fam.measure(preset(options.preset, **sizes), options), options.out)


if __name__ == "__main__":
    with exit_on_error():
        main()
