"""The two loops, and how they are measured: in turns, warmed up, every result checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from actors.layers.lanes import Lanes, Step
from actors.layers.spec import MOST_ITERS, LayerStreamSpec
from actors.layers.times import LayerStreamResult, LayerSweep, Timeline, balance_iters, iters_around, result
from actors.layers.work import Reference
from conductor.types import DeviceKind, Record

_WARM = 1


@dataclass(frozen=True, slots=True)
class Progress(Record):
    what: str
    done: int
    of: int


def serial(lanes: Lanes, spec: LayerStreamSpec) -> Timeline:
    """Copy, wait, compute, wait: nothing is ever beside anything."""
    lanes.begin()
    copies: list[Step] = []
    computes: list[Step] = []
    for layer in range(spec.n_layers):
        buffer = layer % spec.buffers
        copies.append(lanes.copy(layer, buffer=buffer))
        copies[-1].wait()
        computes.append(lanes.compute(layer, buffer=buffer))
        computes[-1].wait()
    return _timeline(copies, computes)


def overlapped(lanes: Lanes, spec: LayerStreamSpec) -> Timeline:
    """The next layer's copy beside this one's compute. The lanes wait for one another; this thread waits at the end only."""
    lanes.begin()
    copies: list[Step] = []
    computes: list[Step] = []
    for layer in range(spec.n_layers):
        buffer = layer % spec.buffers
        last_reader = computes[layer - spec.buffers] if layer >= spec.buffers else None
        copies.append(lanes.copy(layer, buffer=buffer, after=last_reader))
        computes.append(lanes.compute(layer, buffer=buffer, after=copies[-1]))
    computes[-1].wait()
    return _timeline(copies, computes)


def measure(
    lanes: Lanes, spec: LayerStreamSpec, reference: Reference, kind: DeviceKind
) -> Iterator[Progress | LayerStreamResult]:
    """Both loops in turns, so that a drift of the machine's speed meets them alike; the result last."""
    lanes.prepare(spec.compute_iters)
    runs: dict[str, list[Timeline]] = {"serial": [], "overlapped": []}
    largest_error = 0.0
    rounds = _WARM + spec.repeats
    for repeat in range(rounds):
        yield Progress(f"{spec.compute_iters:,} multiply-adds an element", repeat, rounds)
        for name, loop in (("serial", serial), ("overlapped", overlapped)):
            timeline = loop(lanes, spec)
            largest_error = max(largest_error, reference.error(lanes.results(), iters=spec.compute_iters))
            if repeat >= _WARM:
                runs[name].append(timeline)
    yield result(spec, runs["serial"], runs["overlapped"], device=lanes.device, kind=kind, largest_error=largest_error)


def sweep(lanes: Lanes, spec: LayerStreamSpec, reference: Reference, kind: DeviceKind) -> Iterator[Progress | LayerSweep]:
    """Measure around the point where copying and computing take the same, and there; the sweep last."""
    most = MOST_ITERS[spec.compute]
    yield Progress("looking for the balance", 0, 1)
    balance = find_balance(lanes, spec)
    points: list[LayerStreamResult] = []
    grid = iters_around(balance, at_most=most)
    for iters in grid:
        for item in measure(lanes, replace(spec, compute_iters=iters), reference, kind):
            if isinstance(item, LayerStreamResult):
                points.append(item)
            else:
                yield Progress(item.what, len(points) * item.of + item.done, len(grid) * item.of)
    yield LayerSweep(tuple(points), balance)


def find_balance(lanes: Lanes, spec: LayerStreamSpec) -> int | None:
    """By serial passes with four times as much to compute each time, until that takes longer than copying."""
    seen: list[tuple[int, float, float]] = []
    iters = 1
    while iters <= MOST_ITERS[spec.compute]:
        lanes.prepare(iters)
        serial(lanes, spec)
        timeline = serial(lanes, spec)
        copying, computing = (sum(step.ms for step in lane) for lane in (timeline.copies, timeline.computes))
        seen.append((iters, copying, computing))
        if computing >= copying:
            break
        iters *= 4
    return balance_iters(seen)


def _timeline(copies: list[Step], computes: list[Step]) -> Timeline:
    return Timeline(tuple(step.interval() for step in copies), tuple(step.interval() for step in computes))
