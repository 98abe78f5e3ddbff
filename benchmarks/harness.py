"""What the benchmarks share: rounds in which all sides take turns, medians, a table, and JSON with the machine it ran on."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import psutil
from rich.progress import track
from rich.table import Table

from conductor.types import Status
from pipelines.console import out
from pipelines.machine import describe

RESULTS = Path(__file__).parent / "results"


#: {side: {figure: its values, one of each round}}
Figures = dict[str, dict[str, list[float]]]


def in_turns(sides: Mapping[str, Callable[[], Mapping[str, float]]], *, repeats: int, warm: int = 1) -> Figures:
    """Run every side once in each round, so that a drift of the machine's speed meets them alike; `warm` rounds don't count."""
    figures: Figures = {name: {} for name in sides}
    for repeat in track(range(repeats + warm), description="measuring", console=out, transient=True):
        for name, side in sides.items():
            for figure, value in side().items():
                if repeat >= warm:
                    figures[name].setdefault(figure, []).append(value)
    return figures


def settle() -> None:
    """Let the other side's threads go to sleep: llama.cpp's spin for some ms after their last step, on the same cores."""
    time.sleep(0.05)


def median(values: list[float]) -> float:
    return statistics.median(values)


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def shown(figures: Mapping[str, list[float]], name: str, digits: int = 1) -> str:
    """A figure's median for a table; nothing where that side has no such figure."""
    return f"{median(figures[name]):,.{digits}f}" if name in figures else ""


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    grid = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        grid.add_row(*row)
    out.print(grid)


def save(path: Path, figures: Mapping[str, Any], status: Status | None = None) -> None:
    """Write the figures beside the description of the machine they are from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": describe(status), **figures}, indent=1) + "\n", "utf-8")
    out.print(f"[dim]saved {path.name}[/]")


def cores() -> int:
    return psutil.cpu_count(logical=False) or 1


def built_for() -> str:
    """What of the CPU this llama.cpp uses: another build may use less of it, or more."""
    return str(llama.llama_print_system_info().decode()).strip()
