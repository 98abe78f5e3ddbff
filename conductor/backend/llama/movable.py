"""Weights that move: at home in host memory, and a part of them on the device.

llama.cpp loads the model once, and its tensors are pointed to wherever their bytes are: at home while nothing of the model is on
the device (parked), else into one buffer there that holds its head, the layers that are resident, and a ring that the others
pass through (`core.streaming` says how much of each). All that crosses the link are whole blocks, laid out at home as they lie
on the device. Nothing may be decoding, and no context be open, while weights are placed or parked.
"""

from __future__ import annotations

import ctypes
import re
import time
from typing import Any

from conductor.backend.llama.binding import LlamaError
from conductor.backend.llama.buffers import Buffer, evacuate, memory_type
from conductor.backend.llama.layer_ring import LayerRing
from conductor.backend.llama.survey import survey
from conductor.backend.llama.tensors import Unmovable, Weight, weights_of
from conductor.backend.llama.transfers import Ticket, Transfers, transfers_into
from conductor.core.streaming import Blocks, Placement, aligned, placement_bytes, slot_bytes, streamed_bytes, streamed_layers
from conductor.types import DeviceKind

#: the weights of layer i; what llama.cpp is told to leave in host memory
LAYER_PATTERN = r"^blk\.(\d+)\."


class _Block:
    """Weights that move together: (weight, offset) in a piece of memory."""

    def __init__(self, weights: list[Weight], room: Any) -> None:
        self.weights: list[tuple[Weight, int]] = []
        self.bytes = self.at_home = 0
        for weight in weights:
            self.weights.append((weight, self.bytes))
            self.bytes = aligned(self.bytes + weight.room(room))

    def move_to(self, buffer: Buffer, offset: int) -> None:
        for weight, at in self.weights:
            weight.move_to(buffer.handle, buffer.base + offset + at)


class MovableWeights:
    """Of a model just loaded, with its layers in host memory. Raises Unmovable, with the model as it was."""

    def __init__(self, model: Any, kind: DeviceKind) -> None:
        self._kind = kind
        weights = weights_of(model)
        self._original = [(weight, *weight.place()) for weight in weights]
        self._sort(weights, memory_type(kind))
        self.blocks = Blocks(self._head.bytes, tuple(layer.bytes for layer in self._layers), self._stay.bytes)
        self._home = self._settle_in()
        self._window: Buffer | None = None
        self._transfers: Transfers | None = None
        self.placement: Placement | None = None
        self.ring: LayerRing | None = None
        #: of the last time that weights were brought to the device
        self.link_bytes_per_s: float | None = None
        try:
            survey(model, ((weight for weight, _ in layer.weights) for layer in self._layers))
        except Unmovable:
            self._restore()
            raise

    def _sort(self, weights: list[Weight], room: Any) -> None:
        layers: dict[int, list[Weight]] = {}
        others: list[Weight] = []
        for weight in weights:
            of_layer = re.match(LAYER_PATTERN, weight.name)
            (layers.setdefault(int(of_layer[1]), []) if of_layer else others).append(weight)
        if sorted(layers) != list(range(len(layers))) or not layers:
            raise Unmovable("its layers are not numbered from 0")
        stays = self._kind is DeviceKind.CUDA  # there llama.cpp looks embeddings up in host memory
        self._layers = [_Block(layers[number], room) for number in range(len(layers))]
        self._head = _Block([weight for weight in others if not (stays and weight.is_in_host_memory)], room)
        self._stay = _Block([weight for weight in others if stays and weight.is_in_host_memory], room)

    def _settle_in(self) -> Buffer:
        """Copy all weights home, and free what llama.cpp holds of them on the device. Raises LlamaError, nothing changed."""
        home = Buffer.in_host_memory(max(1, self.blocks.home_bytes))
        if home is None:
            raise LlamaError(f"{self.blocks.home_bytes} bytes of host memory for weights are not to be had")
        loaded = {weight.buffer for weight, _ in self._head.weights} if self._kind is DeviceKind.CUDA else set()
        ctypes.memset(home.base, 0, home.bytes)  # what pads rows must be zeros: kernels read it
        offset = 0
        for block in (self._stay, self._head, *self._layers):
            block.at_home = offset
            for weight, at in block.weights:
                weight.copy_out(home.base + offset + at)
            offset += block.bytes
        self._go_home(home)
        for buffer in loaded:
            if not evacuate(buffer, self._kind):
                self._home = home
                self._restore()
                raise Unmovable("this llama.cpp does not let go of what it loaded")
        return home

    def _go_home(self, home: Buffer) -> None:
        for block in (self._stay, self._head, *self._layers):
            block.move_to(home, block.at_home)

    def place(self, placement: Placement, *, overlap: bool = True) -> None:
        """Bring that much of the weights to the device. Raises LlamaError if it has no room for them; parked then."""
        self.park()
        window = Buffer.on_device(self._kind, max(1, placement_bytes(self.blocks, placement)))
        if window is None:
            raise LlamaError(f"{placement_bytes(self.blocks, placement)} bytes for weights are not to be had on the device")
        try:
            self._transfers = transfers_into(window, self._kind)
        except LlamaError:
            window.free()
            raise
        self._window, self.placement = window, placement
        self._fill(window, self._transfers, placement, overlap=overlap)

    def _fill(self, window: Buffer, transfers: Transfers, placement: Placement, *, overlap: bool) -> None:
        n, streamed = len(self._layers), streamed_layers(len(self._layers), placement.resident)
        began, moved, tickets = time.perf_counter(), 0, list[Ticket]()
        end = 0
        for block in (self._head, *(self._layers[layer] for layer in range(n) if layer not in streamed)):
            tickets.append(transfers.copy(end, self._home.base + block.at_home, block.bytes))
            block.move_to(window, end)
            end += block.bytes
        moved = end
        for ticket in tickets:
            transfers.wait(ticket)
        if moved > _WORTH_TIMING_BYTES:
            self.link_bytes_per_s = moved / (time.perf_counter() - began)
        if not streamed:
            return
        size, place = slot_bytes(self.blocks, placement), dict[int, int]()
        for position, layer in enumerate(streamed):
            place[layer] = end + position % placement.slots * size
            self._layers[layer].move_to(window, place[layer])

        def fetch(layer: int) -> Ticket:
            block = self._layers[layer]
            return transfers.copy(place[layer], self._home.base + block.at_home, block.bytes)

        moving = streamed_bytes(self.blocks, placement)
        self.ring = LayerRing(
            streamed, placement.slots, n_layers=n, bytes=moving, fetch=fetch, wait=transfers.wait, overlap=overlap
        )
        self.ring.fill()

    def park(self) -> None:
        """Leave the device. Idempotent."""
        if self._window is None:
            return
        if self._transfers is not None:
            self._transfers.close()
        self._go_home(self._home)
        self._window.free()
        self._window = self._transfers = self.placement = self.ring = None

    @property
    def pinned(self) -> bool:
        return self._home.pinned

    def close(self) -> None:
        """Before llama.cpp frees the model: every tensor is where it was when it was loaded."""
        self.park()
        self._restore()

    def _restore(self) -> None:
        for weight, buffer, data in self._original:
            weight.move_to(buffer, data)
        self._home.free()


_WORTH_TIMING_BYTES = 1 << 20
