"""An answer's text on its way out: made of its tokens, handed on by time, never cut inside a character."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from conductor.backend.llama import Model
from conductor.backend.text import TextAssembler
from conductor.types import Chunk


class Telling:
    """`made`: the turn's tokens, as they grow. Nothing is done for one until somebody looks. Lives as long as its turn."""

    def __init__(self, made: Sequence[int], stop: Sequence[str], *, partial: bytes) -> None:
        self._made = made
        self._assembler = TextAssembler(stop, partial=partial)
        self.heeds_stop = bool(stop)
        self.text: list[str] = []
        self.next_at = math.inf  #: time.monotonic() from which `show` has something to do
        self._assembled = self._shown = 0  #: so many of the tokens
        self._model: Model | None = None  #: none while the turn stands still
        self._emit: Callable[[Chunk], None] | None = None
        self._interval_s = 0.0

    def go_on(self, model: Model, emit: Callable[[Chunk], None] | None, interval_s: float) -> None:
        if emit is None:
            self.next_at = math.inf
        elif self.next_at == math.inf:
            self.next_at = 0.0  # the first text goes out at once
        self._model, self._emit, self._interval_s = model, emit, interval_s

    def keep_up(self) -> bool:
        """Make text of what was made since; True if a stop string is complete now."""
        return self._assemble(len(self._made))

    def end(self) -> None:
        """The newest token ended the answer: it counts, and has no text."""
        self._assemble(len(self._made) - 1)
        self._assembled += 1

    def show(self, now: float) -> None:
        """Hand on what became text: at once the first time, later by time, so that nobody gets a message for each token."""
        self.keep_up()
        text = self._assembler.take()
        if not text:
            return
        self.text.append(text)
        if self._emit is not None:
            tokens, self._shown = len(self._made) - self._shown, len(self._made)
            self.next_at = now + self._interval_s
            self._emit(Chunk(text, tokens))

    def stand_still(self, now: float) -> None:
        """It may be a while until the next token."""
        self.show(now)
        self._model = None

    def finish(self) -> bytes:
        """Release what waited for a stop string that did not come; returns the bytes of an unfinished character."""
        self.keep_up()
        return self._assembler.finish()

    def _assemble(self, tokens: int) -> bool:
        if self._model is None:
            return False  # it was done before
        stopped = False
        for token in self._made[self._assembled : tokens]:
            stopped = self._assembler.add(self._model.piece(token)) or stopped
        self._assembled = tokens
        return stopped
