"""How long it takes to decode tokens that are known already."""

from __future__ import annotations

from dataclasses import dataclass

#: fewer tokens say more about the beginning of a decode than about reading
_WORTH_TIMING = 32


@dataclass(slots=True)
class Reading:
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    @property
    def s_per_token(self) -> float | None:
        return self.seconds / self.tokens if self.tokens >= _WORTH_TIMING else None
