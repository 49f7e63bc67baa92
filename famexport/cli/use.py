"""Commands that use bundles: run, bench, verify."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from famexport.cli import options as opt
from famexport.cli.output import err, out, print_facts, print_json, size, stages

BACKEND_HELP = "auto, ort-cpu or torch."


def run(
    bundle: opt.Bundle,
    input: Annotated[
        str,
        typer.Option("--input", "-i", help="A text file, token ids (.npy or whitespace-separated), or - for stdin."),
    ] = "-",
    tokens: Annotated[
        bool, typer.Option("--tokens", help="The input is token ids, also where there is a tokenizer.")
    ] = False,
    backend: Annotated[str, typer.Option(help=BACKEND_HELP)] = "auto",
    scores: Annotated[Path | None, typer.Option(help="Write one log-probability per token to this file.")] = None,
    threads: opt.Threads = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Stream a file or stdin of any length through a bundle, in constant memory."""
    from contextlib import nullcontext

    from famexport.publish import staged_file
    from famexport.runtime.feeding import token_source
    from famexport.runtime.score import RunReport, run_tokens
    from famexport.runtime.session import load

    with load(bundle, backend, threads=threads) as session, staged_file(scores) if scores else nullcontext() as write:
        source = sys.stdin.buffer if input == "-" else Path(input)
        ids = token_source(session.bundle, source, as_tokens=tokens)
        live = None if quiet or not err.is_terminal else Live(console=err, transient=True, refresh_per_second=4)

        def show(report: RunReport) -> None:
            if live:
                live.update(_progress_line(report))

        if live:
            with live:
                report = run_tokens(session, ids, scores=write, progress=show)
        else:
            report = run_tokens(session, ids, scores=write)
    if json:
        print_json({"bundle": str(bundle), **report.to_dict()})
    elif not quiet:
        print_facts(f"{bundle} on {report.backend}", _run_facts(report))


def _progress_line(report: Any) -> str:
    loss = f"  loss {report.loss:.3f}" if report.loss is not None else ""
    return (
        f"{report.tokens:,} tokens  {report.tokens_per_s:,.0f} tokens/s{loss}  memory {size(report.rss_bytes['last'])}"
    )


def _run_facts(report: Any) -> dict[str, Any]:
    latency, rss = report.latency_ms, report.rss_bytes
    return {
        "tokens": f"{report.tokens:,} in {report.blocks:,} whole blocks of {report.block_size}",
        "loss": f"{report.loss:.4f} nats per token" if report.loss is not None else "-",
        "tokens_per_s": f"{report.tokens_per_s:,.1f}",
        "ms per block": f"p50 {latency['p50']:.2f}  p99 {latency['p99']:.2f}" if latency else "- (no whole block)",
        "state": f"{size(report.state_bytes)} ({report.precision})",
        "resident memory": f"{size(rss['first'])} after the first block, {size(rss['last'])} at the end",
    }


def bench(
    bundle: opt.Bundle,
    backend: Annotated[list[str] | None, typer.Option(help="A backend to measure; repeat for several.")] = None,
    blocks: Annotated[int, typer.Option(help="Counted blocks per backend.", min=2)] = 50,
    threads: opt.Threads = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    samples: Annotated[Path | None, typer.Option(help="Write every sample (ms, by backend) to this JSON file.")] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Latency of each block, memory, and the share of the hardware's limit; the last line of stdout is JSON."""
    from famexport.bench.measure import bench as measure
    from famexport.publish import atomic_write

    with stages(quiet) as report_stage:
        report, raw = measure(
            bundle, backend or (), blocks=blocks, threads=threads, progress=report_stage.one("blocks")
        )
    for path, content in ((json, report), (samples, raw)):
        if path:
            atomic_write(path, json_module.dumps(content, sort_keys=True).encode() + b"\n")
    if not quiet:
        out.print(_bench_table(report))
    print_json(report)


def _bench_table(report: dict[str, Any]) -> Table:
    device = report["device"]
    table = Table(title=f"{device['processor']}, {device['cores']} cores", title_justify="left")
    for column in ("backend", "p50 ms", "p90", "p99", "max", "tokens/s", "of the limit", "memory"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for result in report["results"]:
        ms, rss = result["latency_ms"], result["rss_bytes"]
        table.add_row(
            result["backend"],
            *(f"{ms[name]:.2f}" for name in ("p50", "p90", "p99", "max")),
            f"{result['tokens_per_s']:,.0f}",
            f"{result['roofline']['share']:.0%}",
            size(rss["last"]),
        )
    return table


def verify(
    bundle: opt.Bundle,
    backend: Annotated[str, typer.Option(help=BACKEND_HELP)] = "auto",
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Check hashes and contract, then replay the golden rollout on this device."""
    from famexport.runtime.selftest import verify as verify_bundle

    with stages(quiet) as report:
        facts = verify_bundle(bundle, backend, progress=report.one("hashes"))
    if json:
        print_json({"ok": True, **facts})
    elif not quiet:
        out.print(
            f"{bundle}: {facts['files']} files, {size(facts['bytes'])}, hashes and contract good; golden rollout of "
            f"{facts['golden_blocks']} blocks on {facts['backend']}: logits {facts['logits_error']:.2g}, state "
            f"{facts['state_error']:.2g} (relative; allowed {facts['tolerance']:.2g})",
            markup=False,
        )
