"""The documentation as a site, built as `make docs` does: nothing to complain of, and nothing fetched from elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support import chromium
from tests.support.chromium import tab
from tests.support.shell import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install -e '.[docs]'"),
]
_ROUTINE = re.compile(r"INFO +- +(Cleaning site directory|Building documentation to directory|Documentation built in)")
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|icon))[^>]*\bhref=["']?(?:https?:)?//"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built))  # --quiet would hear no warning
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in (said.stdout + said.stderr).splitlines() if not _ROUTINE.match(line)]
    assert (said.returncode, lines) == (0, [])
    return built


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_each_page_is_there_and_asks_nobody_else_for_anything(site: Path) -> None:
    pages = {path.relative_to(site).as_posix(): path.read_text("utf-8") for path in site.rglob("*.html")}
    written = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert written | {"repository/CONTRIBUTING.html", "repository/configs/default.yaml.html"} <= set(pages)
    assert {name: found[0] for name, page in pages.items() if (found := _FETCHED.search(page))} == {}


def test_scripts_and_what_they_are_made_of_are_not_published(site: Path) -> None:
    sources = (".py", ".pyc", ".jinja", ".md")
    assert [path.relative_to(site).as_posix() for path in site.rglob("*") if path.suffix in sources] == []


def test_the_reference_says_what_the_code_says(site: Path) -> None:
    text = (site / "reference" / "types.html").read_text("utf-8")
    assert "tokens of the prompt that had to be decoded" in text  # a comment behind a field
    assert 'href="#conductor.types.FinishReason"' in text  # its type leads to it
    calls = (site / "reference" / "conductor.html").read_text("utf-8")
    assert 'href="errors.html#conductor.errors.AdmissionRefused"' in calls


@pytest.mark.skipif(chromium.path() is None, reason="no Chromium on the path or in $CHROMIUM (Debian: apt install chromium)")
async def test_a_browser_finds_a_word_and_stays_on_this_machine(address: str) -> None:
    async with tab() as page:
        await page.open(f"{address}/index.html?q=AdmissionRefused")
        await page.until("[...document.querySelectorAll('.md-search-result a')].some(a => a.href.includes('errors.html'))")
        await page.open(f"{address}/reference/errors.html")
        await page.until("document.querySelector('.attributes td') !== null")
        assert page.complaints == []
        assert [url for url in page.requested if not url.startswith((address, "data:"))] == []
