"""How much of their prompts a step may read beside those who generate, so that none of them waits too long for a token."""

from __future__ import annotations

#: how much a new measurement counts beside those before
_NEWS = 0.3
#: of what is not known yet, this much is tried
_FIRST_TOKENS = 8
#: from one measurement to the next, the chunk grows to no more than so many times itself: one may be off
_GROWTH = 8


class Pacing:
    """Measures as it goes: what a step takes that only generates, and what each token of a prompt adds to it."""

    def __init__(self, max_stall_s: float) -> None:
        self._max_stall_s = max_stall_s
        self._step_s: float | None = None  #: without anybody who reads
        self._token_s: float | None = None
        self._last = 0

    def most(self) -> int:
        """Tokens that may be read in a step that others generate in: at least one."""
        step = self._step_s or 0.0
        token = self._token_s or self._step_s  # one token of many takes no longer than one alone
        if token is None:
            return _FIRST_TOKENS
        tokens = int((self._max_stall_s - step) / token)
        return max(1, min(tokens, _GROWTH * max(self._last, _FIRST_TOKENS)))

    def generated(self, seconds: float) -> None:
        """What a step took in which nobody read."""
        self._step_s = _mixed(self._step_s, seconds)

    def read(self, tokens: int, seconds: float, *, alone: bool) -> None:
        """What a step took in which so many tokens were read; `alone`: and none generated."""
        if tokens < _FIRST_TOKENS and self._token_s is not None:
            return  # it says more about the step than about the tokens
        base = 0.0 if alone else self._step_s or 0.0
        self._token_s = _mixed(self._token_s, max(seconds - base, seconds * 0.05) / tokens)
        self._last = tokens


def _mixed(before: float | None, now: float) -> float:
    return now if before is None else before + _NEWS * (now - before)
