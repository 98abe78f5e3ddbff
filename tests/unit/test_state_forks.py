"""Forks as stories: a clone begins where its source is after the turns asked for before, and whatever fails leaves nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.core.sessions import Phase
from conductor.errors import DecodeFailed, DuplicateAgent, ModelLoadFailed, TurnCancelled, UnknownAgent, WindowRefused
from conductor.types import AgentId, KvPlace
from tests.support.calls import Call
from tests.support.stories import ALPHA, BETA, Stage

A, B, TWIN = AgentId("a"), AgentId("b"), AgentId("twin")


@pytest.fixture
def pair(given: Callable[..., Stage]) -> Stage:
    """Agents `a`, whose session has 8 tokens and a seat, and `twin`, who has just come, on one model with one seat."""
    stage = given(cap=1000)
    stage.has("a", ALPHA, owner="worker of a")
    stage.converses("a", tokens=8)
    stage.has("twin", ALPHA, owner="worker of twin")
    return stage


def where(stage: Stage, agent: str) -> tuple[int, KvPlace, int]:
    """Tokens, where its KV is, and bytes booked for that."""
    known = stage.state.agents[AgentId(agent)]
    return known.tokens, known.place, stage.state.kv_books.saved_bytes(known)


def tokens_of(call: Call) -> int:
    assert isinstance(call.answer, actions.AnswerFork), call.answer
    return call.answer.tokens


def copies(stage: Stage) -> list[tuple[str, str, KvPlace]]:
    return [(work.source, work.new, work.to) for work in stage.engine.todo if isinstance(work, actions.CopyKv)]


def saved(stage: Stage, agent: str) -> None:
    """Somebody else needs its place: its KV goes to host memory."""
    stage.has("other", BETA)
    stage.converses("other")
    assert where(stage, agent)[1] is not KvPlace.SLOT


# --- what it has --------------------------------------------------------------------------------------------------------


def test_a_clone_has_the_sources_tokens_and_a_copy_of_its_kv_and_the_source_keeps_its_seat(pair: Stage) -> None:
    fork = pair.forks("a", "twin")
    assert copies(pair) == [("a", "twin", KvPlace.HOST)]
    assert where(pair, "twin") == (0, KvPlace.HOST, 16), "booked before it is made"
    pair.copied("a")
    assert tokens_of(fork) == 8
    assert (where(pair, "a"), where(pair, "twin")) == ((8, KvPlace.SLOT, 0), (8, KvPlace.HOST, 16))
    turn = pair.converses("twin", tokens=12)
    assert turn.evidence == (A, True, 16 + 16), "restored like any other's"
    assert (where(pair, "a")[0], where(pair, "twin")[0]) == (8, 12)


@pytest.mark.parametrize("disk_bytes", [0, 1000])
def test_a_source_whose_kv_is_saved_stays_where_it_is(given: Callable[..., Stage], disk_bytes: int) -> None:
    stage = given(cap=1000, host_bytes=0 if disk_bytes else 1000, disk_bytes=disk_bytes)
    stage.has("a", ALPHA)
    stage.converses("a", tokens=8)
    saved(stage, "a")
    before = where(stage, "a")
    stage.has("twin", ALPHA)
    fork = stage.forks("a", "twin")
    stage.settle()
    assert tokens_of(fork) == 8
    assert where(stage, "a") == before
    copied = (8, KvPlace.TOKENS, 0) if disk_bytes else (8, KvPlace.HOST, 16)  # no room in host memory: it is computed again
    assert where(stage, "twin") == copied


def test_a_conversation_that_has_not_begun_is_cloned_too(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA)
    stage.has("twin", ALPHA)
    fork = stage.forks("a", "twin")
    stage.settle()
    assert tokens_of(fork) == 0
    assert where(stage, "twin") == (0, KvPlace.TOKENS, 0)


def test_without_room_in_host_memory_the_clone_has_its_tokens(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, host_bytes=15)
    stage.has("a", ALPHA)
    stage.converses("a", tokens=8)
    stage.has("twin", ALPHA)
    stage.forks("a", "twin")
    assert copies(stage) == [("a", "twin", KvPlace.TOKENS)]
    stage.settle()
    assert where(stage, "twin") == (8, KvPlace.TOKENS, 0)


def test_a_copy_that_fails_leaves_the_tokens_and_gives_its_place_back(pair: Stage) -> None:
    fork = pair.forks("a", "twin")
    pair.copied("a", fails=True)
    assert tokens_of(fork) == 8
    assert where(pair, "twin") == (8, KvPlace.TOKENS, 0)
    assert pair.state.kv_books.host.allocated_bytes == 0


def test_a_guaranteed_clone_is_in_its_seat_with_its_kv_when_the_fork_is_answered(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    for agent in ("a", "twin"):
        stage.has(agent, ALPHA, kind="guaranteed")
    stage.converses("a", tokens=8)
    fork = stage.forks("a", "twin")
    turn = stage.asks("twin")
    stage.closed("twin")
    stage.copied("a")
    assert fork.waits
    assert turn.waits
    stage.seat_taken("twin")
    assert tokens_of(fork) == 8
    assert where(stage, "twin") == (8, KvPlace.SLOT, 0)
    assert turn.runs


def test_a_guaranteed_clone_that_cannot_have_its_seat_back_leaves_and_says_why(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    for agent in ("a", "twin"):
        stage.has(agent, ALPHA, kind="guaranteed")
    stage.converses("a", tokens=8)
    booked = stage.booked
    fork, turn = stage.forks("a", "twin"), stage.asks("twin")
    stage.closed("twin")
    stage.copied("a")
    stage.open_failed("twin", DecodeFailed(TWIN, "no memory"))
    stage.settle()
    fork.failed_with(DecodeFailed)
    turn.failed_with(TurnCancelled)
    assert (stage.agents, stage.booked) == (["a"], booked - 50)


# --- in line ------------------------------------------------------------------------------------------------------------


def test_a_fork_waits_for_the_turns_asked_before_it_and_those_after_wait_for_it(pair: Stage) -> None:
    first, second = pair.asks("a"), pair.asks("a")
    fork = pair.forks("a", "twin")
    later = pair.asks("a")
    pair.finished(first, tokens=10)
    assert second.runs
    pair.finished(second, tokens=12)
    assert copies(pair)
    assert later.waits
    pair.copied("a")
    assert tokens_of(fork) == 12
    assert later.runs, "in the seat that it had all the time"


def test_a_fork_waits_for_nobody_elses_turn(pair: Stage) -> None:
    saved(pair, "a")
    other = pair.asks("other")
    pair.brings_on(other)
    fork = pair.forks("a", "twin")
    pair.copied("a")
    assert tokens_of(fork) == 8
    assert other.runs


def test_a_fork_waits_for_a_turn_that_stands_still(pair: Stage) -> None:
    pair.has("b", ALPHA, priority=1)
    turn, fork, early = pair.asks("a"), pair.forks("a", "twin"), pair.asks("twin")
    pair.asks("b")
    pair.progresses(a=1)
    pair.paused(turn, tokens=15)
    assert not copies(pair)
    assert early.waits, "a clone has no turn before it has its conversation"
    pair.settle()
    assert tokens_of(fork) == where(pair, "a")[0] == 10
    assert early.endings


def test_several_clones_of_one_source_and_a_clone_of_a_clone_come_one_after_another(pair: Stage) -> None:
    for agent in ("third", "fourth"):
        pair.has(agent, ALPHA)
    forks = [pair.forks("a", "twin"), pair.forks("a", "third"), pair.forks("twin", "fourth")]
    assert copies(pair) == [("a", "twin", KvPlace.HOST)]
    pair.settle()
    assert [tokens_of(fork) for fork in forks] == [8, 8, 8]


def test_while_it_is_cloned_a_seated_source_is_not_sent_away_for_others(pair: Stage) -> None:
    pair.has("other", BETA)
    pair.forks("a", "twin")
    turn = pair.asks("other")
    assert pair.state.agents[A].phase is Phase.BUSY
    assert turn.waits
    pair.copied("a")
    assert not pair.state.agents[A].in_motion
    pair.settle()
    assert turn.endings


def test_while_it_is_cloned_a_saved_source_leaves_host_memory_for_nobody(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, host_bytes=40)
    for agent in ("a", "twin", "third"):
        stage.has(agent, ALPHA)
    stage.converses("a", tokens=8)
    saved(stage, "a")
    stage.forks("a", "twin")
    third = stage.asks("third")
    stage.seat_left("other")  # it has 20 bytes, and 8 are free
    assert where(stage, "a") == (8, KvPlace.HOST, 16)
    assert where(stage, "other") == (10, KvPlace.TOKENS, 0)
    stage.copied("a")
    stage.settle()
    assert third.endings


def test_neither_of_them_is_idle_while_the_fork_waits(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, idle_ttl_s=60.0)
    for agent in ("a", "twin"):
        stage.has(agent, ALPHA)
    turn, fork = stage.asks("a"), stage.forks("a", "twin")
    stage.brings_on(turn)
    stage.passes(100.0)
    stage.finished(turn, tokens=9)
    stage.settle()
    assert tokens_of(fork) == 9


def test_a_fork_whose_turn_before_it_timed_out_goes_on_at_once(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    for agent in "ab":
        stage.has(agent, ALPHA)
    stage.has("twin", ALPHA)
    running = stage.asks("b")
    stage.brings_on(running)
    waiting, fork = stage.asks("a"), stage.forks("a", "twin")
    stage.runs_out_of_time(waiting)
    assert waiting.endings
    stage.copied("a")
    assert tokens_of(fork) == 0
    assert running.runs


# --- windows ------------------------------------------------------------------------------------------------------------


def growing(given: Callable[..., Stage], *, cap: int) -> Stage:
    """`a` is about to end a turn with 30 tokens, for which its first window of 20 is too small; `twin` has that first window."""
    stage = given(cap=cap)
    for agent in ("a", "twin"):
        stage.has(agent, ALPHA, context=80, ladder=(20, 40))
    stage.converses("a", tokens=30)
    return stage


def test_a_clone_of_a_conversation_that_grew_is_booked_the_window_that_it_needs(given: Callable[..., Stage]) -> None:
    stage = growing(given, cap=1000)
    fork = stage.forks("a", "twin")
    assert stage.state.agents[TWIN].window_in_use == 40
    stage.copied("a")
    assert tokens_of(fork) == 30
    assert stage.converses("twin", tokens=31).endings


def test_a_clone_whose_window_cannot_be_booked_is_refused_and_leaves(given: Callable[..., Stage]) -> None:
    stage = given(cap=330)
    for agent in ("a", "twin"):
        stage.has(agent, ALPHA, kind="best_effort", context=80, ladder=(20, 40))
    stage.converses("a", tokens=30)
    stage.reads_device(strangers=300)
    stage.settle()
    before = where(stage, "a")
    fork, turn = stage.forks("a", "twin"), stage.asks("twin")
    stage.settle()
    error = fork.failed_with(WindowRefused)
    assert (error.agent_id, error.window, error.needed_tokens) == ("twin", 20, 30)
    turn.failed_with(UnknownAgent)
    assert stage.agents == ["a"]
    assert where(stage, "a") == before


def test_a_guaranteed_sources_clone_needs_no_other_window(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    for agent in ("a", "twin"):
        stage.has(agent, ALPHA, kind="guaranteed", context=80, ladder=(20, 40))
    stage.converses("a", tokens=70)
    fork = stage.forks("a", "twin")
    stage.settle()
    assert tokens_of(fork) == 70


# --- what comes between -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaver", ["a", "twin"])
def test_a_waiting_fork_ends_with_either_of_them_and_the_clone_leaves(pair: Stage, leaver: str) -> None:
    turn, fork, early = pair.asks("a"), pair.forks("a", "twin"), pair.asks("twin")
    gone = pair.unregisters(leaver)
    assert fork.failed_with(UnknownAgent).agent_id == leaver
    if leaver == "twin":
        assert gone.is_done, "it waits for no turn of its source"
        assert turn.runs
    early.failed_with(TurnCancelled)
    pair.settle()
    assert pair.agents == (["a"] if leaver == "twin" else [])


@pytest.mark.parametrize("leaver", ["a", "twin"])
@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("seated", [False, True])
def test_whoever_leaves_in_the_middle_of_the_copy_is_gone_when_it_is_made(
    pair: Stage, leaver: str, dies: bool, seated: bool
) -> None:
    if not seated:
        saved(pair, "a")
    fork = pair.forks("a", "twin")
    if dies:
        pair.dies(f"worker of {leaver}")
    else:
        gone = pair.unregisters(leaver)
        assert gone.waits
    assert leaver in pair.agents
    pair.copied("a")
    assert tokens_of(fork) == 8
    pair.settle()
    assert {"a", "twin"} & set(pair.agents) == {"a", "twin"} - {leaver}


def test_a_clone_of_a_clone_that_fails_leaves_too(pair: Stage) -> None:
    pair.has("third", ALPHA)
    pair.asks("a")
    forks = [pair.forks("a", "twin"), pair.forks("twin", "third")]
    pair.unregisters("a")
    assert [fork.failed_with(UnknownAgent).agent_id for fork in forks] == ["a", "twin"]
    pair.settle()
    assert pair.agents == []


def test_cancelling_the_sources_turns_ends_a_waiting_fork_too(pair: Stage) -> None:
    turn, fork = pair.asks("a"), pair.forks("a", "twin")
    pair.cancels("a")
    fork.failed_with(TurnCancelled)
    pair.finished(turn)
    pair.settle()
    assert pair.agents == ["a"]


def test_a_copy_under_way_is_made_whatever_is_cancelled(pair: Stage) -> None:
    fork = pair.forks("a", "twin")
    pair.cancels("a")
    assert fork.waits
    pair.copied("a")
    assert tokens_of(fork) == 8


def test_a_model_that_cannot_be_loaded_ends_the_forks_that_wait_behind_its_turns(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    for agent in ("a", "twin"):
        stage.has(agent, ALPHA, kind="best_effort")
    turn, fork, early = stage.asks("a"), stage.forks("a", "twin"), stage.asks("twin")
    stage.load_failed(ALPHA)
    turn.failed_with(ModelLoadFailed)
    fork.failed_with(ModelLoadFailed)
    assert early.endings
    stage.settle()
    assert stage.agents == ["a"]


def test_the_end_of_everything_ends_forks(pair: Stage) -> None:
    waiting, copied = pair.forks("a", "twin"), None
    pair.has("third", ALPHA)
    copied = pair.forks("a", "third")
    pair.closes_down()
    pair.settle()
    assert tokens_of(waiting) == 8
    assert copied.answers


def test_nobody_becomes_a_clone_who_is_somebody_already(pair: Stage) -> None:
    pair.has("b", ALPHA)
    pair.converses("b")
    assert pair.forks("a", "b").failed_with(DuplicateAgent).agent_id == "b"
    assert pair.forks("a", "a").failed_with(DuplicateAgent).agent_id == "a"
    pair.asks("twin")
    assert pair.forks("a", "twin").failed_with(DuplicateAgent).agent_id == "twin"
    pair.has("c", BETA)
    assert pair.forks("a", "c").failed_with(UnknownAgent).agent_id == "a", "another of that name has come meanwhile"
    assert pair.forks("nobody", "twin").failed_with(UnknownAgent).agent_id == "nobody"
    assert pair.forks("a", "nobody").failed_with(UnknownAgent).agent_id == "nobody"
