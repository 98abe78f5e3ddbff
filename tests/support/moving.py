"""Tiny models whose weights move, what is said with them to the last bit, and copies that come early, late, or not at all."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conductor.backend.llama import Context, Llama, Model, movable
from conductor.backend.llama.buffers import Buffer
from conductor.backend.llama.movable import MovableWeights
from conductor.backend.llama.transfers import HostTransfers, Ticket
from conductor.core.streaming import Placement, placements
from conductor.types import ContextSpec, DeviceKind
from tests.support import tiny_gguf
from tests.support.tiny_gguf import write_tiny_gguf

#: no multiple of 2 or 4, so that passes begin in different slots
N_LAYER = 7
GEOMETRY: dict[str, Any] = {"n_layer": N_LAYER, "n_embd": 64, "n_ff": 96, "sliding_window": 16}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama in q8_0": {"file_type": "q8_0"},
    "qwen2, tied": {"architecture": "qwen2", "tied": True},
    "gemma3, sliding": {"architecture": "gemma3"},
    "mamba": {"architecture": "mamba"},
    "jamba, uneven": {"architecture": "jamba"},
    "experts": {"n_expert": 4},
    "one large layer": {"file_type": "q8_0"},
}
#: what llama.cpp repacks when it loads them as it likes
REPACKED = ("llama in q8_0", "one large layer")

SPEC = ContextSpec(window=256, slots=3, n_batch=64, n_ubatch=16)
#: of several steps of 16 tokens, and longer than the sliding window
PROMPTS = [[(7 * n + 31 * at) % 250 for at in range(length)] for n, length in enumerate((41, 16, 33))]


def write(kind: str, directory: Path) -> Path:
    path = directory / f"{kind}.gguf"
    if path.exists():
        return path
    with pytest.MonkeyPatch.context() as patch:
        if kind == "one large layer":  # of floats, between quantised ones
            stored = tiny_gguf._stored_type
            whole = tiny_gguf.TensorType.F32
            patch.setattr(tiny_gguf, "_stored_type", lambda name, *of: whole if name.startswith("blk.3.") else stored(name, *of))
        return write_tiny_gguf(path, **GEOMETRY, **KINDS[kind])


def weights(model: Model) -> MovableWeights:
    assert model.weights is not None
    return model.weights


@contextmanager
def loaded(path: Path, *, plainly: bool = False) -> Iterator[Model]:
    llama = Llama.instance()
    model = llama.load(str(path), DeviceKind.HOST) if plainly else llama.load_movable(str(path), DeviceKind.HOST)
    try:
        yield model
    finally:
        model.close()


@contextmanager
def live(model: Model, spec: ContextSpec = SPEC) -> Iterator[Context]:
    context = model.context(spec, n_threads=1)
    try:
        yield context
    finally:
        context.close()


class Talk:
    """Sequences of a context. `rows` are the bytes of all logits so far: equal if every bit is."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.past = [0] * context.n_slots
        self.next: dict[int, int] = {}
        self.rows: list[bytes] = []
        self.passes = 0

    def hear(self, slot: int, tokens: list[int]) -> None:
        self._decode({slot: tokens})

    def say(self, steps: int, *slots: int) -> list[list[int]]:
        said = []
        for _ in range(steps):
            self._decode({slot: [self.next[slot]] for slot in slots})
            said.append([self.next[slot] for slot in slots])
        return said

    def _decode(self, batch: dict[int, list[int]]) -> None:
        self.context.batch.clear()
        for slot, tokens in batch.items():
            self.context.batch.add(tokens, self.past[slot], slot, output=True)
        self.context.decode()
        self.passes += -(-self.context.batch.count // SPEC.n_ubatch)
        logits = self.context.logits(len(batch))
        self.rows.append(logits.tobytes())
        for row, (slot, tokens) in zip(logits, batch.items(), strict=True):
            self.past[slot] += len(tokens)
            self.next[slot] = int(row.argmax())

    def forget(self, slot: int) -> None:
        self.context.empty(slot)
        self.past[slot] = 0
        self.next.pop(slot, None)


def conversation(model: Model, steps: int = 4) -> Talk:
    """All read their prompts, one after the other, and speak together."""
    with live(model) as context:
        talk = Talk(context)
        for slot, prompt in enumerate(PROMPTS):
            talk.hear(slot, prompt)
        talk.say(steps, 0, 1, 2)
    return talk


def partial(model: Model) -> list[Placement]:
    """All placements with which layers stream."""
    found = [it for it in placements(weights(model).blocks) if it.streams]
    assert {it.slots for it in found} == {2, 4}
    return found


# --- copies ---------------------------------------------------------------------------------------------------------------


class AtOnce(HostTransfers):
    """Each copy is done as early as can be, before `copy` returns: one begun too early shows."""

    def copy(self, offset: int, source: int, bytes: int) -> Ticket:
        ticket = super().copy(offset, source, bytes)
        ticket.exception()
        return ticket


class AtLast(HostTransfers):
    """Each copy is done as late as can be, when it is waited for: one that nobody waits for shows."""

    def __init__(self, buffer: Buffer) -> None:
        super().__init__(buffer)
        self._due: list[Callable[[], object]] = []
        self._done = 0

    def copy(self, offset: int, source: int, bytes: int) -> Ticket:
        self._due.append(lambda: ctypes.memmove(self._base + offset, source, bytes))
        return len(self._due)

    def wait(self, ticket: Ticket) -> None:
        for due in self._due[self._done : ticket]:  # in order
            due()
        self._done = max(self._done, ticket)


class Astray(HostTransfers):
    """From `armed` on a copy brings what lies before what it is to bring: of equal layers, the layer before."""

    armed = False

    def copy(self, offset: int, source: int, bytes: int) -> Ticket:
        return super().copy(offset, source - bytes if self.armed else source, bytes)


class Unawaited(AtLast):
    """From `armed` on nobody waits: what a slot held before stays there."""

    armed = False

    def wait(self, ticket: Ticket) -> None:
        if not self.armed:
            super().wait(ticket)


class LinkDown(Exception):
    """What a copy raises here."""


class Failing(HostTransfers):
    """The copies that are `doomed`, counted from `arm` on, fail: when they are begun, or when they are waited for."""

    def __init__(self, buffer: Buffer, *, at_begin: bool, error: type[BaseException] = LinkDown) -> None:
        super().__init__(buffer)
        self._at_begin, self._error = at_begin, error
        self.tried, self._doomed = 0, range(0)

    def arm(self, doomed: range) -> None:
        self.tried, self._doomed = 0, doomed

    def copy(self, offset: int, source: int, bytes: int) -> Ticket:
        self.tried += 1
        if self.tried - 1 not in self._doomed:
            return super().copy(offset, source, bytes)
        if self._at_begin:
            raise self._error("the link is down")
        ctypes.memset(self._base + offset, 0xFF, bytes)  # what is there then is no weights at all
        return self._thread.submit(self._fail)

    def _fail(self) -> None:
        raise self._error("the link is down")


@contextmanager
def transfers(make: Callable[[Buffer], HostTransfers]) -> Iterator[list[Any]]:
    """Weights placed meanwhile are copied by what `make` gives; those are listed."""
    made: list[HostTransfers] = []

    def begin(buffer: Buffer, _: DeviceKind) -> HostTransfers:
        made.append(make(buffer))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(movable, "transfers_into", begin)
        yield made
