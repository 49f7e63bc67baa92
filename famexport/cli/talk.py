"""Commands that stream: run, chat."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.live import Live

from famexport.cli import options as opt
from famexport.cli.output import err, out, print_facts, print_json, size, stages
from famexport.errors import InvalidInputError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from famexport.runtime.session import Session


def run(
    bundle: opt.Bundle,
    input: Annotated[
        str,
        typer.Option("--input", "-i", help="A text file, token ids (.npy or whitespace-separated), or - for stdin."),
    ] = "-",
    tokens: Annotated[
        bool, typer.Option("--tokens", help="The input is token ids, also where there is a tokenizer.")
    ] = False,
    generate: Annotated[int, typer.Option(help="Then generate up to N tokens, to stdout as they are made.", min=0)] = 0,
    temperature: opt.Temperature = 0.0,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    seed: opt.Seed = None,
    load_state: Annotated[Path | None, typer.Option(help="Go on from a state that --save-state wrote.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Write the state at the end to this file.")] = None,
    any_engine: Annotated[
        bool, typer.Option("--any-engine", help="Load a state that another backend or export computed, too.")
    ] = False,
    backend: Annotated[str, typer.Option(help=opt.BACKENDS)] = "auto",
    scores: Annotated[Path | None, typer.Option(help="Write one log-probability per token to this file.")] = None,
    threads: opt.Threads = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Stream a file or stdin of any length through a bundle, in constant memory; then generate, if asked to."""
    from famexport.chat_template import stop_ids
    from famexport.publish import staged_file
    from famexport.runtime.feeding import bundle_tokenizer, token_source
    from famexport.runtime.generate import Sampler, check_generates
    from famexport.runtime.score import RunReport, run_tokens, timed_tokens
    from famexport.runtime.session import load
    from famexport.runtime.snapshot import Snapshot
    from famexport.text import stream_text

    Sampler(temperature, top_k, top_p, seed)  # before hours of input, not after
    if save_state and not save_state.absolute().parent.is_dir():
        raise UsageError(
            f"no such directory: {save_state.absolute().parent}; make it first, or give another --save-state"
        )
    opt.check_outputs(save_state, scores)
    given = _stdin() if input == "-" else None
    saved = Snapshot.load(load_state) if load_state else None
    with load(bundle, backend, threads=threads) as session, session.stream() as stream:
        tokenizer: Tokenizer | None = None
        stop: Collection[int] = ()
        if generate:  # what can be said of it now, too
            check_generates(session.contract)
            tokenizer = bundle_tokenizer(session.bundle) if session.bundle.manifest.tokenizer else None
            stop = stop_ids(session.bundle, tokenizer) if tokenizer else ()
        if saved:
            stream.restore(saved, any_engine=any_engine)
        source = given.buffer if given else Path(input)
        ids = token_source(session.bundle, source, as_tokens=tokens)
        live = None if quiet or not err.is_terminal else Live(console=err, transient=True, refresh_per_second=4)

        def show(report: RunReport) -> None:
            guard("run", 0, 1)
            if live:
                live.update(_progress_line(report))

        with staged_file(scores) if scores else nullcontext() as write, live or nullcontext(), stages(True) as guard:
            report = run_tokens(session, ids, stream=stream, scores=write, progress=show)
            guard("run", 1, 1)  # raises an interrupt that a library has swallowed
        made: list[int] = []
        if generate:
            _note_slow(session)
            chosen = stream.generate(
                [], generate, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop
            )
            for shown in _shown(timed_tokens(report, chosen), made, None if tokens else tokenizer):
                if not json:
                    print(shown, end="", flush=True)
            if not json:
                print(flush=True)
        if save_state:
            stream.snapshot().save(save_state)
    if json:
        more = {"tokens_generated": made, "text": "".join(stream_text(tokenizer, made)) if tokenizer else None}
        print_json({"bundle": str(bundle), **report.to_dict(), **(more if generate else {})})
    elif not quiet:
        print_facts(f"{bundle} on {report.backend}", _run_facts(report), err if generate else out)


def _stdin() -> TextIO:
    if sys.stdin is None:  # as of ``famexport run BUNDLE <&-``
        raise UsageError(
            "stdin is closed, expected something to read there; redirect it, or give run a file with --input"
        )
    return sys.stdin


def _shown(chosen: Iterator[int], made: list[int], tokenizer: Tokenizer | None) -> Iterator[str]:
    """What to print of tokens as they come: text, or ids where there is no tokenizer. They are noted in ``made``."""
    from famexport.text import stream_text

    def noted() -> Iterator[int]:
        for token in chosen:
            made.append(token)
            yield token

    return stream_text(tokenizer, noted()) if tokenizer else (f"{token} " for token in noted())


def chat(
    bundle: opt.Bundle,
    system: Annotated[str | None, typer.Option(help="What to tell the model first.", show_default="its own")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after which an answer is cut short.", min=1)] = 256,
    temperature: opt.Temperature = 0.0,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    seed: opt.Seed = None,
    backend: Annotated[str, typer.Option(help=opt.BACKENDS)] = "auto",
    threads: opt.Threads = None,
    json: opt.Json = False,
) -> None:
    """Hold a conversation without end, in constant memory: a line in, an answer out, until the input ends."""
    from famexport.chat_template import chat_template, stop_ids
    from famexport.runtime.chat import Chat
    from famexport.runtime.feeding import bundle_tokenizer
    from famexport.runtime.session import load

    given = _stdin()
    with load(bundle, backend, threads=threads) as session, session.stream() as stream:
        tokenizer = bundle_tokenizer(session.bundle)
        template = chat_template(session.bundle)
        _note_slow(session)
        talk = Chat(stream, tokenizer, template, stop_ids(session.bundle, tokenizer), system)
        for message in _messages(given):
            pieces = []
            with _answer_may_be_cut():
                for piece in talk.say(
                    message, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
                ):
                    pieces.append(piece)
                    if not json:
                        print(piece, end="", flush=True)
            if json:
                print_json({"message": message, "answer": "".join(pieces), "blocks": stream.blocks})
            else:
                print(flush=True)


def _messages(given: TextIO) -> Iterator[str]:
    """Lines of ``given``, stdin, that say something; at a terminal with a prompt."""
    asks, number = given.isatty() and err.is_terminal, 0
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = given.buffer.readline()
        number += 1
        if not line:
            return
        try:  # not by the locale's rules: ``run`` takes UTF-8 everywhere, too
            message = line.decode().strip()
        except UnicodeDecodeError as exc:
            raise InvalidInputError(
                f"line {number} of the input: invalid UTF-8 at byte {exc.start}: {exc.reason}; give the text as UTF-8"
            ) from exc
        if message:
            yield message


@contextmanager
def _answer_may_be_cut() -> Iterator[None]:
    """At a terminal, Ctrl-C ends the answer and not the conversation."""
    try:
        yield
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise


def _note_slow(session: Session) -> None:
    if not session.contract.chunks:
        err.print("note: this bundle has block_step alone, so each token costs a block; export it with --graphs all")


def _progress_line(report: Any) -> str:
    loss = f"  loss {report.loss:.3f}" if report.loss is not None else ""
    return (
        f"{report.tokens:,} tokens  {report.tokens_per_s:,.0f} tokens/s{loss}  memory {size(report.rss_bytes['last'])}"
    )


def _run_facts(report: Any) -> dict[str, Any]:
    from famexport.runtime.score import SETTLED

    latency, rss = report.latency_ms, report.rss_bytes
    first = f"{size(rss['first'])} after the first block, " if report.tokens else ""
    settled = f"{size(rss['settled'])} after {SETTLED}, " if "settled" in rss else ""
    return {
        "tokens": f"{report.tokens:,} in {report.blocks:,} whole blocks of {report.block_size}",
        "loss": f"{report.loss:.4f} nats per token" if report.loss is not None else "-",
        "tokens_per_s": f"{report.tokens_per_s:,.1f}",
        "ms per block": f"p50 {latency['p50']:.2f}  p99 {latency['p99']:.2f}" if latency else "- (no whole block)",
        **({"generated": _generated_line(report)} if report.generated else {}),
        "state": f"{size(report.state_bytes)} ({report.precision})",
        "resident memory": f"{first}{settled}{size(rss['last'])} at the end",
    }


def _generated_line(report: Any) -> str:
    ms = report.token_ms
    return f"{report.generated:,} tokens, ms per token p50 {ms['p50']:.2f}  p99 {ms['p99']:.2f}"
