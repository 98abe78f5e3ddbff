"""The streaming experiment as a picture: who copied and computed when, or what a sweep saved.

The command line's only import of matplotlib. Lanes are told apart by hatching and by their place, lines by their marks, so that
a print without colour can be read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from actors.layers.spec import Compute
from actors.layers.times import Interval, LayerStreamResult, LayerSweep, Timeline
from conductor.errors import InvalidRequest
from conductor.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_TRANSFER, _COMPUTE = "#9ecae1", "#fdae6b"
_DPI = 150
_WORK = {Compute.SWEEP: "FMA sweep", Compute.MATMUL: "matrix product"}
_IDEAL = "ideal: the first copy, then the longer of copy and compute"
#: Of the width: a narrower step has no room for its layer's number.
_LEAST_NUMBERED = 0.018


def refuse_unless_installed() -> None:
    """Raises InvalidRequest that names the extra."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("plot", "matplotlib is not installed: pip install 'vram-conductor[plot]'")


def save(found: LayerStreamResult | LayerSweep, path: Path) -> None:
    """Draw it into a file of one of FORMATS. Raises InvalidRequest if the file cannot be written."""
    refuse_unless_installed()
    figure = sweep(found) if isinstance(found, LayerSweep) else timeline(found)
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise InvalidRequest("plot", f"{path} cannot be written: {error.strerror or error}") from error


def timeline(result: LayerStreamResult) -> Figure:
    """Both loops, each with a transfer and a compute lane, on one scale."""
    figure = _figure(f"{_what(result)}\n{result.savings:.1%} of the time saved, {result.speedup:.2f}×", height=4.6)
    above, below = figure.subplots(2, 1, sharex=True)
    both = f"overlapped: {result.overlapped_ms:.2f} ms (ideal {result.ideal_ms:.2f} ms, dashed)"
    width_ms = max(result.serial.elapsed_ms, result.overlapped.elapsed_ms)
    _lanes(above, result.serial, f"serial: {result.serial_ms:.2f} ms", width_ms=width_ms)
    _lanes(below, result.overlapped, both, width_ms=width_ms)
    below.axvline(result.ideal_ms, color="black", linestyle="--", linewidth=1)
    below.set_xlabel("time since the first copy began, ms")
    above.set_xlim(left=0)
    return figure


def sweep(found: LayerSweep) -> Figure:
    """Savings over `compute_iters` with the ideal curve beside it; below, what a layer's copy and compute took."""
    figure = _figure(_what(found.points[0], with_iters=False), height=6.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    iters = [point.spec.compute_iters for point in found.points]
    above.plot(iters, [100 * p.ideal_savings for p in found.points], "k--s", markerfacecolor="white", label=_IDEAL)
    above.plot(iters, [100 * p.savings for p in found.points], "-o", color="#d94801", label="measured")
    above.set_ylabel("time saved, %")
    above.set_ylim(bottom=min(0, *(100 * p.savings for p in found.points)) - 2)
    below.plot(iters, [_mean(p.copy_ms) for p in found.points], "-^", color="#3182bd", label="copy")
    below.plot(iters, [_mean(p.compute_ms) for p in found.points], "-o", color="#d94801", label="compute")
    below.set_ylabel("one layer, ms")
    below.set_yscale("log", base=2)
    below.yaxis.set_major_formatter("{x:g}")
    below.set_xscale("log", base=2)
    below.set_xlabel("multiply-adds for each element of a layer")
    below.set_xticks(iters, [f"{n:,}" for n in iters], rotation=30)
    for axes in (above, below):
        axes.grid(visible=True, color="0.9")
        if found.balance_iters is not None:
            axes.axvline(found.balance_iters, color="black", linestyle=":")
        axes.legend()
    if found.at_balance is not None:
        said = f"balance: {found.balance_iters:,} multiply-adds, {found.at_balance.savings:.1%} saved"
        above.set_title(said, loc="left", fontsize=10)
    return figure


def _figure(title: str, *, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure


def _lanes(axes: Axes, run: Timeline, title: str, *, width_ms: float) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_yticks([1, 0], ["transfer", "compute"])
    axes.set_ylim(-0.5, 1.5)
    axes.grid(visible=True, axis="x", color="0.9")
    axes.set_axisbelow(True)
    _bars(axes, run.copies, width_ms=width_ms, at=1, colour=_TRANSFER, hatch="///")
    _bars(axes, run.computes, width_ms=width_ms, at=0, colour=_COMPUTE, hatch="")


def _bars(axes: Axes, steps: tuple[Interval, ...], *, width_ms: float, at: int, colour: str, hatch: str) -> None:
    spans = [(step.begin_ms, step.ms) for step in steps]
    axes.broken_barh(spans, (at - 0.35, 0.7), facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
    for layer, step in enumerate(steps):
        if step.ms >= _LEAST_NUMBERED * width_ms:
            middle = (step.begin_ms + step.end_ms) / 2
            axes.text(middle, at, str(layer), ha="center", va="center", fontsize=7, bbox=box, clip_on=True)


def _what(result: LayerStreamResult, *, with_iters: bool = True) -> str:
    spec = result.spec
    iters = f", {spec.compute_iters:,} multiply-adds an element" if with_iters else ""
    layers = f"{spec.n_layers} layers of {format_bytes(spec.bytes_per_layer)}"
    return f"{result.device}: {layers}, {spec.buffers} buffers, {_WORK[spec.compute]}{iters}"


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
