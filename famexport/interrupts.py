"""Ctrl-C between steps, not within one: what was computed and what is said of it change together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[Sequence[Any]]:
    """Put off Ctrl-C until the block is left; then it comes. Only the main thread is ever interrupted.

    Yields what grows by one with each that is waiting, for whoever would wait long.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield ()
        return
    waiting: list[tuple[int, Any]] = []

    def put_off(*about: Any) -> None:
        waiting.append(about)

    signal.signal(signal.SIGINT, put_off)
    try:
        yield waiting
    finally:
        if signal.getsignal(signal.SIGINT) is put_off:  # or else someone set another meanwhile
            signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[-1])
