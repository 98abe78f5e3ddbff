"""Who sits where, the conversations, and their KV on its way between slots and what is saved.

Covers taking a seat, leaving it, and the copy of a conversation. What is done with a context is done in its pool's thread;
what only tells something takes no time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from conductor.backend.conversation import Conversation
from conductor.backend.kv_store import Blob
from conductor.backend.pools import OpenPool
from conductor.backend.saved_kv import SavedKv
from conductor.backend.seat import Seat
from conductor.errors import InternalError
from conductor.types import AgentId, KvPlace


@dataclass(frozen=True, slots=True)
class Closed:
    place: KvPlace
    saved_bytes: int


@dataclass(slots=True)
class Taken:
    """A seat and the pool it is in."""

    pool: OpenPool
    seat: Seat


class Seats:
    """`threads`: where what is saved is copied."""

    def __init__(self, saved: SavedKv, threads: Executor) -> None:
        self._saved, self._threads = saved, threads
        self._taken: dict[AgentId, Taken] = {}
        self.conversations: dict[AgentId, Conversation] = {}

    def of(self, agent_id: AgentId) -> Taken:
        """Raises InternalError."""
        if agent_id not in self._taken:
            raise InternalError(f"{agent_id} has no seat")
        return self._taken[agent_id]

    def state_bytes(self, agent_id: AgentId) -> int:
        taken = self._taken.get(agent_id)
        return taken.seat.state_bytes if taken else 0

    # --- taking one -------------------------------------------------------------------------------------------------

    def take(self, agent_id: AgentId, pool: OpenPool) -> Future[int]:
        """A free slot, and the agent's saved KV in it. Bytes restored; 0 for a new conversation, or one to be recomputed."""
        conversation = self.conversations.setdefault(agent_id, Conversation())
        return pool.pool.call(lambda: self._take(agent_id, pool, conversation))

    def _take(self, agent_id: AgentId, pool: OpenPool, conversation: Conversation) -> int:
        seating, label = pool.pool.seating, pool.label(conversation.held)
        seat = seating.take(agent_id, conversation)
        try:
            restored = self._saved.restore(agent_id, seat.sequence, label, purge=lambda: seating.purge(seat))
        except BaseException:  # nobody knows what the slot holds now; what was saved is kept
            seating.leave(seat)
            raise
        if not restored:
            conversation.held = 0
        if conversation.given_up:
            conversation.given_up = False
            self._saved.count_dropped()
        seat.state_bytes = restored
        self._taken[agent_id] = Taken(pool, seat)
        return restored

    # --- leaving it -------------------------------------------------------------------------------------------------

    def leave(self, agent_id: AgentId, *, to: KvPlace) -> Future[Closed]:
        """Free the slot, its KV saved to host memory or disk if there is room; TOKENS drops it.

        The slot is free, and its pool goes on, when the KV is copied; what goes to disk is written after that.
        """
        taken, closed = self.of(agent_id), Future[Closed]()
        closed.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        left = taken.pool.pool.call(lambda: self._leave(taken, to))

        def keep() -> None:
            try:
                closed.set_result(self._kept(taken, left.result()))
            except BaseException as error:
                taken.seat.conversation.held = 0
                closed.set_exception(error)

        left.add_done_callback(lambda _: self._threads.submit(keep) if to is KvPlace.DISK else keep())
        return closed

    def _leave(self, taken: Taken, to: KvPlace) -> Callable[[], Blob | None]:
        seat, conversation = taken.seat, taken.seat.conversation
        try:
            if to is KvPlace.TOKENS:
                conversation.given_up = conversation.cached > 0
                return _nothing
            conversation.trim(seat.sequence)
            if not conversation.cached:
                return _nothing
            return self._saved.save(seat.agent_id, seat.sequence, taken.pool.label(conversation.held), to=to)
        finally:
            taken.pool.pool.seating.leave(seat)
            del self._taken[seat.agent_id]

    def _kept(self, taken: Taken, save: Callable[[], Blob | None]) -> Closed:
        blob = save()
        if blob is None:
            taken.seat.conversation.held = 0
            return Closed(KvPlace.TOKENS, 0)
        return Closed(blob.place, blob.bytes)

    # --- forks ------------------------------------------------------------------------------------------------------

    def copy(self, source: AgentId, new: AgentId, *, to: KvPlace) -> Future[Closed]:
        """`new` goes on from where `source` is, between two of its turns: tokens at once, a copy of the KV if `to` is HOST."""
        conversation = self.conversations.get(source, Conversation())
        clone = self.conversations[new] = conversation.copy()
        taken = self._taken.get(source)
        if to is not KvPlace.HOST:
            nothing: Future[Closed] = Future()
            nothing.set_result(Closed(KvPlace.TOKENS, 0))
            return nothing
        if taken is None:
            return self._threads.submit(self._copy_saved, source, new, conversation, clone)
        return taken.pool.pool.call(lambda: self._copy_seated(taken, new, clone))

    def _copy_seated(self, taken: Taken, new: AgentId, clone: Conversation) -> Closed:
        seat, conversation = taken.seat, taken.seat.conversation
        conversation.trim(seat.sequence)
        held = conversation.held
        if not held:
            return Closed(KvPlace.TOKENS, 0)
        blob = self._saved.save(new, seat.sequence, taken.pool.label(held), to=KvPlace.HOST)()
        return _copied(clone, blob, held, held, conversation.shifted_from)

    def _copy_saved(self, source: AgentId, new: AgentId, conversation: Conversation, clone: Conversation) -> Closed:
        held, valid, shifted_from = conversation.held, conversation.valid, conversation.shifted_from
        return _copied(clone, self._saved.copy(source, new), held, valid, shifted_from)

    # --- conversations ----------------------------------------------------------------------------------------------

    def tokens(self, agent_id: AgentId) -> int:
        conversation = self.conversations.get(agent_id)
        return len(conversation.tokens) if conversation else 0

    def lost_kv(self, agent_id: AgentId) -> None:
        """What was saved of its KV is gone."""
        self.conversations[agent_id].held = 0

    def forget(self, agent_id: AgentId) -> None:
        self.conversations.pop(agent_id, None)


def _nothing() -> None:
    """There is nothing to be kept."""


def _copied(clone: Conversation, blob: Blob | None, held: int, valid: int, shifted_from: int) -> Closed:
    if blob is None:
        return Closed(KvPlace.TOKENS, 0)
    clone.held, clone.valid, clone.shifted_from = held, valid, shifted_from
    return Closed(blob.place, blob.bytes)
