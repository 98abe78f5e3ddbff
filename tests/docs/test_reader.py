"""The reader is told when a page does not keep its word; without a conductor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import reader as readers
from tests.support.reader import Failed, Reader, Sight
from tests.support.snippets import blocks

Read = Callable[[str], None]


@pytest.fixture
def read(tmp_path: Path) -> Iterator[Read]:
    """Read a page to its end."""
    begun: list[Reader] = []

    def read(page: str) -> None:
        found = blocks(page, "page.md")
        begun.append(Reader(found, tmp_path))
        for block in found:
            begun[-1].read(block)

    yield read
    for reader in begun:
        reader.close()


def sh(*lines: str) -> str:
    return "\n".join(["```sh", *lines, "```", ""])


def test_what_a_command_changes_the_next_one_finds(read: Read) -> None:
    page = sh(". .venv/bin/activate", "mkdir here && cd here", "export A='x  y'", "twice() { echo $1$1; }", "B=z")
    checks = ('[ "$A$B" = "x  yz" ]', '[ "${PWD##*/}" = here ]', "[ $(twice o) = oo ]", '[ -n "$VIRTUAL_ENV" ]')
    read(f"{page}\ntext\n\n{sh(*checks)}")


def test_a_command_that_ends_otherwise_than_told_is_named_with_what_it_said(read: Read) -> None:
    with pytest.raises(Failed, match=r"(?s)^page\.md:3: echo why; false.*exit code 1 instead of 0:\nwhy\n$"):
        read(sh("(exit 3)    # exit code 3", "echo why; false"))


def test_a_command_that_was_to_fail_and_does_not_is_a_failure(read: Read) -> None:
    with pytest.raises(Failed, match="exit code 0 instead of 3"):
        read(sh("true    # exit code 3"))


def test_a_traceback_is_a_failure_whatever_the_exit_code(read: Read) -> None:
    with pytest.raises(Failed, match="it shows a traceback"):
        read(sh("python -c 'raise SystemError' || true"))


def test_what_follows_a_failure_is_not_tried(read: Read, tmp_path: Path) -> None:
    found = blocks(sh("false") + "\n" + sh("touch made"), "page.md")
    (tmp_path / "own").mkdir()
    reader = Reader(found, tmp_path / "own")
    with pytest.raises(Failed, match="exit code 1"):
        reader.read(found[0])
    with pytest.raises(Failed, match=r"^page\.md:5: not tried, because page\.md:1 failed$"):
        reader.read(found[1])
    reader.close()


def test_a_program_goes_on_where_the_block_before_ended_and_is_named_by_its_lines(read: Read) -> None:
    begun = "```python\nmade = [1]\nprint('no line end', end='')\n```\n"
    why = r'(?s)^page\.md:6: the program ended with 1:.*File "page\.md", line 8.*AssertionError: \[1, 2\]'
    with pytest.raises(Failed, match=why):
        read(f"{begun}<!-- snippet: continues -->\n```python\nmade.append(2)\nassert not made, made\n```\n")


def test_another_program_knows_nothing_of_the_one_before(read: Read) -> None:
    with pytest.raises(Failed, match="NameError: name 'made' is not defined"):
        read("```python\nmade = 1\n```\n```python\nprint(made)\n```\n")


def test_a_program_that_does_not_end_well_is_a_failure(read: Read) -> None:
    with pytest.raises(Failed, match="the program's end was 3"):
        read("```python\nimport atexit, os\natexit.register(os._exit, 3)\n```\n")


def test_a_file_of_the_page_is_there_and_nothing_is_written_to_the_checkout(read: Read) -> None:
    wants = sh("grep -q threads small.yaml", "echo > docs/made", "ls models/coder.gguf")
    read(f"```yaml\n# small.yaml\nthreads: 1\n```\n{wants}")
    assert not Path(readers.ROOT, "docs", "made").exists()


def test_a_make_target_that_is_not_there_is_a_failure(read: Read) -> None:
    with pytest.raises(Failed, match=r"(?s)make nothing-like-it.*No rule"):
        read(sh("make test", "make help", "make nothing-like-it"))


def test_what_sits_in_the_terminal_is_seen_and_ended(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "import time; print('ready', input('> ')); time.sleep(60)"
    monkeypatch.setitem(readers.SIGHTS, "python -c", Sight("ready x", begins="> ", says="x\n"))
    with pytest.raises(Failed, match=re.compile(r"it ended with -2:.*KeyboardInterrupt", re.DOTALL)):
        read(sh(f'python -c "{prompt}"'))


def test_what_sits_in_the_terminal_and_never_shows_it_is_a_failure(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(readers.SIGHTS, "echo other", Sight("a word"))
    with pytest.raises(Failed, match=r"(?s)it did not show 'a word':\nother\n"):
        read(sh("echo other"))
