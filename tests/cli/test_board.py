"""The board's server: who is let in, what it says to browsers, and that nothing on its page comes from elsewhere."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from conductor.happenings import Happening, HistoryEntry
from pipelines import board_server as pipeline
from pipelines.board_server import Board, Teller, is_loopback
from pipelines.watch import Sample, View
from tests.support.shell import Shell
from tests.support.views import STATUS

TOKEN = "sesame"
Serve = Callable[..., Any]


class Watched:
    """A watch that sees what it is shown."""

    def __init__(self, view: View) -> None:
        self.view = view

    def look(self) -> None:
        pass


def entry(number: int) -> HistoryEntry:
    return HistoryEntry(number, number / 10, Happening.REFUSED, "<b>", None, 5, None, "<script>alert(1)</script>")


def view(*, entries: int = 0, samples: int = 0, run: int = 1) -> View:
    happened = tuple(entry(number + 1) for number in range(entries))
    return View(STATUS, "", run, happened, tuple(Sample(float(n), 2.0, n) for n in range(samples)))


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve(token=…)`: a client of a board that looks at a view."""
    running: list[tuple[Board, TestClient[Any, Any], asyncio.Task[None]]] = []

    async def begin(*, token: str = "", shows: View | None = None) -> TestClient[Any, Any]:
        board = Board(Watched(shows or view()), interval_s=0.01, token=token)  # type: ignore[arg-type]
        client = TestClient(TestServer(board.app()))
        await client.start_server()
        running.append((board, client, asyncio.create_task(board.run())))
        return client

    yield begin
    for board, client, looking in running:
        looking.cancel()
        await asyncio.wait([looking])
        await board.close()
        await client.close()


class Stuck(Watched):
    """A watch whose look does not end by itself."""

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self.looks, self.interrupted = threading.Event(), threading.Event()

    def look(self) -> None:
        self.looks.set()
        assert self.interrupted.wait(30)

    def interrupt(self) -> None:
        self.interrupted.set()


async def test_a_look_that_does_not_end_is_interrupted_before_the_board_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_END_WITHIN_S", 0.01)
    stuck = Stuck(view())
    board = Board(stuck, interval_s=0.01)  # type: ignore[arg-type]
    looking = asyncio.create_task(board.run())
    await asyncio.to_thread(stuck.looks.wait)
    looking.cancel()
    await board.close()
    assert stuck.interrupted.is_set()


# --- who is let in ------------------------------------------------------------------------------------------------------


async def test_on_this_machine_the_page_and_all_that_it_asks_for_is_there(serve: Serve) -> None:
    client = await serve()
    page = await (await client.get("/")).text()
    linked = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert {"board.css", "board.js", "icon.svg"} <= set(linked)
    for name in linked:
        answer = await client.get(f"/{name}")
        assert answer.status == 200
        for needed in re.findall(r'from "\./([^"]+)"', await answer.text()):
            assert (await client.get(f"/{needed}")).status == 200


async def test_a_page_elsewhere_that_leads_its_own_name_here_is_refused(serve: Serve) -> None:
    client = await serve()
    for host, status in (
        ("evil.example", 403),
        ("evil.example:80", 403),
        ("localhost:1", 200),
        ("[::1]:80", 200),
        ("127.0.0.1", 200),
    ):
        for path in ("/", "/board.js"):
            assert (await client.get(path, headers={"Host": host})).status == status
    assert (await client.get("/events", headers={"Host": "evil.example"})).status == 403


async def test_with_a_token_nothing_is_told_without_it(serve: Serve) -> None:
    client = await serve(token=TOKEN)
    for path in ("/", "/events", "/board.js", "/sesam/", "/sesamee/", "/%73esame2/", f"/x/{TOKEN}/"):
        answer = await client.get(path)
        assert answer.status == 403, path
        assert TOKEN not in await answer.text()
    for path in ("/", "/board.js"):
        assert (await client.get(f"/{TOKEN}{path}", headers={"Host": "gpu-box.example"})).status == 200


async def test_what_is_not_of_the_page_is_not_there_and_nothing_can_be_sent(serve: Serve) -> None:
    client = await serve()
    for path in ("/board.py", "/../board.py", "/%2e%2e/board.py", "/etc/passwd", "/index"):
        assert (await client.get(path)).status == 404, path
    for call in (client.post, client.put, client.delete):
        assert (await call("/")).status == 405


@pytest.mark.parametrize(
    ("host", "only_this_machine"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("LOCALHOST", True),
     ("0.0.0.0", False), ("::", False), ("192.168.0.1", False), ("localhost.evil.example", False), ("", False)],
)  # fmt: skip
def test_only_loopback_is_taken_for_this_machine(host: str, only_this_machine: bool) -> None:
    assert is_loopback(host) is only_this_machine


def test_an_address_for_others_is_told_with_its_token_and_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline._announce("0.0.0.0", 80, TOKEN)
    said = capsys.readouterr()
    assert re.fullmatch(rf"board at http://\S+:80/{TOKEN}/\n", said.out)
    assert "0.0.0.0" not in said.out
    assert "not encrypted" in said.err


# --- what browsers are told -----------------------------------------------------------------------------------------------


async def test_every_answer_forbids_scripts_and_resources_of_others(serve: Serve) -> None:
    client = await serve()
    for path in ("/", "/board.js", "/nothing"):
        headers = (await client.get(path)).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")


def test_the_page_is_whole_in_itself_and_makes_no_html_of_data() -> None:
    assets = sorted(Path(pipeline._ASSETS).iterdir())
    assert {path.suffix for path in assets} == {".html", ".css", ".js", ".svg"}
    for path in assets:
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.[a-z]|@import|url\(", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|\bsrcdoc\b", text), (
            path.name
        )
    page = next(path for path in assets if path.suffix == ".html").read_text("utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=)", page)


async def test_a_stream_begins_with_all_there_is_and_goes_on_with_what_is_new(serve: Serve) -> None:
    client = await serve(shows=view(entries=3, samples=2))
    async with client.get("/events") as stream:
        assert stream.headers["Content-Type"] == "text/event-stream"
        told = [await next_message(stream) for _ in range(3)]
    assert [len(message["entries"]) for message in told] == [3, 0, 0]
    assert [message["anew"] for message in told] == [True, False, False]
    assert told[0]["status"]["agents"][0]["id"] == STATUS.agents[0].id
    assert told[0]["entries"][0]["text"] == "<script>alert(1)</script>"
    assert told[0]["samples"] == [[0.0, 2.0], [1.0, 2.0]]


async def next_message(stream: aiohttp.ClientResponse) -> Any:
    line = await asyncio.wait_for(stream.content.readline(), 10)
    await stream.content.readline()
    return json.loads(line.decode().removeprefix("data: "))


def test_a_slow_browser_misses_nothing_and_another_conductor_begins_anew() -> None:
    watched = Watched(view(entries=2))
    teller = Teller(watched)  # type: ignore[arg-type]
    assert [len(teller.news()["entries"]) for _ in range(2)] == [2, 0]  # type: ignore[arg-type]
    watched.view = view(entries=50)
    assert len(teller.news()["entries"]) == 48  # type: ignore[arg-type]
    watched.view = view(entries=1, run=2)
    again = teller.news()
    assert (again["anew"], len(again["entries"])) == (True, 1)  # type: ignore[arg-type]
    watched.view = replace(watched.view, problem="no conductor is running")
    assert teller.news()["problem"] == "no conductor is running"


def test_without_a_conductor_there_is_no_board(tmp_path: Path) -> None:
    failed = Shell(tmp_path).conductor("board")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "error: no conductor is running; start one with: conductor up\n"
