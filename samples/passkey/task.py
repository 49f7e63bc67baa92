"""The PassKey task: a key of five digits, said once, then filler of any length, then the question.

The text form is that of the paper (arXiv 2404.09173, section 4.2, after Mohtashami and Jaggi 2023); the compact form
says the same in a few characters. Everything random comes from seeds, and what training and evaluation draw from never
meets: other seeds, other lines of the documentation, another made-up vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

DIGITS = 5
FILLERS = ("paper", "words", "docs")
PAPER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
CONSONANTS = ["b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "st", "tr", "pl"]
WORDS, NUMBERS = 2000, 0.04  # of the made-up vocabulary; share of numbers among its words
SHARED = 28  # characters in a row that no line of the documentation for tests has from that for training


@dataclass(frozen=True)
class Form:
    """How the key is said, twice, and asked for. ``{key}`` is the digits; ``question`` ends where the answer begins."""

    statement: str
    question: str


FORMS = {
    "text": Form(
        " There is an important info hidden inside a lot of irrelevant text. Find it and memorize them."
        " The pass key is {key}. Remember it. {key} is the pass key. ",
        " What is the pass key? The pass key is ",
    ),
    "compact": Form(" <{key}={key}> ", " <?"),
}


@dataclass(frozen=True)
class Exam:
    """Streams with one key each, side by side: n of them, padded to whole blocks at the end."""

    tokens: Ids  # [n, blocks * T]; the right answer stands where the answer is asked for
    begins: Ids  # [n], where the answer begins
    answers: Ids  # [n, DIGITS], as tokens

    @property
    def places(self) -> Ids:
        """Where the logits stand that say the answers [n, DIGITS]."""
        return self.begins[:, None] - 1 + np.arange(DIGITS)


class Task:
    """The task in the tokens of one tokenizer, in which each digit must be a token.

    Args:
        encode: text to token ids; None takes bytes, id = byte.
    """

    def __init__(self, form: str, encode: Callable[[str], Sequence[int]] | None = None) -> None:
        self._encode = encode or (lambda text: list(text.encode("ascii", "replace")))
        alone = [self._encode(str(d)) for d in range(10)]
        if any(len(ids) != 1 for ids in alone):
            raise ValueError(f"the tokenizer must have a token for each digit, got {alone}")
        self.digits: Ids = np.array(alone, np.int64)[:, 0]
        before, between, self._after = (self.ids(part) for part in FORMS[form].statement.split("{key}"))
        self._before, self._between = before, between
        self.mentions = (len(before), len(before) + DIGITS + len(between))  # where the key stands in the statement
        self.question = self.ids(FORMS[form].question)

    def ids(self, text: str) -> Ids:
        return np.array(self._encode(text), np.int64)

    def statement(self, key: Ids) -> Ids:
        """The tokens that say ``key`` [DIGITS]."""
        digits = self.digits[key]
        return np.concatenate([self._before, digits, self._between, digits, self._after])

    def filler(self, kind: str, split: str, size: int, seed: int) -> Ids:
        """``size`` tokens of text without a key.

        Args:
            kind: ``paper`` (its five sentences again and again), ``words`` (sentences of made-up words and numbers, a
                vocabulary for each seed), or ``docs`` (Python's documentation).
            split: ``train`` or ``test``.
        """
        rng = np.random.default_rng([seed, ("train", "test").index(split), FILLERS.index(kind)])
        if kind == "words":
            found, characters = np.zeros(0, np.int64), size
            while len(found) <= size:
                found, characters = np.concatenate([found, self.ids(_sentences(characters, rng))]), 2 * characters
        else:
            found = self.ids(PAPER if kind == "paper" else _documentation(split, rng))
            found = np.tile(found, size // len(found) + 2)
        start = int(rng.integers(0, len(found) - size))
        return found[start : start + size]

    def episode(self, kind: str, length: int, key: Ids, seed: int, within: int, split: str = "test") -> Ids:
        """``length`` tokens up to where the answer must begin, the key somewhere in the first ``within``."""
        said = self.statement(key)
        if len(said) > within or len(said) + len(self.question) > length:
            raise ValueError(f"{length} tokens with the key in the first {within} are too few: it takes {len(said)}")
        text = self.filler(kind, split, length, seed)
        last = min(within, length - len(self.question)) - len(said)
        start = int(np.random.default_rng([seed, 99]).integers(0, last + 1))
        text[start : start + len(said)] = said
        text[length - len(self.question) :] = self.question
        return text

    def exam(self, kind: str, length: int, count: int, seed: int, block: int) -> Exam:
        """Streams of about ``length`` tokens, the key in the first block; each ends elsewhere in its last block."""
        rng = np.random.default_rng([seed, length, FILLERS.index(kind)])
        keys = rng.integers(0, 10, (count, DIGITS))
        begins = length - rng.integers(0, min(block, length // 2), count)
        tokens = np.full((count, -(-(length + DIGITS) // block) * block), self.digits[0], np.int64)
        for i, (key, begin) in enumerate(zip(keys, begins, strict=True)):
            text = self.episode(kind, int(begin), key, int(rng.integers(0, 2**31)), block)
            tokens[i, : begin + DIGITS] = np.concatenate([text, self.digits[key]])
        return Exam(tokens, begins, self.digits[keys])


def _documentation(split: str, rng: np.random.Generator) -> str:
    texts = _topics(split)
    return "\n".join(texts[i] for i in rng.permutation(len(texts)))


@cache
def _topics(split: str) -> list[str]:
    """Topics by the hash of their names. They repeat passages of each other: lines that training sees test nothing."""
    names = [name for name in sorted(topics) if hashlib.sha256(name.encode()).digest()[0] % 2 == (split == "test")]
    if split == "train":
        return [topics[name] for name in names]
    text = "\n".join(_topics("train"))
    seen = {*_pieces(text), *text.split("\n")} - {""}
    return ["\n".join(ln for ln in topics[n].split("\n") if seen.isdisjoint([ln, *_pieces(ln)])) for n in names]


def _pieces(text: str) -> list[str]:
    return [text[i : i + SHARED] for i in range(len(text) - SHARED + 1)]


def _sentences(characters: int, rng: np.random.Generator) -> str:
    syllables = [c + v for c in CONSONANTS for v in "aeiou"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(WORDS)]
    made, length = [], 0
    while length < characters:
        draws = rng.random(rng.integers(4, 12))
        sentence = [
            words[int(r * WORDS)] if r > NUMBERS else str(rng.integers(10 ** rng.integers(1, 6))) for r in draws
        ]
        made.append(" ".join(sentence).capitalize() + ". ")
        length += len(made[-1])
    return "".join(made)
