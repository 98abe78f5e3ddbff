"""Words for stories about weights that have a home in host memory: which part of them is on the device, and what is booked.

`LARGE` and `OTHER` are 100 bytes each, in a head and nine layers: with R layers on the device and a ring of two slots they take
30 + 10 R bytes, as far as R = 6, and make a token in 9 - R seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from conductor.core.estimate import ModelPlan
from conductor.core.residency import Model
from conductor.core.streaming import Placement
from conductor.types import Kind
from tests.support.stories import Stage, model

LARGE, OTHER = model("large", layers=9), model("other", layers=9)
LEAST, WHOLE = Placement(0, 2), Placement(9, 0)
SLOW = {"link_bytes_per_s": 10.0, "home_bytes": 1000}
Given = Callable[..., Stage]


def part(resident: int) -> Placement:
    return Placement(resident, 2)


def record(stage: Stage, plan: ModelPlan = LARGE) -> Model:
    return stage.state.models[plan.id]


def placed(stage: Stage, plan: ModelPlan = LARGE) -> Placement | None:
    return record(stage, plan).placement


def lines(stage: Stage) -> dict[Kind, int]:
    """The ledger by kind; what is 0 is no line."""
    found: dict[Kind, int] = {}
    for entry in stage.state.ledger.snapshot():
        if entry.bytes:
            found[entry.kind] = found.get(entry.kind, 0) + entry.bytes
    return found


def at_home(stage: Stage) -> int:
    return stage.state.books.homes.ledger.allocated_bytes
