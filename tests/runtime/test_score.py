"""``run_tokens``: the loss and the scores are those of a plain log-softmax over all logits; the figures are what they say."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import random_cuts, random_input

from famexport.errors import ContractError, InvalidInputError, UsageError
from famexport.runtime.feeding import token_source
from famexport.runtime.score import SETTLED, log_probabilities, percentiles, run_tokens


def plain_log_probabilities(session: Any, ids: np.ndarray) -> np.ndarray:
    """log p of every token but the first, from whole blocks that end in padding: nothing streamed, nothing shared."""
    size = session.contract.block_size
    padded = np.concatenate([ids, np.zeros(-len(ids) % size, np.int64)])
    with session.stream() as stream:
        logits = np.concatenate([stream.step(block[None])[0] for block in padded.reshape(-1, size)])
    wide = logits[: len(ids) - 1].astype(np.float64)
    normal = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return normal[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("backend", ["ort-cpu", "torch"])
@pytest.mark.parametrize("count", [2, 7, 8, 9, 16, 100, 161])
def test_loss_and_scores(sessions: Callable[..., Any], count: int, backend: str) -> None:
    session = sessions("plain", backend)
    ids = random_input(session.contract, count, seed=count)[0]
    wanted = plain_log_probabilities(session, ids)
    written = io.BytesIO()
    report = run_tokens(session, [ids], scores=lambda data: written.write(data) and None)
    assert report.loss == pytest.approx(-wanted.mean(), abs=1e-5)
    assert (report.tokens, report.blocks) == (count, count // 8)
    lines = written.getvalue().decode().splitlines()
    assert len(lines) == count
    assert lines[0] == "nan"
    assert not any(line == "nan" for line in lines[1:])
    scores = np.array([float(line) for line in lines[1:]])
    assert np.abs(scores - wanted).max() < 1e-5
    assert report.loss == pytest.approx(-scores.mean(), abs=1e-6)


def test_pieces_do_not_matter(sessions: Callable[..., Any]) -> None:
    session = sessions("plain")
    fed = random_input(session.contract, 203, seed=1)
    results = set()
    for seed in range(5):
        written = io.BytesIO()
        pieces = [piece[0] for piece in random_cuts(fed, seed)]
        report = run_tokens(session, iter(pieces), scores=lambda data, to=written: to.write(data) and None)
        results.add((report.loss, report.tokens, report.blocks, written.getvalue()))
    assert len(results) == 1


@pytest.mark.parametrize(("count", "blocks"), [(1, 0), (7, 0), (8, 1), (9, 1), (15, 1), (16, 2)])
def test_latency_is_of_whole_blocks_only(
    sessions: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, count: int, blocks: int
) -> None:
    from famexport.runtime import score

    counted: list[list[float]] = []
    monkeypatch.setattr(score, "percentiles", lambda samples: counted.append(list(samples)) or percentiles(samples))
    report = run_tokens(sessions("plain"), [np.arange(count)])
    assert report.blocks == blocks == len(counted[0])
    assert report.tokens == count
    assert set(report.latency_ms) == ({"p50", "p90", "p99", "max"} if blocks else set())
    assert report.loss is None if count == 1 else report.loss > 0
    assert report.tokens_per_s > 0
    if blocks:
        assert report.latency_ms["max"] == pytest.approx(max(counted[0]) * 1e3)


def test_percentiles() -> None:
    assert percentiles([]) == {}
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0, "max": 3.0}
    found = percentiles([float(i) for i in range(101)][::-1])
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}


def test_log_probabilities_of_large_logits() -> None:
    """Where exp overflows float32, and for more rows than are done at once."""
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((50, 9)) * 100 + 1000).astype(np.float32)
    targets = rng.integers(0, 9, 50)
    with np.errstate(all="raise", under="ignore"):
        got = log_probabilities(logits, targets)
    for row in range(50):
        values = [float(value) for value in logits[row]]
        total = math.fsum(math.exp(value - max(values)) for value in values)
        assert got[row] == pytest.approx(values[targets[row]] - max(values) - math.log(total), abs=1e-4)
    assert log_probabilities(logits[:0], targets[:0]).shape == (0,)


def test_progress_and_report(sessions: Callable[..., Any]) -> None:
    session = sessions("plain")
    seen = []
    report = run_tokens(session, [np.arange(44) % 96], progress=lambda r: seen.append((r.tokens, r.blocks, r.loss)))
    assert [tokens for tokens, _, _ in seen] == [8, 16, 24, 32, 40, 44]
    assert [blocks for _, blocks, _ in seen] == [1, 2, 3, 4, 5, 5]
    assert seen[-1][2] == report.loss
    data = report.to_dict()
    assert set(data) == {
        "backend",
        "precision",
        "block_size",
        "tokens",
        "blocks",
        "loss",
        "tokens_per_s",
        "latency_ms",
        "state_bytes",
        "rss_bytes",
        "generated",
        "token_ms",
    }
    assert (data["generated"], data["token_ms"]) == (0, {})
    assert (data["backend"], data["precision"], data["block_size"]) == ("ort-cpu", "fp32", 8)
    assert data["state_bytes"] == session.contract.state_bytes()
    assert 2**20 < data["rss_bytes"]["first"] <= data["rss_bytes"]["max"]
    assert data["rss_bytes"]["last"] <= data["rss_bytes"]["max"]
    assert set(data["rss_bytes"]) == {"first", "last", "max"}  # too few blocks to have settled


def test_memory_is_looked_at_again_when_it_has_settled(sessions: Callable[..., Any]) -> None:
    seen = {}
    size = 8 * SETTLED + 20
    report = run_tokens(
        sessions("plain"), [np.arange(size) % 96], progress=lambda r: seen.setdefault(r.blocks, r.rss_bytes["last"])
    )
    assert report.rss_bytes["first"] == seen[1]
    assert report.rss_bytes["settled"] == seen[SETTLED]
    assert len(seen) == SETTLED + 2


def test_last_logits_have_no_loss(sessions: Callable[..., Any]) -> None:
    report = run_tokens(sessions("last"), [np.arange(20)])
    assert (report.tokens, report.blocks, report.loss) == (20, 2, None)
    with pytest.raises(UsageError, match="scores need the logits of every token; export with --logits all"):
        run_tokens(sessions("last"), [np.arange(20)], scores=lambda data: None)


@pytest.mark.parametrize("ids", [[], [np.zeros(0, np.int64)]])
def test_no_new_tokens_for_a_stream_that_goes_on(sessions: Callable[..., Any], ids: list[np.ndarray]) -> None:
    session = sessions("plain")
    with session.stream() as stream:
        list(stream.feed([np.arange(11)]))
        report = run_tokens(session, ids, stream=stream)
        assert stream.held == 3
    assert (report.tokens, report.blocks, report.loss, report.tokens_per_s) == (0, 0, None, 0)
    memory = report.rss_bytes
    assert set(memory) == {"first", "last", "max"}
    assert memory["first"] == memory["last"] == memory["max"] > 2**20


@pytest.mark.parametrize("ids", [[], [np.zeros(0, np.int64)]])
def test_no_tokens(sessions: Callable[..., Any], ids: list[np.ndarray]) -> None:
    with pytest.raises(InvalidInputError, match="the input is empty; expected at least one token"):
        run_tokens(sessions("plain"), ids)


def test_bundles_that_cannot_be_run(sessions: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="takes inputs_embeds: float32 .*, not tokens"):
        run_tokens(sessions("embeds"), [np.arange(8)])
    with pytest.raises(UsageError, match="has a batch of 3; export with --batch 1"):
        run_tokens(sessions("rows"), [np.arange(8)])
    assert run_tokens(sessions("dynamic"), [np.arange(8)]).blocks == 1


@pytest.mark.parametrize("ids", [[0.5, 1.5], [True, False], [[1, 2]], [[1]], 3])
def test_ids_that_are_no_ids(sessions: Callable[..., Any], ids: Any) -> None:
    """Not rounded, not broadcast."""
    with pytest.raises(ContractError, match=r"token ids are .*, expected integers \[n\]"):
        run_tokens(sessions("plain"), [np.array(ids)])


def test_ids_outside_the_vocabulary(sessions: Callable[..., Any]) -> None:
    for wrong in (96, -1):
        for at in (0, 9):
            ids = np.zeros(12, np.int64)
            ids[at] = wrong
            with pytest.raises(ContractError, match=f"token id {wrong} is not in the vocabulary"):
                run_tokens(sessions("plain"), [ids])


def test_token_source(sessions: Callable[..., Any], tmp_path: Path) -> None:
    bundle, text = sessions("plain").bundle, sessions("text").bundle
    (tmp_path / "ids.txt").write_text("1 2\n3")
    np.save(tmp_path / "ids.npy", np.array([4, 5]))
    (tmp_path / "words.txt").write_text("a stone falls xyz")

    def ids(*args: Any, **options: Any) -> list[int]:
        return [int(i) for piece in token_source(*args, **options) for i in piece]

    assert ids(bundle, tmp_path / "ids.txt") == ids(text, tmp_path / "ids.txt", as_tokens=True) == [1, 2, 3]
    assert ids(bundle, tmp_path / "ids.npy") == ids(text, tmp_path / "ids.npy") == [4, 5]
    assert ids(bundle, io.BytesIO(b"7 8")) == [7, 8]
    words = ids(text, tmp_path / "words.txt")
    assert len(words) == 4
    assert words[-1] == 0  # <unk>
    assert ids(text, io.BytesIO(b"a stone falls xyz")) == words
    with pytest.raises(UsageError, match="no such file"):
        ids(bundle, tmp_path / "none")
    with pytest.raises(UsageError, match="cannot read .*directory"):
        ids(bundle, tmp_path)
    with pytest.raises(InvalidInputError, match="text where token ids are expected: 'a'"):
        ids(bundle, tmp_path / "words.txt")
    (tmp_path / "ids.txt").write_text("1 " * 9 + "96 97")
    with pytest.raises(InvalidInputError, match="token id 96 at position 9 is outside the vocabulary of 96"):
        ids(bundle, tmp_path / "ids.txt")
