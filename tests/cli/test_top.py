"""`conductor top`: a picture for any size of terminal, and what a terminal makes of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from conductor.happenings import Happening, HistoryEntry
from conductor.types import ModelKey
from pipelines.top import Section, allot, frame, spark
from pipelines.watch import Sample, View
from tests.support.shell import Shell
from tests.support.views import NAMES, STATUS

ENTRIES = tuple(
    HistoryEntry(n + 1, n / 10, list(Happening)[n % len(Happening)], NAMES[n % 5], ModelKey("m"), 5 << n, 1.5, "why [/y] " * 20)
    for n in range(40)
)
VIEW = View(STATUS, "", 1, ENTRIES, tuple(Sample(n / 2, float(n), n * 100) for n in range(50)))


def shown(view: View, width: int, height: int | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height or 25, highlight=False)
    console.print(frame(view, width, height))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("height", [8, 12, 24, 60, 200])
def test_a_picture_is_never_larger_than_the_terminal(width: int, height: int) -> None:
    lines = shown(VIEW, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_everything_is_there_where_there_is_room() -> None:
    text = "\n".join(shown(VIEW, 200, 100))
    for said in ("GPU [/x]", "80.0 MiB of 100 MiB booked", "80.0 MiB used of 128 MiB", "80.0 MiB equal", "<img src=x>",
                 "[bold]b[/]", "host", "why [/y]", "resident", "1 of 4 slots", "swapped out", "refused", "tok/s"):  # fmt: skip
        assert said in text


def test_names_cannot_steer_the_terminal_or_break_lines() -> None:
    text = "\n".join(shown(VIEW, 200, 100))
    assert "\x1b" not in text
    assert "[2Jc" in text
    assert "e f" in text


def test_what_is_left_out_is_said_and_a_pipe_gets_everybody() -> None:
    low, whole = shown(VIEW, 100, 24), shown(VIEW, 100)
    assert any(line.startswith("… ") and line.endswith(" more") for line in low)
    assert len([line for line in whole if line.startswith("d" * 20)]) == 2  # of the agents, and of those who wait
    assert len(whole) > 24


def test_a_conductor_that_is_gone_is_said_above_all() -> None:
    gone = View(STATUS, "no conductor is running", 1, ENTRIES, VIEW.samples)
    assert "no conductor is running" in shown(gone, 100, 24)[0]
    assert "0 tok/s" in "\n".join(shown(gone, 100, 24))
    assert "nobody" in shown(View(None, "nobody answers"), 60, 24)[0]


def test_the_speed_is_of_the_last_seconds_and_its_line_ends_with_the_newest() -> None:
    assert VIEW.tokens_per_s == 200.0  # 100 more each half second
    line = spark(VIEW.samples, 20)
    assert (len(line), line[-1]) == (20, "█")
    assert spark((), 5) == "     "


@given(rows=st.lists(st.integers(1, 300), min_size=1, max_size=6), lines=st.integers(0, 100))
def test_lines_are_shared_so_that_all_fit_and_the_first_stay_longest(rows: Sequence[int], lines: int) -> None:
    sections: list[Section[int]] = [Section((), range(count)) for count in rows]
    allot(sections, lines)
    given_lines = [section.lines for section in sections]
    assert sum(given_lines) <= lines
    assert all(1 < got <= section.wanted or got == 0 for got, section in zip(given_lines, sections, strict=True))
    assert given_lines == sorted(given_lines, key=lambda got: got == 0)  # once one has gone, so have those behind it
    if sum(section.wanted for section in sections) <= lines:
        assert given_lines == [section.wanted for section in sections]


def test_without_a_conductor_there_is_nothing_to_see(tmp_path: Path) -> None:
    failed = Shell(tmp_path).conductor("top", "--once")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "error: no conductor is running; start one with: conductor up\n"
