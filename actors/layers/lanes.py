"""The two lanes of the experiment, as its loops see them: one copies layers to the device, one computes on them."""

from __future__ import annotations

from typing import Protocol

from actors.layers.times import Interval
from actors.layers.work import Floats


class Step(Protocol):
    """A copy or a compute that was put into its lane."""

    def wait(self) -> None:
        """Until it has ended; the caller stands still."""
        ...

    def interval(self) -> Interval:
        """When it ran, since `Lanes.begin`; only after it has ended."""
        ...


class Lanes(Protocol):
    """A device with room for `buffers` layers. Whoever opens it closes it."""

    device: str
    weights: Floats  #: n_layers × elements, in host memory; copies come from here

    def prepare(self, iters: int) -> None:
        """Compute so much for each element from now on. Both lanes must be idle."""
        ...

    def begin(self) -> None:
        """Forget all results, and count time from now. Both lanes must be idle."""
        ...

    def copy(self, layer: int, *, buffer: int, after: Step | None = None) -> Step:
        """Bring a layer to the device, after the copies before it and after `after`. Returns at once."""
        ...

    def compute(self, layer: int, *, buffer: int, after: Step | None = None) -> Step:
        """Compute on the layer in a buffer, after the computes before it and after `after`. Returns at once."""
        ...

    def results(self) -> Floats:
        """n_layers × results, brought to the host; NaN where nothing was computed."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...
