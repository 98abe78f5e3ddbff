"""Set before anything imports ray, and the plain conductor that tests of llama.cpp talk to."""

from __future__ import annotations

import os

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conductor.gpu_conductor import GpuConductor

Start = Callable[..., Awaitable["GpuConductor"]]

ROOT = Path(__file__).resolve().parents[1]


#: a Ray for each process would take the memory and the cores that the tests of the other need
_WITH_RAY = ("tests/cli/", "tests/docs/", "tests/ray/", "tests/gpu/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run in several processes (`make test`), those that start a Ray run in one of them, one after another.

    Not by marks (xdist_group): xdist 3.8 writes the group into the name of a test, which pytest 9.2 does not read back.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RayInOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(_WITH_RAY) else nodeid

    return RayInOne(config, log)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """`await start(models={key: path or options}, …)`: a conductor on a slice of RAM, one thread and one live pool.

    At the end its books are checked, everybody leaves, and not a byte may be left.
    """
    from conductor.config import parse_config
    from conductor.gpu_conductor import GpuConductor

    started: list[GpuConductor] = []

    async def begin(models: Mapping[str, Any] | None = None, **options: Any) -> GpuConductor:
        document = {
            "device": {"kind": "host", "host_bytes": "256MiB"},
            "host_budget": "64MiB",
            "threads": 1,
            "live_contexts": 1,
            "model_dirs": [str(tmp_path)],
            "models": {key: _options(model) for key, model in (models or {}).items()},
            **options,
        }
        conductor = GpuConductor(parse_config(document, source="test", directory=ROOT))
        started.append(conductor)
        await conductor.start()
        return conductor

    yield begin
    for conductor in started:
        conductor.check()
        await conductor.close()
        conductor.check()
        status = await conductor.status()
        assert (status.agents, status.models, status.host_memory.used_bytes) == ((), (), 0)
        assert {reserved.kind.value for reserved in status.ledger.reservations if reserved.bytes} <= {"external"}


@pytest.fixture
def parrot(start: Start, tmp_path: Path) -> Start:
    """`await parrot("text", …)`: a conductor with an agent `polly` that says the text."""
    from tests.support.parrot import write_parrot

    async def begin(says: str, *, ends: bool = True, window: int = 256, **options: Any) -> GpuConductor:
        path = write_parrot(tmp_path / "parrot.gguf", says, ends=ends)
        conductor = await start({"parrot": {"path": path, **options}})
        await conductor.register("polly", "parrot", window=window)
        return conductor

    return begin


def _options(model: Any) -> dict[str, Any]:
    return {"path": str(model)} if isinstance(model, (str, Path)) else {**model, "path": str(model["path"])}
