"""What is shown: at any width, in true proportion, and whatever people call their agents."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from conductor.errors import Refusal, RefusalCode
from conductor.types import (
    Admission,
    AgentId,
    AgentStatus,
    DecodeResult,
    DeviceKind,
    DeviceStatus,
    FinishReason,
    HostMemoryStatus,
    Kind,
    KvPlace,
    LedgerStatus,
    MirrorState,
    MirrorStatus,
    ModelKey,
    ModelState,
    ModelStatus,
    PoolId,
    PoolStatus,
    Reservation,
    ReservationId,
    ServiceClass,
    Status,
    WaitingStatus,
)
from conductor.units import MIB
from pipelines import tables
from pipelines.console import print_text

#: Rich would colour the first, hide the second, and fail on the third and fourth.
IDS = ("[red]x[/]", "[bold]", "[/x]", "[link=", "\\[x]", ":smile:")


def booked(**sizes: int) -> LedgerStatus:
    reservations = tuple(Reservation(ReservationId(f"r-{k}"), "[/x]", Kind(k), size) for k, size in sizes.items())
    return LedgerStatus(100 * MIB, sum(sizes.values()), reservations)


def agent(id: str) -> AgentStatus:
    return AgentStatus(
        AgentId(id), ModelKey(id), ServiceClass.SHARED, 2048, 1024, 17, KvPlace.SLOT, 0, 5 * MIB, 0, True, 3, 900, 0.0
    )  # fmt: skip


MIRROR = MirrorStatus(MirrorState.BEHIND, "vram_mib", 100, 41.5, 42.5, note="waiting for [/x]")
STATUS = Status(
    version="1",
    device=DeviceStatus("[/x] GPU", DeviceKind.CUDA, 100 * MIB, 60 * MIB, 0, 3 * MIB, "forced by [bold]"),
    ledger=booked(weights=40 * MIB, context=2 * MIB),
    live_contexts=None,
    pools=(PoolStatus(PoolId("model:[/x]"), ModelKey("[/x]"), None, 1024, 4, 2, 1, 2 * MIB, "ready"),),
    models=(ModelStatus(ModelKey("[/x]"), "/a/[b]/c.gguf", ModelState.RESIDENT, 1, 40 * MIB, 39 * MIB, 0.025),),
    agents=tuple(map(agent, IDS)),
    waiting=(WaitingStatus("turn", AgentId("[/x]"), ModelKey("m"), 0, "for [/y]", 0, 1.0, None, 5 * MIB),),
    host_memory=HostMemoryStatus(64 * MIB, 0, True, 128 * MIB, 2 * MIB, 3, 2, 1),
    mirror=MIRROR,
    llama_cpp="1",
    estimates="exact",
    threads=2,
    uptime_s=1.0,
)
REFUSAL = Refusal(
    RefusalCode.CAP, 80 * MIB, 100 * MIB, 42 * MIB, STATUS.ledger.reservations, 512,
    evictable_bytes=2 * MIB, fitting_class=ServiceClass.BEST_EFFORT, retry_after_s=3.0,
)  # fmt: skip
ADMITTED = Admission(
    AgentId("[/x]"), ModelKey("[red]m[/]"), 2048, ServiceClass.SHARED, 0, 40 * MIB, 1024, 2 * MIB, 42 * MIB, False, 0.0
)
TURN = DecodeResult(
    AgentId("[/x]"), "text", (1, 2, 3), 10, 0, 0, 3, False, FinishReason.LENGTH, 1, 30.0, 0.0, 10.0, 2.0, AgentId("[red]"), True,
    99, 0, 0, 0,
)  # fmt: skip


def shown(renderable: Any, width: int, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable, **options)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [60, 120])
def test_everything_can_be_shown_at_any_width(width: int) -> None:
    for renderable in (
        tables.status(STATUS),
        tables.refusal(REFUSAL),
        tables.mirror(MIRROR),
        tables.admissions([ADMITTED]),
        tables.decodes([TURN]),
    ):
        assert max(map(len, shown(renderable, width).splitlines())) <= width


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    text = shown(tables.status(STATUS), 120)
    for name in (*IDS, "[/x] GPU", "forced by [bold]", "/a/[b]/c.gguf", "waiting for [/x]", "for [/y]"):
        assert name in text
    assert "[/x]" in shown(tables.refusal(REFUSAL), 120)
    admitted, turn = shown(tables.admissions([ADMITTED]), 120), shown(tables.decodes([TURN]), 120)
    assert ("[/x]" in admitted, "[red]m[/]" in admitted) == (True, True)
    assert ("[/x]" in turn, "[red]" in turn) == (True, True)


def test_a_models_text_is_shown_as_it_is_but_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("x[:ok:] [bold]y\n", "\tif z:\x1b[2J\r\x9b1m\n", "long " * 100):
        print_text(text)
    assert capsys.readouterr().out == "x[:ok:] [bold]y\n" + "\tif z:[2J1m\n" + "long " * 100


@pytest.mark.parametrize("width", [60, 120])
def test_the_line_of_a_refusal_is_one_line_at_any_width(width: int) -> None:
    assert shown(tables.refusal(REFUSAL), width, crop=False).splitlines()[0] == REFUSAL.line


def letters(ledger: LedgerStatus, width: int = 50) -> dict[str, int]:
    drawn = tables.bar(ledger, width).plain.partition("]")[0].removeprefix("[")
    assert len(drawn) == width
    return {letter: drawn.count(letter) for letter in "wchox·" if letter in drawn}


def test_the_bar_is_in_proportion_to_the_cap() -> None:
    assert letters(booked()) == {"·": 50}
    assert letters(booked(weights=40 * MIB, context=20 * MIB, external=10 * MIB)) == {"w": 20, "c": 10, "x": 5, "·": 15}
    assert letters(booked(weights=100 * MIB)) == {"w": 50}


def test_in_the_bar_nothing_booked_is_invisible_and_the_sum_still_fits() -> None:
    assert letters(booked(context=1, overhead=1)) == {"c": 1, "o": 1, "·": 48}
    assert letters(booked(weights=100 * MIB - 2, headroom=1, external=1)) == {"w": 48, "h": 1, "x": 1}


def test_two_reservations_of_a_kind_are_one_stretch_of_the_bar() -> None:
    one = booked(weights=20 * MIB)
    assert letters(replace(one, reservations=one.reservations * 2)) == {"w": 20, "·": 30}


def test_the_cost_of_a_turn_counts_the_tokens_after_the_first() -> None:
    assert tables.cost(TURN) == "10 prompt + 3 made (length), first after 10 ms, 100 tok/s; evicted [red]; restored"
    assert "tok/s" not in tables.cost(replace(TURN, generated_tokens=1, elapsed_ms=10.0))
