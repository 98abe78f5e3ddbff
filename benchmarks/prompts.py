"""Prompts that part at their first line, so that no KV of one answer can serve another.

They end within a test case: the models that come with the repository go on from there for hundreds of tokens, where a
function would soon be done and end the turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

_VERBS = ("read", "write", "check", "count", "merge", "split", "find", "sort", "load", "save", "parse")
_NOUNS = ("lines", "words", "files", "paths", "names", "items", "values", "users", "rows", "keys", "dates", "pages", "tests")
_LINES = (
    "import os", "import sys", "import unittest", "from pathlib import Path", "", "LIMIT = 100", "ENCODING = 'utf-8'", "", "",
    "class Error(Exception):", '    """Something went wrong."""', "", "", "def open_text(path):",
    "    return open(path, encoding=ENCODING)", "", "",
)  # fmt: skip


def prompt(number: int, tokens: int, count: Callable[[str], int]) -> str:
    """The prompt of that number, `tokens` long or a line longer; `count` tells how long a text is."""
    verb, noun = _VERBS[number % len(_VERBS)], _NOUNS[number % len(_NOUNS)]
    ending = f"\n\nclass Test{verb.title()}{noun.title()}(unittest.TestCase):\n    def test_{verb}(self):\n"
    lines = [f"# {number:05d}: {verb} {noun}\n"]
    for line in itertools.cycle(_LINES):
        if count("".join(lines) + ending) >= tokens:
            break
        lines.append(line + "\n")
    return "".join(lines) + ending


def prompts(tokens: int, count: Callable[[str], int]) -> Iterator[str]:
    """One after another, each another one."""
    return (prompt(number, tokens, count) for number in itertools.count())
