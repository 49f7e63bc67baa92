"""Templates rendered one turn at a time give the text of the whole conversation; hostile ones harm nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import famexport as fx
from famexport.bundle import Bundle
from famexport.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate, chat_template, stop_ids
from famexport.errors import InvalidInputError, UsageError
from famexport.runtime.chat import Chat
from famexport.runtime.feeding import bundle_tokenizer
from tests.chatting import TEMPLATE, WORDS, talking_checkpoint

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system role') }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ' }}{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("source", [CHATML, LLAMA2, TEMPLATE], ids=["chatml", "llama2", "words"])
def test_turn_by_turn_equals_the_whole(source: str) -> None:
    from jinja2 import Environment

    questions, answers = ["Who?", "And why?", "Thanks."], ["I.", "Because.", "Bye."]
    template = ChatTemplate(source, SPECIAL)
    text, messages = "", []
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        text += (template.turn(question) if i else template.opening(question)) + answer + template.end
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = Environment().from_string(source)
    assert text == whole.render(messages=messages, add_generation_prompt=False, **SPECIAL)


def test_a_system_message_comes_first_and_once() -> None:
    template = ChatTemplate(CHATML, {})
    assert "system\nBe brief.<|im_end|>" in template.opening("Hi", "Be brief.")
    assert "SmolLM" in template.opening("Hi")
    assert "system" not in template.turn("Hi")
    with pytest.raises(InvalidInputError, match="cannot be rendered: no system role"):
        ChatTemplate(LLAMA2, SPECIAL).opening("Hi", "Be brief.")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for m in messages %}", "not valid Jinja"),
        ("{{ messages | length }}", "does not put an answer where it asks for one"),
        ("x" * (MAX_TEMPLATE_CHARS + 1), f"expected at most {MAX_TEMPLATE_CHARS}"),
        ("{{ messages[7]['role'] }}", "cannot be rendered"),
        ("{{ raise_exception('') }}", "cannot be rendered: ValueError"),
        ("{{ 'a' * 2 ** 60 }}", "cannot be rendered: MemoryError"),
        ("{{ " + "(" * 150 + "1" + ")" * 150 + " }}", "not valid Jinja"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "not valid Jinja"),
        ("{% if 1 %}" * 150 + "{% endif %}" * 150, "not valid Jinja"),
        ("{{ f(a=1, a=2) }}", "not valid Jinja"),
        ("{{ " + "9" * 5000 + " }}", "not valid Jinja"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "cannot be rendered: Range too big"),
    ],
)
def test_templates_that_cannot_be_used(source: str, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        ChatTemplate(source, {})


def test_a_template_that_changes_its_past_is_refused() -> None:
    source = CHATML.replace("message['content']", "(message['content'] if messages | length < 3 else 'gone')")
    with pytest.raises(InvalidInputError, match="changes what it said before"):
        ChatTemplate(source, {}).turn("Hi")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{% set _ = messages.append(1) %}{{ messages }}",
    ],
)
def test_the_sandbox_holds(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError):
        ChatTemplate(attack, {})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Bundle:
    folder = tmp_path_factory.mktemp("talking")
    checkpoint = talking_checkpoint(folder / "checkpoint", make_checkpoint)
    return fx.export_bundle(checkpoint, folder / "bundle", graphs="all", chunks=(1, 4), parity_blocks=2)


def test_the_bundle_carries_the_template_and_the_end(talking: Bundle) -> None:
    tokenizer = bundle_tokenizer(talking)
    assert stop_ids(talking, tokenizer) == {WORDS.index("<|end|>")}
    assert chat_template(talking).end == " <|end|> "


def test_a_bundle_without_a_template(bundles: Callable[[str], Path]) -> None:
    text = fx.open_bundle(bundles("text"))
    with pytest.raises(UsageError, match=r"has no chat template; .* famexport run --generate"):
        chat_template(text)
    assert stop_ids(text, bundle_tokenizer(text)) == set()
    with pytest.raises(UsageError, match="has no tokenizer; put a tokenizer.json"):
        bundle_tokenizer(fx.open_bundle(bundles("plain")))


def test_settings_that_are_no_json_are_refused(
    talking: Bundle, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = talking_checkpoint(tmp_path / "checkpoint", make_checkpoint)
    (checkpoint / "tokenizer_config.json").write_text("{" * 1000)
    bundle = fx.export_bundle(checkpoint, tmp_path / "bundle", parity_blocks=2)
    with pytest.raises(InvalidInputError, match=r"tokenizer_config\.json is not valid JSON"):
        chat_template(bundle)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"chat_template": [{"name": [], "template": "x"}, {"name": "default"}, 1]}),
        ("tokenizer_config.json", {"chat_template": {"default": "x"}}),
        ("generation_config.json", {"eos_token_id": [[1]]}),
        ("generation_config.json", {"eos_token_id": {}}),
        ("generation_config.json", {"eos_token_id": [True, 1.0, None, "1", -1, 10**6]}),
    ],
)
def test_settings_of_another_form_say_nothing(
    talking: Bundle, monkeypatch: pytest.MonkeyPatch, file: str, content: dict[str, Any]
) -> None:
    monkeypatch.setattr("famexport.chat_template._json", lambda _, name: content if name == file else {})
    assert stop_ids(talking, bundle_tokenizer(talking)) == set()
    with pytest.raises(UsageError, match="has no chat template"):
        chat_template(talking)


def test_the_last_template_of_a_name_is_taken(talking: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [("default", CHATML), ("tool", "x"), ("default", TEMPLATE)]
    content = {"chat_template": [{"name": name, "template": template} for name, template in named]}
    monkeypatch.setattr("famexport.chat_template._json", lambda *_: content)
    assert chat_template(talking).end == ChatTemplate(TEMPLATE, {}).end


def test_every_turn_is_fed_once(talking: Bundle) -> None:
    """Each prompt is the text of its turn and no more, after the end of an answer that did not end itself."""
    tokenizer, template = bundle_tokenizer(talking), chat_template(talking)
    stop, end = stop_ids(talking, tokenizer), WORDS.index("<|end|>")
    calls: list[np.ndarray] = []
    with fx.load(talking, threads=1) as session, session.stream() as stream:
        feed = stream.feed

        def spy(pieces: list[np.ndarray]) -> object:
            calls.extend(np.array(piece) for piece in pieces)
            return feed(pieces)

        stream.feed = spy  # type: ignore[assignment,method-assign]
        talk = Chat(stream, tokenizer, template, stop, system="be brief")
        for seed, message in enumerate(["what is rain", "why", "and why", "what", "is rain"]):
            list(talk.say(message, 9, temperature=1.5, seed=seed))
    at = [i for i, call in enumerate(calls) if call.ndim == 1]  # a token that was generated is [1, 1]
    assert len(at) == 5
    opening = "<|system|> be brief <|end|> <|user|> what is rain <|end|> <|assistant|>"
    assert [WORDS[i] for i in calls[0]] == opening.split()
    ended = 0
    for i, message in zip(at[1:], ["why", "and why", "what", "is rain"], strict=True):
        itself = int(calls[i - 1].flat[-1]) == end
        ended += itself
        turn = ([] if itself else ["<|end|>"]) + f"<|user|> {message} <|end|> <|assistant|>".split()
        assert [WORDS[t] for t in calls[i]] == turn
    assert 0 < ended < 4  # both ways were seen


def test_generation_config_adds_ends(talking: Bundle, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = talking_checkpoint(tmp_path / "checkpoint", make_checkpoint)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 9999, "x", True]}))
    (checkpoint / "chat_template.jinja").write_text(CHATML)
    bundle = fx.export_bundle(checkpoint, tmp_path / "bundle", parity_blocks=2)
    assert stop_ids(bundle, bundle_tokenizer(bundle)) == {1, 3}
    assert chat_template(bundle).end == "<|im_end|>\n"  # the file of its own wins
    shutil.rmtree(tmp_path / "bundle")
