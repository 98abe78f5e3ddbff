"""What serves the board's page and tells browsers the news. Only looks, and can change nothing.

Served with aiohttp, which Ray's dashboard brings along already: no other dependency, and server-sent events are a response that
does not end. The page is hand-written files in `board_assets`, with nothing to build and nothing fetched from elsewhere.

Whoever can reach this machine's loopback sees it: agents' names, models' paths and figures, never a prompt or an answer. Another
address has to be asked for, and is then guarded by a token in the page's address. Agents choose their names, so nothing they
chose becomes HTML: the page is static, data comes as JSON and goes into text nodes, and the headers forbid everything else.

See also: `board`, the command; `watch`, which looks at the conductor once for all browsers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aiohttp import web

from conductor.errors import ServiceFailed
from pipelines.console import err, out
from pipelines.watch import Watch

_ASSETS = Path(__file__).with_name("board_assets")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
#: looks a second are worth their trouble while somebody watches; for the past of the charts fewer do
_UNWATCHED_S = 2.0
_SIGN_OF_LIFE_S = 3.0
_END_WITHIN_S = 1.0
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Board:
    """`token`: what its address begins with; empty where only this machine can reach it."""

    def __init__(self, watch: Watch, *, interval_s: float, token: str = "") -> None:
        self._watch, self._interval_s, self._token = watch, interval_s, token
        self._assets = {path.name: path.read_bytes() for path in sorted(_ASSETS.iterdir()) if path.suffix in _TYPES}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="watch")
        self._looked = asyncio.Condition()
        self._looks = self._watchers = 0
        self._somebody = asyncio.Event()
        self._closing = False

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        prefix = f"/{self._token}" if self._token else ""
        app.add_routes(
            [
                web.get(f"{prefix}/", self._page),
                web.get(f"{prefix}/events", self._events),
                web.get(f"{prefix}/{{name}}", self._asset),
            ]
        )
        app.on_response_prepare.append(_add_headers)
        return app

    async def run(self) -> None:
        """Look at the conductor, again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        while not self._closing:  # a cancellation may be lost in wait_for before Python 3.12
            await loop.run_in_executor(self._thread, self._watch.look)
            await self._tell()
            if self._watchers:
                await asyncio.sleep(self._interval_s)
                continue
            self._somebody.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._somebody.wait(), max(self._interval_s, _UNWATCHED_S))

    async def close(self) -> None:
        """End the streams of those who watch, and the look that is under way: who made the watch may close it then."""
        self.stop()
        await self._tell()
        ended = asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
        _, late = await asyncio.wait([ended], timeout=_END_WITHIN_S)
        if late:
            self._watch.interrupt()
        await ended

    def stop(self) -> None:
        self._closing = True

    async def _tell(self) -> None:
        async with self._looked:
            self._looks += 1
            self._looked.notify_all()

    # --- requests ---------------------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """By its token or, without one, by name: a page elsewhere may have its own name lead here (DNS rebinding)."""
        said = request.path.split("/")[1]
        if self._token and not hmac.compare_digest(said.encode(), self._token.encode()):
            raise web.HTTPForbidden(text="This board's address has a token in it, which `conductor board` prints.\n")
        if not self._token and not is_loopback(_host_of(request.host)):
            raise web.HTTPForbidden(text="This board is for this machine only: open it as http://127.0.0.1 or localhost.\n")
        return await handler(request)

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return self._file("index.html")

    async def _asset(self, request: web.Request) -> web.StreamResponse:
        return self._file(request.match_info["name"])

    def _file(self, name: str) -> web.StreamResponse:
        if name not in self._assets:
            raise web.HTTPNotFound
        return web.Response(body=self._assets[name], content_type=_TYPES[Path(name).suffix], charset="utf-8")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """All there is at first, then what is new after each look. A reader that is slow gets fewer and larger pieces."""
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        await stream.prepare(request)
        self._watchers += 1
        self._somebody.set()
        teller, looks = Teller(self._watch), 0
        try:
            while not self._closing:
                with contextlib.suppress(asyncio.TimeoutError):  # a look may take long: the browser is to know that we live
                    await asyncio.wait_for(self._news_after(looks), _SIGN_OF_LIFE_S)
                looks = self._looks
                await stream.write(f"data: {json.dumps(teller.news(), allow_nan=False)}\n\n".encode())
        except ConnectionResetError:
            pass  # the browser has gone
        finally:
            self._watchers -= 1
        return stream

    async def _news_after(self, looks: int) -> None:
        async with self._looked:
            while self._looks == looks and not self._closing:
                await self._looked.wait()


class Teller:
    """What one browser has not been told yet."""

    def __init__(self, watch: Watch) -> None:
        self._watch, self._run, self._entry, self._sample_at = watch, -1, 0, -1.0

    def news(self) -> Mapping[str, object]:
        view = self._watch.view
        anew = self._run != view.run
        if anew:
            self._run, self._entry, self._sample_at = view.run, 0, -1.0
        entries = [entry for entry in view.entries if entry.number > self._entry]
        samples = [sample for sample in view.samples if sample.at_s > self._sample_at]
        self._entry = entries[-1].number if entries else self._entry
        self._sample_at = samples[-1].at_s if samples else self._sample_at
        return {
            "anew": anew,
            "problem": view.problem,
            "status": view.status.to_json() if view.status else None,
            "tokens_per_s": view.tokens_per_s,
            "entries": [entry.to_json() for entry in entries],
            "samples": [[sample.at_s, sample.tokens_per_s] for sample in samples],
        }


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(header: str) -> str:
    """The host of `host:port` or `[address]:port`."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]


# --- serving it ---------------------------------------------------------------------------------------------------------


def serve(watch: Watch, host: str, port: int, interval_s: float) -> None:
    """Until it is interrupted. Raises ServiceFailed."""
    asyncio.run(_serve(watch, host, port, interval_s))


async def _serve(watch: Watch, host: str, port: int, interval_s: float) -> None:
    stop = _interruption()
    token = "" if is_loopback(host) else secrets.token_urlsafe(24)
    board = Board(watch, interval_s=interval_s, token=token)
    runner = web.AppRunner(board.app(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ServiceFailed(f"the board cannot be served at {host}:{port}: {error.strerror or error}") from None
        _announce(host, runner.addresses[0][1], token)
        looking = asyncio.create_task(board.run())
        looking.add_done_callback(lambda _: stop.set())  # it ends by itself with an error only
        await stop.wait()
        board.stop()
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking
    finally:
        await board.close()
        await runner.cleanup()


def _announce(host: str, port: int, token: str) -> None:
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    name = f"[{name}]" if ":" in name else name
    path = f"{token}/" if token else ""
    out.print(f"board at http://{name}:{port}/{path}", markup=False, soft_wrap=True)
    if token:
        err.print("whoever has this address sees the board; it is not encrypted", style="yellow")


def _interruption() -> asyncio.Event:
    """Set at Ctrl-C or SIGTERM from now on."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop
