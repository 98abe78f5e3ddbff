"""What others ask of a turn while it runs."""

from __future__ import annotations

from conductor.types import FinishReason


class TurnControl:
    """Written by any thread, read by the pool's before each step: plain attributes, and one to look at first."""

    __slots__ = ("attention", "held", "paused", "stop")

    def __init__(self) -> None:
        self.stop: FinishReason | None = None
        self.paused = False
        self.held = False
        #: something was asked since the pool looked last; set after what was asked
        self.attention = False

    def end(self, reason: FinishReason) -> None:
        """The first reason stands."""
        if self.stop is None:
            self.stop = reason
        self.attention = True

    def pause(self) -> None:
        self.paused = self.attention = True

    def hold(self, held: bool) -> None:
        self.held = held
        self.attention = True
