"""An agent's place in a pool: its conversation, and the slot that holds the KV of it."""

from __future__ import annotations

from dataclasses import dataclass

from conductor.backend.conversation import Conversation
from conductor.backend.llama import Sequence
from conductor.types import AgentId


@dataclass(slots=True, eq=False)
class Seat:
    """The pool's thread alone touches `sequence`; who else looks, looks at `state_bytes`."""

    agent_id: AgentId
    conversation: Conversation
    sequence: Sequence
    state_bytes: int = 0  #: what the KV takes at most if it is saved before the next turn

    def measure(self) -> None:
        self.state_bytes = self.sequence.state_bytes() if self.conversation.cached else 0

    def drop_cache(self) -> None:
        """The tokens are kept."""
        self.sequence.clear()
        self.conversation.held = 0
        self.state_bytes = 0
