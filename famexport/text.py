"""Text and token ids as streams: reading, tokenising and checking them in memory that does not grow. No torch."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from famexport.errors import InvalidInputError, MissingDependencyError, UsageError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

READ_BYTES = 64 * 2**10
PIECE_CHARS = 64 * 2**10  # tokenised at once where the text lets it be cut that often
MAX_PIECE_CHARS = 256 * 2**10  # and where it does not: 1 MiB of the longest characters
_WINDOW_CHARS = 64  # either side of a cut, tokenised to see whether the cut changes anything
_CONTEXTS = "\na."  # what a part may be tokenised after; the first that shares no token with it is taken
_TRIES = 8  # cuts of one kind that are looked at before the next kind
_MAX_DIGITS = 32
_OTHER = "feed token ids, or take the model's own tokenizer.json"
_NOT_IDS = re.compile(r"[^\s0-9-]", re.ASCII)


@contextmanager
def tokenizer_errors(says: str, hint: str, error: type[InvalidInputError] = InvalidInputError) -> Iterator[None]:
    """Whatever the tokenizers package runs into becomes ``error``.

    It raises bare Exception for what is wrong with a file, some of it only once there is a text; and where its Rust
    code panics, a PanicException, which is no Exception and has no public name.
    """
    try:
        yield
    except BaseException as exc:
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise  # KeyboardInterrupt, SystemExit
        raise error(f"{says}: {first_line(exc, 200)}; {hint}") from exc


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json``.

    Raises:
        MissingDependencyError: the tokenizers package is not installed.
        UsageError: no such file.
        InvalidInputError: the file is damaged.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as exc:
        raise MissingDependencyError("tokenizers", "text", "tokenising text") from exc
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    data = path.read_bytes()
    with tokenizer_errors(f"{path} is not a tokenizer.json", "copy it again"):
        tokenizer = Tokenizer.from_buffer(data)
    tokenizer.no_truncation()  # a file may ask for either, and both would change a stream's text
    tokenizer.no_padding()
    return tokenizer


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of token ids as they come, special tokens left out; a character whose bytes are not all there waits.

    Raises:
        InvalidInputError: a token that the tokenizer cannot decode.
    """
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(skip_special_tokens=True)
    for token in ids:
        with tokenizer_errors(f"the tokenizer cannot decode token {token}", _OTHER):
            text = decoder.step(tokenizer, token)
        if text:
            yield text


def stream_tokens(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """Token ids of a text without end, int64 [n] at a time: those of the whole text, without special tokens.

    The text is tokenised in parts, cut after a single newline between two characters that are no spaces. Every part is
    tokenised with a newline before it, whose tokens are dropped, so that no part but the first begins like a text (for
    SentencePiece, with a space); with another character where a token would hold the newline and more. A cut is taken
    only if the text around it gets the same tokens cut and uncut.

    Where ``MAX_PIECE_CHARS`` pass without such a cut, one before a single space and a letter is taken, or else any
    that changes no tokens; only where the last few places all do change some, the text is cut regardless. The parts,
    and so the tokens, do not depend on how the text was cut into ``pieces``.

    Raises:
        InvalidInputError: text that the tokenizer cannot encode.
    """
    buffer, searched, first = "", 0, True
    for piece in _equal_pieces(pieces, PIECE_CHARS):
        buffer += piece
        # The characters after a cut must be there to judge it.
        cut = _last_cut(tokenizer, buffer, _newline_cuts(buffer, searched))
        if cut is None and len(buffer) >= MAX_PIECE_CHARS:
            cut = _forced_cut(tokenizer, buffer)
        searched = max(0, len(buffer) - _WINDOW_CHARS)
        if cut is not None:
            yield _encode(tokenizer, buffer[:cut], first)
            buffer, searched, first = buffer[cut:], max(0, searched - cut), False
    if buffer:
        yield _encode(tokenizer, buffer, first)


def _equal_pieces(pieces: Iterable[str], size: int) -> Iterator[str]:
    held: list[str] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count >= size:
            text = "".join(held)
            whole = len(text) - len(text) % size
            yield from (text[i : i + size] for i in range(0, whole, size))
            held, count = [text[whole:]], len(text) - whole
    if count:
        yield "".join(held)


def _newline_cuts(text: str, start: int) -> Iterator[int]:
    """Places after a single newline, the last first."""
    end = len(text) - _WINDOW_CHARS
    while (at := text.rfind("\n", max(start - 1, 1), max(end, 0))) >= 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            yield at + 1
        end = at


def _forced_cut(tokenizer: Tokenizer, text: str) -> int:
    end = len(text) - _WINDOW_CHARS
    spaces = (
        i
        for i in range(end - 1, len(text) // 2, -1)
        if text[i] == " " and text[i + 1].isalpha() and not text[i - 1].isspace()
    )
    cut = _last_cut(tokenizer, text, spaces)
    if cut is None:
        cut = _last_cut(tokenizer, text, iter(range(end, end - _WINDOW_CHARS, -1)), tries=_WINDOW_CHARS)
    return end if cut is None else cut


def _last_cut(tokenizer: Tokenizer, text: str, places: Iterator[int], tries: int = _TRIES) -> int | None:
    for at, _ in zip(places, range(tries), strict=False):
        left, right = text[max(0, at - _WINDOW_CHARS) : at], text[at : at + _WINDOW_CHARS]
        if [*token_ids(tokenizer, left), *_encode(tokenizer, right, False)] == token_ids(tokenizer, left + right):
            return at
    return None


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a whole text, without special tokens.

    Raises:
        InvalidInputError: text that the tokenizer cannot encode.
    """
    with tokenizer_errors("the tokenizer cannot encode this text", _OTHER):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _encode(tokenizer: Tokenizer, text: str, first: bool) -> np.ndarray:
    """Tokens of a part, int64 [n]; unless it is the first, as if something stood before it."""
    for context in "" if first else _CONTEXTS:
        before, ids = token_ids(tokenizer, context), token_ids(tokenizer, context + text)
        if ids[: len(before)] == before:  # or else a token holds the context and more
            return np.array(ids[len(before) :], dtype=np.int64)
    return np.array(token_ids(tokenizer, text), dtype=np.int64)


def read_text(source: str | Path | IO[Any]) -> Iterator[str]:
    """The text of a UTF-8 file, a path or an open one, in pieces of at most 64 KiB.

    Raises:
        UsageError: no such file.
        InvalidInputError: invalid UTF-8, with the offset of the byte.
    """
    name, decoder, position = _name(source), codecs.getincrementaldecoder("utf-8")(), 0
    for data in _read(source):
        if isinstance(data, str):  # a file opened as text
            yield data
            continue
        held = len(decoder.getstate()[0])
        yield _decode(decoder, data, position - held, name, final=False)
        position += len(data)
    held = len(decoder.getstate()[0])
    _decode(decoder, b"", position - held, name, final=True)


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, position: int, name: str, *, final: bool) -> str:
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as exc:
        raise InvalidInputError(
            f"{name}: invalid UTF-8 at byte {position + exc.start}: {exc.reason}; give the text as UTF-8"
        ) from exc


def read_token_ids(source: str | Path | IO[Any]) -> Iterator[np.ndarray]:
    """Token ids int64 [n] at a time, from whitespace-separated integers or a ``.npy`` file with one integer axis.

    Raises:
        UsageError: no such file.
        InvalidInputError: anything but integers, with its line; an array of another kind or shape.
    """
    if isinstance(source, (str, Path)) and _is_npy(Path(source)):
        yield from _read_npy(Path(source))
        return
    name, rest, line = _name(source), "", 1
    for data in _read(source):
        text = data if isinstance(data, str) else data.decode("latin-1")  # one character per byte: only ASCII passes
        text = rest + text
        end = max(text.rfind(space) for space in " \n\t\r\f\v") + 1
        complete, rest = text[:end], text[end:]
        ids = _parse_ids(complete, name, line)
        if len(rest) > _MAX_DIGITS:
            raise _not_an_id(rest, name, line + complete.count("\n"))
        line += complete.count("\n")
        if ids.size:
            yield ids
    ids = _parse_ids(rest, name, line)
    if ids.size:
        yield ids


def _parse_ids(text: str, name: str, line: int) -> np.ndarray:
    if not _NOT_IDS.search(text):
        try:
            return np.array([int(word) for word in text.split()], dtype=np.int64)
        except (ValueError, OverflowError):
            pass  # "1-2", or digits that no int64 holds: found below
    for number, row in enumerate(text.split("\n"), line):
        for word in row.split():
            if not re.fullmatch(r"-?[0-9]{1,18}", word):
                raise _not_an_id(word, name, number)
    raise InvalidInputError(f"{name}: a character that is neither a digit nor a space, from line {line} on")


def _not_an_id(word: str, name: str, line: int) -> InvalidInputError:
    return InvalidInputError(
        f"{name}, line {line}: text where token ids are expected: {word[:_MAX_DIGITS]!r}; "
        "give whitespace-separated integers, or a bundle with a tokenizer.json"
    )


def _is_npy(path: Path) -> bool:
    if path.suffix == ".npy":
        return True
    if not path.is_file():
        return False  # a pipe: looking at its beginning would take it
    with open(path, "rb") as file:
        return file.read(6) == b"\x93NUMPY"


def _read_npy(path: Path) -> Iterator[np.ndarray]:
    if not path.exists():
        raise UsageError(f"no such file: {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        shape, dtype, offset = array.shape, array.dtype, array.offset
    except Exception as exc:  # numpy raises whatever the damaged header runs into
        raise InvalidInputError(f"{path} is not a .npy array of token ids; write one with numpy.save") from exc
    if len(shape) != 1 or dtype.kind not in "iu":
        raise InvalidInputError(f"{path} holds {dtype} {list(shape)}; expected token ids, one axis of integers")
    with open(path, "rb") as file:  # read, not mapped: pages of a mapping would count as ours and grow
        file.seek(offset)
        while (ids := np.fromfile(file, dtype, READ_BYTES // dtype.itemsize)).size:
            if dtype.kind == "u" and int(ids.max()) > np.iinfo(np.int64).max:
                raise InvalidInputError(f"{path} holds {int(ids.max())}, which is no token id")
            yield ids.astype(np.int64)


def check_tokens(ids: np.ndarray, vocab_size: int, start: int = 0) -> None:
    """Refuse token ids outside ``0 .. vocab_size - 1``; ``start`` is the stream position of ``ids``' first element."""
    if ids.dtype.kind not in "iu":
        raise InvalidInputError(f"token ids must be integers, got {ids.dtype}")
    wrong = (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise InvalidInputError(
            f"token id {int(ids.flat[at])} at position {start + at} is outside the vocabulary of {vocab_size}; "
            "was the text tokenised for another model?"
        )


def _name(source: str | Path | IO[Any]) -> str:
    return str(source if isinstance(source, (str, Path)) else getattr(source, "name", "the input"))


def _read(source: str | Path | IO[Any]) -> Iterator[Any]:
    if not isinstance(source, (str, Path)):
        while data := source.read(READ_BYTES):
            yield data
        return
    try:
        with open(source, "rb") as file:
            while data := file.read(READ_BYTES):
                yield data
    except FileNotFoundError as exc:
        raise UsageError(f"no such file: {source}") from exc
    except OSError as exc:
        raise UsageError(f"cannot read {source}: {exc.strerror}") from exc
