"""The log file: a line for each thing that is said, whatever is in it, and no trouble for anybody whatever the disk does."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conductor import log_file
from conductor.config import Config, parse_config
from conductor.happenings import Happening, HistoryEntry
from conductor.log_file import BEGINS, FIELDS, MESSAGE_FIELDS, LogFile, path_of
from conductor.types import ModelKey
from tests.support.eventually import eventually

ROOT = Path(__file__).resolve().parents[2]
DECISIONS, OTHERS = logging.getLogger("conductor.decisions"), logging.getLogger("actors.leases")
REFUSED = HistoryEntry(3, 1.5, Happening.REFUSED, "ada", ModelKey("coder"), 600, 1.23456, "CAP: 600 B asked for", 17)
WITHIN_S = 10.0
NASTY = "a\nb\r\x1b[2J\x00\x85\u2028\ud800"

Begin = Callable[..., LogFile]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    logs: list[LogFile] = []

    def begin(directory: Path = tmp_path, **log: Any) -> LogFile:
        config = parse_config({"log": log, "ray": {"name": "gpu-0"}}, source="test", directory=tmp_path)
        logs.append(LogFile(config, directory))
        return logs[-1]

    yield begin
    for log in logs:
        log.close()


def await_line(log: LogFile, text: str) -> None:
    eventually(lambda: log.path.exists() and text in log.path.read_text(), WITHIN_S)


def lines_of(log: LogFile) -> list[str]:
    """All but the one that it begins with."""
    log.close()
    return log.path.read_text("utf-8").splitlines()[1:]


def test_a_decision_is_one_object_with_every_field(begin: Begin) -> None:
    log = begin()
    DECISIONS.warning(REFUSED)
    [line] = map(json.loads, lines_of(log))
    assert tuple(line) == FIELDS
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("time"))
    assert line == {
        "level": "warning", "conductor": "gpu-0", "kind": "refused", "agent": "ada", "model": "coder", "request": 17,
        "bytes": 600, "ms": 1.235, "text": "CAP: 600 B asked for",
    }  # fmt: skip


def test_what_else_the_packages_say_is_in_the_same_file_with_its_traceback_on_the_line(begin: Begin) -> None:
    log = begin()
    OTHERS.info("for %s", "ada", extra={"agent": "ada", "request": 5})
    try:
        raise RuntimeError("out of\nluck")
    except RuntimeError:
        OTHERS.exception("a mirror broke")
    said, broke = map(json.loads, lines_of(log))
    assert tuple(said) == tuple(broke) == (*FIELDS, *MESSAGE_FIELDS)
    assert (said["kind"], said["text"], said["agent"], said["request"]) == ("message", "for ada", "ada", 5)
    assert (said["logger"], said["trace"], broke["level"]) == ("actors.leases", None, "error")
    assert broke["trace"].endswith("RuntimeError: out of\nluck")


@pytest.mark.parametrize("form", ["json", "text"])
def test_nothing_that_somebody_chose_breaks_a_line_or_steers_a_terminal(
    begin: Begin, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("conductor", "actors"):  # pytest keeps what it hears, and xdist could not hand that on
        monkeypatch.setattr(logging.getLogger(package), "propagate", False)
    log = begin(format=form)
    DECISIONS.info(HistoryEntry(1, 0.0, Happening.ADMITTED, NASTY, ModelKey(NASTY), None, None, NASTY, 1))
    OTHERS.warning("said %s", NASTY)
    lines = lines_of(log)
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)


def test_text_is_for_people(begin: Begin) -> None:
    log = begin(format="text")
    DECISIONS.warning(REFUSED)
    OTHERS.warning("odd")
    decision, message = (line.split(" ", 1)[1] for line in lines_of(log))
    assert decision == "warning gpu-0 refused #17 ada coder 600 B 1.2 ms CAP: 600 B asked for"
    assert message == "warning gpu-0 actors.leases: odd"


def test_what_is_below_the_level_is_not_written_and_loggers_are_left_as_they_were(begin: Begin) -> None:
    package = logging.getLogger("conductor")
    before = (package.level, list(package.handlers))
    log = begin(level="warning")
    DECISIONS.info(REFUSED)
    DECISIONS.warning(REFUSED)
    log.close()
    assert [json.loads(line)["level"] for line in log.path.read_text().splitlines()] == ["warning"]
    assert (package.level, list(package.handlers)) == before


def test_a_file_that_is_full_makes_room_for_a_new_one_and_the_oldest_goes(begin: Begin) -> None:
    log = begin(file_bytes=2000, keep=2)
    for n in range(60):
        OTHERS.info("line %d", n)
        await_line(log, f"line {n}")
    log.close()
    files = sorted(log.path.parent.iterdir(), reverse=True)
    assert [file.name for file in files] == ["conductor-gpu-0.log.2", "conductor-gpu-0.log.1", "conductor-gpu-0.log"]
    assert max(file.stat().st_size for file in files) <= 2000
    numbers = [int(json.loads(line)["text"].split()[1]) for file in files for line in file.read_text().splitlines()]
    assert numbers == list(range(numbers[0], 60))
    assert 0 < numbers[0] < 55


def test_with_none_to_be_kept_there_is_one_file(begin: Begin) -> None:
    log = begin(file_bytes=500, keep=0)
    for n in range(5):
        OTHERS.info("line %d", n)
        await_line(log, f"line {n}")
    assert [path.name for path in log.path.parent.iterdir()] == ["conductor-gpu-0.log"]


def test_a_directory_that_cannot_be_written_to_costs_lines_and_says_so_once(
    begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "logs"
    place.write_text("in the way")
    log = begin(place)
    for n in range(3):
        OTHERS.info("lost %d", n)
        eventually(lambda n=n: log._unwritten == n + 2, WITHIN_S)
    place.unlink()
    OTHERS.info("and on")
    told, on = (json.loads(line) for line in [*lines_of(log), *log.path.read_text().splitlines()[:1]][::-1])
    assert (told["level"], told["text"], on["text"]) == ("warning", "4 lines could not be written and are lost", "and on")
    assert capsys.readouterr().err.count("cannot be written") == 1


@contextlib.contextmanager
def room_for_files_of(bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_after_a_full_disk_lines_are_whole_again(begin: Begin) -> None:
    log = begin()
    await_line(log, BEGINS)
    with room_for_files_of(log.path.stat().st_size + 30):
        OTHERS.info("cut off")
        eventually(lambda: log._unwritten == 1, WITHIN_S)
    OTHERS.info("whole")
    cut, told, whole = lines_of(log)
    assert len(cut) == 30
    assert "1 lines could not be written" in json.loads(told)["text"]
    assert json.loads(whole)["text"] == "whole"


def test_whoever_moves_the_file_away_finds_a_new_one(begin: Begin) -> None:
    log = begin()
    eventually(log.path.exists, WITHIN_S)
    log.path.rename(log.path.with_name("kept"))
    OTHERS.info("here")
    log.close()
    assert [json.loads(line)["text"] for line in log.path.read_text().splitlines()] == ["here"]


def test_a_link_that_somebody_laid_there_is_not_followed(begin: Begin, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("")
    log = begin(tmp_path / "logs")
    log.close()
    log.path.unlink()
    log.path.symlink_to(victim)
    again = begin(tmp_path / "logs")
    again.close()
    assert victim.read_text() == ""


def test_when_the_disk_stands_still_lines_are_lost_and_not_memory(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "_MOST_WAITING", 10)
    log = begin()
    await_line(log, BEGINS)
    write, moves_again = log._file.write, threading.Event()
    monkeypatch.setattr(log._file, "write", lambda lines: moves_again.wait() and write(lines))
    for n in range(100):
        OTHERS.info("line %d", n)
        assert log._waiting.qsize() <= 10
    moves_again.set()
    eventually(log._waiting.empty, WITHIN_S)
    OTHERS.info("on")
    written = "".join(lines_of(log))
    lost = sum(map(int, re.findall(r'"(\d+) lines could not be written and are lost"', written)))
    assert lost > 0
    assert len(re.findall(r'"line \d+"', written)) == 100 - lost


def test_the_file_is_named_after_the_conductor_and_others_cannot_read_it(begin: Begin, tmp_path: Path) -> None:
    def name(**ray: str) -> str:
        return path_of(parse_config({"ray": ray}, source="test", directory=tmp_path), tmp_path).name

    assert name() == f"conductor-{Config().ray.name}.log"
    assert name(name="../monitor") == "conductor-.._monitor.log"
    assert name(name="gpu-1", namespace="lab") == "conductor-lab.gpu-1.log"
    log = begin()
    log.close()
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_the_plain_class_says_nothing_unless_logging_is_configured() -> None:
    program = "import logging\nfrom conductor.history import _tell\n_tell(logging.ERROR, 'a decision')\n"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert (run.stdout, run.stderr) == ("", "")


# --- the page -----------------------------------------------------------------------------------------------------------


def told_under(heading: str) -> list[str]:
    """The words in the first column of the table below a heading of docs/ray.md."""
    page = (ROOT / "docs" / "ray.md").read_text("utf-8")
    part = page.split(f"\n### {heading}\n")[1].split("\n#")[0]
    return [word for row in re.findall(r"^\| (`.+?) \|", part, re.MULTILINE) for word in re.findall(r"`(\w+)`", row)]


def test_the_page_lists_every_field_in_the_order_of_the_line() -> None:
    assert told_under("Fields") == [*FIELDS, *MESSAGE_FIELDS]


def test_the_page_lists_every_kind_of_line() -> None:
    assert sorted(told_under("Kinds")) == sorted([*(kind.value for kind in Happening), log_file.MESSAGE])
