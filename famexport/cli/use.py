"""Commands that measure and check bundles: bench, verify."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from famexport.cli import options as opt
from famexport.cli.output import out, print_json, size, stages
from famexport.errors import ParityError, UsageError


def bench(
    bundle: opt.Bundle,
    backend: Annotated[list[str] | None, typer.Option(help="A backend to measure; repeat for several.")] = None,
    mode: Annotated[opt.Mode, typer.Option(help="Whole blocks, or token by token.")] = opt.Mode.block,
    blocks: Annotated[int, typer.Option(help="Counted blocks per backend.", min=2)] = 50,
    tokens: Annotated[
        int | None, typer.Option(help="Counted tokens per backend (mode token).", min=2, show_default="two blocks")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of the prompt (mode token).", min=1, show_default="a block and a half")
    ] = None,
    threads: opt.Threads = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    samples: Annotated[Path | None, typer.Option(help="Write every sample (ms, by backend) to this JSON file.")] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Latency of each block or token, memory, share of the hardware's limit; the last line of stdout is JSON."""
    from famexport.bench.measure import bench as measure
    from famexport.bench.tokens import bench_tokens
    from famexport.publish import atomic_write

    raw: Any
    with stages(quiet) as report_stage:
        progress = report_stage.one("tokens" if mode is opt.Mode.token else "blocks")
        if mode is opt.Mode.token:
            report, raw = bench_tokens(
                bundle, backend or (), tokens=tokens, prompt=prompt, threads=threads, progress=progress
            )
        else:
            report, raw = measure(bundle, backend or (), blocks=blocks, threads=threads, progress=progress)
    for path, content in ((json, report), (samples, raw)):
        if path:
            atomic_write(path, json_module.dumps(content, sort_keys=True).encode() + b"\n")
    if not quiet:
        out.print(_tokens_table(report) if mode is opt.Mode.token else _bench_table(report))
    print_json(report)


def _tokens_table(report: dict[str, Any]) -> Table:
    device, first = report["device"], report["results"][0]
    title = f"{device['processor']}, {device['cores']} cores; ms, prompt of {first['prompt_tokens']} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("backend", "1st token", "token p50", "p99", "boundary p50", "tokens/s", "of limit"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for result in report["results"]:
        ms, boundary = result["token_ms"], result["boundary_ms"]
        table.add_row(
            result["backend"],
            f"{result['first_token_ms']['p50']:.1f}",
            *(f"{ms[name]:.2f}" if ms else "-" for name in ("p50", "p99")),
            f"{boundary['p50']:.2f} ({result['boundary_tokens']})" if boundary else "-",
            f"{result['tokens_per_s']:,.1f}",
            f"{result['roofline']['share']:.0%}" if result["roofline"] else "-",
        )
    return table


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
            f"{result['roofline']['share']:.0%}" if result["roofline"] else "-",
            size(rss["last"]),
        )
    return table


def compare(
    bundle: opt.Bundle,
    backend: Annotated[list[str], typer.Option(help="Two backends; the second is what the first is compared with.")],
    blocks: Annotated[int, typer.Option(help="Blocks of the closed loop.", min=1)] = 16,
    seed: opt.Seed = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Compare two backends over a closed loop, output by output; exit 6 where they disagree."""
    if len(backend) != 2:
        raise UsageError(f"compare needs --backend twice, got {len(backend)}")
    from famexport.compare import compare as compare_backends

    with stages(quiet) as report:
        found = compare_backends(
            bundle, (backend[0], backend[1]), blocks=blocks, seed=seed or 0, progress=report.one("backends")
        )
    if json:
        print_json(found)
    elif not quiet:
        a, b = found["backends"]
        table = Table(title=f"{a} against {b}, {found['blocks']} blocks", title_justify="left")
        for column in ("output", "max abs", "mean abs", "relative", "worst block"):
            table.add_column(column, justify="left" if column == "output" else "right")
        for name, value in found["outputs"].items():
            numbers = (f"{value[key]:.3g}" for key in ("max_abs", "mean_abs", "relative"))
            table.add_row(name, *numbers, str(value["worst_block"]))
        out.print(table)
    if not found["agree"]:
        worst = max(found["outputs"], key=lambda name: found["outputs"][name]["relative"])
        raise ParityError(
            f"{found['backends'][0]} and {found['backends'][1]} differ in {worst} by "
            f"{found['outputs'][worst]['relative']:.3g} (relative), allowed is {found['tolerance']:.3g}"
        )


def verify(
    bundle: opt.Bundle,
    backend: Annotated[str, typer.Option(help=opt.BACKENDS)] = "auto",
    report_row: Annotated[
        bool, typer.Option("--report", help="Print the row for docs/verified.md that this device has earned.")
    ] = False,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Check hashes and contract, then replay the golden rollout on this device."""
    from famexport.runtime.selftest import verify as verify_bundle

    with stages(quiet) as report:
        facts = verify_bundle(bundle, backend, progress=report.one("hashes"))
    if report_row:
        from famexport.runtime.selftest import report_line

        print(report_line(facts))
    elif json:
        print_json({"ok": True, **facts})
    elif not quiet:
        appended = f", by append_step {facts['append_error']:.2g}" if "append_error" in facts else ""
        out.print(
            f"{bundle}: {facts['files']} files, {size(facts['bytes'])}, hashes and contract good; golden rollout of "
            f"{facts['golden_blocks']} blocks on {facts['backend']}: logits {facts['logits_error']:.2g}, state "
            f"{facts['state_error']:.2g}{appended} (relative; allowed {facts['tolerance']:.2g})",
            markup=False,
        )
