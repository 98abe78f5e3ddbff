"""A session's tokens, which are the truth, and how much of them the KV cache holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from conductor.backend.chat_template import Piece
from conductor.backend.llama import Model
from conductor.backend.llama import Sequence as Slot
from conductor.backend.template_child import TemplateChild
from conductor.errors import ChatTemplateFailed, InvalidRequest
from conductor.types import DecodeRequest, Message

_COMPARED = 1024  #: tokens of a block in `common_prefix`
_HEADS = 64  #: system messages whose tokens are remembered
_PROBE = "\u2301 probe"  #: begins as no other message does
_NEVER = sys.maxsize


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
    #: from this token on the cache was moved by a context shift: it is the session's, but not what reading afresh gives
    shifted_from: int = _NEVER

    @property
    def cached(self) -> int:
        """Tokens from the start that need not be decoded."""
        return min(self.held, self.valid)

    @property
    def fresh(self) -> int:
        """Tokens from the start whose cache is what reading them afresh gives: as good for whoever begins with the same."""
        return min(self.cached, self.shifted_from)

    def has_decoded(self, n_tokens: int) -> None:
        """The cache holds the first `n_tokens` now and nothing else."""
        self.held = self.valid = n_tokens
        if n_tokens <= self.shifted_from:
            self.shifted_from = _NEVER

    def rewind(self, slot: Slot, n_tokens: int) -> None:
        """Let the cache hold no more than the first `n_tokens`; where the architecture cannot, nothing."""
        self.valid = min(self.valid, n_tokens)
        self.trim(slot)

    def trim(self, slot: Slot) -> None:
        """Let the cache hold no more than what is the conversation's; where the architecture cannot, nothing."""
        cached = self.cached
        if self.held > cached:
            self.held = cached if slot.truncate(cached) else 0

    def drop(self, slot: Slot, first: int, count: int) -> None:
        """Forget `count` tokens from `first` on, by moving the cache if the architecture can."""
        if self.cached >= first + count and slot.shift(first, first + count):
            self.has_decoded(self.cached - count)
            self.shifted_from = min(self.shifted_from, first)
        else:
            self.rewind(slot, first)
        self.tokens = self.tokens[:first] + self.tokens[first + count :]  # a turn may keep the list as it was before

    def copy(self) -> Conversation:
        """The same tokens, whose KV is nowhere yet."""
        return Conversation(list(self.tokens), partial=self.partial)


def first_to_drop(model: Model) -> int:
    """A context shift keeps the token that begins every text of the model, if it has one."""
    return 1 if model.adds_bos else 0


class Prompter:
    """Turns requests into the tokens that a model is to continue. One for each model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._template: TemplateChild | None = None
        self._heads: dict[str, list[int]] = {}

    def target(self, conversation: Conversation, request: DecodeRequest) -> list[int]:
        """The conversation as it is to stand before the answer. Raises InvalidRequest, ChatTemplateFailed."""
        held = [] if request.reset else conversation.tokens
        if request.messages is not None:
            return self._chat(request.messages)
        if request.prompt is None:
            if not held:
                raise InvalidRequest("prompt", "there is no conversation to continue: give a prompt or messages")
            return list(held)
        added = self.model.tokenize(request.prompt, add_special=not held, parse_special=True)
        if not held and not added:
            raise InvalidRequest("prompt", "it is empty, and so is the conversation")
        return held + added

    def history(self, conversation: Conversation, request: DecodeRequest, target: Sequence[int]) -> int:
        """How many tokens of the target, from its start, are not new with this request: a context shift may drop of them."""
        if request.messages is not None:
            newest = self.model.tokenize(request.messages[-1].content, add_special=False, parse_special=False)
            return max(0, len(target) - len(newest))
        return 0 if request.reset else len(conversation.tokens)

    def head(self, request: DecodeRequest, target: Sequence[int]) -> int:
        """How many tokens a chat's target begins with that are its system message's, whatever a user says to it; 0 if unknown.

        Only of models that `forgets`. Found by saying something else: the template tells nobody where a message ends.
        """
        messages = request.messages
        if not self.model.forgets or messages is None or len(messages) < 2 or messages[0].role != "system":
            return 0
        system = messages[0].content
        if system not in self._heads:
            try:
                other = self._chat([messages[0], Message("user", _PROBE)])
            except ChatTemplateFailed:
                other = []
            if len(self._heads) >= _HEADS:
                self._heads.clear()
            self._heads[system] = list(target[: common_prefix(target, other)])
        return common_prefix(target, self._heads.get(system, []))

    def close(self) -> None:
        """Let the chat template's child go."""
        if self._template is not None:
            self._template.close()

    def _chat(self, messages: Sequence[Message]) -> list[int]:
        pieces = self._compiled().render(messages)
        tokens: list[int] = []
        for i, piece in enumerate(pieces):
            tokens += self.model.tokenize(piece.text, add_special=i == 0 and self._wants_bos(piece), parse_special=piece.special)
        return tokens

    def _wants_bos(self, first: Piece) -> bool:
        """Whether the tokenizer is to add what the template did not write itself."""
        return self.model.adds_bos and not (self.model.bos and first.text.startswith(self.model.bos))

    def _compiled(self) -> TemplateChild:
        if self._template is None:
            model = self.model
            if not model.chat_template:
                raise ChatTemplateFailed(model.name, "the file has none, so messages cannot be rendered: use prompt")
            self._template = TemplateChild(
                model.name, model.chat_template, bos=model.bos, eos=model.eos, control_strings=model.control_strings
            )
        return self._template


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with. Blocks are compared whole: a long session has a hundred thousand."""
    length = min(len(a), len(b))
    for start in range(0, length, _COMPARED):
        end = min(start + _COMPARED, length)
        if a[start:end] != b[start:end]:
            return next(i for i in range(start, end) if a[i] != b[i])
    return length
