"""Those who wait for the conductor's answers, as stories talk of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from conductor.core import actions, events
from conductor.errors import AdmissionRefused, ConductorError, Refusal
from conductor.types import AgentId, FinishReason, ReservationId

E = TypeVar("E", bound=ConductorError)


@dataclass(eq=False)
class Call:
    """Somebody who waits for one answer."""

    asked: events.Event
    owner: str | None = None
    answers: list[actions.Action] = field(default_factory=list)
    cancelled: bool = False  #: whoever asked went away, and is told nothing

    @property
    def waits(self) -> bool:
        return not self.answers

    @property
    def waits_or_is_in(self) -> bool:
        return self.waits or self.is_admitted

    @property
    def is_registration(self) -> bool:
        return isinstance(self.asked, events.RegisterRequested)

    @property
    def is_reservation(self) -> bool:
        return isinstance(self.asked, events.ReserveRequested)

    @property
    def answer(self) -> actions.Action:
        assert len(self.answers) == 1, f"{self.asked}: {self.answers}"
        return self.answers[0]

    @property
    def is_admitted(self) -> bool:
        return isinstance(self.answer, actions.Admit)

    @property
    def is_refused(self) -> bool:
        return isinstance(self.answer, actions.Refuse) and isinstance(self.answer.error, AdmissionRefused)

    @property
    def admission(self) -> actions.Admit:
        assert isinstance(self.answer, actions.Admit), self.answer
        return self.answer

    @property
    def reservation(self) -> ReservationId:
        assert isinstance(self.answer, actions.AnswerReserve), self.answer
        return self.answer.reservation_id

    @property
    def is_done(self) -> bool:
        """An unregister, a release, a cancel or a fork was carried out."""
        done = (actions.AnswerUnregister, actions.AnswerRelease, actions.AnswerCancel, actions.AnswerFork)
        return bool(self.answers) and isinstance(self.answer, done)

    @property
    def has_failed(self) -> bool:
        return bool(self.answers) and isinstance(self.answer, actions.FailRequest)

    @property
    def refusal(self) -> Refusal:
        return self.failed_with(AdmissionRefused).refusal

    def failed_with(self, kind: type[E]) -> E:
        assert isinstance(self.answer, (actions.Refuse, actions.FailRequest)), self.answer
        assert type(self.answer.error) is kind, self.answer.error
        return self.answer.error


@dataclass(eq=False)
class TurnCall:
    """Somebody who waits for a turn's end."""

    agent: str
    run: actions.RunTurn | None = None
    stopped: FinishReason | None = None  #: why it was asked to end after its step
    pausing: bool = False  #: asked to stand still after its step
    expired: bool = False  #: its time was up while it waited
    required_tokens: int = 0  #: it outgrew its context, and cannot go on in a smaller one
    endings: list[events.TurnFinished | actions.FailTurn | actions.EndTurn] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        return self.run is None and not self.endings

    @property
    def runs(self) -> bool:
        return self.run is not None and not self.endings

    @property
    def evidence(self) -> tuple[AgentId | None, bool, int]:
        """(evicted, restored, swap_bytes) as the result will say."""
        assert self.run is not None, f"the turn of {self.agent} never ran"
        return self.run.evicted, self.run.restored, self.run.swap_bytes

    @property
    def ended_for(self) -> FinishReason:
        """Why it was over before its end, with what it had made."""
        (ending,) = self.endings
        assert isinstance(ending, actions.EndTurn), ending
        return ending.reason

    def failed_with(self, kind: type[E]) -> E:
        (ending,) = self.endings
        assert isinstance(ending, actions.FailTurn)
        assert type(ending.error) is kind, ending.error
        return ending.error
