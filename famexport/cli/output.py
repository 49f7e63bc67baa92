"""How commands speak: progress and errors on stderr, results on stdout, one JSON object where it was asked for."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from famexport.errors import FamExportError


def printable(text: str, keep: str = "") -> str:
    """``text`` with what a terminal would obey, or not show, written as an escape: names out of files may hold it."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Plain(Console):
    """Every string, of a table's cells too, comes through ``render_str``."""

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(printable(text, keep="\n\t"), **options)


# Without markup: "famexport[cpu]", "[batch, 8]" and paths with brackets are printed as they are
err = _Plain(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
out = _Plain(soft_wrap=True, highlight=False, markup=False, emoji=False)


class Stdout:
    """``sys.stdout``, which says of what goes wrong that it went wrong there: the system's error names no file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.failed = stream, False

    def write(self, text: str) -> int:
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # no error: whoever reads has enough
            raise
        except OSError as exc:
            self.failed = True
            raise FamExportError(
                f"cannot write to stdout: {exc.strerror or exc}; make room there, or send it elsewhere"
            ) from exc


def drop(stream: TextIO) -> None:
    """Let what ``stream`` still holds go nowhere, or the interpreter complains of it while exiting."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:  # a stream may have no descriptor
        os.dup2(nowhere.fileno(), stream.fileno())


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(value, sort_keys=True), flush=True)


def print_facts(title: str, facts: Mapping[str, Any], console: Console | None = None) -> None:
    """A two-column table of plain values, on stdout unless another console is given."""
    columns = Column(), Column(overflow="fold")  # folded, not cut: an id is there to be copied
    table = Table(*columns, title=title, show_header=False, title_justify="left")
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), shown(key, value))
    (console or out).print(table)


def shown(key: str, value: Any) -> str:
    """A value for people: byte counts with a unit, lists and objects in one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int) and (key.endswith("bytes") or key == "bytes"):
        return size(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        inner = "bytes" if key == "files" else ""
        return "\n".join(f"{printable(k)}: {shown(inner or k, v)}" for k, v in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(printable(str(item)) for item in value) or "-"
    return printable(str(value))


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


class Stages:
    """A progress line per stage, made when the stage first reports."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._tasks = progress, dict[str, TaskID]()
        self._interrupted = False

    def interrupt(self, signum: int, frame: object) -> None:
        """Ctrl-C. Libraries swallow it now and then (a bare ``except`` at an import): then the next report raises."""
        self._interrupted = True
        raise KeyboardInterrupt

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        if self._progress is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def one(self, stage: str) -> Any:
        """A ``(done, total)`` callback for one stage."""
        return lambda done, total: self(stage, done, total)


@contextmanager
def stages(quiet: bool) -> Iterator[Stages]:
    """Progress on stderr while the block runs; none where ``quiet`` or stderr is no terminal."""
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = None if quiet or not err.is_terminal else Progress(*columns, console=err, transient=True)
    report = Stages(shown)
    before = signal.signal(signal.SIGINT, report.interrupt)
    try:
        with shown or nullcontext():
            yield report
    finally:
        signal.signal(signal.SIGINT, before)
