"""Headless Chromium as tests drive it: over its DevTools protocol, with the aiohttp that is there anyway.

Nothing is downloaded: it is this machine's browser ($CHROMIUM, or one on the path); without one, tests are skipped with a reason.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.eventually import eventually

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_QUIET = (
    "--headless=new", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--mute-audio",
    "--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-port=0",
)  # fmt: skip
_STARTS_WITHIN_S = 60.0


def path() -> str | None:
    """Where Chromium is, if it is anywhere."""
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """A page. `complaints`: what its console had to say, and what was refused to it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        self.requested: list[str] = []  #: every address that the page asked for
        self._listening = asyncio.create_task(self._listen())

    async def close(self) -> None:
        self._listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._listening
        await self._socket.close()

    async def _listen(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if (answer := self._answers.pop(said.get("id", 0), None)) is not None:
                answer.set_result(said)
            else:
                self._note(said.get("method"), said.get("params", {}))

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(argument.get("value")) for argument in params["args"]))
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        id = next(self._ids)
        answer = self._answers[id] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": id, "method": method, "params": params})
        said = await asyncio.wait_for(answer, 60)
        assert "error" not in said, f"{method}: {said['error']}"
        return dict(said["result"])

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")
        await self.send("Page.navigate", url=url)

    async def js(self, expression: str) -> Any:
        """The value of an expression; AssertionError if it throws."""
        said = await self._evaluate(expression)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    async def _evaluate(self, expression: str) -> dict[str, Any]:
        return await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)

    async def until(self, expression: str, within_s: float = 30.0) -> Any:
        """The first truthy value of an expression, which may throw before; AssertionError with what the page says."""
        deadline = time.monotonic() + within_s
        while "exceptionDetails" in (said := await self._evaluate(expression)) or not (value := said["result"].get("value")):
            if time.monotonic() > deadline:
                text = await self.js("document.body?.innerText ?? ''")
                raise AssertionError(f"not within {within_s} s: {expression}\n{self.complaints}\n{text[:3000]}")
            await asyncio.sleep(0.05)
        return value

    async def press(self, key: str, *, shift: bool = False) -> None:
        said = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": 8 if shift else 0}
        down = {"type": "keyDown", "text": "\r"} if key == "Enter" else {"type": "rawKeyDown"}
        await self.send("Input.dispatchKeyEvent", **said, **down)
        await self.send("Input.dispatchKeyEvent", **said, type="keyUp")

    async def emulate(self, *, dark: bool = False, still: bool = True) -> None:
        features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce" if still else ""}
        await self.send("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in features.items()])

    async def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone
        )

    async def screenshot(self, *, whole: bool = False) -> bytes:
        return base64.b64decode((await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole))["data"])


_KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}


@contextlib.contextmanager
def _browser() -> Iterator[int]:
    """Its port. The browser and its files are gone at the end."""
    program = path()
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()  # Chromium's does not work for root
        command = (program, *_QUIET, *sandbox, f"--user-data-dir={profile}", "about:blank")
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                yield eventually(lambda: _port(Path(profile) / "DevToolsActivePort"), _STARTS_WITHIN_S)
            finally:
                process.terminate()
                process.wait(30)


def _port(file: Path) -> int | None:
    lines = file.read_text().splitlines() if file.exists() else []
    return int(lines[0]) if lines else None


@contextlib.asynccontextmanager
async def tab() -> AsyncIterator[Tab]:
    """A browser of its own with one empty page."""
    with _browser() as port:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                [page] = [target for target in await response.json() if target["type"] == "page"]
            opened = Tab(await session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0))
            try:
                yield opened
            finally:
                await opened.close()
