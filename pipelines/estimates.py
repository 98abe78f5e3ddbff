"""What a model will take before it is loaded: `conductor estimate`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conductor import requests
from conductor.backend.catalog import Catalog
from conductor.backend.device import cap_bytes, open_device
from conductor.backend.estimator import Estimator
from conductor.backend.llama import Llama
from conductor.config import Config
from conductor.types import DeviceKind, Record
from conductor.units import format_bytes

WINDOWS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True, slots=True)
class WindowEstimate(Record):
    window: int
    kv_bytes: int
    compute_bytes: int
    total_bytes: int  #: with the weights
    fits: bool  #: alone on the device


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
    weights_bytes: int
    estimates: str  #: where the figures come from
    windows: tuple[WindowEstimate, ...]


def estimate(config: Config, model: str, windows: Sequence[int]) -> Estimate:
    """For each window what an agent of `model` costs on this machine's device. Raises InvalidRequest, ModelError, ConfigError."""
    asked = [requests.window(window) for window in windows]
    device = open_device(config.device, llama_supports_gpu=Llama.instance().supports_gpu, used_bytes=lambda: 0)
    cap = cap_bytes(device, config.admission_percent)
    plan = Catalog(config).plan(model, device.kind)
    own = config.window(plan.key, plan.geometry.trained_window)
    rows, weights = [], plan.weights_bytes
    with contextlib.closing(Estimator(index=config.device.index)) as estimator:
        for window in asked or sorted({own, *(w for w in WINDOWS if w <= max(own, plan.geometry.trained_window))}):
            took = estimator.estimate(plan, config.context_spec(plan.key, window), at_most=cap)
            total = took.weights_bytes + took.context_bytes
            weights = took.weights_bytes
            rows.append(WindowEstimate(window, took.kv_bytes, took.compute_bytes, total, total <= cap))
    return Estimate(
        model, plan.path, plan.geometry.architecture, plan.geometry.trained_window, device.name, device.kind,
        cap, weights, estimator.how, tuple(rows),
    )  # fmt: skip


def table(estimate: Estimate) -> RenderableType:
    head = Text.assemble(
        (estimate.model, "bold"),
        f" ({estimate.architecture}, trained with {estimate.trained_window:,} tokens): "
        f"weights {format_bytes(estimate.weights_bytes)}\n"
        f"on {estimate.device}: {format_bytes(estimate.cap_bytes)} may be booked; figures {estimate.estimates}",
    )
    rows = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("window", "KV", "compute", "with weights", "fits alone"):
        rows.add_column(column, justify="right")
    for w in estimate.windows:
        sizes = map(format_bytes, (w.kv_bytes, w.compute_bytes, w.total_bytes))
        rows.add_row(f"{w.window:,}", *sizes, "[green]yes[/]" if w.fits else "[red]no[/]")
    return Group(head, rows)
