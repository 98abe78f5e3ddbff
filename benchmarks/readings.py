"""What the reader of an answer sees: when tokens came and how many each time; and the figures of many at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Reading:
    """One answer. Times are `time.perf_counter`'s; `arrivals` is empty where the answer came in one piece."""

    began_at: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  #: when, how many tokens
    tokens: int = 0
    ended_at: float = 0.0
    first_token_s: float | None = None  #: as the other side says, where nobody saw it come
    prompts_read_at: float | None = None  #: of all answers together

    def arrived(self, tokens: int) -> None:
        self.arrivals.append((time.perf_counter(), tokens))

    def ended(self, tokens: int, at: float | None = None) -> None:
        self.tokens, self.ended_at = tokens, at or time.perf_counter()

    @property
    def to_first_token_s(self) -> float | None:
        return self.arrivals[0][0] - self.began_at if self.arrivals else self.first_token_s

    def gaps(self) -> list[tuple[float, int]]:
        """Seconds between one arrival and the next, and the tokens that this one brought."""
        return [(at - before, count) for (before, _), (at, count) in zip(self.arrivals, self.arrivals[1:], strict=False)]


def figures(readings: Sequence[Reading]) -> dict[str, float]:
    """Of answers that were asked for at once. A token's time is its arrival's gap, shared among the tokens that came with it."""
    began_at, ended_at = min(r.began_at for r in readings), max(r.ended_at for r in readings)
    tokens = sum(r.tokens for r in readings)
    result = {"tokens": float(tokens), "elapsed_s": ended_at - began_at, "tokens_per_s": tokens / (ended_at - began_at)}
    firsts = [first * 1000 for r in readings if (first := r.to_first_token_s) is not None]
    if firsts:
        result |= {"first_token_ms": float(np.median(firsts)), "first_token_p95_ms": p95(firsts)}
    gaps = [(gap * 1000, count) for r in readings for gap, count in r.gaps() if count]
    if gaps:
        each = np.repeat([gap / count for gap, count in gaps], [count for _, count in gaps])
        result |= {"token_p95_ms": p95(each.tolist()), "longest_gap_ms": max(gap for gap, _ in gaps)}
    if (read_at := readings[0].prompts_read_at) is not None:
        result["prefill_ms"] = (read_at - began_at) * 1000
        result["decode_tokens_per_s"] = (tokens - len(readings)) / (ended_at - read_at)
    return result


def p95(values: Sequence[float]) -> float:
    return float(np.percentile(values, 95))
