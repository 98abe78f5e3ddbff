"""The ring that layers pass through while llama.cpp decodes: it fills slots ahead, and no layer computes before it has arrived.

llama.cpp asks before it computes each node of its graph whether somebody wants to see it, and computes up to the wanted one. By
wanting the last node of each layer that streams, and of each layer before one, the ring gets a say between layers: the slot of
the one that was computed is free for another, and before the next one is computed its copy is waited for. Weights have a
permanent place, so nothing is rewritten while it decodes.

A graph may be computed in parts, on several backends, that end anywhere: asking about a layer's last node may be too late to
wait for the layer. The first layer is waited for where a graph begins.

A slot's next layer may be of the next pass: the ring is full when that begins, and the link never rests between passes.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llama_cpp.llama_cpp as ll

from conductor.backend.llama.binding import LlamaError
from conductor.backend.llama.tensors import NAME_OFFSET
from conductor.backend.llama.transfers import Ticket

#: llama.cpp names the last node of layer i so, with i behind it
_LAYER_END = b"l_out-"
_LENGTH = len(_LAYER_END)
_read = ctypes.string_at


def layer_that_ends(node: int) -> int | None:
    """The layer whose last node this is."""
    if _read(node + NAME_OFFSET, _LENGTH) != _LAYER_END:
        return None
    number = _read(node + NAME_OFFSET + _LENGTH)
    return int(number) if number.isdigit() else None  # a view of it is called "l_out-3 (view)"


@dataclass(slots=True)
class Passage:
    """What passed through a ring so far."""

    passes: int = 0
    bytes: int = 0
    waited_s: float = 0.0  #: for copies, with nothing to compute
    elapsed_s: float = 0.0  #: in decodes
    steps: int = 0  #: that generated, and read no prompt
    steps_s: float = 0.0  #: of them, beside the waiting

    @property
    def step_s(self) -> float | None:
        """What a step that generates computes; None before the first."""
        return self.steps_s / self.steps if self.steps else None


class LayerRing:
    """`layers` stream, in order, the i-th through slot i modulo `slots`. One decode at a time: `with ring:`.

    `fetch`: begin to copy a layer into its slot; `wait`: until it is there. `overlap` False copies each layer when it is asked
    for, and not before: what benchmarks compare with.
    """

    _first: bytes | None = None  #: the name of the node that the graphs of this decode begin with; None before any

    def __init__(
        self,
        layers: Sequence[int],
        slots: int,
        *,
        n_layers: int,
        bytes: int,
        fetch: Callable[[int], Ticket],
        wait: Callable[[Ticket], None],
        overlap: bool = True,
    ) -> None:
        self._layers, self._slots, self._fetch, self._wait = tuple(layers), slots, fetch, wait
        self._position = {layer: position for position, layer in enumerate(self._layers)}
        # A resident layer before one that streams is computed while that one is still on its way.
        self._pauses = {layer for layer in range(n_layers) if layer + 1 in self._position and layer not in self._position}
        self._last = n_layers - 1
        self._bytes, self.overlap = bytes, overlap
        #: by slot: the position whose layer is in it, or on its way
        self._held: dict[int, int] = {}
        self._tickets: dict[int, Ticket] = {}  #: by position, not waited for yet
        self._broken: BaseException | None = None
        #: no layer's nodes are asked about, and the next graph's may be
        self._outside = False
        #: of this decode, a graph began with a node of another name: any node outside of layers may begin the next
        self._unsure = False
        self._lock = threading.Lock()
        self._began = self._waited_before = 0.0
        self.passage = Passage()
        self.callback = ll.ggml_backend_sched_eval_callback(self._on_node)  # referenced as long as contexts have it

    def fill(self) -> None:
        """The first layers, before anything decodes."""
        if not self.overlap:
            return
        for position in range(min(self._slots, len(self._layers))):
            self._begin(position)

    def rehearse(self, passes: int) -> float:
        """Copy what a pass takes so many times, with nothing computed; seconds for each."""
        with self._lock:
            self._empty()
            began = time.perf_counter()
            for ticket in [self._fetch(layer) for _ in range(passes) for layer in self._layers]:
                self._wait(ticket)
            elapsed = time.perf_counter() - began
            self.fill()
        return elapsed / passes

    def __enter__(self) -> LayerRing:
        self._lock.acquire()
        self._outside, self._unsure, self._first = True, False, None
        self._began, self._waited_before = time.perf_counter(), self.passage.waited_s
        return self

    def was_step(self) -> None:
        """Inside: the decode generated only."""
        self.passage.steps += 1
        self.passage.steps_s += time.perf_counter() - self._began - (self.passage.waited_s - self._waited_before)

    def __exit__(self, *_: object) -> None:
        self.passage.elapsed_s += time.perf_counter() - self._began
        self._lock.release()

    def check(self) -> None:
        """After a decode: raise LlamaError if a copy failed in it; what was computed is worth nothing then."""
        broken, self._broken = self._broken, None
        if broken is None:
            return
        self._empty()  # nobody knows what is in the slots
        if not isinstance(broken, Exception):  # somebody wants the process to end
            raise broken
        raise LlamaError(f"a layer could not be brought to the device: {broken!r}") from broken

    def _on_node(self, node: int, asks: bool, _: object) -> bool:
        """llama.cpp asks whether to stop at a node, before it computes it, and, if so, whether to go on, after it did.

        Where a copy failed it is to stop and not to go on, at any node: then a layer that is not there is not computed.
        """
        try:
            if self._broken is not None:
                return asks
            layer = layer_that_ends(node)
            if layer is not None:
                return self._wants_end_of(layer) if asks else self._goes_on_after(layer)
            if asks and self._outside:
                self._perhaps_begins(node)
            return not asks
        except BaseException as error:  # it cannot pass through llama.cpp; `check` raises it
            self._broken = error
            return asks

    def _perhaps_begins(self, node: int) -> None:
        """A decode's first node, or one of that name, begins a graph."""
        name = _read(node + NAME_OFFSET)
        if self._first is None:
            self._first = name
        if name == self._first or self._unsure:
            self._outside = False
            if 0 in self._position:
                self._arrive(0)

    def _wants_end_of(self, layer: int) -> bool:
        self._unsure |= self._outside
        self._outside = layer == self._last
        position = self._position.get(layer)
        if position is None:
            return layer in self._pauses
        self._arrive(position)  # it did, unless that is the first layer, of a graph whose beginning was not known
        return True

    def _goes_on_after(self, layer: int) -> bool:
        position, following = self._position.get(layer), self._position.get(layer + 1)
        if position is not None:
            self._leave(position)
        if following is not None:
            self._arrive(following)
        return True

    def _arrive(self, position: int) -> None:
        """The layer is about to be computed. Idempotent."""
        if self._held.get(position % self._slots) != position:
            self._begin(position)
        ticket = self._tickets.pop(position, None)
        if ticket is not None:
            began = time.perf_counter()
            self._wait(ticket)
            self.passage.waited_s += time.perf_counter() - began

    def _leave(self, position: int) -> None:
        """The layer was computed: its slot is free."""
        if position == len(self._layers) - 1:
            self.passage.passes += 1
            self.passage.bytes += self._bytes
        if self.overlap:
            after = position + self._slots
            self._begin(after if after < len(self._layers) else position % self._slots)

    def _begin(self, position: int) -> None:
        slot = position % self._slots
        replaced = self._held.pop(slot, None)
        if replaced is not None and replaced in self._tickets:  # of a pass that llama.cpp ended early
            self._settle(self._tickets.pop(replaced))
        self._tickets[position] = self._fetch(self._layers[position])
        self._held[slot] = position

    def _empty(self) -> None:
        """Every slot is to be filled again."""
        for ticket in self._tickets.values():
            self._settle(ticket)
        self._tickets.clear()
        self._held.clear()

    def _settle(self, ticket: Ticket) -> None:
        """Nobody reads what that copy brings, but each is waited for once."""
        with contextlib.suppress(Exception):
            self._wait(ticket)
