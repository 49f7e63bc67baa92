"""Which chunks a block is made of: whatever is published was run (R12)."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from famexport.runtime.chunks import chunk_plan


def plan(block_size: int, *chunks: int) -> list[tuple[int, int]]:
    contract: Any = SimpleNamespace(block_size=block_size, chunks=chunks)
    return chunk_plan(contract)


@pytest.mark.parametrize(
    ("block_size", "chunks", "wanted"),
    [
        (8, (1, 3), [(1, 1), (3, 3), (3, 3), (1, 1)]),
        (8, (8,), [(8, 8)]),
        (8, (4, 8), [(4, 4), (8, 4)]),
        (8, (1, 7, 8), [(1, 1), (7, 6), (8, 1)]),
        (3, (1, 2, 3), [(1, 1), (2, 1), (3, 1)]),
        (64, (1, 16), [(1, 1), (16, 16), (16, 16), (16, 16), (16, 15)]),
        (1, (1,), [(1, 1)]),
    ],
)
def test_plans(block_size: int, chunks: tuple[int, ...], wanted: list[tuple[int, int]]) -> None:
    assert plan(block_size, *chunks) == wanted


def test_every_width_is_run_and_a_block_is_filled() -> None:
    rng = random.Random(0)
    for _ in range(500):
        size = rng.randint(1, 40)
        chunks = sorted(rng.sample(range(1, size + 1), rng.randint(1, min(size, 6))))
        made = plan(size, *chunks)
        assert {width for width, _ in made} == set(chunks)
        assert sum(count for _, count in made) == size
        assert all(1 <= count <= width for width, count in made)
