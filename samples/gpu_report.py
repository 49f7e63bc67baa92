"""The figures of a GPU host, from the source tree alone and without network.

    PYTHONPATH=. python3 samples/gpu_report.py --shape edge --mode block --blocks 50 --out DIR

Makes a random checkpoint, exports it, and measures torch eager, ``torch.compile`` and ONNX Runtime in one interleaved
run, block by block and then token by token; outputs are compared before and while timing. Prints a markdown table for
each shape and mode and writes ``DIR/SHAPE-PRECISION-LOGITS-MODE.json`` with the report and every sample. ``device`` is
the GPU's own time by events, ``ratio`` the host's p50 over that of ``torch-compile`` on the same device (below 1 is
faster), and ``of the limit`` the share of the measured ceiling. A shape is a process's worth of device time: call it
once for each. ``--device cpu`` is for trying the script out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from famexport.bench.measure import bench
from famexport.bench.tokens import bench_tokens
from famexport.checkpoint import init_checkpoint
from famexport.config import FamConfig, preset
from famexport.contract import PRECISION_DTYPE
from famexport.errors import exit_on_error
from famexport.export.pipeline import export_bundle
from famexport.publish import write_output

SHAPES: dict[str, FamConfig] = {
    "1b-1024": preset("paper-1b", block_size=1024, memory_segments=3, fam_length=64),
    "1b-64": preset("paper-1b", block_size=64, memory_segments=3, fam_length=16),
    "edge": preset("edge"),
    "tiny": preset("tiny"),
}
BACKENDS = {"cuda": ("torch:cuda", "torch-compile:cuda", "ort-cuda"), "cpu": ("torch", "ort-cpu")}
BASELINE = {"cuda": "torch-compile:cuda", "cpu": "torch-compile"}
PARITY_BLOCKS = 9  # the fewest that a golden rollout is taken from: float32 torch on the host's CPU is the slow part
COLUMNS = ("backend", "host p50 ms", "host p99 ms", "device p50 ms", "ratio", "of the limit")


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", required=True)
    parser.add_argument("--precision", choices=("fp16", "bf16", "fp32"), default="fp16")
    parser.add_argument("--device", choices=BACKENDS, default="cuda")
    parser.add_argument("--backend", action="append", help="instead of the device's own list; repeat for several")
    parser.add_argument("--max-autotune", action="store_true", help="torch-compile in that mode, too: minutes a shape")
    parser.add_argument("--mode", choices=("block", "token"), action="append", help="both unless given")
    parser.add_argument("--graphs", choices=("block", "all"), help="to export; block is faster, and --mode block's own")
    parser.add_argument(
        "--logits", choices=("all", "last"), default="all", help="of a block; all of 1b-1024 are 131 MB"
    )
    parser.add_argument("--parity-blocks", type=int, default=PARITY_BLOCKS, help="compared in the export")
    parser.add_argument("--blocks", type=int, default=50)
    parser.add_argument("--tokens", type=int, help="two blocks unless given")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(words)
    options.mode = options.mode or ["block", "token"]
    if options.graphs == "block" and "token" in options.mode:
        parser.error("--graphs block has no token steps; add --mode block")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu is for trying the script out")
    options.graphs = options.graphs or ("all" if "token" in options.mode else "block")
    return options


def measure(options: argparse.Namespace, mode: str, bundle: Path) -> tuple[dict[str, Any], Any]:
    """The report and the samples of one mode."""
    names = list(options.backend or BACKENDS[options.device])
    if options.max_autotune:
        names.append(f"torch-compile:{options.device},max-autotune")
    if mode == "block":
        return bench(bundle, names, blocks=options.blocks)
    return bench_tokens(bundle, names, tokens=options.tokens)


def table(report: dict[str, Any], mode: str, baseline: str) -> list[str]:
    """A markdown table, one line for each backend."""
    host = "latency_ms" if mode == "block" else "token_ms"
    against = {result["backend"]: result[host]["p50"] for result in report["results"]}.get(baseline)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for result in report["results"]:
        ms, device, roofline = result[host], result["device_ms"], result["roofline"]
        cells = [
            result["backend"],
            f"{ms['p50']:.3f}",
            f"{ms['p99']:.3f}",
            f"{device['p50']:.3f}" if device else "-",
            f"{ms['p50'] / against:.3f}" if against else "-",
            f"{roofline['share']:.1%}" if roofline else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(words: list[str] | None = None) -> None:
    options = arguments(words)
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
            init_checkpoint(checkpoint, SHAPES[shape], dtype=PRECISION_DTYPE[options.precision])
            export_bundle(
                checkpoint,
                bundle,
                precision=options.precision,
                graphs=options.graphs,
                logits=options.logits,
                parity_blocks=options.parity_blocks,
            )
            for mode in options.mode:
                report, samples = measure(options, mode, bundle)
                report.update(shape=shape, mode=mode, logits=options.logits, samples_ms=samples)
                file = options.out / f"{shape}-{options.precision}-{options.logits}-{mode}.json"
                write_output(file, json.dumps(report, sort_keys=True).encode() + b"\n")
                machine = report.get("gpu", {}).get("name") or report["device"]["processor"]
                print(f"\n{shape}, {options.precision}, {mode} ({machine})\n")
                print("\n".join(table(report, mode, BASELINE[options.device])), flush=True)


if __name__ == "__main__":
    with exit_on_error():
        main()
