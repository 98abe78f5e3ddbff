"""Homes in host memory: where the weights live that may leave the device, and how much of them it may have.

A model has one from the moment on when best-effort agents alone use it, as far as host memory has room, until it is forgotten.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from conductor.core.estimate import ModelPlan
from conductor.core.ledger import Ledger
from conductor.core.placing import Offer, offers
from conductor.core.pool import GRANULE_BYTES
from conductor.core.residency import Model
from conductor.core.streaming import Placement
from conductor.errors import InternalError
from conductor.types import DeviceKind, Kind

#: How many times faster a device reads its own memory than the link fills it, at least: 25 on a GTX 1080, 80 on an H200.
MEMORY_OVER_LINK = 25


class Homes:
    """`link_bytes_per_s`: from host memory to the device, measured."""

    def __init__(self, budget_bytes: int, *, link_bytes_per_s: float) -> None:
        self.ledger = Ledger(budget_bytes, prefix="home-")
        self._link_bytes_per_s = link_bytes_per_s

    def offers(self, plan: ModelPlan) -> tuple[Offer, ...]:
        """What of its weights the device could have; nothing where they cannot move, or there is no room for their home."""
        if plan.blocks is None or plan.blocks.home_bytes > self.ledger.free_bytes:
            return ()
        granule = GRANULE_BYTES if plan.device is DeviceKind.CUDA else 1
        return offers(plan.blocks, link_bytes_per_s=self._link_bytes_per_s, booked=granule)

    def settle(self, model: Model) -> bool:
        """Book a home for the model's weights, unless it has one, or cannot; True if it has one from now on."""
        found = self.offers(model.plan) if model.home is None and not model.stays_whole else ()
        if not found or model.plan.blocks is None:
            return False
        model.home, model.offers = self.ledger.reserve(model.plan.key, Kind.WEIGHTS, model.plan.blocks.home_bytes), found
        return True

    def step_s(self, model: Model) -> float:
        """A step's computation: as measured, else by how much faster the device's own memory is than the link."""
        if model.step_s is not None or not model.offers:
            return model.step_s or 0.0
        return model.offers[-1].bytes / (self._link_bytes_per_s * MEMORY_OVER_LINK)

    def offer_less(self, model: Model, tried: Placement) -> bool:
        """The device had no room for what was tried: only smaller parts from now on; False if there are none."""
        smaller = tuple(itertools.takewhile(lambda offer: offer.placement != tried, model.offers))
        if not smaller or smaller == model.offers:
            return False
        model.offers = smaller
        return True

    def leave(self, model: Model) -> None:
        """Its weights are in host memory no more."""
        if model.home is not None:
            self.ledger.release(model.home)
        model.home, model.offers = None, ()

    def check(self, models: Iterable[Model]) -> None:
        """Raise InternalError unless the ledger holds these models' homes, and nothing else."""
        self.ledger.check()
        if {model.home for model in models if model.home} != self.ledger.leases().keys():
            raise InternalError("homes and their ledger differ")
