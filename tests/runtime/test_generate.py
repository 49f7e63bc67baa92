"""Generated tokens are the reference's; whatever was given is in the state; draws follow the probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import same_state

import famexport as fx
from famexport.errors import ContractError, UsageError
from famexport.export.source import float32_model
from famexport.runtime.generate import Sampler, check_generates

Sessions = Callable[..., Any]


def reference(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by block steps of the float32 model alone: the open block is computed anew for every token."""
    model = float32_model(fx.open_checkpoint(checkpoint))
    size = model.config.block_size
    states = model.contract().states
    state = {s.name: torch.zeros(s.sized(1), dtype=getattr(torch, s.dtype)) for s in states}
    ids, opened = list(prompt), 0
    while len(ids) < len(prompt) + count:
        while len(ids) - opened > size:  # the block of the last token stays open
            _, state = model.step(torch.tensor([ids[opened : opened + size]]), state)
            opened += size
        tail = ids[opened:]
        logits, _ = model.step(torch.tensor([tail + [0] * (size - len(tail))]), state)
        ids.append(int(logits[0, len(tail) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("backend", ["ort-cpu", "torch"])
@pytest.mark.parametrize("name", ["all", "all_last", "plain"])
def test_greedy_tokens_are_the_references(
    sessions: Sessions, checkpoints: Callable[[str], Path], name: str, backend: str
) -> None:
    for length in (1, 7, 8, 9, 21):
        prompt = np.random.default_rng(length).integers(0, 96, length).tolist()
        with sessions(name, backend).stream() as stream:
            assert list(stream.generate(prompt, 30)) == reference(checkpoints(name), prompt, 30), length


@pytest.mark.parametrize("name", ["all", "plain", "all_last"])
@pytest.mark.parametrize("taken", [0, 1, 5, 9])
def test_what_was_given_is_in_the_state(sessions: Sessions, name: str, taken: int) -> None:
    """Whether the caller breaks off, closes the iterator or lets it end."""
    session, prompt = sessions(name), [5, 6, 7]
    for count in (9, taken):
        with session.stream() as stream, session.stream() as fed:
            tokens = stream.generate(prompt, count)
            given = [next(tokens) for _ in range(taken)]
            if count == taken:
                assert list(tokens) == []
            tokens.close()
            list(fed.feed([np.array(prompt)]))
            for token in given:
                list(fed.feed([np.array([token])]))
            assert same_state(stream, fed)
            assert stream.held == fed.held == (3 + taken) % 8
            assert list(stream.generate([], 6)) == list(fed.generate([], 6))


def test_stop(sessions: Sessions) -> None:
    session = sessions("all")
    with session.stream() as stream:
        free = list(stream.generate([5, 6, 7], 20))
    end = free[6]
    first = free.index(end)
    with session.stream() as stream, session.stream() as fed:
        tokens = stream.generate([5, 6, 7], 20, stop={end})
        given = [next(tokens) for _ in range(first)]
        with pytest.raises(StopIteration) as stopped:
            next(tokens)
        assert stopped.value.value == end
        assert given == free[:first]
        for token in [5, 6, 7, *given, end]:
            list(fed.feed([np.array([token])]))
        assert stream.held == fed.held
        assert np.allclose(stream.last_logits, fed.last_logits, rtol=1e-4, atol=1e-4)  # the prompt went in one chunk


def test_generation_goes_on(sessions: Sessions) -> None:
    session = sessions("all")
    with session.stream() as whole, session.stream() as parts:
        wanted = list(whole.generate([1, 2], 30))
        got = list(parts.generate([1, 2], 11))
        saved = parts.snapshot()
        got += list(parts.generate([], 19))
        assert got == wanted
        parts.restore(saved)  # the last logits are part of it
        assert list(parts.generate([], 19)) == wanted[11:]


def test_seeds(sessions: Sessions) -> None:
    def drawn(**options: Any) -> list[int]:
        with sessions("all").stream() as stream:
            return list(stream.generate([1, 2, 3], 25, **options))

    assert drawn(temperature=1.0, seed=4) == drawn(temperature=1.0, seed=4) != drawn(temperature=1.0, seed=5)
    assert drawn(temperature=3.0, top_k=1, seed=1) == drawn()
    assert drawn(temperature=1e-6, seed=1) == drawn()
    assert drawn(temperature=2.0, top_p=1e-9, seed=1) == drawn()


LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.05, 0.2], np.float32))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.4, 0.05, 0.3, 0.05, 0.2]),
        ({"temperature": 0.5}, [0.16 / 0.295, 0.0025 / 0.295, 0.09 / 0.295, 0.0025 / 0.295, 0.04 / 0.295]),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"top_p": 0.7}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 0, 3 / 9, 0, 2 / 9]),
        ({"top_p": 1.0}, [0.4, 0.05, 0.3, 0.05, 0.2]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"top_k": 99}, [0.4, 0.05, 0.3, 0.05, 0.2]),
    ],
)
def test_draws_follow_the_probabilities(options: dict[str, Any], wanted: list[float]) -> None:
    """20,000 draws; 0.015 is more than four standard deviations of any of these frequencies."""
    sampler, n = Sampler(**{"temperature": 1.0, "seed": 0, **options}), 20_000
    counts = Counter(sampler(LOGITS) for _ in range(n))
    for token, probability in enumerate(wanted):
        assert abs(counts[token] / n - probability) < 0.015
        assert (counts[token] == 0) == (probability == 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1}, "temperature must be 0 or more, got -1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"seed": -1, "top_k": -2}, "2 problems"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, got -1"),
    ],
)
def test_options_out_of_range_are_refused_at_once(sessions: Sessions, options: dict[str, Any], says: str) -> None:
    with sessions("all").stream() as stream, sessions("all").stream() as untouched:
        with pytest.raises(UsageError, match=says):
            stream.generate([1], **{"max_new_tokens": 3, **options})  # not when the first token is asked for
        assert same_state(stream, untouched)


def test_what_cannot_generate(sessions: Sessions) -> None:
    with sessions("all").stream() as stream:
        with pytest.raises(ContractError, match="the prompt is empty and nothing was fed before"):
            stream.generate([], 3)
        with pytest.raises(ContractError, match="token id 96"):
            stream.generate([96], 3)
    with pytest.raises(UsageError, match=r"this stream has 3; use session\.pool\(\) for several"):
        sessions("all_rows").stream().generate([1], 3)
    for name, says in (
        ("all_embeds", "takes inputs_embeds"),
        ("last", "logits at block ends only; export with --graphs all"),
    ):
        with pytest.raises(UsageError, match=says):
            sessions(name).stream().generate([1], 3)
        with pytest.raises(UsageError, match=says):
            check_generates(sessions(name).contract)
    for name in ("all", "all_last", "all_rows", "plain"):
        check_generates(sessions(name).contract)
