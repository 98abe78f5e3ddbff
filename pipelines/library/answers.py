"""What is made of answers: the part that is kept, the items that a text is cut into, votes. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from pipelines.library.steps import Keep

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def code_in(text: str) -> str:
    """The first fenced block of an answer, or all of it if there is none."""
    fenced = _FENCE.search(text)
    return (fenced[1] if fenced else text).strip()


def kept(text: str, keep: Keep) -> str:
    """The part of an answer that a step keeps."""
    if keep == "text":
        return text
    if keep == "code":
        return code_in(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return lines[0] if keep == "first_line" else lines[-1]


def items_of(over: str | Sequence[str], split: str) -> tuple[str, ...]:
    """A list as it is; a text cut by lines or by empty lines, without what is empty."""
    if not isinstance(over, str):
        return tuple(over)
    pieces = over.splitlines() if split == "lines" else re.split(r"\n[ \t\r]*\n", over)
    return tuple(stripped for piece in pieces if (stripped := piece.strip()))


def majority(answers: Sequence[str]) -> tuple[int, int]:
    """(which answer most agree on, how many do). White space and case make no difference; of as many, the first."""
    votes = [" ".join(answer.split()).casefold() for answer in answers]
    choice, count = Counter(votes).most_common(1)[0]  # of equal counts the one met first
    return votes.index(choice), count


def named(verdict: str, answers: int) -> int | None:
    """Which of the answers, numbered from 1, a judge names first; None: none of them."""
    numbers = (int(number) for number in re.findall(r"(?<![\w.])\d{1,3}(?!\w|\.\d)", verdict))
    return next((number - 1 for number in numbers if 1 <= number <= answers), None)


def numbered(answers: Sequence[str]) -> str:
    """The answers for a judge."""
    return "\n\n".join(f"Answer {i}:\n\n{answer}" for i, answer in enumerate(answers, 1))
