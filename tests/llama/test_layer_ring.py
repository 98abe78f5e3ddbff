"""The ring against a scheduler that computes a graph in parts which end anywhere, as llama.cpp's does with several backends.

Nothing is decoded: the scheduler here follows `ggml_backend_sched_compute_splits`, and "computing" a node is looking whether the
layer that it belongs to is in its slot. See also: `test_movable_weights.py`, with llama.cpp itself, which has one backend here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.backend.llama import LlamaError
from conductor.backend.llama.layer_ring import LayerRing, layer_that_ends
from conductor.backend.llama.tensors import TensorStruct
from conductor.core.streaming import streamed_layers

N_LAYER = 7
NODES_OF_LAYER = 3


def named(name: str) -> TensorStruct:
    return TensorStruct(name=name.encode())


@dataclass(slots=True)
class Link:
    """Copies land in slots when they are begun (`eager`), or when they are waited for."""

    slots: int
    layers: tuple[int, ...]
    eager: bool
    content: dict[int, int] = field(default_factory=dict)  #: of slots: a layer
    begun: list[int] = field(default_factory=list)
    landed: int = 0
    broken: bool = False

    def fetch(self, layer: int) -> int:
        if self.broken:
            raise OSError("the link is down")
        self.begun.append(layer)
        if self.eager:
            self.wait(len(self.begun))
        return len(self.begun)

    def wait(self, ticket: int) -> None:
        for layer in self.begun[self.landed : ticket]:
            self.content[self.layers.index(layer) % self.slots] = layer
        self.landed = max(self.landed, ticket)

    def has(self, layer: int) -> bool:
        return layer not in self.layers or self.content.get(self.layers.index(layer) % self.slots) == layer


class Scheduler:
    """`computed` counts nodes of layers that were there; `missing` are the layers computed with others' weights."""

    def __init__(self, ring: LayerRing, link: Link, splits: set[int], *, head: int = 3) -> None:
        self._ring, self._link = ring, link
        names = ["embd", *(f"l_out-{n}" if last else f"part-{n}" for n in range(N_LAYER) for last in (0, 0, 1))]
        self.nodes = [named(name) for name in (*names, *(f"head-{n}" for n in range(head)))]
        self._ends = sorted({end for end in splits if 0 < end < len(self.nodes)} | {len(self.nodes)})
        self.computed: list[int] = []
        self.missing: list[int] = []

    def graph(self) -> None:
        start = 0
        for end in self._ends:
            self._split(start, end)
            start = end

    def _split(self, start: int, end: int) -> None:
        while start < end:
            stop = start
            needs = self._asked(stop)
            while not needs and stop < end - 1:
                stop += 1
                needs = self._asked(stop)
            for node in range(start, stop + 1):
                self._compute(node)
            if needs and not self._ring.callback(ctypes.addressof(self.nodes[stop]), False, None):
                return
            start = stop + 1

    def _asked(self, node: int) -> bool:
        return bool(self._ring.callback(ctypes.addressof(self.nodes[node]), True, None))

    def _compute(self, node: int) -> None:
        layer = (node - 1) // NODES_OF_LAYER
        if 0 <= layer < N_LAYER:
            (self.computed if self._link.has(layer) else self.missing).append(layer)


def ring_of(resident: int, slots: int, *, eager: bool, overlap: bool) -> tuple[LayerRing, Link]:
    layers = streamed_layers(N_LAYER, resident)
    link = Link(slots, layers, eager)
    ring = LayerRing(layers, slots, n_layers=N_LAYER, bytes=1, fetch=link.fetch, wait=link.wait, overlap=overlap)
    ring.fill()
    return ring, link


@given(
    st.integers(0, N_LAYER - 1), st.integers(1, 5), st.booleans(), st.booleans(), st.sets(st.integers(1, 24)), st.integers(0, 2)
)
def test_no_node_is_computed_before_its_layer_is_there(
    resident: int, slots: int, eager: bool, overlap: bool, splits: set[int], head: int
) -> None:
    ring, link = ring_of(resident, slots, eager=eager, overlap=overlap)
    scheduler = Scheduler(ring, link, splits, head=head)
    for graphs in (1, 3, 2):
        with ring:
            for _ in range(graphs):
                scheduler.graph()
            ring.check()
    assert scheduler.missing == []
    assert scheduler.computed == 6 * [layer for layer in range(N_LAYER) for _ in range(NODES_OF_LAYER)]
    assert ring.passage.passes == 6


@given(st.integers(0, N_LAYER - 2), st.integers(1, 5), st.booleans(), st.sets(st.integers(1, 24)))
def test_when_a_copy_fails_no_layer_is_computed_that_is_not_there(
    resident: int, slots: int, overlap: bool, splits: set[int]
) -> None:
    ring, link = ring_of(resident, slots, eager=False, overlap=overlap)
    scheduler = Scheduler(ring, link, splits)
    if overlap or slots < len(link.layers):
        link.broken = True
        for _ in range(3):
            with ring:
                scheduler.graph()
                scheduler.graph()
                with pytest.raises(LlamaError, match="the link is down"):
                    ring.check()
        # Each part that follows is begun, and ends with its first node.
        assert len(scheduler.missing) <= 3 * 2 * len({split for split in splits if split < len(scheduler.nodes)})
    link.broken = False
    scheduler.missing.clear()
    scheduler.computed.clear()
    for _ in range(2):
        with ring:
            scheduler.graph()
            ring.check()
    assert scheduler.missing == []
    assert len(scheduler.computed) == 2 * N_LAYER * NODES_OF_LAYER


@pytest.mark.parametrize("overlap", [True, False])
def test_a_decode_that_moves_cells_first_begins_with_another_graph(overlap: bool) -> None:
    ring, link = ring_of(0, 2, eager=False, overlap=overlap)
    scheduler, shift = Scheduler(ring, link, set()), named("k_shift")
    with ring:
        assert not ring.callback(ctypes.addressof(shift), True, None)
        for _ in range(3):
            scheduler.graph()
        ring.check()
    assert scheduler.missing == []


@pytest.mark.parametrize(
    ("name", "layer"), [("l_out-0", 0), ("l_out-31", 31), ("l_out-3 (view)", None), ("l_outer", None), ("", None)]
)
def test_a_layers_last_node_is_known_by_its_name(name: str, layer: int | None) -> None:
    node = named(name)
    assert layer_that_ends(ctypes.addressof(node)) == layer
