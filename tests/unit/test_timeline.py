"""The log as a trace: what a viewer needs so that spans lie in rows, one within another or one after another."""

from __future__ import annotations

import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from conductor.happenings import HistoryEntry
from conductor.log_file import BEGINS, Line
from pipelines.log_lines import LogLine, parse
from pipelines.timeline import trace
from tests.support.stories import ALPHA, BETA, Stage
from tests.unit.test_history import watched

Given = Callable[..., Stage]


@pytest.fixture
def lines(given: Given, caplog: pytest.LogCaptureFixture) -> list[LogLine]:
    """Two agents of two models that swap, grow and share, a guaranteed one, a refusal, on a clock of the story's own."""
    stage = given(cap=700, live_contexts=1)
    entries: list[tuple[float, HistoryEntry]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            entries.append((stage.at, record.msg))  # type: ignore[arg-type]

    decisions, keep = logging.getLogger("conductor.decisions"), Keep()
    decisions.addHandler(keep)
    try:
        with caplog.at_level(logging.INFO, "conductor"):
            watched(stage)
            stage.has("a", ALPHA, context=100, ladder=(50,))
            stage.has("b", BETA, context=60, kind="best_effort")
            stage.has("g", BETA, context=40, kind="guaranteed")
            stage.registers("big", ALPHA, context=900)
            for agent, tokens in (("a", 40), ("b", 30), ("a", 90), ("g", 20), ("b", 50)):
                stage.passes(1)
                turn = stage.asks(agent)
                stage.passes(0.5)
                stage.brings_on(turn)
                stage.passes(2)
                if turn.run and turn.run.room < tokens:
                    stage.outgrew(turn, tokens=turn.run.room, desired=tokens)
                    stage.brings_on(turn)
                stage.finished(turn, tokens=tokens)
                stage.settle()
    finally:
        decisions.removeHandler(keep)
    return [logged(at, entry) for at, entry in entries]


def logged(at: float, said: HistoryEntry | str, level: int = logging.INFO) -> LogLine:
    record = logging.LogRecord("conductor", level, "", 0, said, None, None)
    record.created = at
    return parse(Line("test", as_json=True).format(record))


def rows(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The spans by their row's name, group first."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    groups = {e["pid"]: e["args"]["name"].removeprefix("VRAM Conductor: ") for e in events if e["name"] == "process_name"}
    found = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[f"{groups[event['pid']]}/{names[event['pid'], event['tid']]}"].append(event)
    return found


def test_each_agent_model_and_pool_has_a_row_with_what_happened_to_it(lines: list[LogLine]) -> None:
    found = {row: [event["name"] for event in sorted(spans, key=lambda e: e["ts"])] for row, spans in rows(trace(lines)).items()}
    assert {"agents/a", "agents/b", "agents/g", "models/alpha", "models/beta", "pools/alpha", "pools/beta of g"} <= set(found)
    assert found["agents/g"] == ["admission", "turn"]
    assert found["agents/a"].count("turn") == 2
    assert {"KV leaves", "KV comes back"} <= set(found["agents/a"])
    assert found["models/alpha"][:2] == ["load", "live"]
    assert found["pools/alpha"][:3] == ["open", "live", "close"]


def test_spans_of_a_row_lie_within_one_another_or_apart(lines: list[LogLine]) -> None:
    for row, spans in rows(trace(lines)).items():
        for one, other in itertools.combinations(sorted(spans, key=lambda e: (e["ts"], -e["dur"])), 2):
            ends = one["ts"] + one["dur"]
            assert other["ts"] >= ends - 1 or other["ts"] + other["dur"] <= ends + 1, (row, one, other)


def test_times_are_microseconds_since_1970_and_a_turns_are_those_that_it_took(lines: list[LogLine]) -> None:
    turn = next(event for event in rows(trace(lines))["agents/g"] if event["name"] == "turn")
    assert turn["dur"] == pytest.approx(2.5e6)  # a guaranteed agent's begins at once
    ended = next(line for line in lines if line.kind == "turn_ended" and line.agent == "g")
    assert turn["ts"] + turn["dur"] == pytest.approx(lines_at(ended))


def lines_at(line: LogLine) -> float:
    minutes, seconds = line.time[14:].rstrip("Z").split(":")
    return (int(minutes) * 60 + float(seconds)) * 1e6  # the story begins in the first hour of 1970


def test_waiting_lies_beside_the_rows_and_begins_where_it_was_asked(lines: list[LogLine]) -> None:
    waits = [event for event in trace(lines) if event.get("name") == "waits"]
    begun = {event["id"]: event["ts"] for event in waits if event["ph"] == "b"}
    ended = {event["id"]: event["ts"] for event in waits if event["ph"] == "e"}
    assert begun.keys() == ended.keys()
    assert len(begun) == 5
    took_us = sorted(ended[id] - begun[id] for id in begun)
    assert (took_us[0], took_us[-1]) == pytest.approx((0.0, 0.5e6))


def test_a_refusal_is_a_mark_that_says_why(lines: list[LogLine]) -> None:
    [mark] = [event for event in trace(lines) if event["ph"] == "i" and event["name"] == "refused"]
    assert "NEVER" in mark["args"]["text"]


def test_what_a_conductor_before_had_on_the_device_is_not_told_of_the_next(lines: list[LogLine]) -> None:
    later = [logged(5000, BEGINS), logged(5001, "odd", logging.WARNING)]
    events = trace([*lines, *later])
    assert [event["name"] for event in events if event["ph"] != "M"] == ["message"]
    assert json.dumps(events)


def test_a_cut_log_that_begins_in_the_middle_of_a_life_is_a_trace_too(lines: list[LogLine]) -> None:
    for first in range(len(lines)):
        assert all(event["dur"] >= 0 for event in trace(lines[first:]) if event["ph"] == "X")
