"""Token-by-token generation over anything that can be fed, and the choice of the next token."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from typing import Protocol

import numpy as np

from famexport.contract import StepContract
from famexport.errors import ContractError, UsageError, raise_problems


class Feedable(Protocol):
    contract: StepContract
    batch: int

    def feed(self, pieces: list[np.ndarray]) -> Iterator[np.ndarray]: ...

    @property
    def last_logits(self) -> np.ndarray | None: ...

    @property
    def closed(self) -> bool: ...


class Sampler:
    """Chooses a token id from logits [V].

    Args:
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely.
        top_p: keep the fewest tokens whose probability is at least this much (nucleus sampling, Holtzman et al. 2020).
        seed: of the random choice; None takes a fresh one.
    Raises:
        UsageError: names every argument that is out of range.
    """

    def __init__(
        self, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int | None = None
    ) -> None:
        problems = []
        if not 0 <= temperature < float("inf"):
            problems.append(f"temperature must be 0 or more, got {temperature}")
        if top_k is not None and top_k < 1:
            problems.append(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, got {top_p}")
        if seed is not None and seed < 0:
            problems.append(f"seed must not be negative, got {seed}")
        raise_problems(UsageError, "generate", problems)
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._rng = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = (logits.astype(np.float64) - float(logits.max())) / self.temperature
        kept = np.arange(len(scaled))
        if self.top_k is not None and self.top_k < len(scaled):
            kept = np.argpartition(-scaled, self.top_k)[: self.top_k]
        order = kept[np.argsort(-scaled[kept], kind="stable")]
        weights = np.exp(scaled[order])
        weights /= weights.sum()
        if self.top_p is not None:
            count = int(np.searchsorted(np.cumsum(weights), self.top_p * (1 - 1e-12))) + 1
            order, weights = order[:count], weights[:count] / weights[:count].sum()
        return int(order[self._rng.choice(len(order), p=weights)])


def check_generates(contract: StepContract) -> None:
    """Whether tokens can be generated with a bundle of that contract, before anything is fed.

    Raises:
        UsageError: why not.
    """
    if contract.inputs[0].name != "tokens":
        raise UsageError(f"this bundle takes {contract.inputs[0]}, not tokens; it cannot generate")
    if contract.logits == "last" and not contract.chunks:
        raise UsageError("this bundle gives logits at block ends only; export with --graphs all, or --logits all")


def generate(
    stream: Feedable, prompt: object, max_new_tokens: int, sampler: Sampler, stop: Collection[int]
) -> Generator[int, None, int | None]:
    """See ``TokenStream.generate``. What can be checked is checked now, not when the first token is asked for."""
    check_generates(stream.contract)
    if stream.batch != 1:
        raise UsageError(f"generate runs one row, this stream has {stream.batch}; use session.pool() for several")
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    try:
        ids = np.asarray(prompt)
    except ValueError as exc:
        raise ContractError(f"generate: the prompt is {type(prompt).__name__} that is no array: {exc}") from exc
    for _ in stream.feed([ids.astype(np.int64) if ids.size == 0 else ids]):
        pass
    if stream.last_logits is None:
        raise ContractError("generate: the prompt is empty and nothing was fed before; expected at least one token")
    return _tokens(stream, max_new_tokens, sampler, frozenset(stop))


def _tokens(stream: Feedable, count: int, sampler: Sampler, stop: frozenset[int]) -> Generator[int, None, int | None]:
    one = np.empty((1, 1), np.int64)

    def keep(token: int) -> None:
        one[0, 0] = token
        for _ in stream.feed([one]):
            pass

    for _ in range(count):
        logits = stream.last_logits
        assert logits is not None
        token = sampler(logits[0])
        if token in stop:
            keep(token)
            return token
        try:
            yield token
        finally:  # also where the caller stops here: what was given is in the state
            if not stream.closed:
                keep(token)
    return None
