"""A conductor's status as those who show it get it, with names that nobody would choose who means well."""

from __future__ import annotations

from conductor.types import (
    AgentId,
    AgentStatus,
    DeviceKind,
    DeviceStatus,
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

NAMES = ("<img src=x>", "[bold]b[/]", "\x1b[2Jc", "d" * 90, "e\nf")


def _agent(name: str, place: KvPlace) -> AgentStatus:
    shared = ServiceClass.SHARED
    return AgentStatus(AgentId(name), ModelKey("m"), shared, 2048, 512, 100, place, 0, 2 * MIB, MIB, False, 3, 99, 4.5)


STATUS = Status(
    version="1",
    device=DeviceStatus("GPU [/x]", DeviceKind.CUDA, 128 * MIB, 40 * MIB, 8 * MIB, 0, "automatic"),
    ledger=LedgerStatus(
        100 * MIB, 80 * MIB,
        (
            Reservation(ReservationId("r1"), "m", Kind.WEIGHTS, 60 * MIB),
            Reservation(ReservationId("r2"), "m", Kind.CONTEXT, 20 * MIB),
        ),
    ),
    live_contexts=None,
    pools=(PoolStatus(PoolId("m"), ModelKey("m"), None, 512, 4, 2, 1, 20 * MIB, "ready"),),
    models=(ModelStatus(ModelKey("m"), "/m.gguf", ModelState.RESIDENT, 5, 60 * MIB, 60 * MIB, 0.0),),
    agents=tuple(_agent(name, place) for name, place in zip(NAMES, [*KvPlace, KvPlace.SLOT], strict=True)),
    waiting=tuple(
        WaitingStatus("turn", AgentId(name), ModelKey("m"), n, "why [/y]", 0, 1.0, None, MIB) for n, name in enumerate(NAMES)
    ),
    host_memory=HostMemoryStatus(64 * MIB, MIB, True),
    mirror=MirrorStatus(MirrorState.EQUAL, "vram_mib", 100.0, 80.0, 80.0),
    llama_cpp="1",
    estimates="exact",
    threads=2,
    uptime_s=10.0,
    computed_tokens=1000,
)  # fmt: skip
