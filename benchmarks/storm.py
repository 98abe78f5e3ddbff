"""A thousand random requests from 32 agents on three models: is everything accounted for, who stalls, does `status` answer?

    python benchmarks/storm.py [--requests 1000] [--agents 32] [--seed 0] [--config FILE] [--save FILE]

Turns are awaited, streamed, read slowly, left, cancelled, timed out and forked at random (`tests/support/storm.py`), through
the Ray actor, with more agents than there are seats and memory for: unless a configuration is given, 40 MiB of RAM take the
device's part, with four slots a pool and turns of 200 ms. Meanwhile `status` is asked again and again. A stall is the
longest time between two tokens of a turn while it ran; with somebody's prompt in between it may last `max_stall_ms` and a
step. The exit code is 1 if a request is not accounted for, or anything is left at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import ray
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import actors
from actors.connection import own
from benchmarks import harness
from conductor.config import load_config, parse_config
from conductor.errors import ConductorError
from conductor.types import Chunk, DecodeResult, Status
from tests.support.storm import Account, Storm

MODELS = ("coder", "reviewer", "documenter")
#: what makes 32 agents of the models that come along get in each other's way
CROWDED = {
    "device": {"kind": "host", "host_bytes": "40MiB"},
    "host_budget": "6MiB",
    "min_turn_ms": 200,
    "context": {"slots": 4, "first_window": 256},
    "models": {model: {"path": f"models/{model}.gguf"} for model in MODELS},
}


class ThroughRay:
    """The conductor's calls as a storm makes them."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        reference = getattr(self._actor, name).remote(*arguments, **options)
        try:
            return await reference
        except ConductorError as error:
            raise own(error) from None
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise

    async def decode(self, agent: str, prompt: str, **options: Any) -> DecodeResult:
        result: DecodeResult = await self._call("decode", agent, prompt, **options)
        return result

    async def stream(self, agent: str, prompt: str, **options: Any) -> AsyncIterator[Chunk | DecodeResult]:
        turn = self._actor.stream.remote(agent, prompt, **options)
        try:
            async for reference in turn:
                yield await reference
        except ConductorError as error:
            raise own(error) from None
        finally:
            ray.cancel(turn)

    async def cancel(self, agent: str) -> int:
        turns: int = await self._call("cancel", agent)
        return turns

    async def fork(self, agent: str, new: str) -> object:
        return await self._call("fork", agent, new)

    async def unregister(self, agent: str) -> None:
        await self._call("unregister", agent)


async def _watch(actor: Any, answers_ms: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await actor.status.remote()
        answers_ms.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(0.05)


async def _rage(actor: Any, agents: list[str], seed: int, requests: int) -> tuple[Account, list[float], float]:
    answers_ms: list[float] = []
    watching = asyncio.create_task(_watch(actor, answers_ms))
    began = time.perf_counter()
    account = await Storm(ThroughRay(actor), agents, seed=seed).rage(requests)  # type: ignore[arg-type]
    elapsed_s = time.perf_counter() - began
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    return account, answers_ms, elapsed_s


def main(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Another configuration with the three models.")] = None,
    requests: Annotated[int, typer.Option(help="Requests in all.")] = 1000,
    agents: Annotated[int, typer.Option(help="Agents in all.")] = 32,
    seed: Annotated[int, typer.Option(help="What happens is drawn from it.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Where the JSON goes (default: benchmarks/results).")] = None,
) -> None:
    """Print the account and save it."""
    root = harness.RESULTS.parent.parent
    settings = load_config(config) if config else parse_config(CROWDED, source="benchmarks/storm.py", directory=root)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    actor = actors.connect(settings)
    ids = [f"agent-{i}" for i in range(agents)]
    for i, id in enumerate(ids):
        ray.get(actor.register.remote(id, MODELS[i % len(MODELS)], window=512, priority=i % 2))
    account, answers_ms, elapsed_s = asyncio.run(_rage(actor, ids, seed, requests))
    ray.get(actor.check.remote())
    for id in ids:
        ray.get(actor.unregister.remote(id))
    status: Status = ray.get(actor.status.remote())
    actors.stop(actor)
    ray.shutdown()

    stalls = sorted(result.longest_stall_ms for result in account.results if result.generated_tokens > 1)
    left = sum(r.bytes for r in status.ledger.reservations if r.kind.value != "overhead") + status.host_memory.used_bytes
    title = f"{requests} random requests of {agents} agents on {status.device.name}, {elapsed_s:.1f} s"
    harness.table(title, ["ended", "requests"], [[ending, str(count)] for ending, count in account.endings.most_common()])
    over = sum(stall > settings.max_stall_ms for stall in stalls)
    status_median, status_p95 = harness.median(answers_ms), _percentile(sorted(answers_ms), 95)
    harness.out.print(
        f"{account.generated_tokens:,} tokens; stalls: median {harness.median(stalls):.1f} ms, "
        f"p99 {_percentile(stalls, 99):.1f} ms, longest {stalls[-1]:.1f} ms; [bold]{over}[/] of {len(stalls)} turns above "
        f"max_stall_ms = {settings.max_stall_ms}\n"
        f"`status` while it raged: median [bold]{status_median:.1f} ms[/], p95 {status_p95:.1f} ms\n"
        f"left at the end: {left} bytes, {len(status.agents)} agents"
    )
    result = {
        "requests": requests, "agents": agents, "seed": seed, "elapsed_s": elapsed_s, "endings": dict(account.endings),
        "generated_tokens": account.generated_tokens, "pauses": sum(result.pauses for result in account.results),
        "max_stall_ms": settings.max_stall_ms, "stalls_ms": stalls, "status_ms": answers_ms, "bytes_left": left,
    }  # fmt: skip
    harness.save(save or harness.RESULTS / f"storm-{status.device.kind.value}.json", result, status)
    sound = account.requests == requests and not left and not status.agents
    raise typer.Exit(0 if sound and not any(ending.startswith("unexpected") for ending in account.endings) else 1)


def _percentile(ascending: list[float], percent: float) -> float:
    return ascending[min(len(ascending) - 1, int(len(ascending) * percent / 100))]


if __name__ == "__main__":
    typer.run(main)
