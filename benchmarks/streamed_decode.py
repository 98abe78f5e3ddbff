"""What decoding costs while layers stream, against the link, against weights that stay, and against llama.cpp's own way.

    python benchmarks/streamed_decode.py [--model llama-3.1-8b] [--batches 1,8,32] [--slots 2,4] [--steps 12] [--save FILE]

llama.cpp's own decode without a conductor, greedy, in turns: with all weights on the device as llama.cpp loads them (plain); the
same weights placed by us (all of them, half of the layers, none), each copy ahead of its layer (overlapped) or only when it is
asked for (serial); the copies of a pass alone (link); and llama.cpp's partial offload, with as many layers on the device as fit
the same bytes and the rest computed by the CPU. Tokens and logits of every side are compared with the plain ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness, shapes
from benchmarks.streams import Decoding, Offloaded, Side, copies_alone
from conductor.backend.catalog import Catalog
from conductor.backend.device import open_device
from conductor.backend.llama import Llama
from conductor.config import load_config
from conductor.core.streaming import Placement, placement_bytes, streamed_bytes, whole
from conductor.types import DeviceKind
from conductor.units import MIB
from pipelines.console import out

PLAIN, LINK = "plain", "link"
#: {side: {figure: value}}
Rows = dict[str, dict[str, Any]]


def name_of(placement: Placement, n_layers: int, *, overlap: bool) -> str:
    if not placement.streams:
        return f"{n_layers}/{n_layers}"
    return f"{ring_of(placement, n_layers)} {'overlapped' if overlap else 'serial'}"


def ring_of(placement: Placement, n_layers: int) -> str:
    return f"{placement.resident}+{placement.slots}/{n_layers}"


def summary(measured: harness.Figures, batch: int, bytes_of: dict[str, int], streamed: dict[str, int]) -> Rows:
    """By side: tokens a second, and the ratios of the rounds."""
    result: Rows = {}
    for name, figures in measured.items():
        if name.startswith(LINK):
            continue
        step = figures["step_ms"]
        row: dict[str, Any] = {"tokens_per_s": batch / harness.median(step) * 1000, "step_ms": harness.median(step)}
        row["of_plain"] = harness.median_ratio(measured[PLAIN]["step_ms"], step)
        row["equal"] = all(figures["equal"])
        if name in bytes_of:
            row["device_mib"] = bytes_of[name] / MIB
        if streamed.get(name):
            row["of_link"] = harness.median_ratio(measured[f"{LINK} {name.rsplit(' ', 1)[0]}"]["step_ms"], step)
        serial = name.replace("overlapped", "serial")
        if serial != name:
            row["over_serial"] = harness.median_ratio(measured[serial]["step_ms"], step)
            if (peer := f"offload {name.rsplit(' ', 1)[0]}") in measured:
                row["over_offload"] = harness.median_ratio(measured[peer]["step_ms"], step)
        result[name] = row
    return result


def show(title: str, rows: Rows) -> None:
    def cell(row: dict[str, Any], key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    columns = ["", "MiB", "tokens/s", "step, ms", "of the link", "over serial", "over offload", "of plain", "equal"]
    lines = [
        [name, cell(row, "device_mib", ",.0f"), cell(row, "tokens_per_s", ",.1f"), cell(row, "step_ms", ".2f"),
         cell(row, "of_link", ".1%"), cell(row, "over_serial", ".2f"), cell(row, "over_offload", ".2f"),
         cell(row, "of_plain", ".1%"), "yes" if row["equal"] else "near"]
        for name, row in rows.items()
    ]  # fmt: skip
    harness.table(title, columns, lines)


def main(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration of device and threads.")] = None,
    model: Annotated[str, typer.Option(help="A key of the configuration, a file, or a shape.")] = "coder",
    batches: Annotated[str, typer.Option(help="Sequences at once; separated by commas.")] = "1,8,32",
    slots: Annotated[str, typer.Option(help="Of the ring; separated by commas.")] = "2,4",
    steps: Annotated[int, typer.Option(help="Timed steps of a round, a token of each sequence.")] = 12,
    repeats: Annotated[int, typer.Option(help="Counted rounds.")] = 5,
    offload: Annotated[bool, typer.Option(help="Measure llama.cpp's partial offload.")] = True,
    directory: shapes.Directory = shapes.DIRECTORY,
    synth: shapes.Synth = shapes.SYNTH,
    save: Annotated[Path | None, typer.Option(help="Where the JSON goes (default: benchmarks/results).")] = None,
) -> None:
    """Print what streaming costs, and save it."""
    settings = shapes.roomy(shapes.added(load_config(config), [model], directory=directory, synth=synth), slots=1)
    device = open_device(settings.device, llama_supports_gpu=Llama.instance().supports_gpu, used_bytes=lambda: 0)
    plan = Catalog(settings).plan(shapes.key(model), device.kind)
    n_threads = settings.threads or harness.cores()
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        llama, index = Llama.instance(), settings.device.index
        plain = stack.enter_context(closing(llama.load(plan.path, device.kind, index=index)))
        moving = stack.enter_context(closing(llama.load_movable(plan.path, device.kind, index=index)))
        assert moving.weights is not None
        weights, blocks = moving.weights, moving.weights.blocks
        n = len(blocks.layer_bytes)
        partial = [Placement(resident, int(count)) for resident in (0, n // 2) for count in slots.split(",")]
        placements = [it for it in partial if n - it.resident > it.slots]
        offloads: dict[str, Offloaded] = {}
        widest = [it for it in placements if it.slots == max(other.slots for other in placements)]
        for placement in widest if offload and device.kind is DeviceKind.CUDA else ():
            budget = placement_bytes(blocks, placement)
            peer = Offloaded(plan.path, budget, index=index, n_layers=n)
            offloads[f"offload {ring_of(placement, n)}"] = stack.enter_context(closing(peer))
        for batch in map(int, batches.split(",")):
            decoding = Decoding(batch, steps=steps, n_threads=n_threads)
            sides: dict[str, Callable[[], dict[str, float]]] = {PLAIN: Side(decoding, plain)}
            sides[name_of(whole(blocks), n, overlap=True)] = Side(decoding, moving, whole(blocks))
            bytes_of = {name_of(whole(blocks), n, overlap=True): blocks.whole_bytes}
            streamed: dict[str, int] = {}
            for placement in placements:

                def link(placement: Placement = placement) -> dict[str, float]:
                    return copies_alone(weights, placement)

                sides[f"{LINK} {ring_of(placement, n)}"] = link
                for overlap in (True, False):
                    name = name_of(placement, n, overlap=overlap)
                    sides[name] = Side(decoding, moving, placement, overlap=overlap)
                    bytes_of[name], streamed[name] = placement_bytes(blocks, placement), streamed_bytes(blocks, placement)
            sides |= {name: Side(decoding, offloaded) for name, offloaded in offloads.items()}
            bytes_of |= {name: offloaded.device_bytes for name, offloaded in offloads.items()}
            measured = harness.in_turns(sides, repeats=repeats)
            rows = summary(measured, batch, bytes_of, streamed)
            show(f"{plan.key} on {device.name}: {batch} at once", rows)
            results[str(batch)] = {"summary": rows, "rounds": measured}
        rates = {name: harness.median(side["gb_per_s"]) for name, side in measured.items() if name.startswith(LINK)}
        out.print(", ".join(f"{name}: {rate:.1f} GB/s" for name, rate in rates.items()))
        pinned = weights.pinned
    document = {
        "model": plan.key, "device": device.name, "pinned": pinned, "repeats": repeats, "steps": steps, "n_layers": n,
        "layer_mib": max(blocks.layer_bytes) / MIB, "head_mib": blocks.head_bytes / MIB, "batches": results,
    }  # fmt: skip
    harness.save(save or harness.RESULTS / f"streamed-decode-{device.kind.value}-{plan.key}.json", document)


if __name__ == "__main__":
    typer.run(main)
