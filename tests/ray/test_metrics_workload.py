"""A scrape while agents are at work: its figures agree with each other all the time, and with ledger and results in the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from conductor.errors import AdmissionRefused
from conductor.types import DecodeResult
from tests.support.conducting import Conduct, Conductor
from tests.support.eventful import PROMPTS, live_through_everything, short_of_everything
from tests.support.eventually import eventually
from tests.support.scraping import REPORTED_WITHIN_S, Sample, differences, documented, scraped, shape, total
from tests.support.talk import SHIPPED

AGENTS = {"ann": "coder", "ben": "reviewer", "cat": "documenter", "dan": "coder"}


@dataclass
class Workload:
    """Agents that take turns, and a newcomer now and then who is admitted, or refused."""

    conductor: Conductor
    seconds: float
    results: list[DecodeResult] = field(default_factory=list)
    admitted: int = 0
    refused: int = 0

    def run(self) -> None:
        deadline = time.monotonic() + self.seconds
        for id, model in AGENTS.items():
            self.conductor.call("register", id, model, window=512, service_class="best_effort" if id == "dan" else "shared")
            self.admitted += 1
        with ThreadPoolExecutor(len(AGENTS) + 1) as threads:
            done: list[Future[None]] = [threads.submit(self._talk, id, deadline) for id in AGENTS]
            done.append(threads.submit(self._come_and_go, deadline))
        for future in done:
            future.result()

    def _talk(self, id: str, deadline: float) -> None:
        for turn in self._until(deadline):
            self.results.append(self.conductor.call("decode", id, PROMPTS[turn % 3], max_tokens=16, reset=True))

    def _come_and_go(self, deadline: float) -> None:
        for turn in self._until(deadline):
            if turn % 2:
                with pytest.raises(AdmissionRefused):
                    self.conductor.call("register", "eve", "coder", window=100_000, service_class="guaranteed")
                self.refused += 1
            else:
                self.conductor.call("register", "eve", "reviewer", window=256)
                self.admitted += 1
                self.results.append(self.conductor.call("decode", "eve", "def", max_tokens=4))
                self.conductor.call("unregister", "eve")

    @staticmethod
    def _until(deadline: float) -> Iterator[int]:
        for turn in count():
            if time.monotonic() > deadline:
                return
            yield turn


def contradictions(samples: list[Sample]) -> list[str]:
    """What cannot be true together in one scrape."""
    names = (
        "cap_bytes", "booked_bytes", "drift_bytes", "device_total_bytes", "device_used_bytes", "device_free_bytes",
        "device_others_bytes", "mirror_state", "mirror_booked_bytes", "mirror_difference_bytes", "agents", "models",
        "kv_bytes", "kv_budget_bytes", "slots", "slots state=busy",
    )  # fmt: skip
    told = {name: total(samples, name) for name in names}
    values = {name: value for name, value in told.items() if value is not None}
    if missing := told.keys() - values.keys():
        return [f"{name} is missing" for name in sorted(missing)]
    ledger_bytes = values["mirror_booked_bytes"] - values["mirror_difference_bytes"]
    rules = {
        "no more is booked than the cap and the drift": values["booked_bytes"] <= values["cap_bytes"] + values["drift_bytes"],
        "the cap is within the device": 0 < values["cap_bytes"] <= values["device_total_bytes"],
        "used and free are all": values["device_used_bytes"] + values["device_free_bytes"] == values["device_total_bytes"],
        "others' is used": 0 <= values["device_others_bytes"] <= values["device_used_bytes"],
        "Ray's books have one state": values["mirror_state"] == 1,
        "the mirror is compared with the ledger": abs(ledger_bytes - values["booked_bytes"]) < 1024,
        "agents are as many as there can be": 0 < values["agents"] <= 4 + len(AGENTS) + 1,
        "models are as many as there are": 0 < values["models"] <= 4,
        "saved KV is within its budget": 0 <= values["kv_bytes"] <= values["kv_budget_bytes"],
        "turns run in slots": 0 <= values["slots state=busy"] <= values["slots"],
    }
    return [rule for rule, holds in rules.items() if not holds]


def counted(samples: list[Sample]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What only ever grows."""
    return {(s.name, frozenset(s.labels.items())): s.value for s in samples if s.type in ("counter", "histogram")}


def scrape_while(workload: Workload) -> list[list[Sample]]:
    """Run it. Returns the scrapes made meanwhile: each without a contradiction, and none behind the one before."""
    scrapes: list[list[Sample]] = []
    before = counted(scraped(workload.conductor))
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(workload.run)
        eventually(lambda: running.done() or total(scraped(workload.conductor), "models"), within_s=30, every_s=0.2)
        while not running.done():
            # one that is told of while Ray takes its report may be torn: the next is whole
            samples = eventually(lambda: _whole(scraped(workload.conductor)), within_s=20, every_s=0.3)
            now = counted(samples)
            assert {figure for figure, value in before.items() if now.get(figure, -1) < value} == set()
            scrapes.append(samples)
            before = now
            wait([running], timeout=0.5)
        running.result()
    return scrapes


def _whole(samples: list[Sample]) -> list[Sample]:
    return [] if contradictions(samples) else samples


def wrong_after(workload: Workload, *, turns: int = 0, generated: int = 0, admitted: int = 0, refused: int = 0) -> list[str]:
    """What the scrape says otherwise than ledger and results do. The figures: of what happened before."""
    status, results = workload.conductor.status(), workload.results
    turns += len(results)
    return differences(scraped(workload.conductor), {
        "booked_bytes": status.ledger.allocated_bytes,
        "mirror_booked_bytes": status.mirror.used_mib * 2**20,
        "cap_bytes": status.ledger.max_bytes,
        "agents": len(status.agents),
        "slots state=busy": 0,
        "waiting": 0,
        "kv_bytes place=host": status.host_memory.used_bytes,
        "turns_total": turns,
        "turn_seconds_count": turns,
        "time_to_first_token_seconds_count": turns,
        "queue_seconds_count call=turn": turns,
        "tokens_total kind=generated": generated + sum(result.generated_tokens for result in results),
        "admissions_total": admitted + workload.admitted,
        "refusals_total code=NEVER call=register": refused + workload.refused,
    })  # fmt: skip


def test_while_agents_work_a_scrape_is_consistent_and_afterwards_it_equals_ledger_and_results(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED, live_contexts=1, context={"first_window": 256})
    workload = Workload(conductor, seconds=5)
    assert len(scrape_while(workload)) > 1
    eventually(lambda: wrong_after(workload) == [], REPORTED_WITHIN_S, every_s=0.5)


@pytest.mark.slow
def test_a_minute_of_work_leaves_no_documented_metric_without_a_value(conduct: Conduct, endless: Path, tmp_path: Path) -> None:
    conductor = short_of_everything(conduct, endless, tmp_path)
    generated = live_through_everything(conductor, tmp_path / "kv")
    for id in ("ada", "bob", "cy", "di"):
        conductor.call("unregister", id)
    workload = Workload(conductor, seconds=60)
    scrapes = scrape_while(workload)
    assert len(scrapes) > 20
    for samples in scrapes[10:]:
        assert {shape(sample) for sample in samples} == documented()
    before = {"turns": 15, "generated": generated, "admitted": 8, "refused": 1}
    eventually(lambda: wrong_after(workload, **before) == [], REPORTED_WITHIN_S, every_s=0.5)
