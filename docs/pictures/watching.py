"""Those who look on: the board in a browser, `top` in a terminal, a status in a notebook's cell."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from pictures.company import Scene, short_of_room
from pictures.files import draw, photograph

from conductor import notebook
from pipelines.top import frame
from pipelines.watch import Watch
from tests.support.chromium import tab
from tests.support.shell import CONDUCTOR

_WIDTH, _CELL_WIDTH = 1200, 800
_TOP = (108, 34)
_LOOKS_FOR_S = 20.0
_AS_JUPYTER = "font:13px/1.4 system-ui,sans-serif;margin:0;padding:12px 16px"


async def board(scene: Scene, path: Path) -> None:
    """From the top to where models' paths begin: they are this machine's."""
    with _served(scene) as url:
        async with tab() as page:
            await page.resize(_WIDTH, 1000)
            await page.emulate()
            await page.open(url)
            await page.until("document.querySelector('#connection').textContent === 'live'")
            await page.js("document.querySelector('#range input').click()")
            await page.js("document.getElementById('history').style.maxHeight = '20rem'")
            await page.js("document.querySelector('#filter [value=pools]').click()")
            await asyncio.sleep(_LOOKS_FOR_S)
            with short_of_room(scene.conductor):
                await page.until("!document.querySelector('#waiting table').hidden")
                await asyncio.sleep(3)
                models = "document.getElementById('models').closest('section')"
                height = await page.js(f"{models}.getBoundingClientRect().top + scrollY")
                await page.resize(_WIDTH, int(height))
                await asyncio.sleep(1)
                await photograph(page, path)
            assert page.complaints == [], page.complaints


@contextlib.contextmanager
def _served(scene: Scene) -> Iterator[str]:
    command = (CONDUCTOR, "board", "--port", "0", "--config", str(scene.config))
    with subprocess.Popen(command, env=scene.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.send_signal(signal.SIGINT)


async def top(scene: Scene, path: Path) -> None:
    width, height = _TOP
    with Watch(scene.config) as watch, short_of_room(scene.conductor):
        until = time.monotonic() + _LOOKS_FOR_S / 2
        while time.monotonic() < until:
            watch.look()
            await asyncio.sleep(0.3)
        draw(frame(watch.view, width, height), path, width=width)


async def status(scene: Scene, path: Path) -> None:
    """A status as a notebook shows it."""
    await asyncio.sleep(_LOOKS_FOR_S / 2)
    scene.conductor.call("mirrored")
    html = notebook.show(scene.conductor.status()).html
    async with tab() as page:
        await page.resize(_CELL_WIDTH, 1000)
        await page.emulate()
        await page.open("about:blank")
        await page.js(f"document.body.innerHTML = {json.dumps(html)}")
        await page.js(f"document.body.style.cssText = {json.dumps(_AS_JUPYTER)}")
        height = await page.js("document.body.lastElementChild.getBoundingClientRect().bottom")
        await photograph(page, path, (0, 0, _CELL_WIDTH, int(height)))
