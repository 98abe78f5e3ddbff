"""What a swap costs: an agent's KV saved and restored, and a whole change of agents, against computing it again.

    python benchmarks/switch.py [--model coder] [--tokens 1024,4096,8192] [--no-engine] [--no-conductor] [--save FILE]

In one run, in turns: plain copies of the same size between device and host memory, page-locked and pageable (the link);
llama.cpp's own save and restore into page-locked memory; the engine's, with its checksum; and end to end, through the plain
conductor, a turn that evicts one agent's KV and brings back another's, less the same turn of an agent that was there. Beside
them the time to read as many tokens again. The share of the link is of save and restore together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness, shapes
from benchmarks.bare import BareModel
from benchmarks.link import Link
from benchmarks.prompts import prompts
from benchmarks.swaps import BareSwap, ConductorSwap, EngineSwap
from conductor.backend.catalog import Catalog
from conductor.backend.device import open_device
from conductor.backend.llama import Llama
from conductor.config import Config, load_config
from conductor.core.estimate import ModelPlan, cache_bytes
from conductor.types import ContextSpec, DeviceKind
from conductor.units import MIB
from pipelines.console import out

LINK, BARE, ENGINE, END_TO_END, PREFILL = "link", "llama.cpp", "engine", "end to end", "prefill"
#: beyond the conversation's own tokens: what the rounds' turns add
_ROUNDS_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Levels:
    """What is measured; an engine and a conductor only where they were asked for."""

    link: Link
    bare: BareSwap
    engine: EngineSwap | None
    conductor: ConductorSwap | None


def sides(levels: Levels, texts: Iterator[str]) -> dict[str, Callable[[], dict[str, float]]]:
    """With conversations of the next texts' length. The bare context holds what was read last."""
    bare, engine, conductor = levels.bare, levels.engine, levels.conductor
    prefill: Callable[[], dict[str, float]] = lambda: {"ms": bare.prefill_ms(next(texts))}
    prefill()
    size = bare.bytes
    result = {
        PREFILL: prefill,
        LINK: lambda: levels.link.figures(size),
        BARE: lambda: {**bare.figures(levels.link.pinned), "bytes": float(size)},
    }
    if engine is not None:
        engine.hold(next(texts))
        result[ENGINE] = engine.figures
    if conductor is not None:
        conductor.hold(lambda: next(texts))
        result[END_TO_END] = conductor.figures
    return result


def summary(measured: harness.Figures) -> dict[str, float]:
    """Medians in ms, and the ratios of the rounds."""

    def together(side: str, save: str = "save_ms", restore: str = "restore_ms") -> list[float]:
        return [a + b for a, b in zip(measured[side][save], measured[side][restore], strict=True)]

    def share(side: str) -> float:
        """Of the link's bytes per second; the engine's KV may have a token more or less."""
        bytes_ratio = harness.median_ratio(measured[side]["bytes"], measured[BARE]["bytes"])
        return harness.median_ratio(link, together(side)) * bytes_ratio

    link = together(LINK, "pinned_save_ms", "pinned_restore_ms")
    result = {"prefill_ms": harness.median(measured[PREFILL]["ms"]), "link_ms": harness.median(link)}
    result["pageable_ms"] = harness.median(together(LINK, "pageable_save_ms", "pageable_restore_ms"))
    for side, name in ((BARE, "bare"), (ENGINE, "engine")):
        if side in measured:
            result |= {f"{name}_ms": harness.median(together(side)), f"{name}_of_link": share(side)}
    if END_TO_END in measured:
        switch = measured[END_TO_END]["switch_ms"]
        result |= {"switch_ms": harness.median(switch)}
        result["prefill_over_switch"] = harness.median_ratio(measured[PREFILL]["ms"], switch)
    return result


def show(title: str, by_tokens: dict[int, harness.Figures]) -> None:
    rows = []
    for tokens, measured in by_tokens.items():
        size, link = harness.median(measured[BARE]["bytes"]), measured[LINK]
        rows.append([f"{tokens:,}", "link, pinned", *_both(link, "pinned_save_ms", "pinned_restore_ms", size), ""])
        rows.append(["", "link, pageable", *_both(link, "pageable_save_ms", "pageable_restore_ms", size), ""])
        for side, name in ((BARE, "bare_of_link"), (ENGINE, "engine_of_link")):
            if side in measured:
                share = f"{summary(measured)[name]:.0%}"
                rows.append(["", side, *_both(measured[side], "save_ms", "restore_ms", size), share])
    harness.table(title, ["tokens", "", "save, ms", "GB/s", "restore, ms", "GB/s", "of the link"], rows)
    rows = []
    for tokens, measured in by_tokens.items():
        known = summary(measured)
        ending = [f"{known['switch_ms']:.2f}", f"{known['prefill_over_switch']:.1f}"] if "switch_ms" in known else ["", ""]
        mib = harness.median(measured[BARE]["bytes"]) / MIB
        rows.append([f"{tokens:,}", f"{mib:.1f}", f"{known['prefill_ms']:.1f}", *ending])
    title = "one agent's KV leaves, another's comes back"
    harness.table(title, ["tokens", "MiB", "prefill, ms", "swap, ms", "times faster"], rows)


def _both(values: dict[str, list[float]], save: str, restore: str, size: float) -> list[str]:
    medians = [harness.median(values[name]) for name in (save, restore)]
    return [text for ms in medians for text in (f"{ms:.2f}", f"{size / ms / 1e6:.1f}")]


def open_levels(
    stack: ExitStack, settings: Config, plan: ModelPlan, spec: ContextSpec, *, n_threads: int, engine: bool, conductor: bool
) -> tuple[Levels, BareModel]:
    model = stack.enter_context(closing(BareModel(plan)))
    size = cache_bytes(plan.geometry, spec, device=plan.device) + (1 << 20)
    # The conductor first: it takes what is on the device before it came for strangers'.
    through = stack.enter_context(closing(ConductorSwap(settings, plan.key, window=spec.window))) if conductor else None
    within = stack.enter_context(closing(EngineSwap(settings, plan, spec))) if engine else None
    bare = stack.enter_context(closing(BareSwap(model, spec, n_threads=n_threads)))
    return Levels(stack.enter_context(closing(Link(plan.device, size))), bare, within, through), model


def prepared(settings: Config, *, host_budget: int) -> Config:
    """One slot, one live context, room for two saved KVs, and contexts that have their whole window at once."""
    context = settings.context.model_copy(update={"slots": 1, "first_window": None})
    budget = max(settings.host_budget, host_budget)
    return settings.model_copy(update={"context": context, "live_contexts": 1, "host_budget": budget})


def main(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration of the conductor.")] = None,
    model: Annotated[str, typer.Option(help="A key of the configuration, a file, or a shape.")] = "coder",
    tokens: Annotated[str, typer.Option(help="Of a conversation; separated by commas.")] = "1024,4096,8192",
    repeats: Annotated[int, typer.Option(help="Counted rounds.")] = 7,
    warm: Annotated[int, typer.Option(help="Rounds before them.")] = 2,
    engine: Annotated[bool, typer.Option(help="Measure the engine's saves and restores.")] = True,
    conductor: Annotated[bool, typer.Option(help="Measure end to end.")] = True,
    directory: shapes.Directory = shapes.DIRECTORY,
    synth: shapes.Synth = shapes.SYNTH,
    save: Annotated[Path | None, typer.Option(help="Where the JSON goes (default: benchmarks/results).")] = None,
) -> None:
    """Print what a swap costs, and save it."""
    sizes = sorted(int(size) for size in tokens.split(","))
    settings = shapes.roomy(shapes.added(load_config(config), [model], directory=directory, synth=synth), slots=1)
    device = open_device(settings.device, llama_supports_gpu=Llama.instance().supports_gpu, used_bytes=lambda: 0)
    plan = Catalog(settings).plan(shapes.key(model), device.kind)
    spec = settings.context_spec(plan.key, shapes.window_for(max(sizes) + _ROUNDS_TOKENS))
    settings = prepared(settings, host_budget=3 * cache_bytes(plan.geometry, spec, device=plan.device))
    by_tokens: dict[int, harness.Figures] = {}
    with ExitStack() as stack:
        n_threads = settings.threads or harness.cores()
        levels, bare = open_levels(stack, settings, plan, spec, n_threads=n_threads, engine=engine, conductor=conductor)
        for size in sizes:
            by_tokens[size] = harness.in_turns(
                sides(levels, prompts(size, lambda text: len(bare.tokenize(text)))), repeats=repeats, warm=warm
            )
            if levels.engine is not None:
                levels.engine.let_go()
        pinned = levels.link.is_pinned
    show(f"{plan.key} on {device.name}: KV saved and restored", by_tokens)
    if device.kind is not DeviceKind.HOST and not pinned:
        out.print("host memory could not be page-locked")
    result: dict[str, Any] = {
        "model": plan.key, "device": device.name, "repeats": repeats, "warm": warm, "window": spec.window, "pinned": pinned,
        "summary": {str(size): summary(measured) for size, measured in by_tokens.items()},
        "tokens": {str(size): measured for size, measured in by_tokens.items()},
    }  # fmt: skip
    harness.save(save or harness.RESULTS / f"switch-{device.kind.value}-{plan.key}.json", result)


if __name__ == "__main__":
    typer.run(main)
