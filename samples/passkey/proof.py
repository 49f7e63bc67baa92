"""The memory proof of `make demo`: a key hidden at the start of a long text and asked for at its end.

The two checkpoints in this folder have the same sizes and were trained the same way, one with FAM and no cached block,
the other with F=0 and one cached block. Both are exported here, and both read the text through ``famexport run``.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from samples.passkey.task import DIGITS, Task

CHECKPOINTS = Path(__file__).parent / "checkpoints"
TOKENS, BLOCK = 52_000, 1024
PARITY_BLOCKS = 32
Command = Callable[..., list[dict[str, Any]]]


def prove(famexport: Command, folder: Path, say: Callable[[str], Any]) -> dict[str, Any]:
    """Hide a key nobody knows beforehand, and ask both for it.

    Args:
        famexport: runs a command and gives its lines of JSON.
        folder: where bundles and the text go.
    """
    key = np.array([secrets.randbelow(10) for _ in range(DIGITS)], np.int64)
    hidden, text = "".join(map(str, key)), folder / "passkey.txt"
    text.write_bytes(bytes(Task("text").episode("docs", TOKENS, key, secrets.randbelow(2**31), BLOCK).astype(np.uint8)))
    say(f"the key {hidden} is said in the first {BLOCK:,} of {TOKENS:,} tokens, and asked for after the last")
    results = []
    for name in ("fam", "bswa"):
        bundle = folder / f"passkey-{name}"
        (exported,) = famexport(
            "export", CHECKPOINTS / name, "-o", bundle, "--parity-blocks", PARITY_BLOCKS, "--quiet", "--json"
        )
        (run,) = famexport("run", bundle, "--input", text, "--generate", DIGITS, "--quiet", "--json")
        results.append({"model": name, "right": run["text"] == hidden, "parity": exported["worst_error"], **run})
    for r in results:
        kind = "FAM, no cached block" if r["model"] == "fam" else "no FAM, one cached block"
        say(
            f"  {kind}: answers {r['text']!r}, which is {'right' if r['right'] else 'wrong'}; "
            f"state {r['state_bytes'] / 1e6:.2f} MB, {r['latency_ms']['p50']:.0f} ms a block of {BLOCK:,}"
        )
    return {"key": hidden, "tokens": TOKENS, "results": results}
