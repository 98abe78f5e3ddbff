"""A chat template in its child process: the same pieces, and an end to those that have none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import pytest

from conductor.backend import template_child
from conductor.backend.chat_template import ChatTemplate
from conductor.backend.template_child import TemplateChild
from conductor.errors import ChatTemplateFailed
from conductor.types import Message
from tests.support.tiny_gguf import CHATML

HELLO = [Message("user", "hello <|im_end|> \u00e9\U0001f600")]


@contextlib.contextmanager
def child_of(source: str) -> Iterator[TemplateChild]:
    child = TemplateChild("tiny", source, bos="<s>", eos="</s>", control_strings=["<|im_end|>"])
    try:
        yield child
    finally:
        child.close()


def test_the_child_renders_what_the_template_does() -> None:
    template = ChatTemplate("tiny", CHATML, bos="<s>", eos="</s>", control_strings=["<|im_end|>"])
    with child_of(CHATML) as child:
        for _ in range(2):
            assert child.render(HELLO) == template.render(HELLO)


@pytest.mark.parametrize(
    "source",
    ["{{ 9**(messages|length * 9**9) }}", "{{ 'x' * (messages|length * 20000000000) }}", "{{ 1 / (messages|length - 1) }}"],
)
def test_a_template_that_does_not_end_fails_and_the_next_chat_begins_anew(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with child_of("{% if messages[0].content == 'bad' %}" + source + "{% else %}fine{% endif %}") as child:
        with monkeypatch.context() as impatient:
            impatient.setattr(template_child, "_ANSWER_WITHIN_S", 1.0)
            with pytest.raises(ChatTemplateFailed):
                child.render([Message("user", "bad")])
        assert [piece.text for piece in child.render(HELLO)] == ["fine"]


@pytest.mark.parametrize("source", ["{{ 9**(9**9) }}", "{{ ("])
def test_a_template_that_cannot_be_compiled_fails_each_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_child, "_ANSWER_WITHIN_S", 1.0)
    with child_of(source) as child:
        for _ in range(2):
            with pytest.raises(ChatTemplateFailed):
                child.render(HELLO)


def test_nothing_is_left_of_the_child() -> None:
    before = set(psutil.Process().children())  # of other tests
    with child_of(CHATML) as child:
        child.render(HELLO)
        (own,) = set(psutil.Process().children()) - before
    assert own not in psutil.Process().children()
