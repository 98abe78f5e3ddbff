"""The ring that layers pass through while llama.cpp decodes: it fills slots ahead, and no layer computes before it has arrived.

llama.cpp asks before it computes each node of its graph whether somebody wants to see it, and computes up to the wanted one. By
wanting the last node of each layer that streams, the ring gets a say before the layer is computed, to wait for its copy, and
after it, when its slot is free for the next. Weights have a permanent place, so nothing is rewritten while it decodes.

A slot's next layer may be of the next pass: the ring is full when that begins, and the link never rests between passes.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llama_cpp.llama_cpp as ll

from conductor.backend.llama.binding import LlamaError
from conductor.backend.llama.tensors import NAME_OFFSET
from conductor.backend.llama.transfers import Ticket

#: llama.cpp names the last node of layer i so
LAYER_END = b"l_out-"
_LENGTH = len(LAYER_END)
_read = ctypes.string_at


@dataclass(slots=True)
class Passage:
    """What passed through a ring so far."""

    passes: int = 0
    bytes: int = 0
    waited_s: float = 0.0  #: for copies, with nothing to compute
    elapsed_s: float = 0.0  #: in decodes


class LayerRing:
    """`layers` stream, in order, the i-th through slot i modulo `slots`. One decode at a time: `with ring:`.

    `fetch`: begin to copy a layer into its slot; `wait`: until it is there. `overlap` False copies each layer when it is asked
    for, and not before: what benchmarks compare with.
    """

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
        self._bytes, self.overlap = bytes, overlap
        #: by slot: the position whose layer is in it, or on its way
        self._held: dict[int, int] = {}
        self._tickets: dict[int, Ticket] = {}  #: by position, not waited for yet
        self._broken: BaseException | None = None
        self._lock = threading.Lock()
        self._began = 0.0
        self.passage = Passage()
        self.callback = ll.ggml_backend_sched_eval_callback(self._on_node)  # referenced as long as contexts have it

    def fill(self) -> None:
        """The first layers, before anything decodes."""
        for position in range(min(self._slots, len(self._layers))):
            self._begin(position)

    def rehearse(self, passes: int) -> float:
        """Copy what a pass takes so many times, with nothing computed; seconds for each."""
        with self._lock:
            for position in list(self._tickets):
                self._wait(self._tickets.pop(position))
            self._held.clear()
            began = time.perf_counter()
            for ticket in [self._fetch(layer) for _ in range(passes) for layer in self._layers]:
                self._wait(ticket)
            elapsed = time.perf_counter() - began
            self.fill()
        return elapsed / passes

    def __enter__(self) -> LayerRing:
        self._lock.acquire()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.passage.elapsed_s += time.perf_counter() - self._began
        self._lock.release()

    def check(self) -> None:
        """After a decode: raise LlamaError if a copy failed in it; what was computed is worth nothing then."""
        broken, self._broken = self._broken, None
        if broken is not None:
            for ticket in self._tickets.values():  # nobody knows what is in the slots: all are filled again
                self._settle(ticket)
            self._tickets.clear()
            self._held.clear()
            raise LlamaError(f"a layer could not be brought to the device: {broken}") from broken

    def _on_node(self, node: int, asks: bool, _: object) -> bool:
        if _read(node + NAME_OFFSET, _LENGTH) != LAYER_END:
            return not asks
        if self._broken is not None:
            return False
        try:
            return self._at_end_of(int(_read(node + NAME_OFFSET + _LENGTH)), asks)
        except BaseException as error:  # it cannot pass through llama.cpp
            self._broken = error
            return False

    def _at_end_of(self, layer: int, asks: bool) -> bool:
        position = self._position.get(layer)
        if position is None:
            return layer in self._pauses or not asks
        if asks:
            self._arrive(position)
        else:
            self._leave(position)
        return True

    def _arrive(self, position: int) -> None:
        """The layer is about to be computed."""
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
        if replaced is not None and replaced in self._tickets:
            self._wait(self._tickets.pop(replaced))
        self._tickets[position] = self._fetch(self._layers[position])
        self._held[slot] = position

    def _settle(self, ticket: Ticket) -> None:
        try:
            self._wait(ticket)
        except Exception:  # told already, or the same again
            return
