"""How many keys an exported bundle still knows after streams of some lengths, through ``famexport.load`` alone.

    python -m samples.passkey.evaluate BUNDLE --length 1024 --length 65536 --keys 50 --seed 1

The key is said in the first block, the question comes at the end; filler and keys come from the seed. The right answer
is fed while it is asked for: an answer is exact under that if and only if it is exact when generated greedily.
``--sabotage zero`` clears FAM after every block; ``--sabotage hold`` puts a block of filler first and never feeds
``present_fam`` back after that: a memory that is one must be lost by either. Needs no torch. The last line of stdout is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import famexport as fx
from famexport.errors import exit_on_error
from famexport.publish import write_output
from famexport.runtime.feeding import bundle_tokenizer
from famexport.runtime.process import device_facts, rss_bytes, versions
from famexport.text import token_ids
from samples.passkey.task import DIGITS, FILLERS, FORMS, Exam, Ids, Task

LENGTHS = (1_024, 4_096, 16_384, 65_536, 262_144)
FEWER_FROM, FEWER = 200_000, 20  # keys at such lengths
ROWS = 10  # side by side, where the bundle's batch is dynamic


def bundle_task(session: fx.Session, form: str) -> Task:
    """The task in the tokens of a bundle's tokenizer; bytes where each byte is one."""
    tokenizer = bundle_tokenizer(session.bundle)
    size = tokenizer.get_vocab_size()
    plain = size == 256 and token_ids(tokenizer, "Az 09.\n") == list(b"Az 09.\n")
    return Task(form, None if plain else lambda text: token_ids(tokenizer, text))


def answered(session: fx.Session, exam: Exam, sabotage: str | None = None) -> tuple[Ids, dict[str, Any]]:
    """What the bundle answers [n, DIGITS], and how its state and memory fared.

    Args:
        exam: as many streams as the bundle's batch, or any number where that is dynamic.
    """
    size, count = session.contract.block_size, len(exam.begins)
    dynamic = isinstance(session.contract.batch, str)
    found: Ids = np.full((count, DIGITS), -1, np.int64)
    places = exam.places
    logits = np.empty((count, size, session.contract.vocab_size), np.float32)
    facts: dict[str, Any] = {}
    with session.stream(count if dynamic else None) as stream:
        held: dict[str, Any] = {}
        for k in range(exam.tokens.shape[1] // size):
            stream.step(np.ascontiguousarray(exam.tokens[:, k * size : (k + 1) * size]), logits)
            rows, digits = np.nonzero(places // size == k)
            found[rows, digits] = logits[rows, places[rows, digits] % size].argmax(-1)
            if k == 0:
                facts["rss_bytes_first"] = rss_bytes()
            if sabotage:
                state = stream.state()
                fam = {name: past for name, past in state.items() if name.startswith("past_fam")}
                held = held or (fam if sabotage == "hold" else {n: np.zeros_like(p) for n, p in fam.items()})
                stream.load_state({**state, **held})
        state = stream.state()
    facts |= {"rss_bytes_last": rss_bytes(), "state_bytes": session.contract.state_bytes()}
    return found, {**facts, "fam_norm": [round(norm, 1) for norm in fam_norms(state)]}


def fam_norms(state: Mapping[str, NDArray[Any]]) -> list[float]:
    """The L2 norm of a FAM vector, on average, layer by layer."""
    return [float(np.linalg.norm(state[n], axis=-1).mean()) for n in sorted(state) if n.startswith("past_fam")]


def measure(
    session: fx.Session, task: Task, kind: str, length: int, keys: int, seed: int, sabotage: str | None = None
) -> dict[str, Any]:
    """Recall of one length."""
    size = session.contract.block_size
    exam = task.exam(kind, length, keys, seed, size)
    if sabotage == "hold":  # what is held is the FAM of a block without the key
        before = np.stack([task.filler(kind, "test", size, seed + i) for i in range(keys)])
        exam = Exam(np.concatenate([before, exam.tokens], 1), exam.begins + size, exam.answers)
    fixed = session.contract.batch
    rows = min(ROWS, keys) if isinstance(fixed, str) else fixed
    began, found, facts = time.monotonic(), [], {}
    for first in range(0, keys, rows):
        take = np.arange(first, first + rows) % keys  # what is one too many is dropped below
        part, facts = answered(session, Exam(exam.tokens[take], exam.begins[take], exam.answers[take]), sabotage)
        found.append(part)
    right = np.concatenate(found)[:keys] == exam.answers
    return {
        "filler": kind,
        "tokens": length,
        "keys": keys,
        "exact": float(right.all(1).mean()),
        "digits": float(right.mean()),
        "seconds": round(time.monotonic() - began, 1),
        **facts,
    }


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument(
        "--length", type=int, action="append", help=f"tokens; {', '.join(map(str, LENGTHS))} unless given"
    )
    parser.add_argument("--keys", type=int, help=f"a length; 50 unless given, {FEWER} from {FEWER_FROM:,} tokens on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--form", choices=FORMS, default="text")
    parser.add_argument("--filler", choices=FILLERS, action="append", help="docs unless given")
    parser.add_argument("--sabotage", choices=("zero", "hold"))
    parser.add_argument("--backend", default="ort-cpu")
    parser.add_argument("--out", type=Path, help="the report, JSON, written after every result")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> dict[str, Any]:
    options = arguments(words)
    results: list[dict[str, Any]] = []
    report = {**about(options), "sabotage": options.sabotage, "results": results}
    for path in options.bundles:
        with fx.load(path, backend=options.backend) as session:
            task = bundle_task(session, options.form)
            fam_length = (session.bundle.manifest.config or {}).get("fam_length", "?")
            for length in options.length or LENGTHS:
                keys = options.keys or (FEWER if length >= FEWER_FROM else 50)
                for kind in options.filler or ["docs"]:
                    line = measure(session, task, kind, length, keys, options.seed, options.sabotage)
                    results.append({"bundle": path.name, "precision": session.bundle.manifest.precision, **line})
                    print(
                        f"{path.name} F={fam_length} {kind} {length:,} tokens, {keys} keys: "
                        f"{line['exact']:.0%} exact, {line['digits']:.0%} of digits, {line['seconds']:.0f} s",
                        flush=True,
                    )
                    save(report, options.out)
    print(json.dumps(report, sort_keys=True))
    return report


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What every report says of its run."""
    said = {name: getattr(options, name) for name in ("seed", "form", "backend")}
    return {**said, "device": device_facts(), "versions": versions()}


def save(report: dict[str, Any], out: Path | None) -> None:
    """The report to a file, where one is wanted."""
    if out:
        write_output(out, json.dumps(report, indent=1).encode() + b"\n")


if __name__ == "__main__":
    with exit_on_error():
        main()
