"""What the conductor decided and did, as lines for people: who came, went and was refused, what moved, and how long it took.

Looks over the executive's shoulder: told of each event before the policy hears it and of each action before it is carried out, it
measures what lies between an order and its end. It changes nothing, and an error of its own is logged and hurts nobody.
Does not cover the bytes booked after each change (`LedgerEntry`) or what runs now (`status`).
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from conductor.core import actions, events
from conductor.core.events import RequestId, TurnId
from conductor.core.state import State
from conductor.errors import AdmissionRefused, ConductorError, TurnQueueFull, TurnTimedOut, WindowRefused
from conductor.happenings import Happening, HistoryEntry
from conductor.types import AgentId, KvPlace, ModelId, ModelKey
from conductor.units import format_bytes

_log = logging.getLogger("conductor")

#: what was ordered, and of whom
Work: TypeAlias = "tuple[str, str | int]"

_LINES = 4096
_TEXT_LENGTH = 300
_PLACES = {KvPlace.HOST: "host memory", KvPlace.DISK: "disk"}


class History:
    """Belongs to the event loop. `clock`: seconds, the one that `at_s` is counted on from the making of this."""

    def __init__(self, state: State, *, clock: Callable[[], float], lines: int = _LINES) -> None:
        self._state, self._clock, self._began_at = state, clock, clock()
        self._entries: deque[HistoryEntry] = deque(maxlen=lines)
        self._number = 0
        #: when what is under way was ordered
        self._ordered_at: dict[Work, float] = {}
        #: who asked for what is not answered yet
        self._asked: dict[RequestId, tuple[str, ModelKey | None]] = {}
        #: whose turns they are: those that are over are forgotten in time
        self._turns: dict[TurnId, AgentId] = {}
        self._overdrawn_bytes = 0
        self._computed = 0
        #: of that, what the turn that each agent has now has had
        self._counted: dict[AgentId, int] = {}
        self._complained = False

    def since(self, number: int) -> tuple[HistoryEntry, ...]:
        """Those after the one with this number, oldest first; the oldest of all are forgotten in time."""
        missing = self._number - max(0, number)
        first = max(0, len(self._entries) - missing)
        return tuple(list(self._entries)[first:]) if missing > 0 else ()

    def computed_tokens(self, progress: Mapping[AgentId, int]) -> int:
        """All tokens of prompts and answers so far. `progress`: what each running turn has had."""
        for agent_id, computed in progress.items():
            self._count(agent_id, computed)
        return self._computed

    # --- what it is told --------------------------------------------------------------------------------------------

    def heard(self, happened: Iterable[events.Event]) -> None:
        """Call it before the policy hears of it: what is about to leave is still there."""
        with self._harmless():
            for event in happened:
                self._hear(event)

    def decided(self, todo: Iterable[actions.Action]) -> None:
        """Call it before the actions are carried out."""
        with self._harmless():
            for action in todo:
                self._note(action)
            self._look_for_drift()
            self._forget_turns()

    def _hear(self, event: events.Event) -> None:
        match event:
            case events.RegisterRequested(request, agent):
                self._asked[request] = (agent.id, agent.model.key)
            case events.ReserveRequested(request, holder):
                self._asked[request] = (holder, None)
            case events.RegisterAbandoned(request, timed_out=False) | events.ReserveAbandoned(request):
                self._asked.pop(request, None)
            case events.TurnRequested(turn_id, agent_id):
                self._turns[turn_id] = agent_id
            case events.ForkRequested(request, turn_id, _, new):
                self._asked[request], self._turns[turn_id] = (new, None), new
            case events.ModelLoaded(model_id, weights_bytes):
                streams = self._state.models[model_id].streams
                text = "its layers stream through a ring" if streams else "weights on the device"
                self._add(Happening.LOADED, text, model=model_id, bytes=weights_bytes, work=("load", model_id))
            case events.ModelLoadFailed(model_id, error):
                self._add(Happening.FAILED, _line(error), model=model_id, work=("load", model_id))
            case events.ModelUnloaded(model_id):
                self._unloaded(model_id)
            case events.PoolOpened(pool_id, context_bytes):
                pool = self._state.pools[pool_id]
                slots = f"{pool.context.slots} slots of" if pool.context.slots > 1 else "a slot of"
                text = f"{slots} {pool.context.window:,} tokens"
                size = self._state.ledger.size(pool.reservation) if context_bytes is None else context_bytes
                self._add(Happening.POOL_OPENED, text, pool.owner, pool.model_id, bytes=size, work=("open", pool_id))
            case events.PoolOpenFailed(pool_id, error):
                pool = self._state.pools[pool_id]
                self._add(Happening.FAILED, _line(error), pool.owner, pool.model_id, work=("open", pool_id))
            case events.PoolClosed(pool_id):
                pool = self._state.pools[pool_id]
                size = self._state.ledger.size(pool.reservation)
                self._add(Happening.POOL_CLOSED, "", pool.owner, pool.model_id, bytes=size, work=("close", pool_id))
            case _:
                self._hear_of_agent(event)

    def _hear_of_agent(self, event: events.Event) -> None:
        match event:
            case events.SeatLeft(agent_id, place, saved_bytes):
                kept = ("leave", agent_id) in self._ordered_at
                self._left_seat(agent_id, place, saved_bytes, was_to_be_kept=kept)
            case events.SeatTaken(agent_id, restored_bytes):
                work = ("take", agent_id)
                if restored_bytes:
                    self._of_agent(Happening.SWAPPED_IN, agent_id, "to a slot", bytes=restored_bytes, work=work)
                self._ordered_at.pop(work, None)
            case events.SeatNotTaken(agent_id, error):
                self._of_agent(Happening.FAILED, agent_id, _line(error), work=("take", agent_id))
            case events.KvMoved(agent_id, place, elapsed_s):
                self._moved(agent_id, place, elapsed_s)
            case events.KvCopied(turn_id, tokens, _, copied_bytes):
                self._of_turn(Happening.FORKED, turn_id, f"{tokens:,} tokens", bytes=copied_bytes)
            case events.TurnPaused(turn_id, _, _, computed):
                self._of_turn(Happening.PAUSED, turn_id, "makes way for others", computed=computed)
            case events.TurnOutgrew(turn_id, tokens, _, _, _, computed):
                self._of_turn(Happening.PAUSED, turn_id, f"outgrew its slot at {tokens:,} tokens", computed=computed)
            case events.TurnFinished(turn_id, tokens, _, _, computed):
                self._turn_ended(turn_id, tokens, computed)
            case _:
                pass

    def _note(self, action: actions.Action) -> None:
        match action:
            case actions.Admit(request, agent, _, _, charged_bytes, model_loaded):
                self._asked.pop(request, None)
                brought = ", brought its model" if model_loaded else ""
                text = f"{agent.service_class.value}, {agent.context.window:,} tokens{brought}"
                self._add(Happening.ADMITTED, text, agent.id, agent.model.id, bytes=charged_bytes)
            case actions.Refuse(request, error) | actions.FailRequest(request, error):
                self._refused(request, error)
            case actions.AnswerReserve(request, reservation_id):
                holder, _ = self._asked.pop(request, (None, None))
                self._add(Happening.RESERVED, reservation_id, holder, bytes=self._state.ledger.size(reservation_id))
            case actions.AnswerFork(request):
                self._asked.pop(request, None)
            case actions.AnswerRelease(_, released_bytes):
                self._add(Happening.RELEASED, "", bytes=released_bytes)
            case actions.FailTurn(turn_id, error):
                refused = isinstance(error, (WindowRefused, TurnQueueFull, TurnTimedOut))
                self._of_turn(Happening.REFUSED if refused else Happening.FAILED, turn_id, _line(error))
            case actions.EndTurn(turn_id, agent_id, reason):
                self._of_turn(Happening.TURN_ENDED, turn_id, f"{reason.value}, while it waited")
                self._counted.pop(agent_id, None)
            case actions.DropTurn(agent_id):
                self._counted.pop(agent_id, None)
            case actions.DropKv(agent_id):
                self._of_agent(Happening.DROPPED, agent_id, "to be computed again from its tokens")
            case actions.Forget(agent_id):
                self._counted.pop(agent_id, None)
                self._add(Happening.LEFT, "", agent_id)
            case _:
                self._note_order(action)

    def _note_order(self, action: actions.Action) -> None:
        work: Work
        match action:
            case actions.LoadModel(plan):
                work = ("load", plan.id)
            case actions.UnloadModel(model_id):
                work = ("unload", model_id)
            case actions.OpenPool(pool_id):
                work = ("open", pool_id)
            case actions.ClosePool(pool_id):
                work = ("close", pool_id)
            case actions.TakeSeat(agent_id):
                work = ("take", agent_id)
            case actions.LeaveSeat(agent_id, to) if to is not KvPlace.TOKENS:
                work = ("leave", agent_id)
            case actions.RunTurn(turn_id):
                work = ("turn", turn_id)
                if work in self._ordered_at:
                    return  # it goes on: what it takes is counted from its beginning
            case _:
                return
        self._ordered_at[work] = self._clock()

    # --- lines ------------------------------------------------------------------------------------------------------

    def _unloaded(self, model_id: ModelId) -> None:
        model = self._state.models[model_id]
        size = self._state.books.prices.held_bytes(model) or None
        used = any(agent.model_id == model_id for agent in self._state.agents.values())
        kind, text = (Happening.PARKED, "until a turn needs it") if used else (Happening.UNLOADED, "nobody uses it")
        self._add(kind, text, model=model_id, bytes=size, work=("unload", model_id))

    def _left_seat(self, agent_id: AgentId, place: KvPlace, saved_bytes: int, *, was_to_be_kept: bool) -> None:
        work = ("leave", agent_id)
        if place in _PLACES:
            self._of_agent(Happening.SWAPPED_OUT, agent_id, f"to {_PLACES[place]}", bytes=saved_bytes, work=work)
        elif was_to_be_kept and self._state.agents[agent_id].tokens:
            self._of_agent(Happening.DROPPED, agent_id, "there was no place for it", work=work)
        self._ordered_at.pop(work, None)

    def _moved(self, agent_id: AgentId, place: KvPlace, elapsed_s: float) -> None:
        size = self._state.kv_books.saved_bytes(self._state.agents[agent_id]) if agent_id in self._state.agents else None
        kind, text = (Happening.SWAPPED_OUT, "from host memory to disk") if place is KvPlace.DISK else (Happening.DROPPED, "")
        self._of_agent(kind, agent_id, text, bytes=size, ms=elapsed_s * 1000)

    def _refused(self, request: RequestId, error: ConductorError) -> None:
        who, model = self._asked.pop(request, (None, None))
        if who is None and not isinstance(error, AdmissionRefused):
            return  # a wrong id in a call that asks for nothing
        size = error.refusal.requested_bytes if isinstance(error, AdmissionRefused) else None
        self._append(Happening.REFUSED, _line(error), who, model, bytes=size)

    def _turn_ended(self, turn_id: TurnId, tokens: int, computed: int) -> None:
        text = f"{computed:,} tokens computed, {tokens:,} in the conversation"
        self._of_turn(Happening.TURN_ENDED, turn_id, text, computed=computed)
        if (agent_id := self._turns.get(turn_id)) is not None:
            self._counted.pop(agent_id, None)

    def _look_for_drift(self) -> None:
        before, now = self._overdrawn_bytes, self._state.ledger.overdrawn_bytes
        if now and not before:
            self._add(Happening.DRIFT, f"strangers took {format_bytes(now)} of what is booked here", bytes=now)
        elif before and not now:
            self._add(Happening.DRIFT, "what is booked fits again", bytes=0)
        self._overdrawn_bytes = now

    def _of_turn(
        self, kind: Happening, turn_id: TurnId, text: str, *, bytes: int | None = None, computed: int | None = None
    ) -> None:
        agent_id = self._turns.get(turn_id)
        if agent_id is None:
            return
        if computed is not None:
            self._count(agent_id, computed)
        began_at = self._ordered_at.get(("turn", turn_id))
        ms = None if began_at is None else (self._clock() - began_at) * 1000
        if kind is not Happening.PAUSED:
            self._ordered_at.pop(("turn", turn_id), None)
        self._of_agent(kind, agent_id, text, bytes=bytes, ms=ms)

    def _forget_turns(self) -> None:
        """Some end without a word that would come by here."""
        known = self._state.rotation.turns
        if len(self._turns) > 2 * len(known) + 64:
            self._turns = {id: agent_id for id, agent_id in self._turns.items() if id in known}
            self._ordered_at = {work: at for work, at in self._ordered_at.items() if work[0] != "turn" or work[1] in known}

    def _of_agent(
        self,
        kind: Happening,
        id: AgentId,
        text: str,
        *,
        bytes: int | None = None,
        work: Work | None = None,
        ms: float | None = None,
    ) -> None:
        agent = self._state.agents.get(id)
        self._add(kind, text, id, agent.model_id if agent else None, bytes=bytes, work=work, ms=ms)

    def _add(
        self,
        kind: Happening,
        text: str,
        agent: str | None = None,
        model: ModelId | None = None,
        *,
        bytes: int | None = None,
        work: Work | None = None,
        ms: float | None = None,
    ) -> None:
        """`work`: what ends with it, to be timed."""
        known = self._state.models.get(model) if model is not None else None
        ordered_at = self._ordered_at.pop(work, None) if work is not None else None
        took_ms = ms if ordered_at is None else (self._clock() - ordered_at) * 1000
        self._append(kind, text, agent, known.plan.key if known else None, bytes=bytes, ms=took_ms)

    def _append(
        self, kind: Happening, text: str, who: str | None, model: ModelKey | None, *, bytes: int | None, ms: float | None = None
    ) -> None:
        self._number += 1
        at_s = self._clock() - self._began_at
        self._entries.append(HistoryEntry(self._number, at_s, kind, who, model, bytes, ms, text[:_TEXT_LENGTH]))

    def _count(self, agent_id: AgentId, computed: int) -> None:
        more = computed - self._counted.get(agent_id, 0)
        if more > 0:
            self._computed += more
            self._counted[agent_id] = computed

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            if not self._complained:
                self._complained = True
                _log.warning("the history is not complete", exc_info=True)


def _line(error: ConductorError) -> str:
    """What a person has to read of it: of a refusal, why, after its numbers."""
    if isinstance(error, AdmissionRefused):
        return f"{error.code.value}: {str(error).partition(chr(10))[2]}"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
