"""What agents were promised, as their callers see it: classes, windows that grow, waiting, idling, KV that travels.

Through the real actor with real llama.cpp. Where tokens are compared, they were said before by an agent that had the device for
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

import actors
from actors.connection import own
from conductor.errors import AdmissionRefused, ConductorError, RefusalCode, TurnTimedOut, WindowRefused
from conductor.types import (
    AgentStatus,
    DecodeResult,
    Kind,
    KvPlace,
    ModelState,
    ServiceClass,
    WaitingStatus,
)
from conductor.units import MIB
from tests.support.conducting import Conduct, Conductor
from tests.support.eventually import eventually
from tests.support.talk import ANOTHER, ENDLESS, SHIPPED, TASK
from tests.support.tiny_gguf import write_tiny_gguf

GUARANTEED, BEST_EFFORT = ServiceClass.GUARANTEED.value, ServiceClass.BEST_EFFORT.value
#: prompts of a conversation, each of which fills a good part of the smallest context
PROMPTS = tuple(f'\n\ndef task_{n}(x):\n    """Return x + {n}."""\n' * 4 for n in range(4))
FIRST_WINDOW = {"first_window": 256}


def agent(conductor: Conductor, id: str) -> AgentStatus:
    return next(agent for agent in conductor.status().agents if agent.id == id)


def kv_of(conductor: Conductor, id: str) -> KvPlace:
    return agent(conductor, id).kv


def weights_on_the_device(conductor: Conductor) -> list[str]:
    return [model.key for model in conductor.status().models if model.state is ModelState.RESIDENT]


def waiting(conductor: Conductor) -> tuple[WaitingStatus, ...]:
    return conductor.status().waiting


def expires_in_s(waiting: WaitingStatus) -> float:
    assert waiting.expires_in_s is not None
    return waiting.expires_in_s


def says(conductor: Conductor, id: str, prompts: Sequence[str] = PROMPTS, **options: Any) -> list[tuple[int, ...]]:
    return [conductor.call("decode", id, prompt, **{"max_tokens": 24, **options}).tokens for prompt in prompts]


def unhurried(conductor: Conductor, model: str, prompts: Sequence[str] = PROMPTS, **terms: Any) -> list[tuple[int, ...]]:
    """What an agent says that has the device for itself, and its whole window from the start."""
    conductor.call("register", "unhurried", model, service_class=GUARANTEED, **{"window": 1024, **terms})
    said = says(conductor, "unhurried", prompts)
    conductor.call("unregister", "unhurried")
    return said


def raised_by(call: Any) -> Any:
    """The project's error that the call ends with; it arrives as its own class."""
    with pytest.raises(ConductorError) as raised:
        ray.get(call, timeout=60)
    return own(raised.value)


# --- service classes ----------------------------------------------------------------------------------------------------


def test_a_guaranteed_agent_stays_where_it_is_while_the_others_swap(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED, live_contexts=1)
    expected = unhurried(conductor, "coder", PROMPTS[:3])
    admission = conductor.call("register", "gina", "coder", window=1024, service_class=GUARANTEED)
    assert admission.first_window == admission.window == 1024
    assert kv_of(conductor, "gina") is KvPlace.SLOT
    others = {"sam": "coder", "sue": "reviewer", "bea": "documenter"}
    for other, model in others.items():
        conductor.call("register", other, model, service_class=BEST_EFFORT if other == "bea" else "shared")
    said, swapped = [], 0
    for prompt in PROMPTS[:3]:
        for other in others:
            turn = conductor.call("decode", other, "def hello():", max_tokens=4)
            assert turn.kv_swap_evicted in (None, *others)
            assert kv_of(conductor, "gina") is KvPlace.SLOT
            swapped += turn.kv_swap_restored
        own_turn = conductor.call("decode", "gina", prompt, max_tokens=24)
        assert (own_turn.kv_swap_evicted, own_turn.kv_swap_restored) == (None, False)
        assert (own_turn.swap_bytes, own_turn.recomputed_tokens, own_turn.window_growths) == (0, 0, 0)
        said.append(own_turn.tokens)
    assert said == expected
    assert swapped == 6


def test_a_guaranteed_agent_is_answered_while_somebody_elses_turn_never_ends(conduct: Conduct, endless: Path) -> None:
    conductor = conduct({"endless": endless})
    conductor.call("register", "gina", "endless", service_class=GUARANTEED)
    conductor.call("register", "sam", "endless")
    turn = conductor.handle.decode.remote("sam", "x", **ENDLESS)
    eventually(lambda: conductor.is_busy("sam"), within_s=20)
    assert conductor.call("decode", "gina", "x", max_tokens=3).text == "abc"
    assert conductor.is_busy("sam")
    ray.cancel(turn)


@pytest.fixture
def five(conduct: Conduct, tmp_path: Path) -> Conductor:
    """Five models on a device that has room for turns of two of them at once, and for the weights of never more than four."""
    models = {f"m{n}": write_tiny_gguf(tmp_path / f"m{n}.gguf", n_embd=128, n_ff=512, seed=n) for n in range(5)}
    return conduct(models, device={"kind": "host", "host_bytes": "11MiB"}, live_contexts=2, context=FIRST_WINDOW)


GREETINGS = tuple(f"hello agent, the world {n}" * 2 for n in range(3))


def test_best_effort_agents_share_a_device_that_cannot_hold_their_models_together(five: Conductor) -> None:
    models = [f"m{n}" for n in range(5)]
    expected = {model: unhurried(five, model, GREETINGS, window=256) for model in models}
    for model in models:
        assert not five.call("register", model, model, window=256, service_class=BEST_EFFORT).model_loaded
    status = five.status()
    assert {model.state for model in status.models} == {ModelState.PARKED}
    assert {reserved.kind for reserved in status.ledger.reservations} == {Kind.HEADROOM}
    said: dict[str, list[tuple[int, ...]]] = {model: [] for model in models}
    for prompt in GREETINGS:
        turns = [five.handle.decode.remote(model, prompt, max_tokens=24) for model in models]
        for model, turn in zip(models, ray.get(turns, timeout=120), strict=True):
            said[model].append(turn.tokens)
        assert 1 <= len(weights_on_the_device(five)) < 5
    assert said == expected


def test_a_guaranteed_newcomer_takes_the_room_of_best_effort_agents_and_ends_none_of_them(five: Conductor) -> None:
    models = ("m0", "m1")
    expected = {model: unhurried(five, model, GREETINGS, window=256) for model in models}
    for model in models:
        five.call("register", model, model, window=256, service_class=BEST_EFFORT)
    said = {model: says(five, model, GREETINGS[:1]) for model in models}
    assert kv_of(five, "m0") is kv_of(five, "m1") is KvPlace.SLOT
    five.call("register", "gina", "m2", window=256, service_class=GUARANTEED)
    assert kv_of(five, "gina") is KvPlace.SLOT
    assert KvPlace.HOST in {kv_of(five, "m0"), kv_of(five, "m1")}
    for prompt in GREETINGS[1:]:
        for model in models:
            said[model] += says(five, model, [prompt])
            assert len(weights_on_the_device(five)) == 2
    assert said == expected
    assert kv_of(five, "gina") is KvPlace.SLOT


# --- windows that grow --------------------------------------------------------------------------------------------------


def test_a_window_grows_in_a_chat_and_nobody_can_tell_from_its_answers(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED, context=FIRST_WINDOW)
    grows = actors.spawn_agent("grows", "coder", conductor=conductor.handle, window=1024)
    whole = actors.spawn_agent("whole", "coder", conductor=conductor.handle, window=1024, service_class=GUARANTEED)
    assert [ray.get(chat.admission.remote()).first_window for chat in (grows, whole)] == [256, 1024]
    growths = 0
    for text in (TASK, ANOTHER, TASK, ANOTHER, TASK, ANOTHER):
        hurried, unhurried = ray.get([chat.ask.remote(text, max_tokens=100) for chat in (grows, whole)])
        assert hurried.tokens == unhurried.tokens
        assert (hurried.recomputed_tokens, unhurried.window_growths) == (0, 0)
        growths += hurried.window_growths
    assert growths > 0
    assert agent(conductor, "grows").window_in_use > 256
    assert agent(conductor, "grows").tokens > 256
    for chat in (grows, whole):
        ray.kill(chat)


@pytest.fixture
def cramped(conduct: Conduct, endless: Path) -> Conductor:
    """Ada may say 512 tokens, and while Gil is there she has no room for more than 256."""
    conductor = conduct({"endless": endless}, device={"kind": "host", "host_bytes": "8MiB"}, context=FIRST_WINDOW)
    conductor.call("register", "gil", "endless", window=256, service_class=GUARANTEED)
    assert conductor.call("register", "ada", "endless", window=512).first_window == 256
    return conductor


def test_a_window_that_cannot_grow_is_refused_with_its_numbers_and_the_chat_goes_on_later(cramped: Conductor) -> None:
    assert cramped.call("decode", "ada", "x", max_tokens=10).text == "abcdefghij"
    refused = raised_by(cramped.handle.decode.remote("ada", max_tokens=300, wait_s=0))
    assert type(refused) is WindowRefused
    assert (refused.agent_id, refused.window, refused.needed_tokens) == ("ada", 256, 257)
    assert refused.text == ("abcdefghij" * 30)[: len(refused.text)]
    assert len(refused.text) > 200
    ledger, refusal = cramped.status().ledger, refused.refusal
    assert refusal.code is RefusalCode.CAP
    assert (refusal.cap_bytes, refusal.booked_bytes) == (ledger.max_bytes, ledger.allocated_bytes)
    assert refusal.requested_bytes > refusal.free_bytes
    assert {holder.holder for holder in refusal.holders} >= {"gil", "endless"}
    assert agent(cramped, "ada").tokens == 11
    assert agent(cramped, "ada").window_in_use == 256

    cramped.call("unregister", "gil")
    answer = cramped.call("decode", "ada", max_tokens=300, wait_s=0)
    assert answer.text == "abcdefghij" * 30
    assert answer.window_growths == 1


def test_a_turn_waits_for_its_window_in_sight_of_all_and_goes_on_when_somebody_leaves(cramped: Conductor) -> None:
    turn = cramped.handle.decode.remote("ada", "x", max_tokens=300, wait_s=60)
    eventually(lambda: [it.reason for it in waiting(cramped)] == ["room for a window of 257 tokens"], within_s=20)
    [queued] = waiting(cramped)
    assert (queued.what, queued.agent_id, queued.model, queued.position) == ("turn", "ada", "endless", 0)
    assert 0 < expires_in_s(queued) <= 60
    cramped.call("unregister", "gil")
    assert ray.get(turn, timeout=60).text == "abcdefghij" * 30
    assert waiting(cramped) == ()


# --- waiting ------------------------------------------------------------------------------------------------------------


def test_registrations_that_wait_are_seen_with_their_place_and_reason_and_leave_it_when_cancelled(cramped: Conductor) -> None:
    def register(id: str, **options: Any) -> Any:
        return cramped.handle.register.remote(id, "endless", window=256, service_class=GUARANTEED, **options)

    def in_line() -> list[str]:
        return [it.agent_id for it in waiting(cramped)]

    first = register("first", wait_s=60)
    eventually(lambda: in_line() == ["first"], within_s=20)
    second, urgent = register("second", wait_s=600), register("urgent", wait_s=30, priority=5)
    eventually(lambda: in_line() == ["urgent", "first", "second"], within_s=20)
    queue = waiting(cramped)
    assert [(it.what, it.model, it.position, it.priority) for it in queue] == [
        ("register", "endless", 0, 5), ("register", "endless", 1, 0), ("register", "endless", 2, 0),
    ]  # fmt: skip
    assert "must become free" in queue[0].reason
    assert [it.reason for it in queue[1:]] == ["1 before it", "2 before it"]
    assert all(0 < expires_in_s(it) <= most for it, most in zip(queue, (30, 60, 600), strict=True))
    assert all(it.requested_bytes == agent(cramped, "gil").context_bytes for it in queue)
    refused = raised_by(register("impatient"))
    assert (refused.code, refused.refusal.waiting_ahead) == (RefusalCode.CAP, 3)
    assert raised_by(register("late", wait_s=0.1)).code is RefusalCode.TIMEOUT

    ray.cancel(urgent)
    eventually(lambda: in_line() == ["first", "second"], within_s=20)
    cramped.call("unregister", "gil")
    assert ray.get(first, timeout=60).waited_s > 0
    assert in_line() == ["second"]
    cramped.call("unregister", "first")
    assert ray.get(second, timeout=60).agent_id == "second"


def test_a_turn_that_waits_is_seen_and_gives_up_in_time_with_the_session_as_it_was(conduct: Conduct, endless: Path) -> None:
    conductor = conduct({"endless": endless}, context={"slots": 1}, min_turn_ms=600_000)
    for id in ("ada", "bob", "cy"):
        conductor.call("register", id, "endless")
    assert conductor.call("decode", "cy", "x", max_tokens=3).text == "abc"
    running = conductor.handle.decode.remote("ada", "x", **ENDLESS)
    eventually(lambda: conductor.is_busy("ada"), within_s=20)
    patient = conductor.handle.decode.remote("bob", "x", max_tokens=3)
    [queued] = eventually(lambda: waiting(conductor), within_s=20)
    assert (queued.what, queued.agent_id, queued.position, queued.expires_in_s) == ("turn", "bob", 0, None)
    assert queued.reason == "its model's seat"
    given_up = raised_by(conductor.handle.decode.remote("cy", max_tokens=3, wait_s=0.2))
    assert type(given_up) is TurnTimedOut
    assert (given_up.agent_id, given_up.reason) == ("cy", queued.reason)
    assert given_up.waited_s >= 0.2
    ray.cancel(running)
    assert ray.get(patient, timeout=60).text == "abc"
    assert conductor.call("decode", "cy", max_tokens=3).text == "def"


# --- idling -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_agent_that_idles_too_long_is_let_go_and_comes_back_when_it_is_asked(conduct: Conduct) -> None:
    device = {"kind": "host", "host_bytes": "64MiB", "reread_s": 0.05}
    conductor = conduct(SHIPPED, idle_ttl_s=0.5, device=device)
    chat = actors.spawn_agent("ada", "coder", conductor=conductor.handle)
    first = ray.get(chat.ask.remote(TASK))
    eventually(conductor.is_empty, within_s=20)
    second = ray.get(chat.ask.remote(ANOTHER))
    assert second.prompt_tokens_reused == 0
    assert second.prompt_tokens > first.prompt_tokens + first.generated_tokens
    assert "def sub(a, b)" in second.text
    eventually(conductor.is_empty, within_s=20)
    *_, third = [ray.get(item) for item in chat.stream.remote(TASK, fresh=True)]
    assert isinstance(third, DecodeResult)
    assert third.text == first.text
    ray.kill(chat)


# --- KV that travels ----------------------------------------------------------------------------------------------------


def test_kv_goes_to_disk_when_host_memory_is_short_and_comes_back_as_it_was(conduct: Conduct, tmp_path: Path) -> None:
    """Host memory for one of them: Ada's is saved for Bob, goes to disk when Bob's is saved for Cy, and returns."""
    disk = {"directory": str(tmp_path / "kv"), "budget": "64MiB"}
    conductor = conduct(SHIPPED, host_budget="1MiB", disk=disk, live_contexts=1)
    expected = unhurried(conductor, "coder")
    for id, model in (("ada", "coder"), ("bob", "reviewer"), ("cy", "documenter")):
        conductor.call("register", id, model, window=1024)
    said = says(conductor, "ada", PROMPTS[:2])
    assert says(conductor, "bob", PROMPTS[:2])
    assert kv_of(conductor, "ada") is KvPlace.HOST
    assert says(conductor, "cy", PROMPTS[:1])
    assert (kv_of(conductor, "ada"), kv_of(conductor, "bob")) == (KvPlace.DISK, KvPlace.HOST)
    memory = conductor.status().host_memory
    assert (memory.moved_to_disk, memory.dropped, memory.damaged) == (1, 0, 0)
    assert memory.disk_used_bytes == agent(conductor, "ada").saved_bytes > 0
    assert any((tmp_path / "kv").rglob("*"))
    back = conductor.call("decode", "ada", PROMPTS[2], max_tokens=24)
    assert (back.kv_swap_restored, back.recomputed_tokens) == (True, 0)
    assert [*said, back.tokens, *says(conductor, "ada", PROMPTS[3:])] == expected


# --- other tasks' bytes -------------------------------------------------------------------------------------------------


def test_a_reservation_clears_what_idles_before_it_is_refused(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED, live_contexts=2)
    expected = unhurried(conductor, "coder", PROMPTS[:2])
    for id, model in (("ada", "coder"), ("bob", "reviewer")):
        conductor.call("register", id, model, window=512)
    said = says(conductor, "ada", PROMPTS[:1])
    assert says(conductor, "bob", PROMPTS[:1])
    assert kv_of(conductor, "ada") is kv_of(conductor, "bob") is KvPlace.SLOT
    ledger = conductor.status().ledger
    weights = sum(reserved.bytes for reserved in ledger.reservations if reserved.kind is Kind.WEIGHTS)
    largest = max(agent.context_bytes for agent in conductor.call("list"))
    everything_else = ledger.max_bytes - weights - largest
    assert everything_else > ledger.max_bytes - ledger.allocated_bytes
    reservation = conductor.call("reserve", "torch", everything_else)
    assert KvPlace.HOST in {kv_of(conductor, "ada"), kv_of(conductor, "bob")}
    refused = raised_by(conductor.handle.reserve.remote("jax", MIB))
    assert type(refused) is AdmissionRefused
    assert refused.code is RefusalCode.CAP
    assert [*said, *says(conductor, "ada", PROMPTS[1:2])] == expected
    assert conductor.call("release", reservation) == everything_else
