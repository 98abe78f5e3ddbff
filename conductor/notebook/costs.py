"""What a swap costs, as a line: so much for any, and so much for each token."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from conductor.errors import InvalidRequest
from conductor.types import Record


@dataclass(frozen=True, slots=True)
class SwapPoint(Record):
    """A swap that was measured."""

    tokens: int  #: whose KV was moved
    bytes: int  #: moved
    ms: float  #: that it took


@dataclass(frozen=True, slots=True)
class CostLine(Record):
    """ms = at_none_ms + ms_per_token · tokens, by least squares."""

    ms_per_token: float
    at_none_ms: float
    r_squared: float  #: the share of the variance that the line explains
    points: int  #: that it was fitted to

    def __str__(self) -> str:
        line = f"{self.at_none_ms:.2f} ms + {1000 * self.ms_per_token:.2f} µs a token"
        return f"{line} (R² {self.r_squared:.3f}, {self.points} points)"


def fitted(points: Sequence[SwapPoint]) -> CostLine:
    """The least-squares line through measured swaps. Raises InvalidRequest unless there are points of two lengths."""
    lengths, times = [point.tokens for point in points], [point.ms for point in points]
    if len(set(lengths)) < 2:
        raise InvalidRequest("points", "a line needs swaps of two lengths at least")
    slope, intercept = statistics.linear_regression(lengths, times)
    left = sum((ms - intercept - slope * tokens) ** 2 for tokens, ms in zip(lengths, times, strict=True))
    mean = statistics.fmean(times)
    whole = sum((ms - mean) ** 2 for ms in times)
    return CostLine(slope, intercept, 1 - left / whole if whole else 1.0, len(points))
