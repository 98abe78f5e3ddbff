"""The board in a browser, with a real conductor at work: what happens there is seen here."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import ray
import yaml

from conductor.errors import AdmissionRefused
from tests.support import chromium
from tests.support.chromium import Tab, tab
from tests.support.conducting import Conduct, Conductor, document_of
from tests.support.eventually import eventually
from tests.support.parrot import write_parrot
from tests.support.shell import CONDUCTOR, ROOT, family, survivors

pytestmark = pytest.mark.skipif(
    chromium.path() is None, reason="no Chromium on the path or in $CHROMIUM (Debian: apt install chromium)"
)
WICKED = "<img src=x onerror=window.hurt=1>"
LIVE = "document.querySelector('#connection').textContent === 'live'"


@contextmanager
def served(config: Path, *options: str, warns: str = "") -> Iterator[str]:
    """The address of a board as `conductor board` prints it. In the end it is interrupted, and nothing of it may be left."""
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(ROOT)}
    command = (CONDUCTOR, "board", "--port", "0", "--interval", "0.1", "--config", str(config), *options)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("board at http://"), line
            yield line.split()[-1]
        finally:
            processes = family(process.pid)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (0, warns)
        assert survivors(processes) == []


@pytest.fixture
def company(conduct: Conduct, vram_resource: str, tmp_path: Path, endless: Path) -> tuple[Conductor, Path]:
    """A conductor with two models, of which one fits a pool at a time, and its configuration as a file."""
    models: dict[str, Any] = {"endless": endless, "other": write_parrot(tmp_path / "other.gguf", "klmnop", ends=False)}
    config = tmp_path / "board.yaml"
    config.write_text(yaml.safe_dump(_plain(document_of(vram_resource, tmp_path, models, live_contexts=1))))
    return conduct(models, live_contexts=1), config


def _plain(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "models": {key: {**model, "path": str(model["path"])} for key, model in document["models"].items()}}


async def text_of(page: Tab, id: str) -> str:
    return str(await page.js(f"document.getElementById('{id}').innerText"))


async def sees(page: Tab, id: str, text: str) -> None:
    await page.until(f"document.getElementById('{id}').innerText.includes({text!r})")


async def happened(page: Tab, kind: str) -> None:
    """It is a mark in the timeline and a line below it."""
    await page.until(f"!!document.querySelector('#timeline [data-kind={kind}]')")
    await sees(page, "history", kind.replace("_", " "))


async def test_whatever_the_conductor_does_is_seen_on_the_page(company: tuple[Conductor, Path]) -> None:
    conductor, config = company
    with served(config) as url:
        async with tab() as page:
            await page.emulate()
            await page.open(url)
            await page.until(LIVE)
            await sees(page, "agents", "Nobody is registered.")

            conductor.call("register", "ada", "endless")
            conductor.call("register", WICKED, "other")
            await happened(page, "admitted")
            await sees(page, "agents", "ada")
            await sees(page, "agents", WICKED)  # as it is
            await assert_true_proportions(page, conductor)

            turn = conductor.handle.decode.remote("ada", "abc", max_tokens=100_000, context_shift=True)
            await sees(page, "agents", "in a slot, busy")
            await page.until("parseFloat(document.querySelector('[data-figure=\"tokens per second\"]').textContent) > 0")

            with pytest.raises(AdmissionRefused, match="code=NEVER"):
                conductor.call("register", "huge", "endless", window=200_000, service_class="guaranteed")
            await happened(page, "refused")
            await sees(page, "history", "This device cannot hold it even when empty")
            assert "huge" in await text_of(page, "history")
            assert "huge" in await text_of(page, "announcer")

            waits = conductor.handle.decode.remote(WICKED, "kl", max_tokens=5)
            await sees(page, "waiting", WICKED)
            conductor.call("cancel", "ada")
            ray.get([turn, waits])
            await sees(page, "waiting", "Nobody waits.")
            await happened(page, "swapped_out")
            await happened(page, "turn_ended")

            for agent in ("ada", WICKED):
                conductor.call("unregister", agent)
            await happened(page, "left")
            await sees(page, "agents", "Nobody is registered.")
            assert await page.js("window.hurt === undefined && document.images.length === 0")
            assert page.complaints == []
            assert {address.startswith(url) for address in page.requested} == {True}


async def assert_true_proportions(page: Tab, conductor: Conductor) -> None:
    """Each booking is as wide as its share of the device, to half a pixel."""
    status = conductor.status()
    bookings = {booked.id: booked.bytes for booked in status.ledger.reservations if booked.bytes}
    measure = """(() => {
      const strip = document.querySelector('#bars .strip'), whole = strip.getBoundingClientRect().width;
      const parts = [...strip.querySelectorAll('.part')];
      return {whole, parts: parts.map(p => [p.dataset.key, Number(p.dataset.bytes), p.getBoundingClientRect().width])};
    })()"""
    await page.until(f"document.querySelectorAll('#bars .strip')[0].children.length >= {len(bookings)}")
    seen = await page.js(measure)
    assert {key: size for key, size, _ in seen["parts"] if key in bookings} == bookings
    for key, size, width in seen["parts"]:
        assert abs(width - seen["whole"] * size / status.device.total_bytes) < 0.5, key
    assert sum(size for _, size, _ in seen["parts"]) == status.device.total_bytes


@pytest.mark.slow
async def test_it_can_be_used_by_keyboard_on_a_phone_and_held_still(company: tuple[Conductor, Path]) -> None:
    conductor, config = company
    conductor.call("register", "ada", "endless")
    with served(config) as url:
        async with tab() as page:
            await page.resize(360, 740, phone=True)
            await page.emulate(dark=True)
            await page.open(url)
            await page.until(LIVE)
            await sees(page, "agents", "ada")
            assert await page.js("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"

            reached = []
            for _ in range(30):
                await page.press("Tab")
                reached.append(await page.js("document.activeElement.id || document.activeElement.className"))
                if reached[-1] == "history":
                    break
            assert reached[:2] == ["skip", "pause"]
            assert any(name.startswith("part") for name in reached), reached
            assert reached[-1] == "history"

            await page.js("document.querySelector('#bars .part').focus()")
            first = await text_of(page, "bar-detail")
            await page.press("ArrowRight")
            second = await text_of(page, "bar-detail")
            await page.press("End")
            assert "of the device" in first
            assert len({first, second, await text_of(page, "bar-detail")}) == 3

            await page.js("document.getElementById('pause').focus()")
            await page.press("Enter")
            await sees(page, "connection", "held still")
            conductor.call("register", "bob", "endless")
            await page.js("new Promise(done => setTimeout(done, 500))")  # some looks long: what does not come cannot be awaited
            assert "bob" not in await text_of(page, "agents")
            await page.press("Enter")
            await sees(page, "agents", "bob")
            assert page.complaints == []


@pytest.mark.slow
async def test_a_conductor_that_dies_is_said_and_the_next_one_is_shown(company: tuple[Conductor, Path]) -> None:
    conductor, config = company
    conductor.call("register", "ada", "endless")
    async with tab() as page:
        with served(config) as url:
            await page.open(url)
            await page.until(LIVE)
            await sees(page, "agents", "ada")
            ray.kill(conductor.handle, no_restart=False)
            await sees(page, "banner", "What is shown is old")
            await page.until(LIVE)
            await sees(page, "agents", "Nobody is registered.")
            assert "ada" not in await text_of(page, "history")
            await asyncio.to_thread(eventually, lambda: conductor.call("check") is None, 30)
        await sees(page, "banner", "No word from the board")
        assert await page.js("document.querySelector('#connection').textContent") == "connection lost"


@pytest.mark.slow
async def test_an_address_that_others_can_reach_is_guarded_by_a_token(company: tuple[Conductor, Path]) -> None:
    _, config = company
    warning = "whoever has this address sees the board; it is not encrypted\n"
    with served(config, "--host", "0.0.0.0", warns=warning) as url:
        port, token = url.removesuffix("/").rpartition(":")[2].split("/")
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            for path, status in (("/", 403), ("/events", 403), (f"/{token}/", 200), (f"/{token}/board.js", 200)):
                async with session.get(path) as answer:
                    assert answer.status == status, path
