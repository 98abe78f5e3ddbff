"""Every exception the project raises on purpose.

    ConductorError
    ├── ConfigError            a configuration file is wrong: names file and key
    ├── InvalidRequest         an argument is wrong: names it
    │   ├── UnknownAgent
    │   └── DuplicateAgent
    ├── AdmissionRefused       the bytes do not fit: carries a Refusal with the numbers
    ├── ModelError             a model cannot be used
    │   ├── UnknownModel
    │   ├── PathNotAllowed
    │   ├── BadModelFile
    │   ├── ModelLoadFailed
    │   └── ChatTemplateFailed
    ├── WindowFull             the turn does not fit the agent's window; the session is as it was
    ├── WindowRefused          the window cannot grow now: no room; the session is as it was before the turn
    ├── TurnTimedOut           the turn waited `wait_s` in vain; the session is as it was
    ├── TurnQueueFull          too many turns wait already
    ├── TurnCancelled          the agent left, or the turn was ended, before a result existed
    ├── DecodeFailed           llama.cpp gave up; the session keeps its tokens
    ├── UnknownReservation     released twice, or never made
    ├── ServiceFailed          Ray cannot be started, reached or stopped
    │   └── NotRunning
    └── InternalError          a broken invariant: our bug

Each survives pickling, so it reaches a Ray caller with its fields: `__init__` hands its own arguments to
`super().__init__`. `retryable` says whether the same call may succeed later.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from conductor.types import AgentId, ModelKey, Record, Reservation, ReservationId, ServiceClass
from conductor.units import format_bytes


class ConductorError(Exception):
    """Base of all of them. `str()` is one message for people; the fields are attributes."""

    retryable: ClassVar[bool] = False  #: whether the same call may succeed later


class ConfigError(ConductorError):
    """A configuration or pipeline file is wrong. `key`: the option, dotted, or the line; "" if it is about the whole file."""

    def __init__(self, source: str, key: str, problem: str) -> None:
        super().__init__(source, key, problem)
        self.source, self.key, self.problem = source, key, problem

    def __str__(self) -> str:
        return f"{self.source}: {self.key}: {self.problem}" if self.key else f"{self.source}: {self.problem}"


class InvalidRequest(ConductorError):
    """An argument is wrong; nothing happened."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument, self.problem = argument, problem

    def __str__(self) -> str:
        return f"{self.argument}: {self.problem}"


class UnknownAgent(InvalidRequest):
    """No agent of this id is registered: it never was, it left, or the conductor was restarted since."""

    def __init__(self, agent_id: str) -> None:
        super().__init__("agent_id", f"no agent {agent_id!r} is registered; register it first (`list` shows who is)")
        self.args = (agent_id,)
        self.agent_id = agent_id


class DuplicateAgent(InvalidRequest):
    """An agent of this id is registered already."""

    def __init__(self, agent_id: str) -> None:
        super().__init__("agent_id", f"{agent_id!r} is registered already; unregister it or choose another id")
        self.args = (agent_id,)
        self.agent_id = agent_id


class RefusalCode(str, enum.Enum):
    """Why nothing was booked."""

    CAP = "CAP"  #: not now: others hold the bytes
    NEVER = "NEVER"  #: not on this device, even alone
    QUEUE_FULL = "QUEUE_FULL"  #: too many wait already
    TIMEOUT = "TIMEOUT"  #: waited `wait_s` in vain
    DRIFT = "DRIFT"  #: not now: strangers took memory that is booked here


@dataclass(frozen=True, slots=True)
class Refusal(Record):
    """The numbers behind a refusal."""

    code: RefusalCode
    requested_bytes: int  #: what this admission would have added
    cap_bytes: int  #: what may be booked on the device
    booked_bytes: int  #: what is
    holders: tuple[Reservation, ...]  #: and by whom
    largest_window: int | None  #: a window of the same model that would fit now, close to the longest; None if none would
    waiting_ahead: int = 0  #: registrations that wait for room and must not be overtaken
    evictable_bytes: int = 0  #: booked, and given back if all that is idle went to host memory
    fitting_class: ServiceClass | None = None  #: a weaker service class that would be admitted now
    streaming_fits: bool = False  #: that class would, but only with its model's layers streamed
    retry_after_s: float | None = None  #: when something may have changed; None: when somebody leaves

    @property
    def free_bytes(self) -> int:
        """Negative if strangers took memory that is booked."""
        return self.cap_bytes - self.booked_bytes

    @property
    def line(self) -> str:
        """The one-line form, for logs and sockets."""
        return (
            f"VRAM_LEDGER_DENY code={self.code.value} ledger_max_bytes={self.cap_bytes} "
            f"ledger_allocated_bytes={self.booked_bytes} requested_bytes={self.requested_bytes}"
        )


class AdmissionRefused(ConductorError):
    """It does not fit. Nothing was booked and nothing was loaded."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal

    @property
    def code(self) -> RefusalCode:
        return self.refusal.code

    @property
    def line(self) -> str:
        return self.refusal.line

    @property
    def retryable(self) -> bool:  # type: ignore[override]
        """Not if it will never fit."""
        return self.refusal.code is not RefusalCode.NEVER

    def __str__(self) -> str:
        r = self.refusal
        return f"{r.line}\n{format_bytes(r.requested_bytes)} asked for, {format_bytes(r.free_bytes)} free. {_advice(r)}"


def _advice(refusal: Refusal) -> str:
    if refusal.code is RefusalCode.QUEUE_FULL:
        return "Too many registrations wait already; try again later."
    if refusal.waiting_ahead:
        return f"{refusal.waiting_ahead} registrations wait for room before it; wait behind them with wait_s=SECONDS."
    fits = [f"a window of {refusal.largest_window} tokens"] if refusal.largest_window else []
    streamed = ", with its layers streamed," if refusal.streaming_fits else ""
    fits += [f"the service class {refusal.fitting_class.value}{streamed}"] if refusal.fitting_class else []
    smaller = f"{' or '.join(fits)} would fit now" if fits else ""
    smaller = smaller[:1].upper() + smaller[1:]
    if refusal.code is RefusalCode.NEVER:
        return f"This device cannot hold it even when empty. {smaller + '.' if smaller else 'Choose a smaller model.'}"
    if refusal.code is RefusalCode.DRIFT:
        return "Other programs took memory of this device that is booked here; end them, or wait with wait_s=SECONDS."
    return f"{smaller + ', or u' if smaller else 'U'}nregister an agent, or wait with wait_s=SECONDS."


class ModelError(ConductorError):
    """A model cannot be used; no agent and no byte of it remains."""


class UnknownModel(ModelError):
    """The configuration has no model of this key."""

    def __init__(self, model: str, known: tuple[ModelKey, ...]) -> None:
        super().__init__(model, known)
        self.model, self.known = model, known

    def __str__(self) -> str:
        return f"no model {self.model!r} in the configuration; there are: {', '.join(self.known) or 'none'}"


class PathNotAllowed(ModelError):
    """The file lies outside `model_dirs`."""

    def __init__(self, path: str, allowed: tuple[str, ...]) -> None:
        super().__init__(path, allowed)
        self.path, self.allowed = path, allowed

    def __str__(self) -> str:
        where = ", ".join(self.allowed) or "none configured"
        return f"{self.path!r} is outside the directories that models may be named from ({where}); add it to model_dirs"


class BadModelFile(ModelError):
    """The file is missing or cannot be fetched, is no GGUF, or is damaged."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class ModelLoadFailed(ModelError):
    """llama.cpp could not load a file that passed every check."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"llama.cpp could not load {Path(self.path).name}: {self.problem}"


class ChatTemplateFailed(ModelError):
    """The model has no usable chat template, or it does not take these messages."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(model, problem)
        self.model, self.problem = model, problem

    def __str__(self) -> str:
        return f"chat template of {self.model}: {self.problem}"


class WindowFull(ConductorError):
    """The turn needs more tokens than the window has left. Nothing was decoded; the session is as it was."""

    def __init__(self, agent_id: AgentId, window: int, held_tokens: int, new_tokens: int) -> None:
        super().__init__(agent_id, window, held_tokens, new_tokens)
        self.agent_id, self.window, self.held_tokens, self.new_tokens = agent_id, window, held_tokens, new_tokens

    def __str__(self) -> str:
        return (
            f"window of {self.agent_id!r} is {self.window} tokens, holds {self.held_tokens}; the prompt adds {self.new_tokens} "
            "(one must stay free to answer): shorten it, pass reset=True, register a larger window, or allow context_shift"
        )


class WindowRefused(ConductorError):
    """The conversation needs a larger context than there is room for. The session is as it was before the turn.

    `text`: what the turn had made when it had to stop; the same turn makes it again when there is room.
    """

    @property
    def retryable(self) -> bool:  # type: ignore[override]
        """Not if it will never fit."""
        return self.refusal.code is not RefusalCode.NEVER

    def __init__(self, agent_id: AgentId, window: int, needed_tokens: int, refusal: Refusal, text: str = "") -> None:
        super().__init__(agent_id, window, needed_tokens, refusal, text)
        self.agent_id, self.window, self.needed_tokens = agent_id, window, needed_tokens
        self.refusal, self.text = refusal, text

    def __str__(self) -> str:
        r, never = self.refusal, self.refusal.code is RefusalCode.NEVER
        way_out = "" if never else "unregister an agent, wait longer with wait_s=SECONDS, or "
        return (
            f"the window of {self.agent_id!r} cannot grow from {self.window} to {self.needed_tokens} tokens "
            f"{'on this device, even alone' if never else 'now'}: {format_bytes(r.requested_bytes)} asked for, "
            f"{format_bytes(r.free_bytes)} free. The conversation is as it was; {way_out}pass reset=True"
        )


class TurnTimedOut(ConductorError):
    """The turn was not begun. `reason`: what it waited for."""

    retryable = True

    def __init__(self, agent_id: AgentId, waited_s: float, reason: str) -> None:
        super().__init__(agent_id, waited_s, reason)
        self.agent_id, self.waited_s, self.reason = agent_id, waited_s, reason

    def __str__(self) -> str:
        return f"the turn of {self.agent_id!r} waited {self.waited_s:.1f} s: {self.reason}"


class TurnQueueFull(ConductorError):
    """Too many turns wait already (`turn_queue_limit`); nothing was begun."""

    retryable = True

    def __init__(self, agent_id: AgentId, waiting: int) -> None:
        super().__init__(agent_id, waiting)
        self.agent_id, self.waiting = agent_id, waiting

    def __str__(self) -> str:
        return f"{self.waiting} turns wait already, so that of {self.agent_id!r} is not taken in; try again later"


class TurnCancelled(ConductorError):
    """The turn was ended, or its agent left, before it had made anything."""

    def __init__(self, agent_id: AgentId, reason: str) -> None:
        super().__init__(agent_id, reason)
        self.agent_id, self.reason = agent_id, reason

    def __str__(self) -> str:
        return f"the turn of {self.agent_id!r} was cancelled: {self.reason}"


class DecodeFailed(ConductorError):
    """llama.cpp gave up in the middle of a turn. The session keeps its tokens."""

    retryable = True

    def __init__(self, agent_id: AgentId, problem: str) -> None:
        super().__init__(agent_id, problem)
        self.agent_id, self.problem = agent_id, problem

    def __str__(self) -> str:
        return f"decoding for {self.agent_id!r} failed: {self.problem} (the conversation is kept)"


class UnknownReservation(ConductorError):
    """Released already, or never made."""

    def __init__(self, reservation_id: ReservationId) -> None:
        super().__init__(reservation_id)
        self.reservation_id = reservation_id

    def __str__(self) -> str:
        return f"no reservation {self.reservation_id!r}: it was released already, or never made"


class ServiceFailed(ConductorError):
    """Ray or the conductor cannot be started, reached or stopped, or it was closed."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return self.problem


class NotRunning(ServiceFailed):
    """No conductor is running, and none is to be started."""

    def __init__(self) -> None:
        super().__init__("no conductor is running; start one with: conductor up")
        self.args = ()


class InternalError(ConductorError):
    """A broken invariant inside the conductor; please report it with the log."""

    def __init__(self, story: str) -> None:
        super().__init__(story)
        self.story = story

    def __str__(self) -> str:
        return f"internal error: {self.story}"
