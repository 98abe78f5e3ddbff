"""What the benchmarks share: rounds in which all sides take turns, medians, a table, and JSON with the machine it ran on."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

from conductor.types import Status
from pipelines.console import out
from pipelines.machine import describe

RESULTS = Path(__file__).parent / "results"


def in_turns(sides: Mapping[str, Callable[[], Mapping[str, float]]], *, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Run every side once in each round, so that a drift of the machine's speed meets them alike; the first is not counted."""
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for repeat in track(range(repeats + 1), description="measuring", console=out, transient=True):
        for name, side in sides.items():
            for figure, value in side().items():
                if repeat:
                    figures[name].setdefault(figure, []).append(value)
    return figures


def median(values: list[float]) -> float:
    return statistics.median(values)


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    shown = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*row)
    out.print(shown)


def save(path: Path, figures: Mapping[str, Any], status: Status | None = None) -> None:
    """Write the figures beside the description of the machine they are from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": describe(status), **figures}, indent=1) + "\n", "utf-8")
    out.print(f"[dim]saved {path.name}[/]")
