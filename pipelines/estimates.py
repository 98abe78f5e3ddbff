"""What a model will take before it is loaded, and how many agents would fit: `conductor estimate`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conductor import requests
from conductor.backend.catalog import Catalog
from conductor.backend.device import Device, cap_bytes, open_device
from conductor.backend.estimator import Estimator
from conductor.backend.llama import Llama
from conductor.config import Config
from conductor.core.estimate import CELL_MULTIPLE, MAX_CONTEXT_TOKENS, MAX_SLOTS, Footprint, ModelPlan, refusal
from conductor.core.pool import MOST_MULTIPROCESSORS, on_gpu, pool_bytes
from conductor.errors import InvalidRequest
from conductor.types import ContextSpec, DeviceKind, Record
from conductor.units import format_bytes

WINDOWS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)

#: asked about in one go by the search for the largest window: starting to ask costs more than a window does
_ABREAST = 16


@dataclass(frozen=True, slots=True)
class WindowEstimate(Record):
    window: int  #: of each slot
    kv_bytes: int
    compute_bytes: int
    pool_bytes: int  #: CUDA's temporary buffers, at most
    context_bytes: int  #: all three: what one live context takes, all its slots included
    total_bytes: int  #: with the weights
    host_bytes: int | None  #: beside a GPU, in host memory; None where only the formula tells
    fits: bool  #: alone on the device
    contexts: int  #: that fit at once beside one copy of the weights
    agents: int  #: that they serve, one in each slot


@dataclass(frozen=True, slots=True)
class Estimate(Record):
    """What a model takes on a device, and how that is known."""

    model: str
    path: str
    architecture: str
    trained_window: int
    device: str
    device_kind: DeviceKind
    cap_bytes: int
    slots: int
    weights_bytes: int
    estimates: str  #: where the figures come from
    exact: bool
    largest_window: int | None  #: that fits alone, up to what the model was trained for or asked with; None if none does
    once: str | None  #: what a process takes beside all this
    windows: tuple[WindowEstimate, ...]


def estimate(config: Config, model: str, windows: Sequence[int], *, slots: int = 1) -> Estimate:
    """For each window what a context of `model` with `slots` agents takes on this machine's device, and how many fit.

    Raises InvalidRequest, ModelError, ConfigError.
    """
    asked = [requests.window(window) for window in windows]
    if not 1 <= slots <= MAX_SLOTS:
        raise InvalidRequest("slots", f"{slots} is outside 1 to {MAX_SLOTS}")
    device = open_device(config.device, llama_supports_gpu=Llama.instance().supports_gpu, used_bytes=lambda: 0)
    plan = Catalog(config).plan(model, device.kind)
    own, trained = config.window(plan.key, plan.geometry.trained_window), plan.geometry.trained_window
    shown = asked or sorted({own, *(window for window in WINDOWS if window <= max(own, trained))})
    spec = replace(config.context_spec(plan.key, own), slots=slots)
    for window in shown:
        if why := refusal(replace(spec, window=window)):
            raise InvalidRequest("window", why)
    cap = cap_bytes(device.read(), config.admission_percent)
    with contextlib.closing(Estimator(index=config.device.index)) as estimator:

        def ask(windows: Sequence[int]) -> list[WindowEstimate]:
            took = estimator.ladder(plan, spec, windows, at_most=cap)
            specs = (replace(spec, window=window) for window in windows)
            return [_row(plan, *each, device=device, cap=cap) for each in zip(specs, took, strict=True)]

        rows = ask(shown)
        weights = rows[0].total_bytes - rows[0].context_bytes
        most = min(max(trained, *shown), MAX_CONTEXT_TOKENS // slots)
        largest = _largest_window(lambda windows: [row.fits for row in ask(windows)], up_to=most)
        return Estimate(
            model, plan.path, plan.geometry.architecture, trained, device.name, device.kind, cap,
            slots, weights, estimator.how, estimator.exact, largest, _once(device), tuple(rows),
        )  # fmt: skip


def _row(plan: ModelPlan, spec: ContextSpec, took: Footprint, *, device: Device, cap: int) -> WindowEstimate:
    gpu = device.kind is DeviceKind.CUDA
    booked = on_gpu(took, plan.geometry) if gpu else took
    cores = device.multiprocessors or MOST_MULTIPROCESSORS
    pool = pool_bytes(plan.geometry, spec, multiprocessors=cores) if gpu else 0
    context = booked.context_bytes + pool
    contexts = max(0, cap - booked.weights_bytes) // context
    return WindowEstimate(
        spec.window, booked.kv_bytes, booked.compute_bytes, pool, context, booked.weights_bytes + context, took.host_bytes,
        contexts > 0, contexts, contexts * spec.slots,
    )  # fmt: skip


def _largest_window(fit: Callable[[Sequence[int]], Sequence[bool]], *, up_to: int) -> int | None:
    """The longest window that fits, in llama.cpp's steps, or `up_to` if that does. What fits a window fits any shorter one."""
    if fit([up_to])[0]:
        return up_to
    low, high = 0, up_to // CELL_MULTIPLE
    while low < high:  # at least `low` steps fit, and at most `high`
        steps = sorted({low + -(-(high - low) * part // _ABREAST) for part in range(1, _ABREAST + 1)})
        fitting = sum(fit([step * CELL_MULTIPLE for step in steps]))
        low, high = [low, *steps][fitting], [*(step - 1 for step in steps), high][fitting]
    return low * CELL_MULTIPLE or None


def _once(device: Device) -> str | None:
    if device.kind is DeviceKind.HOST:
        return None
    return "once for the process besides: CUDA's context and kernels, some hundreds of MiB, known when the conductor runs"


def table(estimate: Estimate) -> RenderableType:
    head = Text.assemble(
        (estimate.model, "bold"),
        f" ({estimate.architecture}, trained with {estimate.trained_window:,} tokens): "
        f"weights {format_bytes(estimate.weights_bytes)}\n"
        f"on {estimate.device}: {format_bytes(estimate.cap_bytes)} may be booked; figures {estimate.estimates}",
    )
    rows = Table(box=None, pad_edge=False, header_style="dim")
    gpu = estimate.device_kind is DeviceKind.CUDA
    for column in ("window", "KV", "compute", *(["pool"] if gpu else []), "with weights", "fits alone", "how many"):
        rows.add_column(column, justify="right")
    if gpu:
        rows.add_column("host memory", justify="right")
    for w in estimate.windows:
        sizes = map(format_bytes, (w.kv_bytes, w.compute_bytes, *([w.pool_bytes] if gpu else []), w.total_bytes))
        host = "" if w.host_bytes is None else format_bytes(w.host_bytes)
        fits = "[green]yes[/]" if w.fits else "[red]no[/]"
        rows.add_row(f"{w.window:,}", *sizes, fits, f"{w.agents:,}", *([host] if gpu else []))
    return Group(head, rows, Text(_foot(estimate)))


def _foot(estimate: Estimate) -> str:
    how_many = "how many: agents whose contexts fit at once beside one copy of the weights"
    if estimate.slots > 1:
        how_many += f", {estimate.slots} in each; the sizes are of one context"
    largest = f"largest window that fits alone, by {'dry runs' if estimate.exact else 'the formula'}: "
    largest += f"{estimate.largest_window:,} tokens" if estimate.largest_window else "none"
    if (estimate.largest_window or 0) >= estimate.trained_window:
        largest += " (none longer tried: it is all the model was trained with)"
    return "\n".join(filter(None, (how_many, largest, estimate.once)))
