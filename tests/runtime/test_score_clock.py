"""Figures of a run whose times and memory are known, since the clock and the resident bytes are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from famexport.runtime import score
from famexport.runtime.score import SETTLED, RunReport, percentiles, run_tokens, timed_tokens


def test_a_tokens_time_begins_at_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times_ms = SimpleNamespace(now=7.0), [30.0, 10.0, 20.0, 40.0]
    monkeypatch.setattr(score, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def tokens() -> Iterator[int]:
        for token, ms in enumerate(times_ms):
            clock.now += ms / 1e3
            yield token

    report = RunReport("ort-cpu", "fp32", 8)
    assert [(token, report.generated) for token in timed_tokens(report, tokens())] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert report.token_ms == pytest.approx(percentiles(times_ms))


def test_memory_is_that_after_the_blocks_it_is_named_after(
    sessions: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at once after every block, and after the last piece of one; the most of it is in between."""
    given = [1000 + i for i in range(SETTLED + 3)]
    given[5] = 9000
    left = iter(given)
    monkeypatch.setattr(score, "rss_bytes", lambda: next(left))
    report = run_tokens(sessions("plain"), [np.arange(8 * (SETTLED + 2) + 3) % 96])
    assert report.rss_bytes == {"first": given[0], "settled": given[SETTLED - 1], "last": given[-1], "max": 9000}
    assert list(left) == []
