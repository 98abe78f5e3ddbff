"""Weights that move: at home in host memory, and a part of them on the device.

llama.cpp loads the model once, and its tensors are pointed to wherever their bytes are: at home while nothing of the model is on
the device (parked), else into one buffer there that holds its head, the layers that are resident, and a ring that the others
pass through (`core.streaming` says how much of each). All that crosses the link are whole blocks, laid out at home as they lie
on the device. Nothing may be decoding, and no context be open, while weights are placed or parked.
"""

from __future__ import annotations

import ctypes
import re
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
    """Of a model just loaded, with its layers in host memory.

    Raises Unmovable, or LlamaError where host memory is short; whatever it raises, the model is only to be freed then.
    """

    def __init__(self, model: Any, kind: DeviceKind) -> None:
        self._kind = kind
        weights = weights_of(model)
        self._original = [(weight, *weight.place()) for weight in weights]
        self._sort(weights, memory_type(kind))
        self.blocks = Blocks(self._head.bytes, tuple(layer.bytes for layer in self._layers), self._stay.bytes)
        self._window: Buffer | None = None
        self._transfers: Transfers | None = None
        self.placement: Placement | None = None
        self.ring: LayerRing | None = None
        self._home = self._copy_home()
        try:
            self._go_home()
            survey(model, ((weight for weight, _ in layer.weights) for layer in self._layers))
            self._free_what_was_loaded()  # last, for it cannot be taken back
        except BaseException:
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

    def _copy_home(self) -> Buffer:
        home = Buffer.in_host_memory(max(1, self.blocks.home_bytes), self._kind)
        if home is None:
            raise LlamaError(f"{self.blocks.home_bytes} bytes of host memory for weights are not to be had")
        ctypes.memset(home.base, 0, home.bytes)  # what pads rows must be zeros: kernels read it
        offset = 0
        for block in (self._stay, self._head, *self._layers):
            block.at_home = offset
            for weight, at in block.weights:
                weight.copy_out(home.base + offset + at)
            offset += block.bytes
        return home

    def _go_home(self) -> None:
        for block in (self._stay, self._head, *self._layers):
            block.move_to(self._home, block.at_home)

    def _free_what_was_loaded(self) -> None:
        """The head, on a GPU; a file that is mapped into memory takes none."""
        if self._kind is not DeviceKind.CUDA:
            return
        heads = {weight for weight, _ in self._head.weights}
        for buffer in {buffer for weight, buffer, _ in self._original if weight in heads}:
            if not evacuate(buffer, self._kind):
                raise Unmovable("this llama.cpp does not let go of what it loaded")

    def place(self, placement: Placement, *, overlap: bool = True) -> None:
        """Bring that much of the weights to the device. Raises LlamaError if it has no room for them.

        Whatever it raises, the weights are parked then. `overlap`: see LayerRing.
        """
        n = len(self._layers)
        if not 0 <= placement.resident <= n or placement.streams != (placement.resident < n):
            raise ValueError(f"{placement} of a model of {n} layers")
        self.park()
        size = placement_bytes(self.blocks, placement)
        self._window = Buffer.on_device(self._kind, max(1, size))
        if self._window is None:
            raise LlamaError(f"{size} bytes for weights are not to be had on the device")
        try:
            self._transfers = transfers_into(self._window, self._kind)
            self._fill(self._window, self._transfers, placement, overlap=overlap)
        except BaseException:
            self.park()
            raise
        self.placement = placement

    def _fill(self, window: Buffer, transfers: Transfers, placement: Placement, *, overlap: bool) -> None:
        """Head, resident layers, slots, in this order."""
        n, streamed = len(self._layers), streamed_layers(len(self._layers), placement.resident)
        tickets, end = list[Ticket](), 0
        for block in (self._head, *(self._layers[layer] for layer in range(n) if layer not in streamed)):
            tickets.append(transfers.copy(end, self._home.base + block.at_home, block.bytes))
            block.move_to(window, end)
            end += block.bytes
        for ticket in tickets:
            transfers.wait(ticket)
        if streamed:
            self.ring = self._ring_at(end, window, transfers, placement, overlap=overlap)
            self.ring.fill()

    def _ring_at(self, start: int, window: Buffer, transfers: Transfers, placement: Placement, *, overlap: bool) -> LayerRing:
        streamed, size = streamed_layers(len(self._layers), placement.resident), slot_bytes(self.blocks, placement)
        place = {layer: start + position % placement.slots * size for position, layer in enumerate(streamed)}
        for layer, offset in place.items():
            self._layers[layer].move_to(window, offset)

        def fetch(layer: int) -> Ticket:
            block = self._layers[layer]
            return transfers.copy(place[layer], self._home.base + block.at_home, block.bytes)

        return LayerRing(
            streamed,
            placement.slots,
            n_layers=len(self._layers),
            bytes=streamed_bytes(self.blocks, placement),
            fetch=fetch,
            wait=transfers.wait,
            overlap=overlap,
        )

    def park(self) -> None:
        """Leave the device. Idempotent."""
        if self._window is None:
            return
        if self._transfers is not None:
            self._transfers.close()
        self._go_home()
        self._window.free()
        self._window = self._transfers = self.placement = self.ring = None

    @property
    def pinned(self) -> bool:
        return self._home.pinned

    def close(self) -> None:
        """Before llama.cpp frees the model: every tensor is where it was when it was loaded. Idempotent."""
        self.park()
        self._restore()

    def _restore(self) -> None:
        for weight, buffer, data in self._original:
            weight.move_to(buffer, data)
        self._original.clear()
        self._home.free()
