"""`conductor logs` and `conductor timeline`: a log is read where it lies, also of a conductor that has ended."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from conductor.config import load_config
from conductor.happenings import Happening, HistoryEntry
from conductor.log_file import LogFile
from conductor.types import ModelKey
from tests.support.shell import CONDUCTOR, Shell

DECISIONS = logging.getLogger("conductor.decisions")


def entry(kind: Happening, agent: str | None, number: int, ms: float | None = None, text: str = "") -> HistoryEntry:
    return HistoryEntry(1, 0.0, kind, agent, ModelKey("coder"), 4096, ms, text, number)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("log: {directory: logs}\n")
    return path


@pytest.fixture
def log(config: Path) -> Iterator[LogFile]:
    settings = load_config(config)
    log = LogFile(settings, settings.resolve("logs"))
    DECISIONS.info(entry(Happening.ASKED, "ada", 1, text="to be admitted"))
    DECISIONS.info(entry(Happening.LOADED, None, 1, 20.0))
    DECISIONS.warning(entry(Happening.REFUSED, "bob", 2, 1.5, "CAP: [bold]no[/] \x1b[2Jroom"))
    DECISIONS.info(entry(Happening.ADMITTED, "ada", 1, 25.0, "shared"))
    yield log
    log.close()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_lines_are_shown_chosen_and_given_to_programs(shell: Shell, config: Path, log: LogFile) -> None:
    log.close()
    shown = shell.ok("logs", "--config", str(config)).splitlines()
    assert [line.split()[2] for line in shown] == ["message", "asked", "loaded", "refused", "admitted"]
    assert shown[3].endswith("#2 bob coder           4.0 KiB     1.5 ms CAP: [bold]no[/] [2Jroom")
    [refused] = shell.ok("logs", "-c", str(config), "--agent", "bob", "--json").splitlines()
    assert json.loads(refused)["text"] == "CAP: [bold]no[/] \x1b[2Jroom"
    assert refused in log.path.read_text()
    assert len(shell.ok("logs", "-c", str(config), "-n", "2", "--request", "1").splitlines()) == 2
    failed = shell.conductor("logs", "-c", str(config), "--kind", "refusd")
    assert (failed.returncode, failed.stderr[:25]) == (2, "error: kind: 'refusd' is ")


def test_following_shows_what_is_added_until_ctrl_c(shell: Shell, config: Path, log: LogFile) -> None:
    with shell.begin(CONDUCTOR, "logs", "-f", "-n", "1", "--kind", "admitted", "-c", str(config)) as process:
        assert process.stdout is not None
        assert "ada coder" in process.stdout.readline()
        DECISIONS.info(entry(Happening.REFUSED, "bob", 3))
        DECISIONS.info(entry(Happening.ADMITTED, "cem", 4))
        assert "cem coder" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert (process.wait(30), process.stderr.read() if process.stderr else "") == (130, "")


def test_the_timeline_is_a_file_for_a_viewer(shell: Shell, config: Path, log: LogFile, tmp_path: Path) -> None:
    log.close()
    told = shell.ok("timeline", "--config", str(config), "--output", str(tmp_path / "t.json"))
    events = json.loads((tmp_path / "t.json").read_text())
    assert told == f"{len(events)} events in {tmp_path / 't.json'}\n"
    assert {event["name"] for event in events if event["ph"] == "X"} == {"load", "live", "admission"}


def test_without_a_log_there_is_an_error_and_no_file(shell: Shell, config: Path, tmp_path: Path) -> None:
    for command in (["logs"], ["timeline", "-o", str(tmp_path / "t.json")]):
        failed = shell.conductor(*command, "-c", str(config))
        assert (failed.returncode, failed.stdout) == (1, "")
        assert failed.stderr.startswith(f"error: no log at {tmp_path}/logs/conductor-gpu-conductor.log")
    assert not (tmp_path / "t.json").exists()
    alone = shell.conductor("logs")
    assert alone.stderr == "error: no conductor is running; start one with: conductor up\n"


def test_what_cannot_be_written_is_an_error(shell: Shell, config: Path, log: LogFile, tmp_path: Path) -> None:
    log.close()
    failed = shell.conductor("timeline", "-c", str(config), "-o", str(tmp_path / "gone" / "t.json"))
    assert failed.returncode == 2
    assert "output" in failed.stderr
