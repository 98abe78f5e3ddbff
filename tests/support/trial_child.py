"""The child of `trial.py`: a conductor, a mutant a line on standard input, and an outcome a line on standard output."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil

from conductor.config import parse_config
from conductor.errors import ConductorError, InternalError
from conductor.gpu_conductor import GpuConductor
from tests.support.tiny_gguf import write_tiny_gguf

WORKED, UNTYPED = "worked", "UNTYPED"
#: tokens that are longer together than a step of the child's contexts, with what else a user may say
TEXT = "def f(x):\n\treturn x  # <|im_end|> \u00e9\u00df\u4e2d\u6587 \U0001f600\x00\x7f 12345 " * 3
TURNS: tuple[dict[str, Any], ...] = (
    {"prompt": "x", "max_tokens": 4},
    {"prompt": TEXT, "max_tokens": 4, "temperature": 1.0, "seed": 7, "reset": True},
    {"messages": [{"role": "user", "content": "hello <|im_end|>"}], "max_tokens": 2, "reset": True},
)
#: An endless loop that fills memory is to end here, not in the machine's other processes.
MEMORY_BYTES = 16 << 30


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    asyncio.run(serve(Path(sys.argv[1])))


async def serve(directory: Path) -> None:
    conductor = await begin(directory)
    pause = Pause(conductor)
    before = await state(conductor)
    answer({"ready": True})
    while line := await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        pause.wanted = order["pause"]
        began = time.monotonic()
        registered, message, turns = await visit(conductor, order["path"])
        seconds = time.monotonic() - began
        after = await state(conductor)
        wrong = [f"{name}: {before[name]} became {after[name]}" for name in before if before[name] != after[name]]
        wrong += [word for word in (registered, *turns) if word.startswith(UNTYPED)]
        answer({
            "registered": registered, "message": message, "turns": turns, "wrong": wrong, "seconds": seconds,
            "rss_bytes": psutil.Process().memory_info().rss,
        })  # fmt: skip
    await conductor.close()


def answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


async def begin(directory: Path) -> GpuConductor:
    """A conductor with an agent of its own."""
    document = {
        "device": {"kind": "host", "host_bytes": "256MiB"},
        "threads": 1,
        "context": {"n_ubatch": 32},
        "model_dirs": [str(directory)],
        "models": {"good": {"path": str(write_tiny_gguf(directory / "good.gguf", n_layer=1))}},
    }
    conductor = GpuConductor(parse_config(document, source="trial", directory=directory))
    await conductor.start()
    await conductor.register("ada", "good", window=256)
    return conductor


async def visit(conductor: GpuConductor, path: str) -> tuple[str, str, list[str]]:
    """How the mutant's registration ended, the first thing an error said, and how each turn ended."""
    registered, message = await tried(conductor.register("guest", path, window=512))
    if registered != WORKED:
        return registered, message, []
    turns = []
    for turn in TURNS:
        ended, said = await tried(conductor.decode("guest", **turn))
        turns.append(ended)
        message = message or said
    left, said = await tried(conductor.unregister("guest"))
    return (WORKED if left == WORKED else f"{UNTYPED} {left}"), message or said, turns


async def tried(call: Awaitable[object]) -> tuple[str, str]:
    """WORKED or the error's type, and what it said."""
    try:
        await call
    except InternalError as error:
        return f"{UNTYPED} InternalError", str(error)
    except ConductorError as error:
        return type(error).__name__, str(error)
    except Exception as error:
        return f"{UNTYPED} {type(error).__name__}", str(error)
    return WORKED, ""


async def state(conductor: GpuConductor) -> dict[str, Any]:
    """All that a mutant must leave as it was, and that the conductor lives: its agent speaks."""
    said = await conductor.decode("ada", "hello", max_tokens=4, reset=True)
    conductor.check()
    status = await conductor.status()
    me = psutil.Process()
    return {
        "ada's answer": said.tokens,
        "the ledger": sorted((held.kind.value, held.holder, held.bytes) for held in status.ledger.reservations if held.bytes),
        "bytes allocated": status.ledger.allocated_bytes,
        "host memory": status.host_memory.to_json(),
        "agents": [agent.id for agent in status.agents],
        "models": [model.key for model in status.models],
        "estimates": status.estimates,
        "open files": open_files(),
        "more children than the dry run's": len(me.children(recursive=True)) > 1,
        "threads beyond 40": me.num_threads() > 40,
    }


def open_files() -> list[str]:
    """By name: of the pipes and nameless files, which a child of the conductor's may have three of, whether there are more."""
    targets = [target(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
    nameless = [name for name in targets if name.startswith("pipe:") or name.endswith("(deleted)") or not name]
    return sorted(name for name in targets if name not in nameless) + ["too many pipes"] * (len(nameless) > 12)


def target(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except OSError:  # the directory's own
        return ""


class Pause:
    """Holds the conductor between the price and the load while the watcher changes the file."""

    def __init__(self, conductor: GpuConductor) -> None:
        self.wanted = False
        engine: Any = conductor._engine
        self._load: Callable[..., Any] = engine.load
        engine.load = self.load

    def load(self, *arguments: Any, **options: Any) -> Any:
        if self.wanted:
            self.wanted = False
            answer({"priced": True})
            sys.stdin.readline()
        return self._load(*arguments, **options)
