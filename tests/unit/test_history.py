"""The history as it is read afterwards: each decision is a line, with whom it is about, its bytes and how long it took."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from conductor.core import actions, events
from conductor.core.events import RequestId, TurnId
from conductor.happenings import Happening, HistoryEntry
from conductor.history import History
from conductor.types import AgentId
from tests.support.stories import ALPHA, BETA, Stage

Given = Callable[..., Stage]


def watched(stage: Stage, **options: Any) -> History:
    """The history of the stage, told as the executive tells it."""
    history, handle = History(stage.state, clock=lambda: stage.at, **options), stage.state.handle

    def handle_and_tell(*happened: events.Event, at: float) -> list[actions.Action]:
        history.heard(happened)
        todo = handle(*happened, at=at)
        history.decided(todo)
        return todo

    stage.state.handle = handle_and_tell  # type: ignore[method-assign]
    return history


def kinds(entries: tuple[HistoryEntry, ...]) -> list[str]:
    return [entry.kind.value for entry in entries]


def last(history: History, kind: Happening) -> HistoryEntry:
    return [entry for entry in history.since(0) if entry.kind is kind][-1]


def test_an_agents_life_is_told_in_order_with_bytes_and_times(given: Given) -> None:
    stage = given(cap=1000)
    history = watched(stage)
    stage.registers("a", ALPHA, context=50)
    stage.passes(2)
    stage.loaded(ALPHA)
    turn = stage.asks("a")
    stage.opened("a")
    stage.passes(3)
    stage.finished(turn, tokens=12)
    stage.unregisters("a")
    stage.settle()
    assert kinds(history.since(0)) == [
        "loaded", "admitted", "pool_opened", "turn_ended", "pool_closed", "left", "unloaded",
    ]  # fmt: skip
    loaded, admitted, opened, ended = history.since(0)[:4]
    assert (loaded.model, loaded.bytes, loaded.ms, loaded.at_s) == ("alpha", 100, 2000.0, 2.0)
    assert (admitted.agent, admitted.bytes, admitted.text) == ("a", 150, "shared, 50 tokens, brought its model")
    assert (opened.model, opened.bytes, opened.text) == ("alpha", 50, "a slot of 50 tokens")
    assert (ended.agent, ended.ms) == ("a", 3000.0)


def test_a_refusal_says_who_what_and_why(given: Given) -> None:
    stage = given(cap=200)
    history = watched(stage)
    stage.registers("a", ALPHA, context=500)
    [refused] = history.since(0)
    assert (refused.kind, refused.agent, refused.model, refused.bytes) == (Happening.REFUSED, "a", "alpha", 600)
    assert refused.text.startswith("NEVER: 600 B asked for, 200 B free. This device cannot hold it")


def test_kv_that_makes_way_and_comes_back_is_told_with_its_bytes(given: Given) -> None:
    stage = given(cap=260)
    history = watched(stage)
    for agent in ("a", "b"):
        stage.registers(agent, ALPHA, context=100)
        if agent == "a":
            stage.loaded(ALPHA)
    for agent in ("a", "b", "a"):
        stage.converses(agent, tokens=40)
    out, back = last(history, Happening.SWAPPED_OUT), last(history, Happening.SWAPPED_IN)
    assert (out.agent, out.text, back.agent, back.text) == ("b", "to host memory", "a", "to a slot")
    assert out.bytes is not None
    assert out.bytes > 0
    assert back.bytes is not None
    assert back.bytes > 0


def test_strangers_that_take_what_is_booked_are_told_once_and_again_when_they_leave(given: Given) -> None:
    stage = given(cap=1000)
    history = watched(stage)
    stage.registers("a", ALPHA, context=850, kind="guaranteed")
    stage.loaded(ALPHA)
    stage.opened("a")
    for strangers in (200, 250, 0):
        stage.reads_device(strangers=strangers)
    drifts = [entry for entry in history.since(0) if entry.kind is Happening.DRIFT]
    assert [entry.bytes for entry in drifts] == [150, 0]


def test_other_tasks_reservations_are_told(given: Given) -> None:
    stage = given(cap=100)
    history = watched(stage)
    booked = stage.reserves("blender", 60)
    stage.reserves("ffmpeg", 60)
    stage.releases(booked.reservation)
    assert [(entry.kind.value, entry.agent, entry.bytes) for entry in history.since(0)] == [
        ("reserved", "blender", 60), ("refused", "ffmpeg", 60), ("released", None, 60),
    ]  # fmt: skip


def test_whoever_asks_again_gets_what_is_new_and_the_oldest_is_forgotten(given: Given) -> None:
    stage = given(cap=1000)
    history = watched(stage, lines=3)
    assert history.since(0) == ()
    for n in range(5):
        stage.releases(stage.reserves(f"task-{n}", 1).reservation)
    assert [entry.number for entry in history.since(0)] == [8, 9, 10]
    assert [entry.number for entry in history.since(9)] == [10]
    assert history.since(10) == history.since(99) == ()
    assert len(history.since(-5)) == 3


def test_tokens_are_counted_once_however_often_somebody_looks(given: Given) -> None:
    stage = given(cap=1000)
    history = watched(stage)
    a = AgentId("a")
    stage.registers("a", ALPHA, context=100)
    stage.loaded(ALPHA)
    turn = stage.asks("a")
    stage.brings_on(turn)
    assert [history.computed_tokens({a: n}) for n in (0, 7, 7, 12)] == [0, 7, 7, 12]
    stage.finished(turn, tokens=20, computed=20)
    assert history.computed_tokens({}) == 20
    assert history.computed_tokens({a: 3}) == 23  # the next turn's


def test_turns_that_end_unsaid_are_forgotten_in_time(given: Given) -> None:
    stage = given(cap=1000)
    history = watched(stage)
    for n in range(1000):
        history.heard([events.TurnRequested(TurnId(n), AgentId("a"))])
        history.decided([])
    assert len(history._under_way.turns) <= 65


def test_an_error_of_its_own_hurts_nobody_and_is_logged_once(given: Given, caplog: pytest.LogCaptureFixture) -> None:
    history = watched(given(cap=1000))
    with caplog.at_level(logging.WARNING, "conductor"):
        for _ in range(3):
            history.heard([events.ModelUnloaded(BETA.id)])  # nobody knows it
    assert [record.message for record in caplog.records] == ["the history is not complete"]


def test_a_text_is_cut_and_an_entry_has_a_json_form(given: Given) -> None:
    stage = given(cap=100)
    history = watched(stage)
    history.heard([events.ReserveRequested(RequestId(1), "x" * 2000, 1)])
    history.decided([actions.AnswerRelease(RequestId(1), 5)])
    [entry] = history.since(0)
    assert entry.to_json() == {
        "number": 1, "at_s": 0.0, "kind": "released", "agent": None, "model": None, "bytes": 5, "ms": None, "text": "",
        "request": 1,
    }  # fmt: skip


# --- what the log is told besides ---------------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[HistoryEntry]:
    return [record.msg for record in caplog.records if isinstance(record.msg, HistoryEntry)]


def of_call(entries: list[HistoryEntry], number: int | None) -> list[str]:
    return [entry.kind.value for entry in entries if entry.request == number]


def test_a_call_is_followed_by_its_number_from_its_being_asked_to_its_answer(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    stage = given(cap=250)
    with caplog.at_level(logging.INFO, "conductor"):
        history = watched(stage)
        for agent in ("a", "b"):
            stage.registers(agent, ALPHA, context=100)
            if agent == "a":
                stage.loaded(ALPHA)
        stage.converses("a", tokens=40)
        stage.converses("b", tokens=40)
        turn = stage.asks("a")
        stage.passes(3)
        stage.brings_on(turn)
        stage.passes(2)
        stage.finished(turn, tokens=50)
    entries = told(caplog)
    admitted, *turns = [entry.request for entry in entries if entry.kind in (Happening.ADMITTED, Happening.TURN_ENDED)]
    assert of_call(entries, admitted) == ["asked", "loaded", "admitted"]
    last_turn = [entry for entry in entries if entry.request == turns[-1]]
    assert [entry.kind.value for entry in last_turn] == ["asked", "swapped_in", "turn_began", "turn_ended"]
    assert [(entry.agent, entry.model) for entry in last_turn] == [("a", "alpha")] * 4
    assert [entry.ms for entry in last_turn if entry.kind in (Happening.TURN_BEGAN, Happening.TURN_ENDED)] == [3000.0, 2000.0]
    assert "asked" not in kinds(history.since(0))
    assert [entry.number for entry in history.since(0)] == list(range(1, len(history.since(0)) + 1))


def test_a_turn_that_stands_still_and_goes_on_is_one_call(given: Given, caplog: pytest.LogCaptureFixture) -> None:
    stage = given(cap=400)
    with caplog.at_level(logging.INFO, "conductor"):
        watched(stage)
        stage.has("a", ALPHA, context=100, ladder=(50,))
        turn = stage.asks("a")
        stage.brings_on(turn)
        stage.outgrew(turn, tokens=50, desired=80)
        stage.brings_on(turn)
        stage.finished(turn, tokens=80)
    number = next(entry.request for entry in told(caplog) if entry.kind is Happening.TURN_ENDED)
    began = [entry for entry in told(caplog) if entry.request == number and entry.kind is Happening.TURN_BEGAN]
    assert [(entry.text, entry.ms is None) for entry in began] == [("", False), ("goes on", True)]
    assert of_call(told(caplog), number)[-3:] == ["swapped_in", "turn_began", "turn_ended"]


def test_whoever_goes_away_is_told_of_and_a_refusal_says_how_long_it_took(given: Given, caplog: pytest.LogCaptureFixture) -> None:
    stage = given(cap=200)
    with caplog.at_level(logging.INFO, "conductor"):
        watched(stage)
        stage.has("a", ALPHA, context=50, kind="guaranteed")
        gone = stage.registers("b", ALPHA, context=90, kind="guaranteed", may_wait=True)
        stage.registers("d", ALPHA, context=90, kind="guaranteed", may_wait=True, owner="process")
        late = stage.registers("c", ALPHA, context=90, kind="guaranteed", may_wait=True)
        stage.passes(4)
        stage.goes_away(gone)
        stage.loses_patience(late)
        stage.dies("process")
    assert [(e.agent, e.ms) for e in told(caplog) if e.kind is Happening.ABANDONED] == [("b", 4000.0), ("d", 4000.0)]
    assert [(e.agent, e.ms) for e in told(caplog) if e.kind is Happening.REFUSED] == [("c", 4000.0)]


def test_levels_tell_what_went_wrong(given: Given, caplog: pytest.LogCaptureFixture) -> None:
    stage = given(cap=200)
    with caplog.at_level(logging.INFO, "conductor"):
        watched(stage)
        stage.registers("a", ALPHA, context=500)
        stage.registers("b", BETA, context=50)
        stage.load_failed(BETA)
    levels = {record.msg.kind.value: record.levelname for record in caplog.records if isinstance(record.msg, HistoryEntry)}
    assert (levels["asked"], levels["refused"], levels["failed"]) == ("INFO", "WARNING", "ERROR")
