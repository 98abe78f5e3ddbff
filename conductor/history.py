"""What the conductor decided and did, as lines for people: who came, went and was refused, what moved, and how long it took.

The last of them are kept for those who look on; all of them go to the logger `conductor.decisions` (`log_file` writes them).

Looks over the executive's shoulder: told of each event before the policy hears it and of each action before it is carried out, it
measures what lies between an order and its end. It changes nothing, and an error of its own is logged and hurts nobody.
Does not cover the bytes booked after each change (`LedgerEntry`) or what runs now (`status`).
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from conductor.core import actions, events
from conductor.core.events import RequestId, TurnId
from conductor.core.state import State
from conductor.errors import AdmissionRefused, ConductorError, TurnQueueFull, TurnTimedOut, WindowRefused
from conductor.happenings import IN_THE_LOG_ALONE, Happening, HistoryEntry
from conductor.types import AgentId, KvPlace, ModelId, ModelKey, OwnerId
from conductor.under_way import Asked, UnderWay, Work
from conductor.units import format_bytes

_log = logging.getLogger("conductor")
#: Each line, as a HistoryEntry; says nothing unless logging is configured.
_decisions = logging.getLogger("conductor.decisions")
_decisions.addHandler(logging.NullHandler())

_LINES = 4096
_TEXT_LENGTH = 300
_LEVELS = {
    Happening.FAILED: logging.ERROR,
    Happening.REFUSED: logging.WARNING,
    Happening.DROPPED: logging.WARNING,
    Happening.DRIFT: logging.WARNING,
}
_PLACES = {KvPlace.HOST: "host memory", KvPlace.DISK: "disk"}


class History:
    """Belongs to the event loop. `clock`: seconds, the one that `at_s` is counted on from the making of this."""

    def __init__(self, state: State, *, clock: Callable[[], float], lines: int = _LINES) -> None:
        self._state, self._clock, self._began_at = state, clock, clock()
        self._entries: deque[HistoryEntry] = deque(maxlen=lines)
        self._number = 0
        self._under_way = UnderWay(state, clock=clock)
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
            self._under_way.forget_turns()

    def _hear(self, event: events.Event) -> None:
        match event:
            case events.RegisterRequested(request, agent, may_wait):
                would_wait = ", would wait" if may_wait else ""
                text = f"to be admitted: {agent.service_class.value}, {agent.context.window:,} tokens{would_wait}"
                self._under_way.requests[request] = self._ask(request, agent.id, text, agent.model.key, owner=agent.owner)
            case events.ReserveRequested(request, holder, size):
                self._under_way.requests[request] = self._ask(request, holder, "to reserve", bytes=size)
            case events.RegisterAbandoned(request, timed_out=False) | events.ReserveAbandoned(request):
                self._abandoned(self._under_way.requests.pop(request, None))
            case events.OwnerDied(owner):
                for asked in self._under_way.take_of(owner):
                    self._abandoned(asked)
            case events.TurnAbandoned(turn_id) if turn_id in self._state.rotation.turns:
                self._abandoned(self._under_way.turns.get(turn_id))
            case events.TurnRequested(turn_id, agent_id):
                self._under_way.turns[turn_id] = self._ask(turn_id, agent_id, "for a turn", self._under_way.model_of(agent_id))
            case events.ForkRequested(request, turn_id, source, new):
                asked = self._ask(turn_id, new, f"to go on from where {source} is", self._under_way.model_of(new))
                self._under_way.requests[request] = self._under_way.turns[turn_id] = asked
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
                kept = self._under_way.ordered(("leave", agent_id)) is not None
                self._left_seat(agent_id, place, saved_bytes, was_to_be_kept=kept)
            case events.SeatTaken(agent_id, restored_bytes):
                work = ("take", agent_id)
                if restored_bytes:
                    self._of_agent(Happening.SWAPPED_IN, agent_id, "to a slot", bytes=restored_bytes, work=work)
                self._under_way.end(work)
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
                brought = ", brought its model" if model_loaded else ""
                text = f"{agent.service_class.value}, {agent.context.window:,} tokens{brought}"
                self._answered(Happening.ADMITTED, text, request, bytes=charged_bytes)
            case actions.Refuse(request, error) | actions.FailRequest(request, error):
                self._refused(request, error)
            case actions.AnswerReserve(request, reservation_id):
                self._answered(Happening.RESERVED, reservation_id, request, bytes=self._state.ledger.size(reservation_id))
            case actions.AnswerFork(request):
                self._under_way.requests.pop(request, None)
            case actions.AnswerRelease(request, released_bytes):
                self._append(Happening.RELEASED, "", None, None, bytes=released_bytes, request=request)
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
        order = self._under_way.order
        match action:
            case actions.LoadModel(plan):
                order(("load", plan.id), model=plan.key)
            case actions.UnloadModel(model_id):
                order(("unload", model_id))
            case actions.OpenPool(pool_id, agent_id=agent_id):
                order(("open", pool_id), of=agent_id)
            case actions.ClosePool(pool_id):
                order(("close", pool_id))
            case actions.TakeSeat(agent_id):
                order(("take", agent_id), of=agent_id)
            case actions.LeaveSeat(agent_id, to) if to is not KvPlace.TOKENS:
                order(("leave", agent_id))
            case actions.RunTurn():
                self._runs(action)
            case _:
                pass

    # --- lines ------------------------------------------------------------------------------------------------------

    def _ask(
        self,
        number: int,
        who: str,
        text: str,
        model: ModelKey | None = None,
        *,
        bytes: int | None = None,
        owner: OwnerId | None = None,
    ) -> Asked:
        self._append(Happening.ASKED, text, who, model, bytes=bytes, request=number)
        return self._under_way.asked(number, who, model, owner)

    def _abandoned(self, asked: Asked | None) -> None:
        if asked is not None:
            ms = self._under_way.ms_since(asked)
            self._append(Happening.ABANDONED, "", asked.who, asked.model, ms=ms, request=asked.number)

    def _answered(self, kind: Happening, text: str, request: RequestId, *, bytes: int | None) -> None:
        asked = self._under_way.requests.pop(request, None)
        if asked is not None:  # else it was of a call that asks for nothing, such as an unregistration
            ms = self._under_way.ms_since(asked)
            self._append(kind, text, asked.who, asked.model, bytes=bytes, ms=ms, request=asked.number)

    def _runs(self, run: actions.RunTurn) -> None:
        work, asked = ("turn", run.turn_id), self._under_way.turns.get(run.turn_id)
        goes_on = self._under_way.ordered(work) is not None
        if not goes_on:  # else what it takes is counted from its beginning
            self._under_way.order(work)
        if asked is not None:
            ms = None if goes_on else self._under_way.ms_since(asked)
            text = "goes on" if goes_on else f"the KV of {run.evicted} made way" if run.evicted else ""
            self._append(Happening.TURN_BEGAN, text, asked.who, asked.model, ms=ms, request=asked.number)

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
        self._under_way.end(work)

    def _moved(self, agent_id: AgentId, place: KvPlace, elapsed_s: float) -> None:
        size = self._state.kv_books.saved_bytes(self._state.agents[agent_id]) if agent_id in self._state.agents else None
        kind, text = (Happening.SWAPPED_OUT, "from host memory to disk") if place is KvPlace.DISK else (Happening.DROPPED, "")
        self._of_agent(kind, agent_id, text, bytes=size, ms=elapsed_s * 1000)

    def _refused(self, request: RequestId, error: ConductorError) -> None:
        size = error.refusal.requested_bytes if isinstance(error, AdmissionRefused) else None
        self._answered(Happening.REFUSED, _line(error), request, bytes=size)

    def _turn_ended(self, turn_id: TurnId, tokens: int, computed: int) -> None:
        text = f"{computed:,} tokens computed, {tokens:,} in the conversation"
        self._of_turn(Happening.TURN_ENDED, turn_id, text, computed=computed)
        if (asked := self._under_way.turns.get(turn_id)) is not None:
            self._counted.pop(AgentId(asked.who), None)

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
        asked = self._under_way.turns.get(turn_id)
        if asked is None:
            return
        if computed is not None:
            self._count(AgentId(asked.who), computed)
        began = self._under_way.ordered(("turn", turn_id))
        ms = None if began is None else self._under_way.ms_since(began)
        if kind is not Happening.PAUSED:
            self._under_way.end(("turn", turn_id))
        self._append(kind, text, asked.who, asked.model, bytes=bytes, ms=ms, request=asked.number)

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
        order = self._under_way.end(work) if work is not None else None
        took_ms = ms if order is None else self._under_way.ms_since(order)
        request = order.number if order is not None else None
        self._append(kind, text, agent, known.plan.key if known else None, bytes=bytes, ms=took_ms, request=request)

    def _append(
        self,
        kind: Happening,
        text: str,
        who: str | None,
        model: ModelKey | None,
        *,
        bytes: int | None = None,
        ms: float | None = None,
        request: int | None = None,
    ) -> None:
        number, at_s = self._number + 1, self._clock() - self._began_at
        entry = HistoryEntry(number, at_s, kind, who, model, bytes, ms, text[:_TEXT_LENGTH], request)
        if kind not in IN_THE_LOG_ALONE:
            self._number = number
            self._entries.append(entry)
        _tell(_LEVELS.get(kind, logging.INFO), entry)

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


def _tell(level: int, entry: HistoryEntry) -> None:
    """Without a look at the stack for who says it, which takes as long as all the rest."""
    if _decisions.isEnabledFor(level):
        _decisions.handle(_decisions.makeRecord(_decisions.name, level, __file__, 0, entry, (), None))


def _line(error: ConductorError) -> str:
    """What a person has to read of it: of a refusal, why, after its numbers."""
    if isinstance(error, AdmissionRefused):
        return f"{error.code.value}: {str(error).partition(chr(10))[2]}"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
