"""Weights that move between host memory and a real GPU, and layers that stream while it decodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conductor.backend.device import open_device
from conductor.backend.llama import Llama, Model
from conductor.config import DeviceConfig
from conductor.core.streaming import Placement, placements, whole
from conductor.types import DeviceKind
from conductor.units import MIB
from tests.support.moving import KINDS, PROMPTS, Talk, live, weights, write
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not Llama.instance().supports_gpu, reason="this llama-cpp-python was built without CUDA"),
]


@contextmanager
def on_gpu(path: Path, *, plainly: bool = False) -> Iterator[Model]:
    llama = Llama.instance()
    load = llama.load if plainly else llama.load_movable
    model = load(str(path), DeviceKind.CUDA)
    try:
        yield model
    finally:
        model.close()


def said(model: Model) -> tuple[list[list[int]], list[bytes]]:
    with live(model) as context:
        talk = Talk(context)
        for slot, prompt in enumerate(PROMPTS):
            talk.hear(slot, prompt)
        return talk.say(6, *range(len(PROMPTS))), talk.rows


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_logits_are_those_of_weights_that_llama_cpp_placed(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    with on_gpu(path, plainly=True) as plain:
        expected = said(plain)
    with on_gpu(path) as model:
        moving = weights(model)
        assert moving.pinned
        for placement in placements(moving.blocks):
            moving.place(placement)
            assert said(model) == expected, placement
            moving.park()


def test_parked_weights_leave_nothing_on_the_device_and_come_back(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "large.gguf", n_layer=8, n_embd=1024, n_ff=4096, n_head=8, n_kv_head=8, n_vocab=8000)
    device = open_device(DeviceConfig(kind="cuda"), llama_supports_gpu=True, used_bytes=lambda: 0)
    with on_gpu(path) as model:
        moving = weights(model)
        moving.place(Placement(2, 2))
        moving.park()
        parked = device.read().free_bytes
        moving.place(whole(moving.blocks))
        taken = parked - device.read().free_bytes
        assert 0 <= taken - moving.blocks.whole_bytes < 4 * MIB
        moving.park()
        assert device.read().free_bytes == parked
