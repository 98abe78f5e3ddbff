"""The pictures of docs/board.md, from a real run: three shipped models, agents at work, one refused, one waiting.

    python docs/make_pictures.py        # in the repository's root; needs Chromium and Pillow, writes docs/images/

It starts a Ray and a conductor of its own on a slice of RAM, and ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

import ray
import yaml
from PIL import Image
from rich.console import Console

from conductor.errors import AdmissionRefused, ConductorError
from pipelines.top import frame
from pipelines.watch import Watch
from tests.support.chromium import Tab, tab
from tests.support.conducting import Conductor, config_of, document_of
from tests.support.shell import CONDUCTOR, ROOT

IMAGES = ROOT / "docs" / "images"
_WIDTH = 1200
_TOP = (108, 34)
_WORKS_S = 20.0
MODELS = {name: {"path": str(ROOT / "models" / f"{name}.gguf"), "window": 2048} for name in ("coder", "reviewer", "documenter")}
OPTIONS = {"live_contexts": 2, "host_budget": "32MiB", "device": {"kind": "host", "host_bytes": "64MiB"}}
TASK = "Write a Python function `add(a, b)` that returns the sum of two numbers."


class Company:
    """Agents that talk until they are told to stop."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor, self._enough = conductor, threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        agents = (("ada", "coder", "shared"), ("bob", "reviewer", "shared"), ("cem", "documenter", "best_effort"),
                  ("dee", "coder", "guaranteed"))  # fmt: skip
        for agent, model, promised in agents:
            self._conductor.call("register", agent, model, service_class=promised, window=1024)
        self._conductor.call("reserve", "embedder", 6 << 20)
        for n, (agent, _, _) in enumerate(agents):
            thread = threading.Thread(target=self._talk, args=(agent, 1.5 + 1.1 * n))
            thread.start()
            self._threads.append(thread)

    def _talk(self, agent: str, rest_s: float) -> None:
        while not self._enough.is_set():
            with contextlib.suppress(ConductorError):
                self._conductor.call("decode", agent, messages=[{"role": "user", "content": TASK}], max_tokens=160)
            self._enough.wait(rest_s)

    def is_asked_too_much(self) -> None:
        """One registration is refused, another one waits for room."""
        with contextlib.suppress(AdmissionRefused):
            self._conductor.call("register", "eve", "coder", window=60_000, service_class="guaranteed")
        room = self._conductor.status().ledger
        self._late = self._conductor.handle.reserve.remote("trainer", room.max_bytes - room.allocated_bytes - (1 << 20))
        self._waits = self._conductor.handle.register.remote(
            "fay", "reviewer", window=2048, service_class="guaranteed", wait_s=20
        )

    def end(self) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()
        self._conductor.call("release", ray.get(self._late))
        with contextlib.suppress(AdmissionRefused):  # it gave up, as the page said it would
            ray.get(self._waits)


@contextlib.contextmanager
def board(config: Path) -> Iterator[str]:
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = (CONDUCTOR, "board", "--port", "0", "--config", str(config))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.send_signal(signal.SIGINT)


async def photograph(page: Tab, name: str) -> None:
    """From the top to where models' paths begin: they are this machine's."""
    height = await page.js("document.getElementById('models').closest('section').getBoundingClientRect().top + scrollY")
    await page.resize(_WIDTH, int(height))
    await asyncio.sleep(1)
    picture = Image.open(io.BytesIO(await page.screenshot()))
    picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(IMAGES / name, optimize=True)


async def take(config: Path, company: Company) -> None:
    with board(config) as url:
        async with tab() as page:
            await page.resize(_WIDTH, 1000)
            await page.emulate()
            await page.open(url)
            await page.until("document.querySelector('#connection').textContent === 'live'")
            await page.js("document.querySelector('#range input').click()")
            await page.js("document.getElementById('history').style.maxHeight = '20rem'")
            await page.js("document.querySelector('#filter [value=pools]').click()")
            await asyncio.to_thread(company.begin)
            await asyncio.sleep(_WORKS_S)
            await asyncio.to_thread(company.is_asked_too_much)
            await page.until("!document.querySelector('#waiting table').hidden")
            await asyncio.sleep(3)
            await photograph(page, "board.png")
            assert page.complaints == [], page.complaints


def draw_top(config: Path) -> None:
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    width, height = _TOP
    with Watch(config) as watch:
        for _ in range(25):
            watch.look()
            threading.Event().wait(0.3)
        console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
        console.print(frame(watch.view, width, height))
    picture = console.export_svg(title="conductor top", unique_id="top")
    (IMAGES / "top.svg").write_text(
        re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL), "utf-8"
    )  # nothing from elsewhere


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    options: dict[str, Any] = {"num_cpus": 4, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 80 << 20}
    ray.init(address="local", logging_level="ERROR", **options)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        config = directory / "pictures.yaml"
        config.write_text(yaml.safe_dump(document_of("vram_pictures", directory, MODELS, **OPTIONS)))
        conductor = Conductor(config_of("vram_pictures", directory, MODELS, **OPTIONS))
        company = Company(conductor)
        asyncio.run(take(config, company))
        draw_top(config)
        company.end()
    ray.shutdown()


if __name__ == "__main__":
    main()
