"""Which part of a model's weights goes to the device: a pure choice between layers that stay and seats for more agents.

A step of a model that streams takes as long as its layers take over the link, or as its computation, whichever is longer; a
token of every seated agent comes of it. So with many agents, memory is worth more as their KV (each adds a token to every step),
and with one it is worth more as layers (each makes every step shorter). The choice is the one with the most tokens a second that
fits, by the measured link and step; docs/streaming.md has the measurements behind it. Covers one model at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from conductor.core.streaming import Blocks, Placement, placement_bytes, placements, streamed_bytes

#: A change of placement brings the whole placement over the link once more: it has to be worth that.
WORTH_MOVING = 1.25
#: A step's computation where none was measured yet: as short as any, so that layers are worth having.
UNMEASURED_STEP_S = 0.001


@dataclass(frozen=True, slots=True)
class Offer:
    """A placement, as it is booked, and how long the link works for each pass."""

    placement: Placement
    bytes: int
    link_s: float


@dataclass(frozen=True, slots=True)
class Choice:
    offer: Offer
    slots: int  #: of the pool that goes with it
    tokens_per_s: float


@functools.lru_cache(maxsize=64)
def offers(blocks: Blocks, *, link_bytes_per_s: float, booked: int = 1) -> tuple[Offer, ...]:
    """Every placement of a model that brings something, the least first. `booked`: the granules that the device gives out.

    One with more bytes, and no less to stream than another, brings nothing.
    """
    found: list[Offer] = []
    for it in placements(blocks):
        bytes = -(-placement_bytes(blocks, it) // booked) * booked
        offer = Offer(it, bytes, streamed_bytes(blocks, it) / link_bytes_per_s)
        if not found or offer.link_s < found[-1].link_s:
            found.append(offer)
    return tuple(found)


def choose(
    offered: Sequence[Offer], shapes: Sequence[tuple[int, int]], *, budget_bytes: int, agents: int, step_s: float
) -> Choice | None:
    """The placement and the pool that together fit the budget and make the most tokens; None if none fit.

    `shapes`: (slots, bytes) of the pools that may be made; `agents` that want to decode; `step_s`: a step's computation, 0 if
    that is not known. Among equals the one with fewer bytes.
    """
    best: tuple[float, int, Choice] | None = None
    for offer in offered:
        for slots, bytes in shapes:
            total = offer.bytes + bytes
            if total > budget_bytes:
                continue
            speed = speed_of(offer, slots=slots, agents=agents, step_s=step_s)
            if best is None or (speed, -total) > best[:2]:
                best = (speed, -total, Choice(offer, slots, speed))
    return best[2] if best else None


def speed_of(offer: Offer, *, slots: int, agents: int, step_s: float) -> float:
    """Tokens a second of a placement that is there."""
    return min(slots, max(1, agents)) / max(offer.link_s, step_s or UNMEASURED_STEP_S)
