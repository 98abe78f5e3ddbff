"""Several models at once: agents of each stream at the same time, against the same turns one after another.

    python benchmarks/mixed.py [--models coder,reviewer,documenter] [--each 2] [--save FILE]

Both sides go through the same actor with the same agents, the same number of tokens and prompts of the same length, in turns,
in one run. The ratio is of the wall times, one after another to all at once: above 1, being together is faster. The longest
gap is between two pieces of one answer as its reader sees them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness, shapes
from benchmarks.crowd import Crowd
from benchmarks.prompts import prompts
from benchmarks.readings import Reading, figures
from conductor.config import load_config
from pipelines.console import out

TOGETHER, IN_TURN = "all at once", "one after another"
_COLUMNS = (
    ("wall, s", "elapsed_s", 3), ("tok/s", "tokens_per_s", 0), ("first, ms", "first_token_ms", 1),
    ("p95", "first_token_p95_ms", 1), ("token, p95", "token_p95_ms", 2), ("gap, max", "longest_gap_ms", 1),
)  # fmt: skip


def sides(crowd: Crowd, agents: Mapping[str, str], texts: Iterator[str], max_tokens: int) -> dict[str, Any]:
    """{side: run it once and return its figures}"""

    def asked() -> dict[str, str]:
        harness.settle()
        return dict(zip(agents, islice(texts, len(agents)), strict=True))

    def together() -> dict[str, float]:
        return figures(crowd.stream(asked(), max_tokens)[0])

    def in_turn() -> dict[str, float]:
        readings: list[Reading] = []
        for agent, prompt in asked().items():
            readings += crowd.stream({agent: prompt}, max_tokens)[0]
        return figures(readings)

    return {TOGETHER: together, IN_TURN: in_turn}


def main(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration of the conductor.")] = None,
    models: Annotated[str, typer.Option(help="Keys of the configuration, files or shapes; separated by commas.")] = ",".join(
        shapes.SHIPPED
    ),
    each: Annotated[int, typer.Option(help="Agents of each model.")] = 2,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt, about; the models' own words for it differ.")] = 64,
    repeats: Annotated[int, typer.Option(help="Counted rounds.")] = 5,
    warm: Annotated[int, typer.Option(help="Rounds before them.")] = 2,
    directory: shapes.Directory = shapes.DIRECTORY,
    synth: shapes.Synth = shapes.SYNTH,
    save: Annotated[Path | None, typer.Option(help="Where the JSON goes (default: benchmarks/results).")] = None,
) -> None:
    """Print the ratio of the wall times, and save it."""
    names = models.split(",")
    settings = shapes.roomy(shapes.added(load_config(config), names, directory=directory, synth=synth), slots=each)
    agents = {f"{shapes.key(name)}-{i}": shapes.key(name) for name in names for i in range(each)}
    # A synthetic vocabulary has a token for each byte: windows are made for that, at four bytes to a usual token.
    window = shapes.window_for(4 * prompt_tokens + max_tokens)
    texts = prompts(prompt_tokens, lambda text: len(text) // 4)
    with closing(Crowd(settings)) as crowd:
        crowd.admit(agents, window=window)
        measured = harness.in_turns(sides(crowd, agents, texts, max_tokens), repeats=repeats, warm=warm)
        status = crowd.status()
    rows = [[side, *(harness.shown(values, name, digits) for _, name, digits in _COLUMNS)] for side, values in measured.items()]
    title = f"{each} agents of each of {', '.join(names)} on {status.device.name}: {max_tokens} tokens each, streamed"
    harness.table(title, ["", *(column for column, _, _ in _COLUMNS)], rows)
    ratio = harness.median_ratio(measured[IN_TURN]["elapsed_s"], measured[TOGETHER]["elapsed_s"])
    gap = harness.median(measured[TOGETHER]["longest_gap_ms"])
    out.print(f"{IN_TURN} / {TOGETHER}: [bold]{ratio:.2f}[/] of the wall time; longest gap {gap:.0f} ms")
    result = {
        "models": list(dict.fromkeys(agents.values())), "each": each, "max_tokens": max_tokens, "prompt_tokens": prompt_tokens,
        "window": window, "repeats": repeats, "warm": warm, "wall_ratio": ratio, "longest_gap_ms": gap, "sides": measured,
    }  # fmt: skip
    harness.save(save or harness.RESULTS / f"mixed-{status.device.kind.value}.json", result, status)


if __name__ == "__main__":
    typer.run(main)
