"""An answer's text on its way out: made of its tokens, handed on by time, never cut inside a character."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from conductor.backend.llama import Model
from conductor.backend.text import TextAssembler
from conductor.types import Chunk


class Telling:
    """Nothing is done for a token until somebody looks, unless a stop string may end in it. Lives as long as its turn."""

    def __init__(self, stop: Sequence[str], *, partial: bytes) -> None:
        self._assembler = TextAssembler(stop, partial=partial)
        self.heeds_stop = bool(stop)
        self.text: list[str] = []
        self.next_at = math.inf  #: time.monotonic() from which `show` has something to do
        self._untold: list[int] = []
        self._tokens = self._tokens_shown = 0
        self._model: Model | None = None  #: none while the turn stands still
        self._emit: Callable[[Chunk], None] | None = None
        self._interval_s = 0.0

    def go_on(self, model: Model, emit: Callable[[Chunk], None] | None, interval_s: float) -> None:
        if emit is None:
            self.next_at = math.inf
        elif self.next_at == math.inf:
            self.next_at = 0.0  # the first text goes out at once
        self._model, self._emit, self._interval_s = model, emit, interval_s

    def add(self, token: int) -> bool:
        """Take in a token; True if a stop string is complete now."""
        self._tokens += 1
        self._untold.append(token)
        return self.heeds_stop and self._assemble()

    def end(self) -> None:
        """Count the token that ended the answer, which has no text."""
        self._tokens += 1

    def show(self, now: float) -> None:
        """Hand on what became text: at once the first time, later by time, so that nobody gets a message for each token."""
        self._assemble()
        text = self._assembler.take()
        if not text:
            return
        self.text.append(text)
        if self._emit is not None:
            tokens, self._tokens_shown = self._tokens - self._tokens_shown, self._tokens
            self.next_at = now + self._interval_s
            self._emit(Chunk(text, tokens))

    def stand_still(self, now: float) -> None:
        """It may be a while until the next token."""
        self.show(now)
        self._model = None

    def finish(self) -> bytes:
        """Release what waited for a stop string that did not come; returns the bytes of an unfinished character."""
        self._assemble()
        return self._assembler.finish()

    def _assemble(self) -> bool:
        if self._model is None:
            return False  # it was done before
        stopped = False
        for token in self._untold:
            stopped = self._assembler.add(self._model.piece(token)) or stopped
        self._untold.clear()
        return stopped
