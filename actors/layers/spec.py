"""What the experiment streams: so many layers of so many bytes, and what is computed on each. Sizes follow from it alone."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from conductor.errors import InvalidRequest
from conductor.types import DeviceKind, Record
from conductor.units import MIB

#: Results of one layer's sweep: each adds up every SUMS-th element. On a GPU one thread makes one, so these fill the largest.
SUMS = 1 << 18
#: A layer as a matrix has rows of so many elements.
COLUMNS = 4096
ELEMENT_BYTES = 4

_MOST_LAYERS, _MOST_BUFFERS, _MOST_REPEATS = 1024, 64, 1001


class Compute(str, enum.Enum):
    """What is done with a layer; both take `compute_iters` multiply-adds for each of its elements."""

    SWEEP = "sweep"  #: x = a·x + b, `compute_iters` times, each element by itself
    MATMUL = "matmul"  #: the layer is a matrix, multiplied by `compute_iters` columns


#: A product keeps all its columns on the device, and a sweep over `compute_iters` books the most of them.
MOST_ITERS = {Compute.SWEEP: 1 << 20, Compute.MATMUL: 8192}


def _within(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidRequest(name, f"{value:,} is outside {least:,} to {most:,}")


@dataclass(frozen=True, slots=True)
class LayerStreamSpec(Record):
    """Raises InvalidRequest if it cannot be."""

    n_layers: int = 8
    bytes_per_layer: int = 64 * MIB
    compute_iters: int = 64
    buffers: int = 2  #: of one layer each, on the device
    compute: Compute = Compute.SWEEP
    repeats: int = 7  #: of each loop; what is told are medians

    def __post_init__(self) -> None:
        _within("n_layers", self.n_layers, 1, _MOST_LAYERS)
        _within("compute_iters", self.compute_iters, 1, MOST_ITERS[self.compute])
        _within("buffers", self.buffers, 2, _MOST_BUFFERS)
        _within("repeats", self.repeats, 1, _MOST_REPEATS)
        if self.bytes_per_layer < MIB or self.bytes_per_layer % MIB:
            raise InvalidRequest("bytes_per_layer", f"{self.bytes_per_layer:,} bytes are not one or more whole MiB")

    @property
    def elements(self) -> int:
        """Of a layer: 32-bit floats."""
        return self.bytes_per_layer // ELEMENT_BYTES

    @property
    def rows(self) -> int:
        """Of a layer as a matrix."""
        return self.elements // COLUMNS

    @property
    def results(self) -> int:
        """Of a layer: floats by which what was computed is checked."""
        return SUMS if self.compute is Compute.SWEEP else self.rows

    @property
    def arena_bytes(self) -> int:
        """All layers, in host memory."""
        return self.n_layers * self.bytes_per_layer

    def device_bytes(self, *, most_iters: int | None = None) -> int:
        """What its arrays take on the device; with `most_iters`, where that many may be computed."""
        iters = most_iters or self.compute_iters
        floats = self.n_layers * self.results
        if self.compute is Compute.MATMUL:
            floats += (COLUMNS + self.rows + 1) * iters
        return self.buffers * self.bytes_per_layer + floats * ELEMENT_BYTES


#: What is shown where nothing else is asked for. A core copies nearly as fast as a link, and computes far slower than a GPU.
DEFAULTS = {
    DeviceKind.CUDA: LayerStreamSpec(),
    DeviceKind.HOST: LayerStreamSpec(bytes_per_layer=16 * MIB, compute_iters=2),
}
