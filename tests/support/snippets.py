"""Code blocks of Markdown pages: what language they are in, what is to be done with each, and what is wrong in how it is written.

A fence says its language, and a comment right before it what else there is to know:

    <!-- snippet: skip REASON -->    cannot run where tests run
    <!-- snippet: continues -->      goes on with the Python program of the block before
    <!-- snippet: pipeline -->       YAML of a pipeline; without it, YAML is a configuration

YAML whose first line is a comment with a file's name, `# small.yaml`, is that file for the page's commands. `exit code N` in a
command's comment is what it is expected to end with. See also: `reader`, which runs them.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import yaml
from markdown_it import MarkdownIt

from conductor.config import UniqueKeyLoader, parse_config
from pipelines.library import files

LANGUAGES = ("sh", "python", "yaml", "json", "text")
ORDERS = {"skip": ("sh", "python"), "continues": ("python",), "pipeline": ("yaml",)}

_ORDER = re.compile(r"<!--\s*snippet:\s*(\w*)\s*(.*?)\s*-->\s*")
_FILE = re.compile(r"#\s*([\w-]+\.ya?ml)\b")
_EXIT_CODE = re.compile(r"#[^#]*\bexit code (\d+)\b[^#]*$")


class WrongSnippet(Exception):
    """A block that nobody could run or believe, with its page and line."""


@dataclass(frozen=True, slots=True)
class Block:
    page: str
    line: int  #: of the fence
    language: str  #: empty: it says none, or is indented instead of fenced
    text: str
    order: str = ""  #: one of ORDERS, or what the page has instead
    reason: str = ""  #: to skip it

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python")

    @property
    def file(self) -> str | None:
        """The name of the file that it is."""
        named = _FILE.match(self.text) if self.language == "yaml" else None
        return named[1] if named else None


@dataclass(frozen=True, slots=True)
class _Said:
    """A comment that waits for its block."""

    line: int = 0
    order: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    line: int
    text: str
    exit_code: int


def blocks(markdown: str, page: str) -> list[Block]:
    """In their order; `check` says what is wrong with them."""
    found: list[Block] = []
    said = _Said()
    for token in MarkdownIt("commonmark").parse(markdown):
        line = (token.map or [0])[0] + 1
        if token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else ""
            found.append(Block(page, line, language, token.content, said.order, said.reason))
        elif said.order:
            found.append(Block(page, said.line, "", "", said.order))
        said = _Said()
        if token.type == "html_block" and "snippet" in token.content:
            told = _ORDER.fullmatch(token.content)
            said = _Said(line, told[1], told[2]) if told else _Said(line, token.content.strip())
    return [*found, Block(page, said.line, "", "", said.order)] if said.order else found


def commands(block: Block) -> list[Command]:
    """Of a `sh` block: one in each line, or in several that end with a backslash."""
    found: list[Command] = []
    text, began = "", 0
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        began = began if text else number
        text += line.strip()
        if text.endswith("\\"):
            text = text[:-1]
            continue
        if text and not text.startswith("#"):
            expected = _EXIT_CODE.search(text)
            found.append(Command(began, text, int(expected[1]) if expected else 0))
        text = ""
    return found


def check(block: Block, *, before: Block | None) -> None:
    """That it is what it says it is; `before` is the page's Python block before it. Raises WrongSnippet."""
    try:
        if block.order and block.order not in ORDERS:
            raise ValueError(f"{block.order!r} is none of {', '.join(ORDERS)}")
        if block.language not in LANGUAGES:
            raise ValueError(f"a block is fenced and says its language, one of {', '.join(LANGUAGES)}")
        if block.order and block.language not in ORDERS[block.order]:
            raise ValueError(f"{block.order!r} is nothing for a block of {block.language}")
        if block.order == "continues" and (before is None or before.order == "skip"):
            raise ValueError("there is no Python before it that it could continue")
        if (block.order == "skip") != bool(block.reason):
            raise ValueError("skip, and nothing else, has a reason")
        _CHECKS[block.language](block)
    except Exception as error:
        raise WrongSnippet(f"{block.place}: {error}") from error


def _check_sh(block: Block) -> None:
    known = commands(block)
    if not known:
        raise ValueError("there is no command in it")
    for command in known:
        if command.text.startswith(("$ ", "> ", ">>> ")):
            raise ValueError(f"a command has no prompt: {command.text}")
        checked = subprocess.run(["bash", "-n", "-c", command.text], capture_output=True, text=True, check=False)
        if checked.returncode:
            raise ValueError(f"{command.text}: {checked.stderr.strip()}")


def _check_python(block: Block) -> None:
    compile(block.text, block.place, "exec")


def _check_json(block: Block) -> None:
    json.loads(block.text)


def _check_yaml(block: Block) -> None:
    if block.order == "pipeline":
        files.parse(block.text, source=block.place, name="documented")
    else:
        document = yaml.load(block.text, Loader=UniqueKeyLoader)
        parse_config(document, source=block.place, directory=Path("/"))


_CHECKS = {"sh": _check_sh, "python": _check_python, "json": _check_json, "yaml": _check_yaml, "text": lambda block: None}
