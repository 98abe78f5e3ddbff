"""What it costs to have another model on the device: weights parked and brought back, against the link, and against loading them.

    python benchmarks/model_switch.py [--models llama-3.2-1b,llama-3.1-8b] [--repeats 7] [--save FILE]

In one run, in turns: plain page-locked copies of as many bytes (the link); weights brought from their home to a place on the
device that is made for them, and let go (unpark, park); one model parked and the next one brought (switch), as where both
together are larger than the device; and llama.cpp's own load of the same file from the page cache, with what freeing it takes.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness, shapes
from benchmarks.link import Link
from conductor.backend.catalog import Catalog
from conductor.backend.device import open_device
from conductor.backend.llama import Llama, Model
from conductor.backend.llama.movable import MovableWeights
from conductor.config import load_config
from conductor.core.estimate import ModelPlan
from conductor.core.streaming import whole
from conductor.units import MIB


def weights_of(model: Model) -> MovableWeights:
    assert model.weights is not None
    return model.weights


def placed(weights: MovableWeights) -> dict[str, float]:
    """Brought to the device and let go, in ms."""
    began = time.perf_counter()
    weights.place(whole(weights.blocks))
    there = time.perf_counter()
    weights.park()
    return {"unpark_ms": (there - began) * 1000, "park_ms": (time.perf_counter() - there) * 1000}


def switched(first: MovableWeights, second: MovableWeights) -> dict[str, float]:
    """From `first` on the device to `second`, in ms."""
    first.place(whole(first.blocks))
    began = time.perf_counter()
    first.park()
    second.place(whole(second.blocks))
    elapsed = time.perf_counter() - began
    second.park()
    return {"ms": elapsed * 1000}


def reloaded(plan: ModelPlan, index: int) -> dict[str, float]:
    began = time.perf_counter()
    model = Llama.instance().load(plan.path, plan.device, index=index)
    loaded = time.perf_counter()
    model.close()
    return {"load_ms": (loaded - began) * 1000, "free_ms": (time.perf_counter() - loaded) * 1000}


def main(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration of the device.")] = None,
    models: Annotated[
        str, typer.Option(help="Keys of the configuration, files, or shapes, separated by commas.")
    ] = "coder,documenter",
    repeats: Annotated[int, typer.Option(help="Counted rounds.")] = 7,
    directory: shapes.Directory = shapes.DIRECTORY,
    synth: shapes.Synth = shapes.SYNTH,
    save: Annotated[Path | None, typer.Option(help="Where the JSON goes (default: benchmarks/results).")] = None,
) -> None:
    """Print what a change of models costs, and save it."""
    names = models.split(",")
    settings = shapes.added(load_config(config), names, directory=directory, synth=synth)
    device = open_device(settings.device, llama_supports_gpu=Llama.instance().supports_gpu, used_bytes=lambda: 0)
    catalog, index = Catalog(settings), settings.device.index
    plans = {shapes.key(name): catalog.plan(shapes.key(name), device.kind) for name in names}
    with ExitStack() as stack:
        homes: dict[str, MovableWeights] = {}
        first_load_s: dict[str, float] = {}
        for key, plan in plans.items():
            began = time.perf_counter()
            homes[key] = weights_of(
                stack.enter_context(closing(Llama.instance().load_movable(plan.path, plan.device, index=index)))
            )
            first_load_s[key] = time.perf_counter() - began
        link = stack.enter_context(closing(Link(device.kind, max(it.blocks.whole_bytes for it in homes.values()))))
        sides: dict[str, Any] = {}
        for key, weights in homes.items():
            sides[f"link {key}"] = lambda size=weights.blocks.whole_bytes: {"ms": link.figures(size)["pinned_restore_ms"]}
            sides[f"unpark {key}"] = lambda weights=weights: placed(weights)
            sides[f"reload {key}"] = lambda plan=plans[key]: reloaded(plan, index)
        for before, key in zip([*homes][-1:] + [*homes][:-1], homes, strict=True):
            sides[f"switch {before} to {key}"] = lambda a=homes[before], b=homes[key]: switched(a, b)
        measured = harness.in_turns(sides, repeats=repeats)
        summary: dict[str, dict[str, float]] = {}
        for before, key in zip([*homes][-1:] + [*homes][:-1], homes, strict=True):
            unpark, reload = measured[f"unpark {key}"]["unpark_ms"], measured[f"reload {key}"]
            switch = measured[f"switch {before} to {key}"]["ms"]
            anew = [load + free for load, free in zip(reload["load_ms"], reload["free_ms"], strict=True)]
            summary[key] = {
                "mib": homes[key].blocks.whole_bytes / MIB,
                "link_ms": harness.median(measured[f"link {key}"]["ms"]),
                "unpark_ms": harness.median(unpark),
                "of_link": harness.median_ratio(measured[f"link {key}"]["ms"], unpark),
                "park_ms": harness.median(measured[f"unpark {key}"]["park_ms"]),
                "switch_ms": harness.median(switch),
                "reload_ms": harness.median(reload["load_ms"]),
                "reload_over_switch": harness.median_ratio(anew, switch),
                "first_load_s": first_load_s[key],
            }
    rows = [
        [key, f"{it['mib']:,.0f}", *(f"{it[name]:.1f}" for name in ("link_ms", "unpark_ms")), f"{it['of_link']:.0%}",
         *(f"{it[name]:.1f}" for name in ("park_ms", "switch_ms", "reload_ms", "reload_over_switch"))]
        for key, it in summary.items()
    ]  # fmt: skip
    columns = ["", "MiB", "link, ms", "unpark, ms", "of the link", "park, ms", "switch, ms", "reload, ms", "times faster"]
    harness.table(f"weights parked and brought back on {device.name}", columns, rows)
    document = {"device": device.name, "repeats": repeats, "summary": summary, "rounds": measured}
    harness.save(save or harness.RESULTS / f"model-switch-{device.kind.value}.json", document)


if __name__ == "__main__":
    typer.run(main)
