"""Ray's own dashboard in Chromium: the actors' page, and the placement groups that repeat the ledger."""

from __future__ import annotations

import asyncio
from pathlib import Path

import ray
from pictures.company import AGENTS, Scene
from pictures.files import photograph

from tests.support.chromium import Tab, tab

_WIDTH, _HEIGHT = 1400, 3200
_MARGIN = 16  #: of the page around its table
_SETTLES_S = 2.0
_LEFT_OF = "[...{table}.querySelectorAll('th')].find(th => th.innerText === '{column}').getBoundingClientRect().left"


async def actors(scene: Scene, path: Path) -> None:
    """As far down and to the right as it tells of them, and not of where they run."""
    async with tab() as page:
        await _open(page, f"{scene.dashboard_url}/#/actors")
        await page.until(f"document.querySelectorAll('tbody tr').length === {len(AGENTS) + 1}")
        await page.until("!document.querySelector('tbody').innerText.includes('ffffffff')")  # no id yet, on a busy machine
        await asyncio.sleep(_SETTLES_S)
        width = int(await page.js(_LEFT_OF.format(table="document", column="Job ID"))) + _MARGIN
        await page.resize(width, _HEIGHT)  # the page's head is as wide, the table ends in the middle
        await asyncio.sleep(_SETTLES_S)
        bottom = await page.js("document.querySelector('tbody').getBoundingClientRect().bottom")
        await photograph(page, path, (0, 0, width, int(bottom)))


async def placement_groups(scene: Scene, path: Path) -> None:
    """Their table on the job's page, those that were removed left out by its own filter."""
    async with tab() as page:
        await _open(page, f"{scene.dashboard_url}/#/jobs/{ray.get_runtime_context().get_job_id()}")
        await page.until("""(() => {
            const title = [...document.querySelectorAll('h4')].find(h => h.innerText === 'Placement Group Table')
            window.section = title.parentElement.parentElement
            title.click()
            return true
        })()""")
        await page.until("section.querySelector('tbody tr') !== null")
        await page.js("""(() => {
            const label = [...section.querySelectorAll('label')].find(label => label.innerText === 'State')
            document.getElementById(label.htmlFor).focus()
        })()""")
        await page.send("Input.insertText", text="CREATED")
        await page.until("document.querySelector('[role=option]').click() ?? true")
        await page.until("[...section.querySelectorAll('tbody tr')].every(row => row.innerText.includes('CREATED'))")
        await asyncio.sleep(_SETTLES_S)
        left, top = await page.js("(box => [box.left, box.top])(section.getBoundingClientRect())")
        right = await page.js(_LEFT_OF.format(table="section", column="Label Selector"))
        bottom = await page.js("section.querySelector('tbody').getBoundingClientRect().bottom")
        await photograph(page, path, (int(left), int(top), int(right), int(bottom)))


async def _open(page: Tab, url: str) -> None:
    await page.resize(_WIDTH, _HEIGHT)
    await page.emulate()
    await page.open(url)
