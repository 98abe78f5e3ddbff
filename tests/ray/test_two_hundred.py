"""Two hundred registrations from twenty processes, some of which die half-way: everybody is answered, nothing is promised twice,
and everything comes back.

What each process does is drawn beforehand from a seed; how it goes then is up to the machine. So the test asserts what must hold
however it goes, and has the ledger's own log for what held at every moment in between.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, TaskCancelledError

from actors.connection import own
from actors.deaths import Owner
from conductor.errors import AdmissionRefused, RefusalCode, TurnTimedOut, UnknownAgent, WindowFull, WindowRefused
from conductor.types import Admission, DecodeResult, LedgerEntry, MirrorState, ServiceClass
from tests.support.conducting import Conduct, Conductor
from tests.support.eventually import eventually
from tests.support.tiny_gguf import write_tiny_gguf

PROCESSES, VISITS_EACH, DOOMED = 20, 10, 4
CANCELLED = "cancelled"
#: How late an answer may come. Between a deadline and its answer lie a decision and, for whoever was admitted just before it, the
#: load of a tiny model: milliseconds. The rest is for twenty processes, llama.cpp and Ray on the two cores of a CI machine.
ALLOWANCE_S = 5.0
#: so many lines the ledger's log keeps
LOG_LINES = 16_384


@dataclass(frozen=True, slots=True)
class Visit:
    """One registration, and what is done with it."""

    agent: str
    model: str
    window: int
    service_class: str
    priority: int
    wait_s: float
    cancelled_after_s: float | None
    prompts: tuple[str, ...]
    turn_wait_s: float | None


@dataclass(frozen=True, slots=True)
class Account:
    """A call and its one answer: a result, the project's error, or CANCELLED."""

    call: str
    visit: Visit
    answer: Any
    took_s: float


@ray.remote(num_cpus=0)
class Visitor:
    """A process that registers, talks and leaves, one visit after another or several at once."""

    def __init__(self, conductor: Any) -> None:
        self._conductor, self._owner = conductor, Owner.current()
        self._lock = threading.Lock()
        self._sent = self._answered = 0

    def is_here(self) -> bool:
        return True

    def goes_through(self, visits: list[Visit], *, at_once: int, dies_after: int | None) -> list[Account]:
        with ThreadPoolExecutor(at_once) as threads:
            accounts = threads.map(lambda visit: list(self._visit(visit, len(visits), dies_after)), visits)
            return [account for visit in accounts for account in visit]

    def _visit(self, visit: Visit, of: int, dies_after: int | None) -> Iterator[Account]:
        """A call that Ray cancelled may have been carried out: the agent has to be sent home to be sure that it is not there."""
        registration = self._register(visit)
        yield registration
        self._perhaps_die(of, dies_after)
        if isinstance(registration.answer, Admission):
            for prompt in visit.prompts:
                yield self._ask("decode", visit, visit.agent, prompt, max_tokens=12, wait_s=visit.turn_wait_s)
        if isinstance(registration.answer, Admission) or registration.answer == CANCELLED:
            yield self._ask("unregister", visit, visit.agent)

    def _register(self, visit: Visit) -> Account:
        options = {
            "window": visit.window,
            "service_class": visit.service_class,
            "priority": visit.priority,
            "wait_s": visit.wait_s,
            "owner": self._owner,
        }
        began_at = time.monotonic()
        call = self._conductor.register.remote(visit.agent, visit.model, **options)
        with self._lock:
            self._sent += 1
        if visit.cancelled_after_s is not None:
            ray.wait([call], timeout=visit.cancelled_after_s)
            ray.cancel(call)
        return Account("register", visit, answer_to(call), time.monotonic() - began_at)

    def _ask(self, method: str, visit: Visit, *arguments: Any, **options: Any) -> Account:
        began_at = time.monotonic()
        answer = answer_to(getattr(self._conductor, method).remote(*arguments, **options))
        return Account(method, visit, answer, time.monotonic() - began_at)

    def _perhaps_die(self, of: int, dies_after: int | None) -> None:
        """Without a word, as soon as every registration was sent and so many were answered."""
        with self._lock:
            self._answered += 1
            if dies_after is not None and self._sent == of and self._answered >= dies_after:
                os.kill(os.getpid(), signal.SIGKILL)


def answer_to(call: Any) -> Any:
    try:
        return ray.get(call)
    except TaskCancelledError:
        return CANCELLED
    except Exception as error:
        return own(error)


# --- what is drawn ------------------------------------------------------------------------------------------------------

SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "qwen": {"architecture": "qwen2", "n_layer": 3},
    "mamba": {"architecture": "mamba"},
    "deep": {"n_layer": 6, "n_embd": 96},
    "wide": {"n_embd": 128, "n_ff": 512},
    "large": {"n_embd": 192, "n_ff": 768, "n_kv_head": 4},
}


def visits_of(process: int, rng: random.Random) -> list[Visit]:
    return [
        Visit(
            agent=f"process {process}, visit {n}",
            model=rng.choice(list(SIZES)),
            window=rng.choice((256, 300, 512, 1024, 2048, 4096)),
            service_class=rng.choice(list(ServiceClass)).value,
            priority=rng.randint(-1, 3),
            wait_s=rng.choice((0.0, rng.uniform(0.05, 1.0), rng.uniform(1.0, 4.0), 6.0)),
            cancelled_after_s=rng.uniform(0.0, 0.5) if rng.random() < 0.2 else None,
            prompts=tuple("hello world agent " * rng.randint(1, 20) for _ in range(rng.randint(0, 3))),
            turn_wait_s=rng.choice((None, None, rng.uniform(0.0, 0.5), 5.0)),
        )
        for n in range(VISITS_EACH)
    ]


@pytest.fixture
def crowded(conduct: Conduct, tmp_path: Path) -> Conductor:
    """Room for a few of the models at once, or for one of them with a large window.

    The landlord never goes out, and beside it the largest do not fit: they wait in vain, and others behind them.
    """
    models = {name: write_tiny_gguf(tmp_path / f"{name}.gguf", seed=n, **SIZES[name]) for n, name in enumerate(SIZES)}
    conductor: Conductor = conduct(
        models,
        device={"kind": "host", "host_bytes": "16MiB"},
        live_contexts=2,
        context={"first_window": 256},
        host_budget="512KiB",
        disk={"directory": str(tmp_path / "kv"), "budget": "1MiB"},
        ageing_s=2.0,
        growth_wait_s=1.0,
    )
    conductor.call("register", "landlord", "small", window=1024, service_class="guaranteed")
    return conductor


# --- what must hold -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))])
def test_two_hundred_who_come_from_twenty_processes_are_answered_in_time_and_leave_nothing(crowded: Conductor, seed: int) -> None:
    rng = random.Random(seed)
    plans = [visits_of(process, rng) for process in range(PROCESSES)]
    doomed = set(rng.sample(range(PROCESSES), DOOMED))
    visitors = [Visitor.remote(crowded.handle) for _ in plans]
    ray.get([visitor.is_here.remote() for visitor in visitors])

    lives = [
        visitor.goes_through.remote(
            plan,
            at_once=VISITS_EACH if process in doomed else rng.choice((1, 2, 5)),
            dies_after=VISITS_EACH // 2 if process in doomed else None,
        )
        for process, (visitor, plan) in enumerate(zip(visitors, plans, strict=True))
    ]
    accounts = [account for process, life in enumerate(lives) for account in told_by(life, dies=process in doomed)]

    assert_answered_once(accounts, VISITS_EACH * (PROCESSES - DOOMED))
    assert_deadlines_kept(accounts)
    crowded.call("unregister", "landlord")
    # The processes that are left still live: what is gone now was given back, not taken back.
    eventually(lambda: is_back_to_zero(crowded), within_s=20)
    crowded.call("check")
    mirror = crowded.call("mirrored", 5.0)
    assert (mirror.state, mirror.used_mib, mirror.ledger_mib) == (MirrorState.EQUAL, 0, 0)
    assert_never_overcommitted(crowded.call("ledger_log"), cap_bytes=crowded.status().ledger.max_bytes)
    for visitor in visitors:
        ray.kill(visitor)


#: what each call may be answered with
EXPECTED: dict[str, tuple[type, ...]] = {
    "register": (Admission, AdmissionRefused, str),
    "decode": (DecodeResult, WindowFull, WindowRefused, TurnTimedOut),
    "unregister": (type(None), UnknownAgent),
}


def told_by(life: Any, *, dies: bool) -> list[Account]:
    if not dies:
        accounts: list[Account] = ray.get(life, timeout=120)
        return accounts
    with pytest.raises(RayActorError):
        ray.get(life, timeout=120)
    return []


def assert_answered_once(accounts: list[Account], registrations: int) -> None:
    registered = [account for account in accounts if account.call == "register"]
    assert len({account.visit.agent for account in registered}) == len(registered) == registrations
    for account in accounts:
        assert isinstance(account.answer, EXPECTED[account.call]), account
        if account.answer == CANCELLED or isinstance(account.answer, UnknownAgent):
            assert account.visit.cancelled_after_s is not None, account
    codes = {account.answer.code for account in registered if isinstance(account.answer, AdmissionRefused)}
    assert codes >= {RefusalCode.CAP, RefusalCode.TIMEOUT}, "some would not wait, and some waited in vain"
    assert any(isinstance(account.answer, Admission) for account in registered)


def assert_deadlines_kept(accounts: list[Account]) -> None:
    patience = {id(a): a.visit.wait_s for a in accounts if a.call == "register"}
    patience |= {id(a): a.visit.turn_wait_s or 0.0 for a in accounts if isinstance(a.answer, TurnTimedOut)}
    assert [a for a in accounts if id(a) in patience and a.took_s > patience[id(a)] + ALLOWANCE_S] == []


def is_back_to_zero(conductor: Conductor) -> bool:
    status = conductor.status()
    return conductor.is_empty() and (status.waiting, status.host_memory.disk_used_bytes) == ((), 0)


def assert_never_overcommitted(log: tuple[LedgerEntry, ...], *, cap_bytes: int) -> None:
    """No stranger came, so the cap never moved, and nothing may ever have been booked beyond it."""
    assert len(log) < LOG_LINES, "it holds everything since the start"
    assert {entry.max_bytes for entry in log} == {cap_bytes}
    assert [entry for entry in log if entry.allocated_bytes > entry.max_bytes or entry.overdrawn_bytes] == []
    assert max(entry.allocated_bytes for entry in log) > 0.8 * cap_bytes, "there was something to go beyond"
    assert log[-1].allocated_bytes == 0
