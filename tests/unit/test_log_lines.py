"""A log as it is read: the last lines that match, over the files that were begun, and what is added while somebody reads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from conductor.errors import InvalidRequest, ServiceFailed
from pipelines.log_lines import Log, LogLine, parse
from pipelines.logs import for_people, that_match

ALL = that_match(None, None, None)


def line(n: int, **fields: object) -> str:
    base = {"time": f"2026-01-02T03:04:{n % 60:02}.123456Z", "level": "info", "kind": "asked", "agent": "ada", "text": f"{n}"}
    return json.dumps({**base, **fields}) + "\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "conductor-x.log"
    for name, numbers in (("conductor-x.log.2", range(10)), ("conductor-x.log.1", range(10, 20)), (path.name, range(20, 25))):
        (tmp_path / name).write_text("".join(map(line, numbers)))
    return path


@pytest.fixture
def log(path: Path) -> Iterator[Log]:
    with contextlib.closing(Log(path)) as log:
        yield log


def texts(lines: Iterator[LogLine] | list[LogLine]) -> list[str]:
    return [line.text for line in lines]


def test_the_last_lines_are_found_across_files_in_their_order(log: Log) -> None:
    assert texts(log.last(ALL, 7)) == ["18", "19", "20", "21", "22", "23", "24"]


def test_all_are_all_and_nothing_is_read_twice(log: Log) -> None:
    assert texts(log.last(ALL)) == [str(n) for n in range(25)]
    assert texts(log.news(ALL)) == []


def test_what_is_added_comes_once_and_only_when_its_line_is_whole(log: Log, path: Path) -> None:
    log.last(ALL, 1)
    with path.open("a") as file:
        file.write(line(25) + line(26)[:20])
        file.flush()
        assert texts(log.news(ALL)) == ["25"]
        file.write(line(26)[20:])
    assert texts(log.news(ALL)) == ["26"]


def test_following_goes_on_in_the_new_file_with_nothing_left_out(log: Log, path: Path) -> None:
    log.last(ALL, 1)
    with path.open("a") as file:
        file.write(line(25))
    path.rename(path.with_name("conductor-x.log.0"))
    assert texts(log.news(ALL)) == ["25"]
    path.write_text(line(26))
    assert texts(log.news(ALL)) == ["26"]


def test_lines_are_chosen_by_agent_kind_and_call() -> None:
    lines = [
        parse(line(0, agent="ada", kind="asked", request=1)),
        parse(line(1, agent="bob", kind="asked", request=2)),
        parse(line(2, agent="ada", kind="refused", request=1)),
        parse(line(3, agent=None, kind="loaded", request=1)),
    ]
    chosen = [
        texts(list(filter(matches, lines)))
        for matches in (
            that_match(["ada"], None, None), that_match(["ada", "bob"], ["asked"], None), that_match(None, None, 1),
        )
    ]  # fmt: skip
    assert chosen == [["0", "2"], ["0", "1"], ["0", "2", "3"]]
    with pytest.raises(InvalidRequest, match=r"'refusd' is no kind of line; there are: .*refused"):
        that_match(None, ["refusd"], None)


@pytest.mark.parametrize("raw", ["", "not JSON", "[1, 2]", '{"time": "2026', "\x1b[2Jx", '"text"', "null"])
def test_a_line_of_another_make_is_shown_as_it_is_and_steers_nothing(raw: str) -> None:
    shown = for_people(parse(raw))
    assert shown == raw.replace("\x1b", "")


def test_people_get_one_line_without_what_steers_a_terminal() -> None:
    raw = line(1, agent="a\x1b[2Jd\na", model="coder", request=7, bytes=2048, ms=1234.5, text="x\ny", trace="a\nValueError: no")
    shown = for_people(parse(raw))
    assert shown == "2026-01-02 03:04:01.123 asked          #7 a[2Jd a coder      2.0 KiB 1,234.5 ms x y (ValueError: no)"


def test_where_there_is_no_log_it_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(ServiceFailed, match=f"no log at {tmp_path}/gone.log"):
        Log(tmp_path / "gone.log")
