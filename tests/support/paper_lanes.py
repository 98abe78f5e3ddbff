"""Lanes on paper: a clock of their own, a price for each step, and bytes that are really moved, in the order of that clock.

A copy takes effect when it ends and a compute reads when it begins, so a loop that lets them run into one another gets
wrong results, as on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from actors.layers.lanes import Step
from actors.layers.spec import SUMS, LayerStreamSpec
from actors.layers.times import Interval
from actors.layers.work import Factors, Floats, fill


@dataclass
class PaperStep:
    lanes: PaperLanes
    layer: int
    buffer: int
    begin_ms: float
    end_ms: float

    def wait(self) -> None:
        self.lanes.now_ms = max(self.lanes.now_ms, self.end_ms)

    def interval(self) -> Interval:
        return Interval(self.begin_ms, self.end_ms)


@dataclass
class PaperLanes:
    spec: LayerStreamSpec
    copy_ms: Callable[[int], float] = lambda layer: 1.0
    compute_ms: Callable[[int, int], float] = lambda layer, iters: 1.0  #: of a layer and compute_iters
    heeds: bool = True  #: whether `after` is waited for; a device that forgets it is a bug to be found
    device: str = "paper"
    now_ms: float = 0.0  #: of whoever puts steps into the lanes
    copies: list[PaperStep] = field(default_factory=list)
    computes: list[PaperStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights: Floats = np.empty((self.spec.n_layers, self.spec.elements), np.float32)
        fill(self.weights)
        self.prepare(self.spec.compute_iters)

    def prepare(self, iters: int) -> None:
        self._iters = iters

    def begin(self) -> None:
        self.copies, self.computes = [], []
        self.now_ms = 0.0

    def copy(self, layer: int, *, buffer: int, after: Step | None = None) -> Step:
        return self._put(self.copies, layer, buffer, after, self.copy_ms(layer))

    def compute(self, layer: int, *, buffer: int, after: Step | None = None) -> Step:
        return self._put(self.computes, layer, buffer, after, self.compute_ms(layer, self._iters))

    def _put(self, lane: list[PaperStep], layer: int, buffer: int, after: Step | None, ms: float) -> Step:
        begin = max(self.now_ms, lane[-1].end_ms if lane else 0.0)
        if after is not None and self.heeds:
            begin = max(begin, after.interval().end_ms)
        lane.append(PaperStep(self, layer, buffer, begin, begin + ms))
        return lane[-1]

    def results(self) -> Floats:
        slope, offset = Factors.of(self._iters).whole()
        found = np.full((self.spec.n_layers, SUMS), np.nan, np.float32)
        for compute in self.computes:
            came = [copy for copy in self.copies if copy.buffer == compute.buffer and copy.end_ms <= compute.begin_ms]
            if came:
                strides = self.weights[came[-1].layer].reshape(-1, SUMS)
                found[compute.layer] = (slope * strides + offset).sum(axis=0)
        return found

    def close(self) -> None:
        pass
