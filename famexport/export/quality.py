"""What quantising costs on real text: loss and most likely token of the exported step against the float32 step.

A relative error says little about a quantised model: random tokens are no language, and what rounding does to text
shows in the loss. Both steps stream the same text from a fresh state, each on its own state. Past the limit the export
fails; nothing is published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from famexport.contract import QUANTIZED, StepContract
from famexport.errors import InvalidInputError, NumericError, UsageError
from famexport.export.source import Reference, Source
from famexport.runtime.backend import Loop
from famexport.runtime.ort import OrtCpu
from famexport.runtime.score import log_probabilities
from famexport.text import check_tokens, open_tokenizer, read_text, token_ids

DEFAULT_TEXT = "Python's documentation (pydoc_data.topics)"
TOKENS, FLOP_BUDGET, LEAST_BLOCKS = 4096, 1.5e12, 8
MAX_LOSS_INCREASE = {"int8": 0.05, "int4": 0.1}  # nats per token


@dataclass(frozen=True)
class Quality:
    """Losses in nats per token; ``standard_error`` is that of the increase over these tokens."""

    text: str
    tokens: int
    loss: float
    reference_loss: float
    loss_increase: float
    standard_error: float
    argmax_agreement: float
    max_loss_increase: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quality_options(
    precision: str, opset: int, opset_needed: int, limit: float | None, text: str | Path | None
) -> tuple[float, Path | None]:
    """The limit and the text that the options amount to; a limit of 0 where nothing is quantised.

    Raises:
        UsageError: options that do not go together.
    """
    if precision not in QUANTIZED:
        if limit is not None or text is not None:
            wanted = " or ".join(QUANTIZED)
            raise UsageError(f"max_loss_increase and quality_text are for precision {wanted}, got {precision}")
        return 0.0, None
    if opset != opset_needed:
        raise UsageError(f"precision {precision} needs opset {opset_needed}, got {opset}")
    if limit is not None and not 0 < limit < float("inf"):  # infinity would let NaN through
        raise UsageError(f"max_loss_increase must be a positive, finite number, got {limit}")
    if text is not None and not Path(text).is_file():
        raise UsageError(f"no such file: {text}")
    return MAX_LOSS_INCREASE[precision] if limit is None else limit, None if text is None else Path(text)


def measure_quality(
    what: Source,
    precision: str,
    graph: Path,
    weights: Path,
    ids: np.ndarray | None,
    limit: float,
    text: Path | None,
    report: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Loss and argmax agreement of a written ``block_step`` on text, for the manifest; or why there are none.

    Args:
        ids: what ``quality_tokens`` gave.
        text: the file that they are of.
    Raises:
        NumericError: past ``limit``.
    """
    if ids is None:
        return {"unmeasured": unmeasured(what.contract, bool(what.tokenizer))}
    backend = OrtCpu(what.contract, precision, {"block_step": graph}, weights)
    loop = backend.open(1 if what.contract.batch == "dynamic" else None)

    def release() -> None:
        loop.close()
        backend.close()

    return check_quality(
        loop,
        what.reference(),
        ids,
        limit,
        text=text.name if text else DEFAULT_TEXT,
        release=release,
        progress=lambda done, total: report("quality", done, total),
    ).to_dict()


def quality_tokens(what: Source, tokenizer: Path, text: Path | None) -> np.ndarray | None:
    """The token ids to measure on; None where text says nothing (``unmeasured``).

    Raises:
        UsageError, InvalidInputError: a text that cannot be used.
    """
    if reason := unmeasured(what.contract, bool(what.tokenizer)):
        if text is not None:
            raise UsageError(f"a quality text cannot be used: {reason}")
        return None
    return quality_ids(what.contract, tokenizer, text, what.cost.get("flops_per_block"))


def unmeasured(contract: StepContract, tokenizer: bool) -> str | None:
    """Why text says nothing about a bundle; None where it does."""
    if contract.inputs[0].name != "tokens":
        return "it takes embeddings"
    if contract.logits != "all":
        return "it gives the logits of a block's last token only"
    return None if tokenizer else "the checkpoint has no tokenizer"


def quality_ids(contract: StepContract, tokenizer: Path, text: Path | None, flops_per_block: int | None) -> np.ndarray:
    """Whole blocks of text as token ids [n]: of a file, or of Python's own documentation.

    Raises:
        UsageError, InvalidInputError: no such file, or less than two blocks of text.
    """
    size = contract.block_size
    budget = int(FLOP_BUDGET // flops_per_block) if flops_per_block else TOKENS
    wanted = max(LEAST_BLOCKS, min(-(-TOKENS // size), budget)) * size
    if text is None:
        from pydoc_data.topics import topics

        pieces = "\n".join(topics[name] for name in sorted(topics))
    else:
        if not text.is_file():
            raise UsageError(f"no such file: {text}")
        pieces = "".join(read_text(text))
    # A token is rarely longer than 32 characters
    ids = token_ids(open_tokenizer(tokenizer), pieces[: 32 * wanted])[:wanted]
    found = np.array(ids[: len(ids) // size * size], np.int64)
    if len(found) < 2 * size:
        raise InvalidInputError(
            f"the quality text, {text or DEFAULT_TEXT}, has {len(ids)} tokens, expected at least {2 * size} (two "
            "blocks); name a longer one with --quality-text"
        )
    check_tokens(found, contract.vocab_size)
    return found


def check_quality(
    loop: Loop,
    reference: Reference,
    ids: np.ndarray,
    limit: float,
    *,
    text: str,
    release: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Score ``ids`` by ``loop``, then by ``reference``.

    Args:
        limit: largest increase of the loss, in nats per token.
        text: what the ids are of, for the report.
        release: called when ``loop`` has done its part.
    Raises:
        NumericError: past ``limit``, or not finite.
    """
    contract, batch = loop.contract, loop.batch
    blocks = ids.reshape(-1, contract.block_size)
    out = np.empty(contract.outputs[0].sized(batch), np.float32)
    scorers = _Scored(ids), _Scored(ids)
    for i, block in enumerate(blocks):
        loop.advance(np.repeat(block[None], batch, 0), out)
        loop.commit()
        scorers[0].add(out[0])
        progress(i + 1, 2 * len(blocks))
    release()
    state = {s.name: torch.zeros(s.sized(1), dtype=getattr(torch, s.dtype)) for s in contract.states}
    for i, block in enumerate(blocks):
        with torch.no_grad():
            logits, state = reference(torch.from_numpy(block[None]), state)
        scorers[1].add(logits[0].numpy())
        progress(len(blocks) + i + 1, 2 * len(blocks))
    (losses, tokens), (wanted, wanted_tokens) = (scorer.result() for scorer in scorers)
    more = losses - wanted
    increase, error = float(more.mean()), float(more.std() / len(more) ** 0.5)
    if not increase <= limit:  # NaN fails too
        raise NumericError(
            f"quantised, the loss on {len(ids)} tokens of {text} is {losses.mean():.4f} nats against "
            f"{wanted.mean():.4f} in float32, {increase:+.4f} (standard error {error:.4f}), allowed is {limit:+.4g}; "
            "nothing was published; export with a higher precision, or with --max-loss-increase if that will do"
        )
    return Quality(
        text=text,
        tokens=len(ids),
        loss=float(losses.mean()),
        reference_loss=float(wanted.mean()),
        loss_increase=increase,
        standard_error=error,
        argmax_agreement=float((tokens == wanted_tokens).mean()),
        max_loss_increase=limit,
    )


class _Scored:
    """The loss of each token but the first, and the most likely next token at each, without keeping logits."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids, self._at = ids, 0
        self._losses: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []

    def add(self, logits: np.ndarray) -> None:
        targets = self._ids[self._at + 1 : self._at + 1 + len(logits)]
        self._losses.append(-log_probabilities(logits[: len(targets)], targets))
        self._tokens.append(logits.argmax(-1))
        self._at += len(logits)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate(self._losses), np.concatenate(self._tokens)
