"""What a model and a context were estimated to take, against what they take: by llama.cpp's account, and by the driver's.

    python benchmarks/estimate.py [--models llama-3.2-1b,qwen2-0.5b] [--windows 4096,16384] [--save FILE]

On a GPU the driver's account is its free memory before and after each step, in one process that nobody shares the card with
and that has run each model once before, so that kernels loaded late are not taken for a context's. A context is measured
after a prompt and some single tokens, and again after batches of sizes that do not divide evenly, which may need more. On
the host llama.cpp's own account is all there is, and the estimate must equal it.
"""

from __future__ import annotations

import itertools
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness, shapes
from conductor.backend.catalog import Catalog
from conductor.backend.device import Device, open_device
from conductor.backend.estimator import Estimator
from conductor.backend.llama import Context, Llama
from conductor.config import DeviceConfig
from conductor.core.estimate import Footprint, ModelPlan
from conductor.core.pool import MOST_MULTIPROCESSORS, on_gpu, pool_bytes
from conductor.types import ContextSpec, DeviceKind, Record
from conductor.units import MIB, format_bytes
from pipelines.console import out

#: a batch larger than usual, and the window it is measured with
WIDE, WIDE_WINDOW = 2048, 16_384
SINGLE_TOKENS = 64
UNEVEN = (384, 300, 129, 33, 9, 2)
#: what must be free beside a context before it is tried: an allocation that fails in the pool ends the process
SPARE_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class Cell(Record):
    """One model with one context. `driver`: what the driver says was taken since before the load, after each step."""

    model: str
    window: int
    n_ubatch: int
    estimate: Footprint
    pool_bytes: int = 0  #: of temporary buffers, as the law has it
    booked_bytes: int = 0  #: the estimate as the driver hands it out, and the pool
    account: Footprint | None = None  #: llama.cpp's own, of the real thing
    steps: tuple[str, ...] = ()
    driver: tuple[int, ...] = ()
    skipped: str | None = None

    def after(self, step: str) -> int:
        return self.driver[self.steps.index(step)]

    @property
    def taken_bytes(self) -> int:
        return max(map(self.after, ("prompt", "single tokens")))

    @property
    def error(self) -> float:
        """Of what was booked, as a share of what was taken; negative is too little."""
        return self.booked_bytes / self.taken_bytes - 1

    @property
    def worst_error(self) -> float:
        """The same, batches of uneven sizes included."""
        return self.booked_bytes / max(self.taken_bytes, self.after("uneven batches")) - 1


@dataclass(slots=True)
class Steps:
    """What the driver says at each step; nothing on the host."""

    device: Device
    names: list[str] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)

    def note(self, name: str) -> None:
        if self.device.kind is DeviceKind.CUDA:
            self.names.append(name)
            self.taken.append(settled(self.device) - (self.taken[0] if self.taken else 0))


def settled(device: Device) -> int:
    """What is taken, once the driver says the same twice: what was freed may come back a moment later."""
    last, now = -1, device.taken_bytes()
    for _ in range(50):
        if last == now:
            break
        time.sleep(0.02)
        last, now = now, device.taken_bytes()
    return now


def decode(context: Context, n_vocab: int, count: int) -> None:
    """So many tokens from the beginning, a batch at a time, in the first slot."""
    tokens, batch = [(7 + 7919 * i) % n_vocab for i in range(count)], context.batch
    for start in range(0, count, batch.capacity):
        batch.clear()
        batch.add(tokens[start : start + batch.capacity], start, 0, output=True)
        context.decode()
    context.synchronize()


def decode_singly(context: Context, first: int, count: int) -> None:
    """So many more tokens, each by itself."""
    for position in range(first, first + count):
        context.batch.clear()
        context.batch.add_one(1, position, 0)
        context.decode()
    context.synchronize()


def run(plan: ModelPlan, spec: ContextSpec, device: Device, *, tokens: int) -> tuple[Footprint | None, Steps]:
    """Load, open, read a prompt, decode, close: llama.cpp's account of it, and the driver's."""
    steps = Steps(device)
    steps.note("before")
    with closing(Llama.instance().load(plan.path, plan.device)) as model:
        steps.note("load")
        with closing(model.context(spec, n_threads=psutil.cpu_count(logical=False) or 1)) as context:
            account = context.footprint()
            steps.note("context")
            prompt = min(max(tokens, spec.n_ubatch), spec.window - SINGLE_TOKENS)
            decode(context, model.n_vocab, prompt)
            steps.note("prompt")
            decode_singly(context, prompt, SINGLE_TOKENS)
            steps.note("single tokens")
            for size in UNEVEN:
                context.empty(0)
                decode(context, model.n_vocab, min(size, spec.window))
            steps.note("uneven batches")
        steps.note("closed")
    steps.note("unloaded")
    return account, steps


def measure(plan: ModelPlan, spec: ContextSpec, device: Device, estimator: Estimator, *, tokens: int) -> Cell:
    estimate = estimator.estimate(plan, spec, at_most=device.read().total_bytes)
    cell = Cell(plan.key, spec.window, spec.n_ubatch, estimate)
    if plan.device is DeviceKind.CUDA:
        handed_out = on_gpu(estimate, plan.geometry)
        pool = pool_bytes(plan.geometry, spec, multiprocessors=device.multiprocessors or MOST_MULTIPROCESSORS)
        cell = replace(cell, pool_bytes=pool, booked_bytes=handed_out.weights_bytes + handed_out.context_bytes + pool)
    needed, free = estimate.weights_bytes + estimate.context_bytes, device.read().free_bytes
    if needed + SPARE_BYTES > free:
        return replace(cell, skipped=f"{format_bytes(needed)} needed, {format_bytes(free)} free")
    account, steps = run(plan, spec, device, tokens=tokens)
    return replace(cell, account=account, steps=tuple(steps.names[1:]), driver=tuple(steps.taken[1:]))


def warm_up(plans: list[ModelPlan], device: Device) -> dict[str, int]:
    """Run each model once; {model: bytes that stay on the card although everything was closed}."""
    stays: dict[str, int] = {}
    for plan in plans:
        before = settled(device)
        for n_ubatch in (512, WIDE):
            run(plan, ContextSpec(4096, n_batch=n_ubatch, n_ubatch=n_ubatch), device, tokens=1024)
        stays[plan.key] = settled(device) - before
    return stays


def show_driver(cells: list[Cell]) -> None:
    rows = []
    for cell in cells:
        estimate = cell.estimate
        parts = [estimate.weights_bytes, estimate.kv_bytes, estimate.compute_bytes, cell.pool_bytes, cell.booked_bytes]
        row = [cell.model, f"{cell.window:,}", str(cell.n_ubatch), *(f"{part / MIB:.1f}" for part in parts)]
        if cell.skipped:
            rows.append([*row, "", "", "", cell.skipped])
            continue
        sizes = cell.taken_bytes - _total(estimate), cell.taken_bytes
        rows.append([*row, *(f"{size / MIB:.1f}" for size in sizes), f"{cell.error:+.2%}", f"{cell.worst_error:+.2%}"])
    columns = ["", "window", "batch", "weights", "KV", "compute", "pool", "booked", "beyond", "driver", "error", "uneven"]
    harness.table("MiB on the GPU; beyond: the driver's figure less weights, KV and compute", columns, rows)


def show_account(cells: list[Cell]) -> None:
    rows = []
    for cell in cells:
        estimate, account = cell.estimate, cell.account
        row = [cell.model, f"{cell.window:,}", str(cell.n_ubatch)]
        row += [f"{part / MIB:.2f}" for part in (estimate.weights_bytes, estimate.kv_bytes, estimate.compute_bytes)]
        off = "no account" if account is None else str(_total(account) - _total(estimate))
        rows.append([*row, cell.skipped or off])
    harness.table("MiB in host memory", ["", "window", "batch", "weights", "KV", "compute", "bytes off"], rows)


def _total(footprint: Footprint) -> int:
    return footprint.weights_bytes + footprint.context_bytes


def main(
    models: shapes.Models = None,
    windows: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "4096,16384,65536,172032",
    tokens: Annotated[int, typer.Option(help="Of the prompt.")] = 1024,
    directory: shapes.Directory = shapes.DIRECTORY,
    synth: shapes.Synth = shapes.SYNTH,
    save: Annotated[Path | None, typer.Option(help="Where the JSON goes (default: benchmarks/results).")] = None,
) -> None:
    """Print estimates beside what was taken, and save them."""
    llama = Llama.instance()
    everything = DeviceConfig(host_bytes=int(psutil.virtual_memory().total))
    device = open_device(everything, llama_supports_gpu=llama.supports_gpu, used_bytes=lambda: 0)
    on_card = device.kind is DeviceKind.CUDA
    usual = (*reversed(shapes.PUBLIC), shapes.LARGER) if on_card else shapes.SHIPPED
    files = shapes.find(models or usual, directory=directory, synth=synth)
    catalog = Catalog(shapes.configured(files))
    plans = [catalog.plan(name, device.kind) for name in files]
    specs = [ContextSpec(int(window)) for window in windows.split(",")]
    specs.append(ContextSpec(WIDE_WINDOW, n_batch=WIDE, n_ubatch=WIDE))
    if on_card:
        llama.touch_device()
    overhead, stays = settled(device) if on_card else 0, warm_up(plans, device) if on_card else {}
    with closing(Estimator()) as estimator:
        cells = [measure(plan, spec, device, estimator, tokens=tokens) for plan, spec in itertools.product(plans, specs)]

    (show_driver if on_card else show_account)(cells)
    measured = [cell for cell in cells if cell.skipped is None]
    equal = all(cell.account in (None, cell.estimate) for cell in measured)
    out.print(f"llama.cpp's account equals the estimate: [bold]{'yes' if equal else 'no'}[/]")
    figures: dict[str, Any] = {
        "device": device.name, "multiprocessors": device.multiprocessors, "overhead_bytes": overhead, "stays_bytes": stays,
        "prompt_tokens": tokens, "cells": [cell.to_json() for cell in cells], "account_equals_estimate": equal,
    }  # fmt: skip
    if on_card and measured:
        least, most = min(cell.worst_error for cell in measured), max(cell.error for cell in measured)
        figures |= {"least_error": least, "largest_error": most}
        late = ", ".join(f"{name} {size / MIB:.0f}" for name, size in stays.items())
        out.print(f"booked against taken: [bold]{least:+.2%}[/] (uneven batches included) to [bold]{most:+.2%}[/]")
        out.print(f"for good: {format_bytes(overhead)} at start; in MiB with each model's first run: {late}")
    harness.save(save or harness.RESULTS / f"estimate-{device.kind.value}.json", figures)


if __name__ == "__main__":
    typer.run(main)
