"""The metrics as Prometheus gets them: a real request to Ray's own port, held against docs/metrics.md."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter as Sums
from pathlib import Path

import pytest

from actors.metric_names import COUNTERS, GAUGES, HISTOGRAMS, Figure
from actors.metrics import Metrics, gauges_of
from conductor.errors import AdmissionRefused, InvalidRequest
from conductor.happenings import Happening, HistoryEntry
from conductor.types import MirrorState, ModelKey, Status
from conductor.units import MIB
from tests.conftest import Start
from tests.support.conducting import Conduct, Conductor
from tests.support.eventful import live_through_everything, short_of_everything
from tests.support.eventually import eventually
from tests.support.scraping import REPORTED_WITHIN_S, asked_for, differences, documented, queries, scraped, shape, total
from tests.support.talk import SHIPPED, until

# --- a conductor that has seen everything -------------------------------------------------------------------------------


@pytest.fixture
def conductor(conduct: Conduct, endless: Path, tmp_path: Path) -> Conductor:
    return short_of_everything(conduct, endless, tmp_path)


def test_every_metric_that_is_documented_is_exported_and_every_one_exported_is_documented(
    conductor: Conductor, tmp_path: Path
) -> None:
    generated = live_through_everything(conductor, tmp_path / "kv")
    expected = documented()
    assert len(expected) == len(GAUGES) + len(COUNTERS) + len(HISTOGRAMS)
    eventually(lambda: {shape(sample) for sample in scraped(conductor)} >= expected, REPORTED_WITHIN_S, every_s=0.5)
    samples = scraped(conductor)
    assert {shape(sample) for sample in samples} == expected
    had = {(sample.name, label) for sample in samples for label in (*sample.labels, "")}
    asked = {(name, label) for _, query in queries() for name, labels in asked_for(query) for label in (*labels, "")}
    assert asked - had == set()
    with contextlib.suppress(AssertionError):
        eventually(lambda: wrong_after_everything(conductor, generated) == [], REPORTED_WITHIN_S, every_s=0.5)
    assert wrong_after_everything(conductor, generated) == []


def wrong_after_everything(conductor: Conductor, generated: int) -> list[str]:
    """What a scrape says otherwise than the status and the history do, or than what was done says."""
    samples, status, history = scraped(conductor), conductor.status(), conductor.call("history")
    happened = Sums(entry.kind for entry in history)
    swapped_out = sum(entry.bytes for entry in history if entry.kind is Happening.SWAPPED_OUT)
    return differences(samples, {
        "cap_bytes": status.ledger.max_bytes,
        "booked_bytes": status.ledger.allocated_bytes,
        "booked_bytes kind=external": 0,
        "device_total_bytes": status.device.total_bytes,
        "mirror_state": 1,
        "mirror_state state=equal": 1,
        "models": 3,
        "estimate_error_ratio model=coder": 0,
        "agents": 4,
        "agents service_class=best_effort": 1,
        "agents service_class=guaranteed": 0,
        "waiting": 0,
        "kv_bytes place=host": status.host_memory.used_bytes,
        "kv_bytes place=disk": status.host_memory.disk_used_bytes,
        "kv_budget_bytes": 2 * MIB,
        "admissions_total": 8,
        "admissions_total service_class=shared": 5,
        "refusals_total": 2,
        "refusals_total call=register code=NEVER": 1,
        "refusals_total call=reserve code=NEVER": 1,
        "errors_total": 3,
        "errors_total call=register error=UnknownModel": 1,
        "turns_total": 15,
        "turns_total finish_reason=cancelled": 1,
        "tokens_total kind=generated": generated,
        "pools": 1,
        "slots": 1,
        "slots state=busy": 0,
        "swaps_total direction=on_to_disk": status.host_memory.moved_to_disk,
        "swaps_total direction=in": happened[Happening.SWAPPED_IN],
        "swaps_total": happened[Happening.SWAPPED_IN] + happened[Happening.SWAPPED_OUT],
        "swap_bytes_total direction=out": swapped_out - (total(samples, "swap_bytes_total direction=on_to_disk") or 0),
        "loads_total": happened[Happening.LOADED],
        "parks_total": happened[Happening.PARKED],
        "kv_moved_to_disk_total": status.host_memory.moved_to_disk,
        "kv_dropped_total": status.host_memory.dropped,
        "kv_damaged_total": 1,
        "turn_seconds_count": 15,
        "time_to_first_token_seconds_count": 15,
        "queue_seconds_count call=register": 8,
        "queue_seconds_count call=turn": 15,
        "swap_seconds_count": happened[Happening.SWAPPED_IN] + happened[Happening.SWAPPED_OUT],
        "load_seconds_count": happened[Happening.LOADED],
        "park_seconds_count": happened[Happening.PARKED],
        # what is unloaded again before it is looked at has no error to be seen
        "estimate_miss_ratio_bucket le=0.0001": total(samples, "estimate_miss_ratio_count") or -1,
    })  # fmt: skip


@pytest.mark.slow
def test_what_has_not_happened_yet_is_told_as_nothing_so_that_a_rate_sees_the_first_time(conductor: Conductor) -> None:
    def refusals() -> float | None:
        return total(scraped(conductor), "refusals_total call=register code=NEVER")

    before = eventually(refusals, REPORTED_WITHIN_S, every_s=0.5)
    assert before is not None
    assert before < 1e-9
    with pytest.raises(AdmissionRefused):
        conductor.call("register", "eve", "coder", window=100_000, service_class="guaranteed")
    eventually(lambda: refusals() == 1, REPORTED_WITHIN_S, every_s=0.5)


@pytest.mark.slow
def test_a_gauge_follows_what_it_shows(conductor: Conductor) -> None:
    def external() -> float | None:
        return total(scraped(conductor), "booked_bytes kind=external")

    reservation = conductor.call("reserve", "torch", 12345)
    eventually(lambda: external() == 12345, REPORTED_WITHIN_S, every_s=0.5)
    conductor.call("release", reservation)
    eventually(lambda: external() == 0, REPORTED_WITHIN_S, every_s=0.5)


# --- without Ray --------------------------------------------------------------------------------------------------------


class Paper:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.begun: list[Figure] = []
        self.gauges: dict[Figure, float] = {}
        self.counters: dict[Figure, int] = {}
        self.observed: dict[Figure, list[float]] = {}

    def begin(self, figure: Figure) -> None:
        self.begun.append(figure)

    def set(self, figure: Figure, value: float) -> None:
        self.gauges[figure] = value

    def add(self, figure: Figure, more: int) -> None:
        assert more > 0
        self.counters[figure] = self.counters.get(figure, 0) + more

    def observe(self, figure: Figure, value: float) -> None:
        assert value >= 0
        self.observed.setdefault(figure, []).append(value)


class Torn(Paper):
    """A sink that takes nothing as long as it is torn."""

    torn, refused = True, 0

    def set(self, figure: Figure, value: float) -> None:
        if self.torn:
            self.refused += 1
            raise OSError("Ray is unwell")
        super().set(figure, value)


async def test_what_goes_wrong_with_figures_is_logged_once_and_neither_hurts_a_call_nor_loses_a_count(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    conductor, sink = await start(SHIPPED), Torn()
    metrics = Metrics(sink, period_s=0.01)
    telling = asyncio.create_task(metrics.run(conductor.status, conductor.history))
    metrics.admitted(await conductor.register("ada", "coder"))
    metrics.ended(await conductor.decode("ada", "def", max_tokens=2))
    metrics.ended(None)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest), metrics.errors_of("register"):
        await conductor.register("", "coder")
    await until(lambda: asyncio.sleep(0, sink.refused > 2))
    assert [record.levelno for record in caplog.records if record.name == "actors.metrics"] == [logging.WARNING] * 2

    sink.torn = False
    await until(lambda: asyncio.sleep(0, ("turns", ("length",)) in sink.counters))
    telling.cancel()
    assert sink.counters[("admissions", ("shared",))] == 1
    assert sink.counters[("errors", ("register", "InvalidRequest"))] == 1
    assert sink.counters[("tokens", ("generated",))] == 2
    assert sink.gauges[("cap_bytes", ())] == conductor.cap_bytes


async def test_gauges_are_told_for_what_nobody_has(start: Start) -> None:
    gauges = gauges_of(await (await start()).status())
    of_models = {"estimate_error_ratio", "home_bytes", "link_share", "pools", "slots"}
    assert {name for name, _ in gauges} == GAUGES.keys() - of_models - {"mirror_booked_bytes", "mirror_difference_bytes"}
    assert gauges["mirror_state", (MirrorState.UNMIRRORED.value,)] == 1
    assert len([1 for name, _ in gauges if name == "agents"]) == 12
    assert {values: value for (name, values), value in gauges.items() if name == "waiting"} == {("register",): 0, ("turn",): 0}


async def test_calls_are_counted_under_names_that_are_declared(start: Start) -> None:
    conductor, sink = await start(SHIPPED), Paper()
    metrics = Metrics(sink, period_s=0.01)
    with pytest.raises(AdmissionRefused), metrics.errors_of("reserve"):
        await conductor.reserve("torch", 1 << 40)
    await conductor.register("ada", "coder")
    metrics.ended(await conductor.decode("ada", "def", max_tokens=2))
    telling = asyncio.create_task(metrics.run(conductor.status, conductor.history))
    await until(lambda: asyncio.sleep(0, sink.counters))
    telling.cancel()
    assert sink.counters[("refusals", ("reserve", "NEVER"))] == 1
    assert sink.counters[("loads", ("coder", "file"))] == 1
    assert {"load_seconds", "time_to_first_token_seconds", "estimate_miss_ratio"} <= {name for name, _ in sink.observed}
    assert set(sink.begun) >= sink.counters.keys() - {figure for figure in sink.counters if figure[0] in ("errors", "loads")}
    tables = ((GAUGES, sink.gauges), (COUNTERS, sink.begun), (COUNTERS, sink.counters), (HISTOGRAMS, sink.observed))
    for table, told in tables:
        assert [figure for figure in told if len(table[figure[0]].labels) != len(figure[1])] == []


async def test_weights_that_come_back_are_told_from_weights_that_come(start: Start) -> None:
    status, sink = await (await start()).status(), Paper()
    kinds = (Happening.LOADED, Happening.PARKED, Happening.LOADED, Happening.UNLOADED, Happening.LOADED, Happening.SWAPPED_IN)
    entries = [HistoryEntry(n + 1, n, kind, None, ModelKey("m"), 5, 2000.0, "") for n, kind in enumerate(kinds)]
    asked: list[int] = []

    async def now() -> Status:
        return status

    async def since(number: int) -> tuple[HistoryEntry, ...]:
        asked.append(number)
        return tuple(entries[number : number + 2])

    telling = asyncio.create_task(Metrics(sink, period_s=0).run(now, since))
    await until(lambda: asyncio.sleep(0, len(asked) > 4))
    telling.cancel()
    assert asked[:5] == [0, 2, 4, 6, 6]
    assert {figure: count for figure, count in sink.counters.items() if figure[1]} == {
        ("loads", ("m", "file")): 2,
        ("loads", ("m", "parked")): 1,
        ("parks", ("m",)): 1,
        ("swaps", ("in",)): 1,
        ("swap_bytes", ("in",)): 5,
    }
    assert sink.observed[("load_seconds", ("parked",))] == [2.0]
