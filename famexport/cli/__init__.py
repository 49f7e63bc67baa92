"""The command line. Each command parses its options, calls one library function and prints what it gives.

Exit codes: 0 fine, 2 usage, 3 invalid or damaged input, 4 untrusted, 5 wrong device or version, 6 numeric, 1 anything
else. An error is one line; ``--debug`` adds the traceback.
"""

from __future__ import annotations

import sys
from typing import Annotated, TextIO, cast

import typer

from famexport.errors import FamExportError, MissingDependencyError, first_line

_INTERRUPTED = 130
app = typer.Typer(
    name="famexport",
    help="Put a TransformerFAM model on a device: export one block step to ONNX, loop it in constant memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        from famexport import __version__

        print(f"famexport {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works at any place.")] = False,
) -> None:
    pass


def _register() -> None:
    from famexport.cli import engines, look, make, talk, use

    makers = make.init, make.convert, make.export, engines.build, engines.kernels
    for command in (*makers, talk.run, talk.chat, use.bench, use.compare, use.verify, look.inspect, look.doctor):
        app.command()(command)
    app.add_typer(engines.recipe, name="recipe")


_register()


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    sys.exit(_run(arguments, debug))


def _say(error: FamExportError) -> int:
    _print_error(" ".join(str(error).splitlines()))
    return error.exit_code


def _print_error(line: str) -> None:
    from famexport.cli.output import printable

    print(f"error: {printable(line)}", file=sys.stderr)  # it may quote a file, and so a terminal's commands


def _missing_package(exc: Exception) -> MissingDependencyError | None:
    """What makes artifacts imports its packages without asking first; a device need not have them."""
    from famexport.doctor import PARTS

    package = (getattr(exc, "name", None) or "").partition(".")[0].replace("_", "-")
    if not isinstance(exc, ImportError) or package not in PARTS:
        return None
    return MissingDependencyError(package, PARTS[package][0], "this command")


def _run(arguments: list[str], debug: bool) -> int:
    from famexport.cli.output import Stdout, drop

    if (before := sys.stdout) is None:  # as of ``famexport inspect BUNDLE >&-``
        return _run_command(arguments, debug)
    ours = Stdout(before)
    sys.stdout = wrapped = cast(TextIO, ours)
    try:
        return _run_command(arguments, debug)
    finally:
        if ours.failed:
            drop(before)
        if sys.stdout is wrapped:  # else it is what Typer puts there once nobody reads on
            sys.stdout = before


def _call(arguments: list[str]) -> int:
    try:
        app(arguments, standalone_mode=True)
        code = 0
    except SystemExit as exc:  # Typer's own: help, usage errors, typer.Exit
        if exc.code == _INTERRUPTED:  # Typer turns Ctrl-C into this code, and says nothing
            print("interrupted; nothing was left half-written", file=sys.stderr)
        code = exc.code if isinstance(exc.code, int) else 0 if exc.code is None else 1
    if code == 0 and sys.stdout is not None:
        sys.stdout.flush()  # now: what fails while the interpreter exits is not said in our words
    return code


def _run_command(arguments: list[str], debug: bool) -> int:
    try:
        return _call(arguments)
    except BrokenPipeError:
        from famexport.cli.output import drop

        drop(sys.stdout)
        return 0
    except FamExportError as exc:
        if debug:
            raise
        return _say(exc)
    except MemoryError:
        if debug:
            raise
        print("error: out of memory; use a smaller model, block or batch, or a lower precision", file=sys.stderr)
        return 1
    except Exception as exc:
        if debug:
            raise
        if missing := _missing_package(exc):
            return _say(missing)
        _print_error(f"{type(exc).__name__}: {first_line(exc)} (run again with --debug for the traceback)")
        return 1
