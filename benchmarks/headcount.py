"""How many agents one small card takes: a process of llama.cpp for each, against the conductor.

    python benchmarks/headcount.py [--leave 8GiB] [--save FILE]

On a GPU a child process holds all of the card but `--leave`. Then three models, each with a window of 172,032 tokens: first
as `llama-completion` processes that are started one after another and stay, then as agents of one conductor that all decode.
After that the conductor admits more agents of the same models until it refuses one. Without a GPU the conductor's side runs
on the host device with the models that come with the repository, and there is no other side.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness, shapes
from benchmarks.ballast import ballast
from conductor.backend.device import Device, open_device
from conductor.config import Config, DeviceConfig
from conductor.errors import AdmissionRefused
from conductor.gpu_conductor import GpuConductor
from conductor.types import DeviceKind, Record, ServiceClass, Status
from conductor.units import format_bytes, parse_bytes
from pipelines import tables
from pipelines.console import out
from pipelines.machine import without_directories

WINDOW = 172_032
TOOL = "llama-completion"
PROMPT = "import os\nimport sys\n\n\ndef main(arguments):\n"
#: what the second part registers: service class and window
FURTHER = ((ServiceClass.SHARED, WINDOW), (ServiceClass.GUARANTEED, 4096), (ServiceClass.GUARANTEED, 16_384))


@dataclass(frozen=True, slots=True)
class Alone(Record):
    """A model as a process of its own."""

    model: str
    lives: bool
    exit_code: int | None
    said: str  #: its line about memory, if it died
    left_bytes: int  #: free on the card afterwards


@dataclass(frozen=True, slots=True)
class Conducted(Record):
    """A model as an agent of the conductor."""

    model: str
    admitted: bool
    charged_bytes: int
    tokens: int
    elapsed_ms: float
    said: str


@dataclass(frozen=True, slots=True)
class Filled(Record):
    """Further agents of one kind."""

    service_class: ServiceClass
    window: int
    admitted: int
    turns: int  #: of every tenth of them
    refusal: str | None  #: None: nobody was refused up to the most that were tried
    booked_bytes: int
    cap_bytes: int


def alone(files: dict[str, Path], device: Device, *, patience_s: float) -> list[Alone]:
    """Start a process for each model, one after another; all that live stay until the last has had its time."""
    with ExitStack() as stack:
        started = []
        for name, path in files.items():
            process, said = _start(path, patience_s)
            stack.callback(_end, process)
            started.append((name, process, said, device.read().free_bytes))
        return [Alone(name, process.poll() is None, process.poll(), said, left) for name, process, said, left in started]


def _start(path: Path, patience_s: float) -> tuple[subprocess.Popen[bytes], str]:
    """A process, which lives or has died, and what it said about memory."""
    command = [TOOL, "-m", str(path), "-c", str(WINDOW), "-ngl", "99", "-fit", "off", "-no-cnv", "--ignore-eos", "-n", "-1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "-p", PROMPT], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        try:
            process.wait(timeout=patience_s)  # it has more to say than that: whoever ends has died
        except subprocess.TimeoutExpired:
            pass
        log.seek(0)
        lines = log.read().decode("utf-8", "replace").splitlines()
    return process, next((line.strip() for line in lines if "out of memory" in line or "failed to allocate" in line), "")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def three(conductor: GpuConductor, models: Sequence[str]) -> list[Conducted]:
    """An agent of each model with the whole window; when all are in, each decodes."""
    admissions: dict[str, int | str] = {}
    for model in models:
        try:
            admissions[model] = (await conductor.register(model, model, window=WINDOW, service_class="shared")).charged_bytes
        except AdmissionRefused as refused:
            admissions[model] = refused.refusal.line
    results = []
    for model, charged in admissions.items():
        if isinstance(charged, str):
            results.append(Conducted(model, False, 0, 0, 0.0, charged))
            continue
        turn = await conductor.decode(model, PROMPT, max_tokens=32)
        results.append(Conducted(model, True, charged, turn.generated_tokens, turn.elapsed_ms, ""))
    return results


async def fill(conductor: GpuConductor, models: Sequence[str], kind: ServiceClass, window: int, *, most: int) -> Filled:
    """Register agents of the models in turn until one is refused; every tenth decodes. All of them leave again."""
    agents: list[str] = []
    turns, refusal = 0, None
    for number, model in zip(range(most), itertools.cycle(models), strict=False):
        agent = f"{kind.value}-{window}-{number}"
        try:
            await conductor.register(agent, model, window=window, service_class=kind.value)
        except AdmissionRefused as refused:
            refusal = refused.refusal.line
            break
        agents.append(agent)
        if number % 10 == 0:
            await conductor.decode(agent, PROMPT, max_tokens=8)
            turns += 1
    ledger = (await conductor.status()).ledger
    for agent in agents:
        await conductor.unregister(agent)
    conductor.check()
    return Filled(kind, window, len(agents), turns, refusal, ledger.allocated_bytes, ledger.max_bytes)


async def conduct(config: Config, models: Sequence[str], *, most: int) -> tuple[list[Conducted], list[Filled], Status]:
    conductor = GpuConductor(config)
    await conductor.start()
    try:
        agents = await three(conductor, models)
        status = await conductor.status()
        filled = [await fill(conductor, models, kind, window, most=most) for kind, window in FURTHER]
    finally:
        await conductor.close()
    return agents, filled, status


def show(processes: list[Alone], agents: list[Conducted], filled: list[Filled], status: Status, *, why_alone: str) -> None:
    by_model = {process.model: process for process in processes}
    rows = []
    for agent in agents:
        process = by_model.get(agent.model)
        if process is None:
            beside = "not run"
        elif process.lives:
            beside = f"lives, {format_bytes(process.left_bytes)} left"
        else:
            beside = f"dies: exit code {process.exit_code}"
        turn = f"admitted, {agent.tokens} tokens in {agent.elapsed_ms:.0f} ms" if agent.admitted else agent.said
        rows.append([agent.model, beside, turn])
    out.print(tables.status(status))
    title = f"a window of {WINDOW:,} tokens each, on {status.device.name}, {format_bytes(status.device.total_bytes)}"
    harness.table(title, ["", "a process each", "conductor"], rows)
    if why_alone:
        out.print(f"[dim]no processes: {why_alone}[/]")
    rows = [
        [f"{f.service_class.value}, {f.window:,}", str(f.admitted), f"{f.booked_bytes / f.cap_bytes:.0%}", str(f.turns),
         f.refusal.split()[1] if f.refusal else f"no refusal up to {f.admitted}"]
        for f in filled
    ]  # fmt: skip
    harness.table("further agents beside these", ["class, window", "admitted", "of the cap", "turns", "then"], rows)


def main(
    leave: Annotated[str, typer.Option(help="What of a GPU is left for both sides.")] = "8GiB",
    host_bytes: Annotated[str, typer.Option(help="The size of the host device, without a GPU.")] = "64MiB",
    models: shapes.Models = None,
    most: Annotated[int, typer.Option(help="The most further agents of a kind.")] = 512,
    patience: Annotated[float, typer.Option(help="Seconds after which a process that still runs is said to live.")] = 15.0,
    directory: shapes.Directory = shapes.DIRECTORY,
    synth: shapes.Synth = shapes.SYNTH,
    save: Annotated[Path | None, typer.Option(help="Where the JSON goes (default: benchmarks/results).")] = None,
) -> None:
    """Print both sides and save them."""
    # NVML alone: what llama.cpp would take of the card in this process is not free for the processes.
    device = open_device(DeviceConfig(), llama_supports_gpu=True, used_bytes=lambda: 0)
    on_card = device.kind is DeviceKind.CUDA
    files = shapes.find(models or (shapes.PUBLIC if on_card else shapes.SHIPPED), directory=directory, synth=synth)
    why_alone = "no GPU here" if not on_card else "" if shutil.which(TOOL) else f"no {TOOL} here"
    # With a limit of that size beside the ballast, the share that is kept unbooked is the small card's, not the large one's.
    place = {"kind": "cuda", "limit": leave} if on_card else {"kind": "host", "host_bytes": host_bytes}
    config = shapes.configured(files, device=place, context={"first_window": 4096})
    with ExitStack() as stack:
        left = stack.enter_context(ballast(parse_bytes(leave))) if on_card else 0
        began = time.monotonic()
        processes = [] if why_alone else alone(files, device, patience_s=patience)
        for process in processes:
            out.print(f"{process.model}: {'lives' if process.lives else f'died, exit code {process.exit_code}'} {process.said}")
        agents, filled, status = asyncio.run(conduct(config, list(files), most=most))
    show(processes, agents, filled, status, why_alone=why_alone)
    figures: dict[str, Any] = {
        "window": WINDOW, "left_bytes": left, "elapsed_s": time.monotonic() - began, "no_processes_because": why_alone,
        "processes": [process.to_json() for process in processes], "agents": [agent.to_json() for agent in agents],
        "further": [each.to_json() for each in filled], "status": without_directories(status).to_json(),
    }  # fmt: skip
    harness.save(save or harness.RESULTS / f"headcount-{device.kind.value}.json", figures, status)


if __name__ == "__main__":
    typer.run(main)
