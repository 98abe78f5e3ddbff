"""Queries of the dashboard in the Prometheus that `conductor monitor` starts, after some minutes of work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from pictures.company import Scene, short_of_room
from pictures.files import photograph

from tests.support.chromium import tab
from tests.support.scraping import queries
from tests.support.shell import CONDUCTOR

#: (the panel's title, whether its series lie on each other)
_PANELS = (("What is booked, and for what", True), ("Tokens per second", False))
_MINUTES = 4
_WIDTH, _HEIGHT = 1100, 2000


async def graphs(scene: Scene, path: Path) -> None:
    """Prometheus' own page: it has no variables and no legends, so a query is as Grafana would send it."""
    with _monitored(scene) as url:
        for _ in range(2 * _MINUTES):
            await asyncio.sleep(20)
            with short_of_room(scene.conductor):
                await asyncio.sleep(10)
        async with tab() as page:
            await page.resize(_WIDTH, _HEIGHT)
            await page.emulate()
            await page.open(f"{url}/graph?{urllib.parse.urlencode(_shown())}")
            await page.until(f"document.querySelectorAll('.rickshaw_legend').length === {len(_PANELS)}")
            await asyncio.sleep(2)
            bottom = await page.js("[...document.querySelectorAll('.rickshaw_legend')].at(-1).getBoundingClientRect().bottom")
            await photograph(page, path, (0, 0, _WIDTH, int(bottom) + 16))


def _shown() -> dict[str, str]:
    asked: dict[str, str] = {}
    for n, (title, stacked) in enumerate(_PANELS):
        query = next(query for panel, query in queries() if panel == title)
        query = query.replace("$conductor", ".*").replace("$__rate_interval", "40s")
        asked |= {f"g{n}.expr": query, f"g{n}.tab": "0", f"g{n}.range_input": f"{_MINUTES}m", f"g{n}.stacked": str(int(stacked))}
    return asked


@contextlib.contextmanager
def _monitored(scene: Scene) -> Iterator[str]:
    command = (CONDUCTOR, "monitor", "--json", "--prometheus-port", "0", "--config", str(scene.config))
    with subprocess.Popen(command, env=scene.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = "".join(iter(process.stdout.readline, "}\n"))
            yield json.loads(said + "}")["prometheus_url"]
        finally:
            process.send_signal(signal.SIGINT)
