"""The documents against the code: the configuration's page, the ways out of every error, and links that lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

from conductor import errors
from conductor.config import Config
from conductor.errors import ConductorError, RefusalCode
from pipelines.console import Exit

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

_FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(`+).+?\1")
_LINK = re.compile(r'\]\(([^)\s]+)[^)]*\)|(?:src|href)="([^"]+)"')
_HEADING = re.compile(r"^(#{1,6}) +(.+?) *#*$", re.MULTILINE)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_configuration", DOCS / "make_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the configuration --------------------------------------------------------------------------------------------------


def test_the_page_of_the_configuration_is_what_the_code_says_today(generator: ModuleType) -> None:
    assert (DOCS / "configuration.md").read_text("utf-8") == generator.page(), "run python docs/make_configuration.py"


def test_the_page_of_the_configuration_has_a_row_for_each_option(generator: ModuleType) -> None:
    rows = re.findall(r"^\| `(\w+)` \|", generator.page(), re.MULTILINE)
    schema = Config.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    nested = [key for section in sections for key, option in section["properties"].items() if "$ref" in option or key == "models"]
    assert sorted([*rows, *nested]) == sorted(key for section in sections for key in section["properties"])


# --- operating ----------------------------------------------------------------------------------------------------------


def part(page: str, heading: str) -> str:
    """What stands under a heading of the page, its subheadings' parts included."""
    found = re.search(rf"^(#+) {re.escape(heading)}$(.*?)(?=^#{{1,2}} |\Z)", page, re.DOTALL | re.MULTILINE)
    assert found, f"no heading {heading!r}"
    return found[2]


@pytest.fixture(scope="module")
def operating() -> str:
    return _FENCED.sub("", (DOCS / "operating.md").read_text("utf-8"))


def test_there_is_a_way_out_of_each_refusal(operating: str) -> None:
    told = re.findall(r"^### `(\w+)`", part(operating, "Troubleshooting by refusal code"), re.MULTILINE)
    assert told == [code.value for code in RefusalCode]


def test_there_is_a_way_out_of_each_error(operating: str) -> None:
    told = re.findall(r"^\| `(\w+)` \|", part(operating, "Troubleshooting by error"), re.MULTILINE)
    raised = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ConductorError)]
    assert sorted(told) == sorted(raised)


def test_each_exit_code_is_told(operating: str) -> None:
    told = re.findall(r"^\| (\d+) \|", part(operating, "Exit codes"), re.MULTILINE)
    assert told == [*(str(code.value) for code in Exit), "130"]


# --- links --------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as both GitHub and mkdocs make them; a heading that they would name differently has none."""
    found: list[str] = []
    for _, heading in _HEADING.findall(_FENCED.sub("", page.read_text("utf-8"))):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        kept = re.sub(r"[^\w\s-]", "", text).strip().lower()
        on_github, in_mkdocs = re.sub(r"\s", "-", kept), re.sub(r"[-\s]+", "-", kept)
        found += [on_github] if on_github == in_mkdocs and on_github.isascii() else []
    return {anchor for anchor in found if found.count(anchor) == 1}


def dead_links(page: Path, *, root: Path = ROOT) -> list[str]:
    """Relative ones that lead to no file or heading below `root`."""
    prose = _CODE.sub("", _FENCED.sub("", page.read_text("utf-8")))
    dead = []
    for markdown, html in _LINK.findall(prose):
        target = unquote(markdown or html)
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        leads = there.exists() and there.is_relative_to(root) and not path.startswith("/")
        if not leads or (anchor and (there.suffix != ".md" or anchor not in anchors(there))):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `word` of two\n## Twice\n## Twice\n```text\n# no heading\n```\n")
    (tmp_path / "page.md").write_text(
        "[a](other.md#one-word-of-two) [`b`](gone.md) [c](other.md#one-word) [d](other.md#twice) [e](#here) ![f](gone.png)\n"
        "[g](https://elsewhere.example/x) [h](other.md#no-heading) `[i](code.md)` [![j](also-gone.png)](other.md)\n"
        "```text\n[k](fenced.md)\n```\n# Here\n"
    )
    gone = ["gone.md", "other.md#one-word", "other.md#twice", "gone.png", "other.md#no-heading", "also-gone.png"]
    assert dead_links(tmp_path / "page.md", root=tmp_path) == gone
