"""A model larger than the card: agents admitted to it, decoding together, and what the card really held.

    python benchmarks/beyond.py [--model llama-3.1-8b] [--leave 2GiB] [--agents 8] [--save FILE]

On a GPU another process holds all of the card but `--leave`; without one the host device has so many bytes. Best-effort agents
are registered with the plain conductor, which is told nothing about streaming, and take turns all at once. Meanwhile the driver
is asked every few milliseconds what is held, and the ledger keeps its log: neither may ever pass what was left.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness, shapes
from benchmarks.ballast import ballast
from conductor.backend.device import open_device
from conductor.config import Config, DeviceConfig
from conductor.gpu_conductor import GpuConductor
from conductor.types import DecodeResult, DeviceKind, LedgerEntry, Status
from conductor.units import MIB, format_bytes, parse_bytes
from pipelines.console import out
from pipelines.machine import without_directories

PROMPT = "Write one sentence about number {}."


class Watch:
    """What the device holds, asked again and again in a thread; only the least that was free is kept."""

    def __init__(self) -> None:
        self._device = open_device(DeviceConfig(), llama_supports_gpu=True, used_bytes=lambda: 0)
        self.before = self.least_free = self._device.read().free_bytes
        self.readings = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.003):
            self.least_free = min(self.least_free, self._device.read().free_bytes)
            self.readings += 1

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def most_held(self) -> int:
        return self.before - self.least_free


async def conduct(
    config: Config, model: str, *, agents: int, tokens: int, rounds: int
) -> tuple[list[dict[str, float]], list[DecodeResult], Status, tuple[LedgerEntry, ...]]:
    conductor = GpuConductor(config)
    await conductor.start()
    try:
        for number in range(agents):
            await conductor.register(f"agent-{number}", model, window=256, service_class="best_effort")
        figures: list[dict[str, float]] = []
        results: list[DecodeResult] = []
        for _ in range(rounds):
            began = time.perf_counter()
            asked = (conductor.decode(f"agent-{n}", PROMPT.format(n), max_tokens=tokens, reset=True) for n in range(agents))
            results = await asyncio.gather(*asked)
            elapsed = time.perf_counter() - began
            made = sum(result.generated_tokens for result in results)
            figures.append({"seconds": elapsed, "tokens": made, "tokens_per_s": made / elapsed})
        return figures, results, await conductor.status(), await conductor.ledger_log()
    finally:
        await conductor.close()


def main(
    model: Annotated[str, typer.Option(help="A file or a shape.")] = "",
    leave: Annotated[str, typer.Option(help="What of a GPU is left.")] = "2GiB",
    host_bytes: Annotated[str, typer.Option(help="The size of the host device, without a GPU.")] = "8MiB",
    agents: Annotated[int, typer.Option(help="How many, all of the model.")] = 8,
    tokens: Annotated[int, typer.Option(help="Of each turn.")] = 32,
    rounds: Annotated[int, typer.Option(help="Turns of each agent.")] = 3,
    directory: shapes.Directory = shapes.DIRECTORY,
    synth: shapes.Synth = shapes.SYNTH,
    save: Annotated[Path | None, typer.Option(help="Where the JSON goes (default: benchmarks/results).")] = None,
) -> None:
    """Print what came of it, and save it."""
    device = open_device(DeviceConfig(), llama_supports_gpu=True, used_bytes=lambda: 0)
    on_card = device.kind is DeviceKind.CUDA
    name = model or (shapes.LARGER if on_card else "coder")
    files = shapes.find([name], directory=directory, synth=synth)
    key = next(iter(files))
    place = {"kind": "cuda", "limit": leave} if on_card else {"kind": "host", "host_bytes": host_bytes}
    context = {"slots": agents, "n_batch": 128, "n_ubatch": 128, "first_window": 256}
    config = shapes.configured(files, device=place, context=context, host_budget="64MiB")
    with ExitStack() as stack:
        left = stack.enter_context(ballast(parse_bytes(leave))) if on_card else parse_bytes(host_bytes)
        watch = Watch() if on_card else None
        figures, results, status, log = asyncio.run(conduct(config, key, agents=agents, tokens=tokens, rounds=rounds))
        if watch is not None:
            watch.end()
    weights = next(it for it in status.models if it.key == key)
    most_booked = max(entry.allocated_bytes for entry in log)
    held = watch.most_held if watch is not None else None
    pool = status.pools[0] if status.pools else None
    rows = [
        ["weights, all of them", format_bytes(weights.estimated_bytes)],
        ["the card", format_bytes(left)],
        ["most that was booked", format_bytes(most_booked)],
        ["most that the driver saw", format_bytes(held) if held is not None else "not asked"],
        ["residency", weights.residency],
        ["slots", str(pool.slots) if pool else "none"],
        ["tokens per second", f"{harness.median([it['tokens_per_s'] for it in figures]):,.1f}"],
        ["of the link", f"{weights.weights.link_share:.0%}" if weights.weights else ""],
    ]
    harness.table(f"{agents} agents of {key}", ["", ""], rows)
    holds = most_booked <= left and (held is None or held <= left) and all(it.generated_tokens for it in results)
    out.print("never more than there was" if holds else "MORE WAS HELD THAN THERE WAS, or somebody got nothing")
    document: dict[str, Any] = {
        "model": key, "left_bytes": left, "most_booked_bytes": most_booked, "most_held_bytes": held,
        "readings": watch.readings if watch else 0, "weights_mib": weights.estimated_bytes / MIB, "agents": agents,
        "rounds": figures, "status": without_directories(status).to_json(), "holds": holds,
    }  # fmt: skip
    harness.save(save or harness.RESULTS / f"beyond-{device.kind.value}.json", document, status)
    raise typer.Exit(0 if holds else 1)


if __name__ == "__main__":
    typer.run(main)
