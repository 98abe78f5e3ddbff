"""A session's tokens, which are the truth, and how much of them the KV cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from conductor.backend.chat_template import Piece
from conductor.backend.llama import Context, Model
from conductor.backend.template_child import TemplateChild
from conductor.errors import ChatTemplateFailed, InvalidRequest
from conductor.types import DecodeRequest, Message


@dataclass(slots=True)
class Conversation:
    """The tokens, and how many of them need not be decoded. After a turn all but its last token are cached.

    `held` and `valid` have a writer each while no turn runs: the thread that has the context, and whoever changes the
    tokens. So a turn may be taken back at the moment in which its context is saved, without a lock.
    """

    tokens: list[int] = field(default_factory=list)
    #: tokens in the KV cache, on the device or saved; those at its end may be of a turn that was taken back
    held: int = 0
    #: how many tokens at the cache's start are the conversation's, were it to hold as many
    valid: int = 0
    #: bytes of a character that the last turn ended inside of; only a bare continuation may complete it
    partial: bytes = b""
    #: its cache was dropped with its context, and will be missed if it comes back
    given_up: bool = False

    @property
    def cached(self) -> int:
        """Tokens from the start that need not be decoded."""
        return min(self.held, self.valid)

    def has_decoded(self, n_tokens: int) -> None:
        """The cache holds the first `n_tokens` now and nothing else."""
        self.held = self.valid = n_tokens

    def rewind(self, context: Context, n_tokens: int) -> None:
        """Let the cache hold no more than the first `n_tokens`; where the architecture cannot, nothing."""
        self.valid = min(self.valid, n_tokens)
        self.trim(context)

    def trim(self, context: Context) -> None:
        """Let the cache hold no more than what is the conversation's; where the architecture cannot, nothing."""
        cached = self.cached
        if self.held > cached:
            self.held = cached if context.truncate(cached) else 0

    def drop(self, context: Context, first: int, count: int) -> None:
        """Forget `count` tokens from `first` on, by moving the cache if the architecture can."""
        if context.can_shift and self.cached >= first + count:
            context.shift(first, first + count)
            self.has_decoded(self.cached - count)
        else:
            self.rewind(context, first)
        del self.tokens[first : first + count]


def first_to_drop(context: Context) -> int:
    """A context shift keeps the token that begins every text of the model, if it has one."""
    return 1 if context.model.adds_bos else 0


class Prompter:
    """Turns requests into the tokens that a model is to continue. One for each model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._template: TemplateChild | None = None

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

    def close(self) -> None:
        """Let the chat template's child go."""
        if self._template is not None:
            self._template.close()

    def _chat(self, messages: Sequence[Message]) -> list[int]:
        pieces = self._compiled().render(messages)
        tokens: list[int] = []
        for i, piece in enumerate(pieces):
            tokens += self._model.tokenize(piece.text, add_special=i == 0 and self._wants_bos(piece), parse_special=piece.special)
        return tokens

    def _wants_bos(self, first: Piece) -> bool:
        """Whether the tokenizer is to add what the template did not write itself."""
        return self._model.adds_bos and not (self._model.bos and first.text.startswith(self._model.bos))

    def _compiled(self) -> TemplateChild:
        if self._template is None:
            model = self._model
            if not model.chat_template:
                raise ChatTemplateFailed(model.name, "the file has none, so messages cannot be rendered: use prompt")
            self._template = TemplateChild(
                model.name, model.chat_template, bos=model.bos, eos=model.eos, control_strings=model.control_strings
            )
        return self._template


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
