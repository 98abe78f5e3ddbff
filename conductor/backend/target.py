"""The conversation as it is to stand before an answer."""

from __future__ import annotations

from dataclasses import dataclass

from conductor.backend.conversation import Conversation, Prompter, common_prefix, first_to_drop
from conductor.backend.turn import TurnOrder
from conductor.errors import WindowFull


@dataclass(frozen=True, slots=True)
class Target:
    tokens: list[int]
    known: int  #: how many of the conversation's tokens it began with
    first: int = 0
    dropped: int = 0  #: how many of those, from `first` on, a context shift then took out
    head: int = 0  #: how many tokens, from the start, other chats with the same system message begin with


def fit_window(conversation: Conversation, prompter: Prompter, order: TurnOrder) -> Target:
    """The target, if it and one token more fit the window; with a context shift, less what has to be dropped of its history.

    Takes its time with long texts, and touches neither conversation nor context. Raises InvalidRequest, ChatTemplateFailed,
    WindowFull, LlamaError.
    """
    tokens = prompter.target(conversation, order.request)
    known = common_prefix(conversation.tokens, tokens)
    excess = len(tokens) + 1 - order.window
    if excess <= 0:
        return Target(tokens, known, head=prompter.head(order.request, tokens))
    first = first_to_drop(prompter.model)
    droppable = prompter.history(conversation, order.request, tokens) - first
    if not order.context_shift or excess > droppable:
        raise WindowFull(order.agent_id, order.window, known, len(tokens) - known)
    drop = max(excess, droppable // 2)
    rest = tokens[:first] + tokens[first + drop :]
    if known >= first + drop:
        return Target(rest, known, first, drop)
    # A chat's messages begin before what the session still holds: its history is read again.
    return Target(rest, common_prefix(conversation.tokens, rest))
