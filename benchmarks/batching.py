"""Many agents of one model at once: through the actor, in llama.cpp's bare batched loop, and in llama.cpp's own server.

    python benchmarks/batching.py [--model coder] [--agents 1,4,16] [--server FILE] [--no-peer] [--no-actor] [--save FILE]

All sides read prompts of the same length, a different one for each agent and round, decode greedily to the same number of
tokens with the same parameters, and take turns in rounds, in one run. The bare loop is the limit: one context, a sequence
for each agent, one token of each in a step. The peer, a server with as many slots as there are agents, is asked over HTTP.
Ratios are medians of the rounds' own ratios, of tokens per second from the first question to the last answer's end. Like is
held against like: whole answers of the actor against the server's whole answers, streamed against streamed.

`--model` is a key of the configuration, one of the models that come along, a file, or a shape that can be made
(`benchmarks/shapes.py`).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness, peer, shapes
from benchmarks.bare import BareModel
from benchmarks.bare_batch import BareBatch
from benchmarks.crowd import Crowd
from benchmarks.peer import PeerKind
from benchmarks.prompts import prompts
from benchmarks.readings import figures
from conductor.backend.catalog import Catalog
from conductor.backend.device import open_device
from conductor.backend.llama import Llama
from conductor.config import load_config
from conductor.types import ContextSpec
from pipelines.console import out

BARE, ACTOR, STREAMED, PEER, PEER_STREAMED = "bare batch", "actor", "actor, streamed", "peer", "peer, streamed"
#: what is held against what: above, below
RATIOS = ((ACTOR, BARE), (STREAMED, BARE), (ACTOR, PEER), (STREAMED, PEER_STREAMED), (PEER, BARE), (PEER_STREAMED, BARE))
_COLUMNS = (
    ("tok/s", "tokens_per_s", 0), ("first, ms", "first_token_ms", 1), ("p95", "first_token_p95_ms", 1),
    ("token, p95", "token_p95_ms", 2), ("gap, max", "longest_gap_ms", 1),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What every side is asked for in a round."""

    texts: Iterator[str]
    agents: int
    max_tokens: int

    def prompts(self) -> list[str]:
        harness.settle()
        return list(islice(self.texts, self.agents))

    def prompt_of(self) -> dict[str, str]:
        """{agent: its prompt}"""
        return {f"agent-{i}": prompt for i, prompt in enumerate(self.prompts())}


def bare_side(work: Work, batch: BareBatch, model: BareModel) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        return figures(batch.run([model.tokenize(prompt) for prompt in work.prompts()], work.max_tokens)[0])

    return run


def actor_sides(work: Work, crowd: Crowd) -> dict[str, Callable[[], dict[str, float]]]:
    def whole() -> dict[str, float]:
        readings, results = crowd.decode(work.prompt_of(), work.max_tokens)
        stall = max(getattr(result, "longest_stall_ms", 0.0) for result in results)
        return figures(readings) | {"longest_stall_ms": stall, "queue_ms": max(result.queue_ms for result in results)}

    def streamed() -> dict[str, float]:
        return figures(crowd.stream(work.prompt_of(), work.max_tokens)[0])

    return {ACTOR: whole, STREAMED: streamed}


def peer_sides(work: Work, server: peer.Peer) -> dict[str, Callable[[], dict[str, float]]]:
    def run(*, stream: bool) -> dict[str, float]:
        return figures(asyncio.run(server.ask(work.prompts(), work.max_tokens, stream=stream)))

    return {PEER: lambda: run(stream=False), PEER_STREAMED: lambda: run(stream=True)}


def open_sides(
    stack: ExitStack, work: Work, model: BareModel, spec: ContextSpec, n_threads: int, crowd: Crowd | None, kind: PeerKind | None
) -> tuple[dict[str, Callable[[], dict[str, float]]], dict[str, str]]:
    """All sides for so many agents, and what the peer says of itself."""
    batch = stack.enter_context(closing(BareBatch(model, spec, n_threads=n_threads)))
    sides, about = {BARE: bare_side(work, batch, model)}, {}
    if crowd is not None:
        sides |= actor_sides(work, crowd)
    if kind is not None:
        server = stack.enter_context(peer.running(kind, model.path, spec, n_threads=n_threads, kind=model.kind))
        about = {"server": kind.name, **server.about}
        sides |= peer_sides(work, server)
    return sides, about


def ratios(measured: harness.Figures) -> dict[str, float]:
    return {
        f"{above} / {below}": harness.median_ratio(measured[above]["tokens_per_s"], measured[below]["tokens_per_s"])
        for above, below in RATIOS
        if above in measured and below in measured
    }


def show(title: str, by_agents: Mapping[int, harness.Figures]) -> None:
    rows = []
    for agents, measured in by_agents.items():
        for i, (side, values) in enumerate(measured.items()):
            shown = (harness.shown(values, name, digits) for _, name, digits in _COLUMNS)
            rows.append([f"{agents if i == 0 else '':>2}  {side}", *shown])
    harness.table(title, ["agents", *(column for column, _, _ in _COLUMNS)], rows)
    kinds = dict.fromkeys(name for measured in by_agents.values() for name in ratios(measured))
    rows = [
        [name, *(f"{ratios(measured)[name]:.3f}" if name in ratios(measured) else "" for measured in by_agents.values())]
        for name in kinds
    ]
    harness.table("tokens per second, ratios", ["agents", *map(str, by_agents)], rows)


def main(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration of the conductor.")] = None,
    model: Annotated[str, typer.Option(help="A key of the configuration, a file, or a shape.")] = "coder",
    agents: Annotated[str, typer.Option(help="How many at once; separated by commas.")] = "1,2,4,8,16,32",
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt, about.")] = 64,
    repeats: Annotated[int, typer.Option(help="Counted rounds.")] = 5,
    warm: Annotated[int, typer.Option(help="Rounds before them.")] = 2,
    actor: Annotated[bool, typer.Option(help="The conductor is one of the sides.")] = True,
    peer_: Annotated[bool, typer.Option("--peer/--no-peer", help="A server is one of the sides.")] = True,
    server: Annotated[Path | None, typer.Option(help="The llama-server to take.")] = None,
    directory: shapes.Directory = shapes.DIRECTORY,
    synth: shapes.Synth = shapes.SYNTH,
    save: Annotated[Path | None, typer.Option(help="Where the JSON goes (default: benchmarks/results).")] = None,
) -> None:
    """Print the figures of all sides and their ratios, and save them."""
    counts = [int(count) for count in agents.split(",")]
    settings = shapes.roomy(shapes.added(load_config(config), [model], directory=directory, synth=synth), slots=max(counts))
    window = shapes.window_for(prompt_tokens + 64 + max_tokens)
    key = shapes.key(model)
    with ExitStack() as stack:
        crowd = Crowd(settings) if actor else None
        if crowd is not None:
            stack.callback(crowd.close)
        status = crowd.status() if crowd else None
        device = open_device(settings.device, llama_supports_gpu=Llama.instance().supports_gpu, used_bytes=lambda: 0)
        plan = Catalog(settings).plan(key, device.kind)
        bare = stack.enter_context(closing(BareModel(plan)))
        n_threads = status.threads if status else settings.threads or harness.cores()
        found = peer.find(server, device.kind) if peer_ else "not asked for"
        kind = found if isinstance(found, PeerKind) else None
        texts = prompts(prompt_tokens, lambda text: len(bare.tokenize(text)))
        by_agents: dict[int, harness.Figures] = {}
        about: dict[str, str] = {}
        for count in counts:
            spec = replace(settings.context_spec(key, window), slots=count)
            if crowd is not None:
                crowd.admit({f"agent-{i}": key for i in range(count)}, window=window)
            work = Work(texts, count, max_tokens)
            with ExitStack() as round_:
                sides, about = open_sides(round_, work, bare, spec, n_threads, crowd, kind)
                by_agents[count] = harness.in_turns(sides, repeats=repeats, warm=warm)
    show(f"{model} on {device.name}: {max_tokens} tokens after some {prompt_tokens}, greedy", by_agents)
    out.print(f"[dim]no peer: {found}[/]" if isinstance(found, str) else f"[dim]peer: {' '.join(about.values())}[/]")
    result: dict[str, Any] = {
        "model": key, "device": device.name, "max_tokens": max_tokens, "prompt_tokens": prompt_tokens, "window": window,
        "repeats": repeats, "warm": warm, "n_threads": n_threads, "built_for": harness.built_for(),
        "peer": about, "no_peer_because": found if isinstance(found, str) else "",
        "ratios": {str(count): ratios(measured) for count, measured in by_agents.items()},
        "agents": {str(count): measured for count, measured in by_agents.items()},
    }  # fmt: skip
    harness.save(save or harness.RESULTS / f"batching-{device.kind.value}-{key}.json", result, status)


if __name__ == "__main__":
    typer.run(main)
