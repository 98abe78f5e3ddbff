"""Every code block of the README and the documents does what its page says, for somebody who goes through it from the top."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.reader import Reader
from tests.support.shell import ROOT
from tests.support.snippets import Block, blocks, check

PAGES = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "models/README.md", "benchmarks/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]  # fmt: skip
BLOCKS = {page: blocks((ROOT / page).read_text("utf-8"), page) for page in PAGES}

#: all that a block may be left out for
REASONS = {
    "needs an NVIDIA GPU",
    "compiles llama.cpp for minutes",
    "installs packages",
}


@pytest.mark.parametrize("page", PAGES)
def test_each_block_is_what_it_says_it_is(page: str) -> None:
    before: Block | None = None
    for block in BLOCKS[page]:
        check(block, before=before)
        before = block if block.language == "python" else before


def test_a_block_is_skipped_for_a_reason_that_is_known() -> None:
    skipped = {block.place: block.reason for page in PAGES for block in BLOCKS[page] if block.order == "skip"}
    assert {place: reason for place, reason in skipped.items() if reason not in REASONS} == {}
    assert set(skipped.values()) >= REASONS, "a reason that nobody gives"


def marked(block: Block) -> object:
    return pytest.param(block, id=block.place, marks=[] if block.page == "README.md" else [pytest.mark.slow])


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Block], None]]:
    """Read a block: one page after the other, each by a reader of its own."""
    readers: dict[str, Reader] = {}

    def close() -> None:
        if readers:
            readers.popitem()[1].close()

    def read(block: Block) -> None:
        if block.page not in readers:
            close()
            readers[block.page] = Reader(BLOCKS[block.page], tmp_path_factory.mktemp("page"))
        readers[block.page].read(block)

    yield read
    close()


@pytest.mark.parametrize("block", [marked(block) for page in PAGES for block in BLOCKS[page] if block.runs])
def test_it_works_for_whoever_reads_the_page(read: Callable[[Block], None], block: Block) -> None:
    if block.order == "skip":
        pytest.skip(block.reason)
    read(block)
