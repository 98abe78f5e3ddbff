"""The values that cross module and process boundaries: frozen, typed, with JSON beside attributes.

Covers what goes in (`DecodeRequest`), what comes out (`Admission`, `DecodeResult`, `Chunk`, `Status`) and the ids.
Does not cover what only `core` passes to itself (`core/events.py`) or errors (`errors.py`).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NewType, TypeAlias

AgentId = NewType("AgentId", str)
#: The key of a model in the configuration or, for a model named by path, that path as resolved.
ModelKey = NewType("ModelKey", str)
#: What makes two names the same model: the file itself, not its path.
ModelId = NewType("ModelId", str)
ReservationId = NewType("ReservationId", str)
#: A live context: of a model's shared and best-effort agents together, or of one guaranteed agent.
PoolId = NewType("PoolId", str)
#: Identity of the process that an agent or a reservation dies with (Ray's worker id).
OwnerId = NewType("OwnerId", str)

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"


class Record:
    """Base of results: attributes for programs, `record["key"]` and `to_json()` for notebooks and shells.

    `to_json()` is plain dicts, lists and scalars, ready for `json.dumps`; of an enum, its value.
    """

    __slots__ = ()

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def keys(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def to_json(self) -> dict[str, JSON]:
        """Plain dicts, lists and scalars, ready for `json.dumps`."""
        return {name: _plain(getattr(self, name)) for name in self.keys()}


def _plain(value: Any) -> JSON:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


class DeviceKind(str, enum.Enum):
    """What the bytes are shared out of."""

    CUDA = "cuda"  #: a GPU
    HOST = "host"  #: a slice of RAM


class Kind(str, enum.Enum):
    """What booked bytes are for."""

    WEIGHTS = "weights"
    RING = "ring"  #: slots that the layers of a model pass through
    CONTEXT = "context"  #: KV cache and compute buffers of a live context
    HEADROOM = "headroom"  #: promised to the registered agents' turns, used by no context at this moment
    OVERHEAD = "overhead"  #: what the process itself holds on the device (CUDA context, libraries)
    KV = "kv"  #: saved KV, in the ledgers of host memory and of the disk
    EXTERNAL = "external"  #: booked by other tasks of the node through `reserve`


class ServiceClass(str, enum.Enum):
    """What an agent is promised when it is admitted."""

    GUARANTEED = "guaranteed"  #: weights and the full window stay on the device; never swapped
    SHARED = "shared"  #: weights stay on the device; the KV is there while decoding, in host memory otherwise
    BEST_EFFORT = "best_effort"  #: a turn: its model's weights may leave the device too while it is idle


class KvPlace(str, enum.Enum):
    """Where an agent's KV cache is. The session's tokens are the truth, the KV a cache of them."""

    SLOT = "slot"  #: in a live context on the device
    HOST = "host"  #: saved to host memory
    DISK = "disk"  #: saved to a file
    TOKENS = "tokens"  #: nowhere: recomputed from the tokens on the next turn (also: nothing computed yet)


class ModelState(str, enum.Enum):
    """Where a model's weights are. A model that no agent uses has no state: it is unloaded and forgotten."""

    PARKED = "parked"  #: known and used, its weights not on the device (not yet, or not now)
    LOADING = "loading"  #: booked, on their way
    RESIDENT = "resident"  #: on the device, or as much of them as is to be there: `ModelStatus.residency`
    UNLOADING = "unloading"  #: on their way off it, still booked


class FinishReason(str, enum.Enum):
    """Why a turn ended."""

    EOS = "eos"  #: the model ended its turn
    STOP = "stop"  #: a stop string appeared
    LENGTH = "length"  #: `max_tokens` were made
    WINDOW = "window"  #: the agent's window is full
    CANCELLED = "cancelled"  #: the caller went away or asked for the end
    TIMEOUT = "timeout"  #: the time that its caller gave it was up


class MirrorState(str, enum.Enum):
    """How Ray's figure stands to the ledger's."""

    EQUAL = "equal"  #: to the MiB
    BEHIND = "behind"  #: not yet; `MirrorStatus.note` says why
    UNMIRRORED = "unmirrored"  #: Ray does not know; `MirrorStatus.note` says why


@dataclass(frozen=True, slots=True)
class ContextSpec(Record):
    """The parameters of a `llama_context` that decide its size, and so an agent's price."""

    window: int  #: tokens of one sequence
    slots: int = 1  #: sequences, each with a window of its own
    n_batch: int = 512  #: the most tokens decoded in one call
    n_ubatch: int = 512  #: the most tokens computed at once
    kv_type: str = "f16"  #: f32, f16, q8_0 or q4_0
    flash_attention: bool = True


@dataclass(frozen=True, slots=True)
class Message(Record):
    """One message of a chat; a dict with the same keys does as well."""

    role: str  #: user, assistant, system, or what else the model's chat template knows
    content: str


#: llama.cpp takes the largest 32-bit number for "draw one", so it is no seed
MAX_SEED = 2**32 - 2


@dataclass(frozen=True, slots=True)
class DecodeRequest(Record):
    """One turn of one agent. `prompt` continues the conversation as raw text; `messages` is a whole chat.

    With neither the answer goes on where it ended.
    """

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    max_tokens: int = 128  #: made at most, 1 or more
    temperature: float = 0.0  #: 0 is greedy
    top_k: int = 40  #: 0 is off
    top_p: float = 0.95  #: 1 is off
    min_p: float = 0.05  #: 0 is off
    seed: int | None = None  #: None draws one; the result says which
    stop: tuple[str, ...] = ()  #: the first of them to appear ends the turn; the text ends before it
    reset: bool = False  #: forget the conversation first
    context_shift: bool | None = None  #: at the window's end drop the oldest half; None: as the model's configuration says


@dataclass(frozen=True, slots=True)
class Admission(Record):
    """What was promised to an agent, and what it cost."""

    agent_id: AgentId
    model: ModelKey
    window: int  #: the most tokens that its conversation may hold
    service_class: ServiceClass
    priority: int  #: higher goes first
    weights_bytes: int  #: of the model, booked once however many agents use it
    first_window: int  #: tokens that its context begins with; it grows with the conversation, up to `window`
    context_bytes: int  #: KV and compute of the context that it begins with, while it is live
    charged_bytes: int  #: what this admission added to the ledger
    model_loaded: bool  #: True if this admission loaded the weights
    waited_s: float  #: from the call to its answer, loading included
    warnings: tuple[str, ...] = ()  #: for people, for instance that the model was trained with a smaller window


@dataclass(frozen=True, slots=True)
class Chunk(Record):
    """Text as it is made; never cut inside a character."""

    text: str
    tokens: int  #: generated since the chunk before


@dataclass(frozen=True, slots=True)
class DecodeResult(Record):
    """A finished turn and what it cost."""

    agent_id: AgentId
    text: str  #: the answer
    tokens: tuple[int, ...]  #: the generated token ids, the end-of-turn token included
    prompt_tokens: int  #: tokens of the prompt that had to be decoded
    prompt_tokens_reused: int  #: tokens of the prompt that the session held already
    prefix_tokens_reused: int  #: tokens of the prompt that another agent had read: a shared beginning, copied instead
    generated_tokens: int  #: the length of `tokens`
    stopped_on_eos: bool  #: `finish_reason` is EOS
    finish_reason: FinishReason
    seed: int  #: the one given, or the one drawn
    elapsed_ms: float  #: from the call's arrival to its last token
    queue_ms: float  #: of it, waiting for a seat
    time_to_first_token_ms: float  #: of a turn that made none, its whole time
    longest_stall_ms: float  #: the longest time between two tokens while it ran: others' prompts are read in between
    kv_swap_evicted: AgentId | None  #: whose KV had to leave for this turn
    kv_swap_restored: bool  #: this agent's KV came back from host memory
    swap_bytes: int  #: moved both ways for this turn
    window_growths: int  #: how often it outgrew its window
    pauses: int  #: how often it stood still for others
    recomputed_tokens: int  #: decoded again because their KV was nowhere


@dataclass(frozen=True, slots=True)
class Reservation(Record):
    """A line of the ledger."""

    id: ReservationId
    holder: str  #: a model, an agent, the name that `reserve` was given, or a part of the conductor
    kind: Kind
    bytes: int


@dataclass(frozen=True, slots=True)
class DeviceStatus(Record):
    """The last reading of the device."""

    name: str
    kind: DeviceKind
    total_bytes: int
    free_bytes: int
    others_bytes: int  #: held by the driver and by strangers
    drift_bytes: int  #: what is booked beyond what may be booked now, because strangers took it
    chosen: str  #: why this device: automatic, forced, or what was missing


@dataclass(frozen=True, slots=True)
class LedgerStatus(Record):
    """What is booked on the device."""

    max_bytes: int  #: the cap: what may be booked
    allocated_bytes: int  #: the sum of the reservations
    reservations: tuple[Reservation, ...]


@dataclass(frozen=True, slots=True)
class LedgerEntry(Record):
    """A line of the ledger's log: what was booked after something happened."""

    at_s: float  #: since the conductor's start
    cause: str  #: what happened
    max_bytes: int
    allocated_bytes: int
    overdrawn_bytes: int  #: booked beyond the cap because strangers came and the cap fell; never by a booking


@dataclass(frozen=True, slots=True)
class WeightsStatus(Record):
    """A model's weights that may leave the device, and what passed through its ring since they were placed."""

    home_bytes: int  #: of host memory
    pinned: bool  #: page-locked: copied at the link's full rate
    passes: int  #: how often all its layers were passed through
    moved_bytes: int
    stalled_s: float  #: waiting for layers, with nothing to compute
    link_share: float  #: bytes per second while it decoded, of what the link gives


@dataclass(frozen=True, slots=True)
class ModelStatus(Record):
    """A model that agents are registered for."""

    key: ModelKey
    path: str  #: of its file
    state: ModelState
    agents: int  #: how many use it
    bytes: int  #: booked for its weights, and the ring; 0 while parked
    estimated_bytes: int  #: what its weights were expected to take
    estimate_error: float | None  #: (measured - estimated) / estimated at the last load; None before the first
    residency: str = ""  #: resident, parked, or streamed R+K/N: R layers stay, the other N - R pass through K slots
    ring_bytes: int = 0  #: of `bytes`, the slots
    weights: WeightsStatus | None = None  #: of weights that have a home in host memory


@dataclass(frozen=True, slots=True)
class PoolStatus(Record):
    """A live context and its seats."""

    id: PoolId
    model: ModelKey
    owner: AgentId | None  #: the guaranteed agent whose own it is
    window: int  #: tokens of each slot
    slots: int
    seated: int  #: agents whose KV is in it
    running: int  #: turns
    bytes: int  #: booked
    phase: str  #: opening, ready, draining or closing


@dataclass(frozen=True, slots=True)
class AgentStatus(Record):
    """A registered agent, and its conversation."""

    id: AgentId
    model: ModelKey
    service_class: ServiceClass
    window: int  #: that it was admitted for
    window_in_use: int  #: that is booked for it now; it grows with the conversation
    tokens: int  #: in its conversation
    kv: KvPlace
    priority: int
    context_bytes: int  #: of a pool of one slot with the window in use
    saved_bytes: int  #: of its KV, in host memory or on disk
    busy: bool  #: a turn of it runs
    turns: int  #: begun since it was admitted
    served_tokens: int  #: computed for it, in the account of fair shares
    idle_s: float  #: since its last turn ended, or it was admitted; 0 while one waits or runs


@dataclass(frozen=True, slots=True)
class WaitingStatus(Record):
    """Somebody in a queue: a registration that waits for room, or a turn that waits for its place."""

    what: str  #: register or turn
    agent_id: AgentId
    model: ModelKey
    position: int  #: 0 is first
    reason: str
    priority: int
    waited_s: float
    expires_in_s: float | None  #: None: it waits for as long as it takes
    requested_bytes: int


@dataclass(frozen=True, slots=True)
class MirrorStatus(Record):
    """Ray's accounting beside the ledger's, in MiB."""

    state: MirrorState
    resource: str  #: the custom resource of the node
    total_mib: float  #: that Ray advertises
    used_mib: float  #: of it, in use
    ledger_mib: float  #: booked
    note: str = ""


@dataclass(frozen=True, slots=True)
class HostMemoryStatus(Record):
    """Where swapped KV lives."""

    budget_bytes: int
    used_bytes: int
    pinned: bool  #: page-locked: copied at the link's full rate
    disk_budget_bytes: int = 0
    disk_used_bytes: int = 0
    moved_to_disk: int = 0  #: caches since the start
    dropped: int = 0  #: caches that found no place, or were not worth one: recomputed from the tokens
    damaged: int = 0  #: caches that failed their check: recomputed from the tokens


@dataclass(frozen=True, slots=True)
class Status(Record):
    """Everything at one moment. The bytes of `ledger` are the truth; what Ray and the device say stands beside them."""

    version: str  #: of VRAM Conductor
    device: DeviceStatus
    ledger: LedgerStatus
    live_contexts: int | None  #: the most pools at once; None: as many as there is room for
    pools: tuple[PoolStatus, ...]
    models: tuple[ModelStatus, ...]
    agents: tuple[AgentStatus, ...]
    waiting: tuple[WaitingStatus, ...]
    host_memory: HostMemoryStatus
    mirror: MirrorStatus
    llama_cpp: str  #: its version
    estimates: str  #: how bytes are known before a model is loaded
    threads: int  #: of the CPU, in all
    uptime_s: float
    computed_tokens: int = 0  #: since the start, of prompts and answers, turns that run now included
    started_at: float = 0.0  #: time.time(); another one is another conductor, which knows nothing of the one before
