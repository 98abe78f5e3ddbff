"""The layers' weights, what is computed on them, and what must come out, by NumPy alone.

Both computes end in few numbers that depend on every element of the layer, so that one that was overwritten too early, or
computed before it had arrived, shows. What must come out is known without computing it the same way: in closed form for a
sweep, and for a product W·X by Freivalds' check, W·(X·v) against (W·X)·v; both in 64 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.layers.spec import COLUMNS, SUMS, Compute, LayerStreamSpec

Floats = NDArray[np.float32]

#: Rounding of one operation on a float below 1.
_ROUNDING = 2.0**-24
#: Sweeps go towards this value, half of the way.
_AIM, _SHARE_LEFT = 0.5, 0.5


@dataclass(frozen=True, slots=True)
class Factors:
    """Of a sweep's x = a·x + b, made so that the whole of it halves each element's distance to 1/2, however many steps it takes:
    nothing overflows, vanishes or loses the element it began with.
    """

    a: np.float32
    b: np.float32
    iters: int

    @classmethod
    def of(cls, iters: int) -> Factors:
        a = np.float32(_SHARE_LEFT ** (1 / iters))
        return cls(a, np.float32((1 - float(a)) * _AIM), iters)

    def whole(self) -> tuple[float, float]:
        """The sweep in one step: x = slope·x + offset."""
        a, b = float(self.a), float(self.b)
        slope = a**self.iters
        return slope, b * (1 - slope) / (1 - a)


def fill(weights: Floats) -> None:
    """Random weights between 0 and 1, other ones in each layer, the same in each run."""
    for layer, row in enumerate(weights):
        np.random.default_rng(layer).random(out=row, dtype=np.float32)


def activations(iters: int) -> tuple[Floats, Floats]:
    """The right-hand side X of the products, COLUMNS × iters, and the signs v that their columns are added up with."""
    chance = np.random.default_rng(iters)
    columns = chance.random((COLUMNS, iters), dtype=np.float32) * 2 - 1
    signs = np.where(chance.random(iters) < 0.5, -1, 1).astype(np.float32)
    return columns, signs


class Reference:
    """What the layers' results must be. `weights`: n_layers × elements; must stay as they are."""

    def __init__(self, spec: LayerStreamSpec, weights: Floats) -> None:
        self._spec, self._weights = spec, weights
        self._expected: dict[int, tuple[NDArray[np.float64], NDArray[np.float64] | float]] = {}
        self._sums: NDArray[np.float64] | None = None

    def error(self, results: Floats, *, iters: int) -> float:
        """The largest deviation, in units of what rounding may do: above 1 they are wrong, infinite if there are none."""
        if iters not in self._expected:
            self._expected = {iters: self._product(iters) if self._spec.compute is Compute.MATMUL else self._sweep(iters)}
        expected, allowed = self._expected[iters]
        error = np.max(np.abs(results - expected) / allowed)
        return float(error) if np.isfinite(error) else float("inf")

    def _sweep(self, iters: int) -> tuple[NDArray[np.float64], float]:
        if self._sums is None:
            shape = (self._spec.n_layers, -1, SUMS)
            self._sums = self._weights.reshape(shape).sum(axis=1, dtype=np.float64)
        each = self._spec.elements // SUMS
        slope, offset = Factors.of(iters).whole()
        # A step rounds twice at most, and later steps shrink that; then `each` values below 1 are added up.
        allowed = each * (1.5 * iters + each) * _ROUNDING
        return slope * self._sums + each * offset, allowed

    def _product(self, iters: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        columns, signs = activations(iters)
        right = columns.astype(np.float64) @ signs.astype(np.float64)
        size = np.abs(columns).sum(axis=1, dtype=np.float64)
        both = np.stack([right, size], axis=1)
        matrices = self._weights.reshape(self._spec.n_layers, self._spec.rows, COLUMNS)
        found = np.stack([matrix.astype(np.float64) @ both for matrix in matrices])
        # Signs are mixed, so roundings cancel: far below the worst case, and far above what is seen.
        return found[..., 0], 8 * _ROUNDING * found[..., 1]
