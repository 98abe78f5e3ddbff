"""The metrics as Prometheus gets them: a real request to Ray's own port, held against docs/metrics.md."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

import actors
from actors.metrics import COUNTERS, GAUGES, Figure, Metrics, gauges_of
from conductor.errors import AdmissionRefused, InvalidRequest, UnknownModel
from conductor.types import DecodeResult, KvPlace
from conductor.units import MIB
from tests.conftest import Start
from tests.support.conducting import Conduct, Conductor
from tests.support.eventually import eventually
from tests.support.talk import ENDLESS, ROOT, SHIPPED, until

REPORTED_WITHIN_S = 60.0
PROMPTS = tuple(f'\n\ndef task_{n}(x):\n    """Return x + {n}."""\n' * 4 for n in range(3))
ROW = re.compile(r"\| `(ray_vram_conductor_\w+)` \| (\w+) \| ([\w`, ]*)\| \S.* \|")


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    type: str
    labels: dict[str, str]
    value: float


def documented() -> set[tuple[str, str, frozenset[str]]]:
    """(name, type, labels) of each row of the table."""
    rows = [ROW.fullmatch(line) for line in (ROOT / "docs" / "metrics.md").read_text("utf-8").splitlines() if "| `ray_" in line]
    assert all(rows)
    return {(row[1], row[2], frozenset(re.findall(r"`(\w+)`", row[3]))) for row in rows if row}


def scraped(conductor: Conductor) -> list[Sample]:
    """What this conductor's metrics are now, as a Prometheus server would get them."""
    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30) as page:
        text = page.read().decode()
    return [
        Sample(sample.name, family.type, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("conductor") == conductor.config.ray.name
    ]


RAYS_OWN = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "conductor"}


def shape(sample: Sample) -> tuple[str, str, frozenset[str]]:
    own = {label for label in sample.labels if label not in RAYS_OWN and not label.startswith("otel_")}
    return sample.name, sample.type, frozenset(own)


# --- a conductor that has seen everything -------------------------------------------------------------------------------


@pytest.fixture
def conductor(conduct: Conduct, endless: Path, tmp_path: Path) -> Conductor:
    """Host memory and disk for about one KV each."""
    disk = {"directory": str(tmp_path / "kv"), "budget": "1MiB"}
    models = {**SHIPPED, "endless": endless}
    context = {"first_window": 256, "slots": 1}
    return conduct(models, context=context, live_contexts=1, min_turn_ms=10, host_budget="1MiB", disk=disk)


def live_through_everything(conductor: Conductor, kv_directory: Path) -> int:
    """Ada's KV goes to disk and is damaged there, Bob's finds no place any more, and some are refused.

    Returns the tokens that were generated.
    """
    call, generated = conductor.call, stand_still(conductor)
    for id, model in (("ada", "coder"), ("bob", "reviewer"), ("cy", "documenter"), ("di", "coder")):
        call("register", id, model, window=1024, service_class="best_effort" if id == "di" else "shared")
    for id in ("ada", "bob"):
        for prompt in PROMPTS:
            generated += call("decode", id, prompt, max_tokens=24).generated_tokens
    for id in ("cy", "di"):
        *_, result = actors.stream(conductor.handle, id, PROMPTS[0] + PROMPTS[1], max_tokens=24)
        assert isinstance(result, DecodeResult)
        generated += result.generated_tokens
    places = {agent.id: agent.kv for agent in call("list")}
    assert places == {"ada": KvPlace.DISK, "bob": KvPlace.TOKENS, "cy": KvPlace.HOST, "di": KvPlace.SLOT}
    [file] = [path for path in kv_directory.rglob("*") if path.is_file() and path.stat().st_size > 4096]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = call("decode", "ada", "def more(x):", max_tokens=4)
    assert again.recomputed_tokens > 0
    with pytest.raises(AdmissionRefused):
        call("register", "eve", "coder", window=100_000, service_class="guaranteed")
    with pytest.raises(UnknownModel):
        call("register", "eve", "coda")
    with pytest.raises(AdmissionRefused):
        call("reserve", "torch", 1 << 40)
    return int(generated + again.generated_tokens)


def stand_still(conductor: Conductor) -> int:
    """One seat, a turn that never ends, and somebody else who wants it. Returns the tokens that were generated."""
    call = conductor.call
    for id in ("eli", "fay"):
        call("register", id, "endless")
    endless = conductor.handle.decode.remote("eli", "x", **ENDLESS)
    eventually(lambda: conductor.is_busy("eli"), within_s=20)
    other = call("decode", "fay", "x", max_tokens=4)
    eventually(lambda: conductor.is_busy("eli"), within_s=20)
    assert call("cancel", "eli") == 1
    ended = ray.get(endless, timeout=60)
    assert ended.pauses
    for id in ("eli", "fay"):
        call("unregister", id)
    return int(ended.generated_tokens + other.generated_tokens)


def test_every_metric_that_is_documented_is_exported_and_every_one_exported_is_documented(
    conductor: Conductor, tmp_path: Path
) -> None:
    generated = live_through_everything(conductor, tmp_path / "kv")
    expected = documented()
    assert len(expected) == len(GAUGES) + len(COUNTERS)
    eventually(lambda: {shape(sample) for sample in scraped(conductor)} >= expected, REPORTED_WITHIN_S, every_s=0.5)
    assert {shape(sample) for sample in scraped(conductor)} == expected
    with contextlib.suppress(AssertionError):
        eventually(lambda: wrong_after_everything(conductor, generated) == [], REPORTED_WITHIN_S, every_s=0.5)
    assert wrong_after_everything(conductor, generated) == []


def wrong_after_everything(conductor: Conductor, generated: int) -> list[str]:
    """What a scrape says otherwise than the status does, or than what was done says."""
    samples, status = scraped(conductor), conductor.status()
    expected = {
        "cap_bytes": status.ledger.max_bytes,
        "booked_bytes": status.ledger.allocated_bytes,
        "booked_bytes kind=external": 0,
        "device_total_bytes": status.device.total_bytes,
        "estimate_error_ratio model=coder": 0,
        "agents": 4,
        "agents service_class=best_effort": 1,
        "agents service_class=guaranteed": 0,
        "waiting": 0,
        "kv_bytes place=host": status.host_memory.used_bytes,
        "kv_bytes place=disk": status.host_memory.disk_used_bytes,
        "kv_budget_bytes": 2 * MIB,
        "admissions_total": 6,
        "admissions_total service_class=shared": 5,
        "refusals_total": 2,
        "refusals_total call=register code=NEVER": 1,
        "refusals_total call=reserve code=NEVER": 1,
        "errors_total": 3,
        "errors_total call=register error=UnknownModel": 1,
        "turns_total": 11,
        "turns_total finish_reason=cancelled": 1,
        "tokens_total kind=generated": generated,
        "pools": 1,
        "slots": 1,
        "slots state=busy": 0,
        "kv_moved_to_disk_total": status.host_memory.moved_to_disk,
        "kv_dropped_total": status.host_memory.dropped,
        "kv_damaged_total": 1,
    }
    told = {text: total(samples, text) for text in expected}
    return [f"{text}: {told[text]} is not {value}" for text, value in expected.items() if told[text] != value]


def total(samples: list[Sample], text: str) -> float | None:
    """The sum over all samples of a name that have the labels; None if there are none."""
    name, *pairs = text.split()
    labels = dict(pair.split("=") for pair in pairs).items()
    found = [s.value for s in samples if s.name == f"ray_vram_conductor_{name}" and labels <= s.labels.items()]
    return sum(found) if found else None


def test_a_gauge_follows_what_it_shows(conductor: Conductor) -> None:
    def external() -> float:
        return sum(s.value for s in scraped(conductor) if s.name.endswith("booked_bytes") and s.labels["kind"] == "external")

    reservation = conductor.call("reserve", "torch", 12345)
    eventually(lambda: external() == 12345, REPORTED_WITHIN_S, every_s=0.5)
    conductor.call("release", reservation)
    eventually(lambda: external() == 0, REPORTED_WITHIN_S, every_s=0.5)


# --- without Ray --------------------------------------------------------------------------------------------------------


class Paper:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.gauges: dict[Figure, float] = {}
        self.counters: dict[Figure, int] = {}

    def set(self, figure: Figure, value: float) -> None:
        self.gauges[figure] = value

    def add(self, figure: Figure, more: int) -> None:
        assert more > 0
        self.counters[figure] = self.counters.get(figure, 0) + more


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
    telling = asyncio.create_task(metrics.run(conductor.status))
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
    assert {name for name, _ in gauges} == GAUGES.keys() - {"estimate_error_ratio", "pools", "slots"}
    assert len([1 for name, _ in gauges if name == "agents"]) == 12
    assert {values: value for (name, values), value in gauges.items() if name == "waiting"} == {("register",): 0, ("turn",): 0}


async def test_calls_are_counted_under_names_that_are_declared(start: Start) -> None:
    conductor, sink = await start(SHIPPED), Paper()
    metrics = Metrics(sink, period_s=0.01)
    with pytest.raises(AdmissionRefused), metrics.errors_of("reserve"):
        await conductor.reserve("torch", 1 << 40)
    await conductor.register("ada", "coder")
    metrics.ended(await conductor.decode("ada", "def", max_tokens=2))
    telling = asyncio.create_task(metrics.run(conductor.status))
    await until(lambda: asyncio.sleep(0, sink.counters))
    telling.cancel()
    assert sink.counters[("refusals", ("reserve", "NEVER"))] == 1
    for table, told in ((GAUGES, sink.gauges), (COUNTERS, sink.counters)):
        assert [figure for figure in told if len(table[figure[0]].labels) != len(figure[1])] == []
