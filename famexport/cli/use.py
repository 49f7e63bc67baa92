"""Commands that measure and check bundles: bench, compare, verify."""

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
    paced: Annotated[
        float | None,
        typer.Option(
            help="Also measure blocks that come every so many milliseconds.", metavar="MS", show_default="not"
        ),
    ] = None,
    threads: opt.Threads = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Write every sample in ms to this file: CSV if it ends with .csv, else JSON.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as a page with charts.")] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Latency of each block or token, memory, share of the hardware's limit; the last line of stdout is JSON."""
    from famexport.bench.files import check_plotly, html_page, samples_file
    from famexport.bench.measure import bench as measure
    from famexport.bench.tokens import bench_tokens
    from famexport.publish import write_output

    opt.check_outputs(json, samples, html)
    if html:
        check_plotly()
    if paced is not None and mode is opt.Mode.token:
        raise UsageError("--paced is about whole blocks; leave out --mode token, or --paced")
    with stages(quiet) as report_stage:
        progress = report_stage.one("tokens" if mode is opt.Mode.token else "blocks")
        if mode is opt.Mode.token:
            report, raw = bench_tokens(
                bundle, backend or (), tokens=tokens, prompt=prompt, threads=threads, progress=progress
            )
        else:
            report, raw = measure(
                bundle, backend or (), blocks=blocks, paced_ms=paced, threads=threads, progress=progress
            )
    if json:
        write_output(json, json_module.dumps(report, sort_keys=True).encode() + b"\n")
    if samples:
        write_output(samples, samples_file(samples, raw))
    if html:
        write_output(html, html_page(report, raw))
    if not quiet:
        out.print(_tokens_table(report) if mode is opt.Mode.token else _bench_table(report))
        if more := _more_table(report):
            out.print(more)
    print_json(report)


def _table(title: str | None, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "backend" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _machine(report: dict[str, Any]) -> str:
    device, gpu = report["device"], report.get("gpu", {}).get("name")
    kernels = next((result["kernels"] for result in report["results"] if result["kernels"]), None)  # of ort-cuda
    parts = f"{device['processor']}, {device['cores']} cores", gpu, kernels and f"kernels: {kernels}"
    return ", ".join(part for part in parts if part)


def _share(result: dict[str, Any]) -> str:
    return f"{result['roofline']['share']:.0%}" if result["roofline"] else "-"


def _tokens_table(report: dict[str, Any]) -> Table:
    rows = []
    for result in report["results"]:
        ms, boundary = result["token_ms"], result["boundary_ms"]
        row = [
            result["backend"],
            f"{result['first_token_ms']['p50']:.1f}",
            *(f"{ms[name]:.2f}" if ms else "-" for name in ("p50", "p99")),
            f"{boundary['p50']:.2f} ({result['boundary_tokens']})" if boundary else "-",
            f"{result['tokens_per_s']:,.1f}",
            _share(result),
        ]
        rows.append(row)
    title = f"{_machine(report)}; ms, prompt of {report['results'][0]['prompt_tokens']} tokens"
    return _table(title, ["backend", "1st token", "token p50", "p99", "boundary p50", "tokens/s", "of limit"], rows)


def _bench_table(report: dict[str, Any]) -> Table:
    rows = []
    for result in report["results"]:
        ms = result["latency_ms"]
        row = [
            result["backend"],
            *(f"{ms[name]:.2f}" for name in ("p50", "p90", "p99", "max")),
            f"{result['tokens_per_s']:,.0f}",
            _share(result),
            size(result["rss_bytes"]["last"]),
        ]
        rows.append(row)
    columns = ["backend", "p50 ms", "p90", "p99", "max", "tokens/s", "of the limit", "memory"]
    return _table(_machine(report), columns, rows)


def _more_table(report: dict[str, Any]) -> Table | None:
    """What only GPUs have, and blocks at a pace: a table of its own, or the first would not fit into 80 columns."""
    results = report["results"]
    columns: dict[str, list[str]] = {"backend": [result["backend"] for result in results]}
    for title, key in (("device p50 ms", "device_ms"), ("at boundary", "boundary_device_ms")):
        if any(result.get(key) for result in results):
            columns[title] = [f"{result[key]['p50']:.2f}" if result[key] else "-" for result in results]
    rates = [result.get("throughput_tokens_per_s") for result in results]
    if any(rates):
        columns["back to back tokens/s"] = [f"{rate:,.0f}" if rate else "-" for rate in rates]
    if all(result.get("paced") for result in results):
        paced = [result["paced"] for result in results]
        columns[f"every {paced[0]['period_ms']:g} ms: p50"] = [f"{each['latency_ms']['p50']:.2f}" for each in paced]
        columns["p99"] = [f"{each['latency_ms']['p99']:.2f}" for each in paced]
        columns["late"] = [f"{each['late']} of {each['blocks']}" for each in paced]
    if len(columns) == 1:
        return None
    return _table(None, list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def compare(
    bundle: opt.Bundle,
    backend: Annotated[list[str], typer.Option(help="Two backends; the second is what the first is compared with.")],
    blocks: Annotated[int, typer.Option(help="Blocks of the closed loop.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the random input.", min=0)] = 0,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Compare two backends over a closed loop, output by output; exit 6 where they disagree."""
    if len(backend) != 2:
        raise UsageError(f"compare needs --backend twice, got {len(backend)}")
    from famexport.compare import compare as compare_backends

    with stages(quiet) as report:
        found = compare_backends(
            bundle, (backend[0], backend[1]), blocks=blocks, seed=seed, progress=report.one("backends")
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
