"""A session's tokens, which are the truth, and how much of them the KV cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from conductor.backend.chat_template import ChatTemplate, Piece
from conductor.backend.llama import Model
from conductor.errors import ChatTemplateFailed, InvalidRequest
from conductor.types import DecodeRequest, Message


@dataclass(slots=True)
class Conversation:
    """`cached` tokens from the start are in the KV cache (on the device or saved); the rest must be decoded.

    After a turn all but its last token are cached: that one is decoded first thing in the next turn.
    """

    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    #: bytes of a character that the last turn ended inside of; only a bare continuation may complete it
    partial: bytes = b""


class Prompter:
    """Turns requests into the tokens that a model is to continue. One for each model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._template: ChatTemplate | None = None

    def target(self, conversation: Conversation, request: DecodeRequest) -> list[int]:
        """The conversation as it is to stand before the answer. Raises InvalidRequest, ChatTemplateFailed."""
        held = [] if request.reset else conversation.tokens
        if request.messages is not None:
            return self._chat(request.messages)
        if request.prompt is None:
            if not held:
                raise InvalidRequest("prompt", "there is no conversation to continue: give a prompt or messages")
            return list(held)
        added = self._model.tokenize(request.prompt, add_special=not held, parse_special=True)
        if not held and not added:
            raise InvalidRequest("prompt", "it is empty, and so is the conversation")
        return held + added

    def history(self, conversation: Conversation, request: DecodeRequest, target: Sequence[int]) -> int:
        """How many tokens of the target, from its start, are not new with this request: a context shift may drop of them."""
        if request.messages is not None:
            newest = self._model.tokenize(request.messages[-1].content, add_special=False, parse_special=False)
            return max(0, len(target) - len(newest))
        return 0 if request.reset else len(conversation.tokens)

    def _chat(self, messages: Sequence[Message]) -> list[int]:
        pieces = self._compiled().render(messages)
        tokens: list[int] = []
        for i, piece in enumerate(pieces):
            tokens += self._model.tokenize(piece.text, add_special=i == 0 and self._wants_bos(piece), parse_special=piece.special)
        return tokens

    def _wants_bos(self, first: Piece) -> bool:
        """Whether the tokenizer is to add what the template did not write itself."""
        return self._model.adds_bos and not (self._model.bos and first.text.startswith(self._model.bos))

    def _compiled(self) -> ChatTemplate:
        if self._template is None:
            model = self._model
            if not model.chat_template:
                raise ChatTemplateFailed(model.name, "the file has none, so messages cannot be rendered: use prompt")
            self._template = ChatTemplate(
                model.name, model.chat_template, bos=model.bos, eos=model.eos, control_strings=model.control_strings
            )
        return self._template


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
