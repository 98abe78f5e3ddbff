"""Where the KV of agents that are not live is kept: booked in host memory, then on disk, else nowhere.

Host memory and the directory have a ledger each. When host memory is short, those whose agents were away longest leave
it: to disk, if that is cheaper than computing them again, else they are dropped. The tokens are always kept, so what is
lost is time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

from conductor.core.ledger import Ledger
from conductor.core.residency import Model
from conductor.core.sessions import Agent, Phase, SavedKv
from conductor.errors import InternalError
from conductor.types import AgentId, Kind, KvPlace, ModelId

#: until one was measured; a slow disk, so that little is moved in vain
DISK_BYTES_PER_S = 500e6
#: the same for reading a prompt: what a GPU needs for a model of 8B, so that little is kept in vain
PREFILL_S_PER_TOKEN = 1e-4


@dataclass(frozen=True, slots=True)
class Eviction:
    """A saved KV that has to leave host memory: `to` DISK, or TOKENS to be dropped."""

    agent_id: AgentId
    to: KvPlace


def worth_a_file(bytes: int, tokens: int, *, prefill_s_per_token: float, disk_bytes_per_s: float) -> bool:
    """Whether writing a KV to disk and reading it back takes less time than computing it again from its tokens."""
    return 2 * bytes / disk_bytes_per_s < tokens * prefill_s_per_token


class KvBooks:
    """`agents` and `models` are the state's own records, read here; each agent's `saved` and `place` are kept here."""

    def __init__(
        self, agents: Mapping[AgentId, Agent], models: Mapping[ModelId, Model], *, host_bytes: int, disk_bytes: int
    ) -> None:
        self.host, self.disk = Ledger(host_bytes, prefix="h"), Ledger(disk_bytes, prefix="d")
        self.disk_bytes_per_s = DISK_BYTES_PER_S
        self._agents, self._models = agents, models

    def saved_bytes(self, agent: Agent) -> int:
        return self._ledger(agent.saved.place).size(agent.saved.reservation) if agent.saved else 0

    def place(self, agent: Agent, *, wanted: Set[AgentId]) -> KvPlace | None:
        """Book a place for the KV of an agent that is about to be saved; None if room must be made in host memory first.

        The `wanted` have a turn waiting: what is saved of them stays where it is.
        """
        bytes = agent.state_bytes
        if not bytes:
            return KvPlace.TOKENS
        if bytes <= self.host.free_bytes:
            return self._book(agent, KvPlace.HOST, bytes)
        leaving = sum(map(self.saved_bytes, self._away(wanted))) + sum(map(self.saved_bytes, self._returning()))
        if bytes <= self.host.free_bytes + leaving:
            return None
        if bytes <= self.disk.free_bytes and self._worth_a_file(agent, bytes):
            return self._book(agent, KvPlace.DISK, bytes)
        self._forget_rate()
        return KvPlace.TOKENS

    def evictions(self, bytes: int, *, wanted: Set[AgentId]) -> list[Eviction]:
        """Who leaves host memory so that `bytes` are free there, those away longest first. What is leaving already counts."""
        away = self._away(wanted)
        missing = bytes - self.host.free_bytes - sum(self.saved_bytes(a) for a in away if a.moving_to)
        missing -= sum(map(self.saved_bytes, self._returning()))
        disk_free, found = self.disk.free_bytes, list[Eviction]()
        for agent in away:
            if missing <= 0:
                break
            if agent.moving_to:
                continue
            size = self.saved_bytes(agent)
            to_disk = size <= disk_free and self._worth_a_file(agent, size)
            if not to_disk:
                self._forget_rate()
            disk_free -= size if to_disk else 0
            missing -= size
            found.append(Eviction(agent.id, KvPlace.DISK if to_disk else KvPlace.TOKENS))
        return found

    def _away(self, wanted: Set[AgentId]) -> list[Agent]:
        """Whose KV is in host memory and may leave it, or does, those away longest first."""
        in_host = (a for a in self._agents.values() if a.saved and a.saved.place is KvPlace.HOST and not a.seat and not a.cloning)
        return sorted((a for a in in_host if a.moving_to or a.id not in wanted), key=_last_turn)

    def _returning(self) -> list[Agent]:
        """Whose KV leaves host memory for a context that is being opened."""
        return [a for a in self._agents.values() if a.saved and a.saved.place is KvPlace.HOST and a.phase is Phase.TAKING]

    def book_copy(self, source: Agent, new: Agent) -> KvPlace:
        """A place in host memory for a copy of the KV of `source`; TOKENS if there is none."""
        bytes = self.saved_bytes(source) or source.state_bytes
        return self._book(new, KvPlace.HOST, bytes) if 0 < bytes <= self.host.free_bytes else KvPlace.TOKENS

    def begin_move(self, agent: Agent) -> None:
        """Book the file; the bytes in host memory stay booked until it is written."""
        agent.moving_to = self.disk.reserve(agent.id, Kind.KV, self.saved_bytes(agent))

    def moved(self, agent: Agent, place: KvPlace, elapsed_s: float) -> None:
        """The move that had begun is over; elsewhere than on disk, the KV is lost."""
        bytes, target = self.saved_bytes(agent), agent.moving_to
        if target is None:
            raise InternalError(f"the KV of {agent.id} moved without a place to go")
        agent.moving_to = None
        self.drop(agent)
        if place is KvPlace.DISK:
            agent.saved = SavedKv(place, target)
            self._learn_rate(bytes, elapsed_s)
        else:
            self.disk.release(target)

    def _learn_rate(self, bytes: int, elapsed_s: float) -> None:
        """Half by half, and as ratios: single moves are off by a lot, both ways."""
        if bytes and elapsed_s > 0:
            self.disk_bytes_per_s = math.sqrt(self.disk_bytes_per_s * bytes / elapsed_s)

    def _forget_rate(self) -> None:
        """Bit by bit, when nothing is moved: a rate that was too low once would never be measured again."""
        self.disk_bytes_per_s *= (DISK_BYTES_PER_S / self.disk_bytes_per_s) ** (1 / 16)

    def drop(self, agent: Agent) -> None:
        """Its saved KV is nowhere from now on."""
        if agent.saved:
            self._ledger(agent.saved.place).release(agent.saved.reservation)
            agent.saved = None

    def settle(self, agent: Agent, place: KvPlace, bytes: int) -> None:
        """The KV was saved, or was not after all: book what it took."""
        if agent.saved and (place is not agent.saved.place or bytes != self.saved_bytes(agent)):
            self.drop(agent)
            if place in (KvPlace.HOST, KvPlace.DISK):
                self._book(agent, place, bytes)

    def _book(self, agent: Agent, place: KvPlace, bytes: int) -> KvPlace:
        agent.saved = SavedKv(place, self._ledger(place).reserve(agent.id, Kind.KV, bytes))
        return place

    def _ledger(self, place: KvPlace) -> Ledger:
        return self.disk if place is KvPlace.DISK else self.host

    def _worth_a_file(self, agent: Agent, bytes: int) -> bool:
        measured = self._models[agent.model_id].prefill_s_per_token
        prefill = PREFILL_S_PER_TOKEN if measured is None else measured
        return worth_a_file(bytes, agent.tokens, prefill_s_per_token=prefill, disk_bytes_per_s=self.disk_bytes_per_s)

    def check(self) -> None:
        """Raise InternalError unless both ledgers hold what the agents say, and nothing else."""
        for ledger, place in ((self.host, KvPlace.HOST), (self.disk, KvPlace.DISK)):
            ledger.check()
            booked = {a.saved.reservation for a in self._agents.values() if a.saved and a.saved.place is place}
            if place is KvPlace.DISK:
                booked |= {a.moving_to for a in self._agents.values() if a.moving_to}
            if booked != ledger.leases().keys():
                raise InternalError(f"saved KV ({place.value}) and its ledger differ")


def _last_turn(agent: Agent) -> int:
    return agent.last_turn
