"""How much of a model's weights is on the device: what moves together, what a placement takes, which layers stream.

A model that may leave the device has its weights at home in host memory. A *placement* is the part of them that is on the device:
its head (whatever belongs to no layer), `resident` layers, and a ring of `slots` through which the other layers pass while it
decodes. Plain arithmetic, which `backend/llama/movable.py` lays weights out by; which placement is best is `placing`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Blocks of weights, and tensors in them, begin at multiples of this: more than any backend asks for.
ALIGNMENT_BYTES = 256
#: The fewest slots that hide anything: one is filled while another is read.
LEAST_SLOTS = 2
#: More slots hide more of what varies between layers. Measured: see docs/streaming.md.
USUAL_SLOTS = 4


@dataclass(frozen=True, slots=True)
class Blocks:
    """A model's weights by what moves together, in bytes as they lie on the device."""

    head_bytes: int  #: output, norms, and on the host device the embeddings
    layer_bytes: tuple[int, ...]
    home_only_bytes: int = 0  #: never on the device: beside a GPU the token embeddings

    @property
    def home_bytes(self) -> int:
        return self.home_only_bytes + self.head_bytes + sum(self.layer_bytes)

    @property
    def whole_bytes(self) -> int:
        """On the device, with every layer resident."""
        return self.head_bytes + sum(self.layer_bytes)


@dataclass(frozen=True, slots=True)
class Placement:
    """`resident` layers on the device, the others through a ring of `slots`; no slots where all are resident."""

    resident: int
    slots: int

    @property
    def streams(self) -> bool:
        return self.slots > 0


def streamed_layers(n_layers: int, resident: int) -> tuple[int, ...]:
    """The layers that pass through the ring, spread evenly: while resident ones compute, the ring is filled."""
    streamed = n_layers - resident
    return tuple(layer for layer in range(n_layers) if (layer + 1) * streamed // n_layers > layer * streamed // n_layers)


def whole(blocks: Blocks) -> Placement:
    return Placement(len(blocks.layer_bytes), 0)


def slot_bytes(blocks: Blocks, placement: Placement) -> int:
    """One slot holds any of the layers that stream."""
    if not placement.streams:
        return 0
    return max(blocks.layer_bytes[layer] for layer in streamed_layers(len(blocks.layer_bytes), placement.resident))


def ring_bytes(blocks: Blocks, placement: Placement) -> int:
    return placement.slots * slot_bytes(blocks, placement)


def streamed_bytes(blocks: Blocks, placement: Placement) -> int:
    """What crosses the link in one pass over the model."""
    return sum(blocks.layer_bytes[layer] for layer in streamed_layers(len(blocks.layer_bytes), placement.resident))


def placement_bytes(blocks: Blocks, placement: Placement) -> int:
    """Head, resident layers and ring."""
    return blocks.whole_bytes - streamed_bytes(blocks, placement) + ring_bytes(blocks, placement)


def placements(blocks: Blocks) -> list[Placement]:
    """Every placement worth having, the least first. One whose ring could hold all that streams is none: those stay."""
    n = len(blocks.layer_bytes)
    partial = [
        Placement(resident, slots)
        for resident in range(n)
        for slots in (LEAST_SLOTS, USUAL_SLOTS)
        if n - resident > slots and placement_bytes(blocks, Placement(resident, slots)) < blocks.whole_bytes
    ]
    return [*sorted(partial, key=lambda it: (placement_bytes(blocks, it), it.resident)), whole(blocks)]


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
