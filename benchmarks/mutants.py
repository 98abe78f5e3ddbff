"""Hostile model files against a conductor: how each of many mutants ends, and whether anything is left of it.

    python benchmarks/mutants.py [--count 1000] [--seed 0] [--save FILE]

Each mutant is registered by path with a real conductor in a child process, speaks three turns if it was admitted, and leaves.
It must end in a typed error or work, within seconds, with the ledger, the other agent's answers and the open files as they
were. The exit code is 1 if one did not. See also: `tests/support/mutants.py`, the mutants; `tests/support/trial.py`, the trial.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from pipelines.console import out
from tests.support.mutants import KINDS, Mutant, mutants
from tests.support.trial import CRASHED, HUNG, UNTYPED, WORKED, Outcome, Trial

#: what ends nobody, and is too slow all the same
WITHIN_S = 10.0


def run(count: int, seed: int) -> tuple[list[tuple[Mutant, Outcome]], int]:
    """(each mutant with its outcome, how many children it took)."""
    with tempfile.TemporaryDirectory() as directory, Trial(Path(directory)) as trial:
        made = track(mutants(count, seed=seed), total=count, description="mutants", console=out, transient=True)
        return [(mutant, trial.put(mutant)) for mutant in made], trial.children


def figures(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    outcomes = list(outcomes)
    return {
        "mutants": len(outcomes),
        "outcomes": dict(Counter(outcome.name for outcome in outcomes).most_common()),
        "slowest_s": round(max(outcome.seconds for outcome in outcomes), 2),
        "crashed": sum(outcome.registered == CRASHED for outcome in outcomes),
        "hung": sum(outcome.registered == HUNG for outcome in outcomes),
        "untyped": sum(any(word.startswith(UNTYPED) for word in outcome.wrong) for outcome in outcomes),
        "differences": sum(any(": " in word for word in outcome.wrong) for outcome in outcomes),
        "slow": sum(outcome.seconds > WITHIN_S for outcome in outcomes),
    }


def main(
    count: Annotated[int, typer.Option(help="Mutants.")] = 1000,
    seed: Annotated[int, typer.Option(help="Other mutants for another seed.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Where the JSON goes (default: benchmarks/results).")] = None,
) -> None:
    """Print what became of each kind of mutant, and save it."""
    began = time.monotonic()
    results, children = run(count, seed)
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for mutant, outcome in results:
        kinds[mutant.kind].append(outcome)
    by_kind = {kind: figures(kinds[kind]) for kind in KINDS if kind in kinds}
    total = figures(outcome for _, outcome in results)
    wrong = [
        {"kind": mutant.kind, "what": mutant.what, "outcome": outcome.name, "said": outcome.message[-300:], "why": outcome.wrong}
        for mutant, outcome in results
        if outcome.wrong or outcome.seconds > WITHIN_S
    ]
    harness.table(
        f"{count} mutants",
        ["", "worked", "refused", "refused in a turn", "slowest, s", "wrong"],
        [row(kind, known) for kind, known in [*by_kind.items(), ("all", total)]],
    )
    for case in wrong[:20]:
        out.print(f"{case['outcome']} by {case['kind']}, {case['what']!r}: {case['said'] or case['why']}", markup=False)
    out.print(
        f"{total['crashed']} crashes, {total['hung']} hangs, {total['untyped']} errors that are not ours, "
        f"{total['differences']} differences afterwards; {time.monotonic() - began:.0f} s"
    )
    resident = [outcome.rss_bytes for _, outcome in results if outcome.rss_bytes]
    result = {
        "count": count, "seed": seed, "seconds": round(time.monotonic() - began, 1), "children": children, **total,
        "rss_bytes": {"first": resident[0], "last": resident[-1]}, "kinds": by_kind, "wrong": wrong,
    }  # fmt: skip
    harness.save(save or harness.RESULTS / "mutants.json", result)
    raise typer.Exit(code=1 if wrong else 0)


def row(kind: str, known: dict[str, Any]) -> list[str]:
    outcomes: dict[str, int] = known["outcomes"]
    worked = outcomes.get(WORKED, 0)
    in_turns = sum(number for name, number in outcomes.items() if name.endswith("in a turn"))
    ours = known["mutants"] - known["crashed"] - known["hung"]
    wrong = known["crashed"] + known["hung"] + known["untyped"] + known["differences"] + known["slow"]
    return [kind, str(worked), str(ours - worked - in_turns), str(in_turns), f"{known['slowest_s']:.1f}", str(wrong)]


if __name__ == "__main__":
    typer.run(main)
