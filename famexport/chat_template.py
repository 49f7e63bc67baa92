"""A tokenizer's chat template, rendered one turn at a time, so that a conversation needs no memory of its own.

Templates are Jinja programs that come with a model: they are data from outside, so they run in Jinja's immutable
sandbox, as in transformers, and their size is capped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from famexport.errors import InvalidInputError, MissingDependencyError, UsageError, first_line
from famexport.manifest import strict_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from famexport.bundle import Bundle

MAX_TEMPLATE_CHARS = 64 * 2**10
_CONFIG, _GENERATION, _TEMPLATE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_USER, _ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}

Message = Mapping[str, str]


class ChatTemplate:
    """Turns messages into text.

    Args:
        source: the template, Jinja as in Hugging Face's ``chat_template``.
        special: special tokens that it may name, such as ``bos_token``.
    Raises:
        InvalidInputError: it is no template, or one that cannot be rendered turn by turn.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as exc:
            raise MissingDependencyError("jinja2", "text", "a chat template") from exc
        if len(source) > MAX_TEMPLATE_CHARS:
            raise InvalidInputError(
                f"the chat template has {len(source)} characters, expected at most {MAX_TEMPLATE_CHARS}"
            )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except Exception as exc:  # Jinja's own errors, and Python's for the code that it makes of a template
            raise InvalidInputError(f"the chat template is not valid Jinja: {first_line(exc, 300)}") from exc
        self._special = dict(special)
        opened, answered = self._render([_USER], True), self._render([_USER, _ASSISTANT], False)
        head = opened + _ASSISTANT["content"]
        if not answered.startswith(head):
            raise InvalidInputError(
                "the chat template does not put an answer where it asks for one; it cannot be streamed"
            )
        self.end = answered[len(head) :]  # what follows an answer

    def opening(self, message: str, system: str | None = None) -> str:
        """The text from the start of a conversation to where the first answer begins."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        return self._render([*messages, {"role": "user", "content": message}], True)

    def turn(self, message: str) -> str:
        """The text from the end of an answer (``end`` included before it) to where the next begins."""
        before = [_USER, _ASSISTANT]
        known, text = self._render(before, False), self._render([*before, {"role": "user", "content": message}], True)
        if not text.startswith(known):
            raise InvalidInputError("the chat template changes what it said before; it cannot be rendered turn by turn")
        return text[len(known) :]

    def _render(self, messages: Sequence[Message], answer: bool) -> str:
        try:
            text: str = self._template.render(messages=messages, add_generation_prompt=answer, **self._special)
            return text
        except Exception as exc:  # a template may run into anything; the sandbox raises its own
            raise InvalidInputError(f"the chat template cannot be rendered: {first_line(exc, 300)}") from exc


def _refuse(message: object) -> None:
    raise ValueError(str(message))


def chat_template(bundle: Bundle) -> ChatTemplate:
    """The template of a bundle's tokenizer.

    Raises:
        UsageError: it has none.
        InvalidInputError: it has one that cannot be used.
    """
    config = _json(bundle, _CONFIG)
    special = {name: text for name in _SPECIAL if (text := _content(config.get(name)))}
    source: Any = config.get("chat_template")
    if _TEMPLATE in bundle.manifest.files:
        source = bundle.read(_TEMPLATE).decode("utf-8", "replace")
    if isinstance(source, list):  # several by name
        named = [e.get("template") for e in source if isinstance(e, dict) and e.get("name") == "default"]
        source = named[-1] if named else None
    if not isinstance(source, str):
        raise UsageError(
            f"{bundle.path} has no chat template; chat needs a model made for conversations, and a bundle exported "
            "with its tokenizer_config.json: for other models use famexport run --generate"
        )
    return ChatTemplate(source, special)


def stop_ids(bundle: Bundle, tokenizer: Tokenizer) -> set[int]:
    """Token ids that end a text, from the tokenizer's and the model's own settings."""
    found = {tokenizer.token_to_id(_content(_json(bundle, _CONFIG).get("eos_token")) or "")}
    more = _json(bundle, _GENERATION).get("eos_token_id")
    found |= {i for i in (more if isinstance(more, list) else [more]) if type(i) is int}
    return {i for i in found if i is not None and 0 <= i < bundle.contract.vocab_size}


def _content(token: Any) -> str | None:
    """A special token's text, which may stand in an object with its options."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _json(bundle: Bundle, name: str) -> dict[str, Any]:
    if name not in bundle.manifest.files:
        return {}
    tree = strict_json(bundle.read(name), name)
    return tree if isinstance(tree, dict) else {}
