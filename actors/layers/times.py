"""The arithmetic of the experiment: what the two loops took, the least they could have taken, and where they balance.

Times are milliseconds. Pure: no clock, no device. See `layers.loops` for where the times come from.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actors.layers.spec import LayerStreamSpec
from conductor.types import DeviceKind, Record


@dataclass(frozen=True, slots=True)
class Interval(Record):
    begin_ms: float
    end_ms: float

    @property
    def ms(self) -> float:
        return self.end_ms - self.begin_ms

    def since(self, zero_ms: float) -> Interval:
        return Interval(self.begin_ms - zero_ms, self.end_ms - zero_ms)

    def within(self, other: Interval) -> float:
        """Milliseconds that both share."""
        return max(0.0, min(self.end_ms, other.end_ms) - max(self.begin_ms, other.begin_ms))


@dataclass(frozen=True, slots=True)
class Timeline(Record):
    """One pass over all layers: when each was copied, and when computed."""

    copies: tuple[Interval, ...]
    computes: tuple[Interval, ...]

    @property
    def elapsed_ms(self) -> float:
        """From the first copy's begin to the last compute's end."""
        return self.computes[-1].end_ms - self.copies[0].begin_ms

    def from_zero(self) -> Timeline:
        """The same, told from the first copy's begin."""
        zero = self.copies[0].begin_ms
        copies, computes = (tuple(step.since(zero) for step in lane) for lane in (self.copies, self.computes))
        return Timeline(copies, computes)

    def hidden_ms(self) -> tuple[float, ...]:
        """For each layer, how long something was computed while it was copied."""
        return tuple(sum(copy.within(compute) for compute in self.computes) for copy in self.copies)


@dataclass(frozen=True, slots=True)
class LayerStreamResult(Record):
    """Both loops on the same buffers and weights. Medians over the repeats."""

    spec: LayerStreamSpec
    device: str
    kind: DeviceKind
    serial_ms: float
    overlapped_ms: float
    ideal_ms: float  #: the least that the copies and computes of the serial loop could take side by side
    savings: float  #: of the serial loop's time, 0 to 1
    ideal_savings: float
    speedup: float
    above_ideal: float  #: by how much of the ideal the overlapped loop is longer
    copy_ms: tuple[float, ...]  #: of each layer, in the serial loop
    compute_ms: tuple[float, ...]
    serial: Timeline  #: the repeat of median length
    overlapped: Timeline
    largest_error: float  #: against NumPy, in units of what rounding may do
    correct: bool


@dataclass(frozen=True, slots=True)
class LayerSweep(Record):
    """The same layers with more and more to compute."""

    points: tuple[LayerStreamResult, ...]  #: by `compute_iters`
    balance_iters: int | None  #: where computing takes as long as copying; None if it does nowhere

    @property
    def at_balance(self) -> LayerStreamResult | None:
        """The point measured there."""
        return next((point for point in self.points if point.spec.compute_iters == self.balance_iters), None)

    @property
    def best(self) -> LayerStreamResult:
        return max(self.points, key=lambda point: point.savings)


def ideal(copy_ms: Sequence[float], compute_ms: Sequence[float], *, buffers: int) -> Timeline:
    """The loop at its best: everything begins the moment it can, and beginning it costs nothing.

    A copy waits for the copy before it and for the compute that last read its buffer, a compute for its copy and the compute
    before it. With two buffers that takes the first copy (the fill), max(compute i, copy i + 1) for each pair, and the last
    compute.
    """
    copies: list[Interval] = []
    computes: list[Interval] = []
    for layer, (copying, computing) in enumerate(zip(copy_ms, compute_ms, strict=True)):
        link_free = copies[-1].end_ms if copies else 0.0
        buffer_free = computes[layer - buffers].end_ms if layer >= buffers else 0.0
        copies.append(_lasting(copying, since=max(link_free, buffer_free)))
        device_free = computes[-1].end_ms if computes else 0.0
        computes.append(_lasting(computing, since=max(device_free, copies[-1].end_ms)))
    return Timeline(tuple(copies), tuple(computes))


def result(
    spec: LayerStreamSpec,
    serial: Sequence[Timeline],
    overlapped: Sequence[Timeline],
    *,
    device: str,
    kind: DeviceKind,
    largest_error: float,
) -> LayerStreamResult:
    """What the repeats of both loops come to. `largest_error`: above 1, the results are wrong."""
    serial_ms, overlapped_ms = (statistics.median(run.elapsed_ms for run in runs) for runs in (serial, overlapped))
    copy_ms, compute_ms = _medians(run.copies for run in serial), _medians(run.computes for run in serial)
    ideal_ms = ideal(copy_ms, compute_ms, buffers=spec.buffers).elapsed_ms
    return LayerStreamResult(
        spec, device, kind, serial_ms, overlapped_ms, ideal_ms,
        savings=1 - overlapped_ms / serial_ms,
        ideal_savings=1 - ideal_ms / serial_ms,
        speedup=serial_ms / overlapped_ms,
        above_ideal=overlapped_ms / ideal_ms - 1,
        copy_ms=copy_ms, compute_ms=compute_ms, serial=_median_run(serial), overlapped=_median_run(overlapped),
        largest_error=largest_error, correct=largest_error <= 1,
    )  # fmt: skip


def balance_iters(points: Iterable[tuple[int, float, float]]) -> int | None:
    """Of points (compute_iters, copy ms, compute ms): where both take the same, on a straight line between the two around it."""
    before: tuple[int, float] | None = None
    for iters, copy_ms, compute_ms in sorted(points):
        excess = compute_ms - copy_ms
        if excess >= 0:
            if before is None:
                return iters if excess == 0 else None
            short_iters, shortfall = before
            return round(short_iters + (iters - short_iters) * -shortfall / (excess - shortfall))
        before = iters, excess
    return None


def iters_around(balance: int | None, *, at_most: int) -> tuple[int, ...]:
    """What a sweep measures: from a sixteenth of the balance to four times it, closer near it; doublings from 1 without one."""
    if balance is None:
        return tuple(iters for iters in (1, 2, 4, 8, 16, 32) if iters <= at_most)
    shares = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 2**-0.5, 1, 2**0.5, 2, 4)
    return tuple(sorted({min(max(1, round(balance * share)), at_most) for share in shares}))


def _lasting(ms: float, *, since: float) -> Interval:
    return Interval(since, since + ms)


def _medians(lanes: Iterable[tuple[Interval, ...]]) -> tuple[float, ...]:
    """For each layer, over the repeats."""
    return tuple(statistics.median(interval.ms for interval in layer) for layer in zip(*lanes, strict=True))


def _median_run(runs: Sequence[Timeline]) -> Timeline:
    return sorted(runs, key=lambda run: run.elapsed_ms)[len(runs) // 2].from_zero()
