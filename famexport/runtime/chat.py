"""A conversation without end over one stream: each turn is fed once, and what is remembered is the stream's state."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from famexport.chat_template import ChatTemplate
from famexport.runtime.stream import TokenStream
from famexport.text import stream_text, token_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Chat:
    """Messages in, answers out, in constant memory.

    Args:
        stream: a fresh stream of one row; it stays the caller's.
        stop: token ids that end an answer.
        system: what to tell the model first; None leaves it to the template.
    """

    def __init__(
        self,
        stream: TokenStream,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        stop: Collection[int],
        system: str | None = None,
    ) -> None:
        self._stream, self._tokenizer, self._template = stream, tokenizer, template
        self._stop, self._system = frozenset(stop), system
        self._end: list[int] | None = None  # tokens that end the last answer and are not fed yet; None before the first

    def say(self, message: str, max_new_tokens: int = 256, **sampling: Any) -> Iterator[str]:
        """Feed a message; yields the answer as it is made, text by text.

        Args:
            max_new_tokens: tokens after which an answer is cut short.
            sampling: as for ``TokenStream.generate``.
        """
        if self._end is None:
            text, before = self._template.opening(message, self._system), []
        else:
            text, before = self._template.turn(message), self._end
        ids = np.array([*before, *token_ids(self._tokenizer, text)], np.int64)
        answer = self._stream.generate(ids, max_new_tokens, stop=self._stop, **sampling)
        self._end = end = token_ids(self._tokenizer, self._template.end)

        def tokens() -> Iterator[int]:
            if (yield from answer) in end[:1]:
                self._end = end[1:]  # it ended itself, and that token is in the state

        yield from stream_text(self._tokenizer, tokens())
