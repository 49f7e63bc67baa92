"""A bundle that can hold a conversation, as far as a random model can: words, a chat template and an end token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from famexport.config import preset

WORDS = [
    "<unk>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "be",
    "brief",
    "what",
    "is",
    "the",
    "sea",
    "made",
    "of",
    "and",
    "why",
    "rain",
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def talking_checkpoint(target: Path, make: Callable[..., Path]) -> Path:
    """A checkpoint with a word-level tokenizer whose settings have a template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS[1:5]])
    config = preset("tiny", num_hidden_layers=1, vocab_size=len(WORDS))
    path = make(target, config, tokenizer=tokenizer.to_str().encode())
    settings = {"eos_token": {"content": "<|end|>"}, "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
