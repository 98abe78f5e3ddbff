"""Weights that move, where something is wrong: copies that fail, no room, structs that differ, graphs that name no layers.

And what is left behind: after `close` every tensor is where llama.cpp had it, and neither memory nor threads are.
See also: `test_movable_weights.py`, what is said with them.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp.llama_cpp as ll
import psutil
import pytest

from conductor.backend.llama import Context, Llama, LlamaError, Model, movable, tensors
from conductor.backend.llama.buffers import Buffer, device, evacuate
from conductor.backend.llama.movable import MovableWeights
from conductor.backend.llama.survey import survey
from conductor.backend.llama.tensors import Unmovable, Weight, struct_at, weights_of
from conductor.backend.llama.transfers import measure_link
from conductor.core.streaming import Placement, whole
from conductor.types import DeviceKind
from tests.support.moving import (
    N_LAYER,
    PROMPTS,
    Failing,
    LinkDown,
    Talk,
    conversation,
    live,
    loaded,
    transfers,
    weights,
    write,
)

PAIR = Placement(0, 2)
MIB = 1 << 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("llama", tmp_path_factory.mktemp("moving"))


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with loaded(path) as model:
        yield model


@pytest.fixture(scope="module")
def expected(path: Path) -> Talk:
    with loaded(path, plainly=True) as plain:
        return conversation(plain)


@pytest.fixture
def plain(path: Path) -> Iterator[Model]:
    """As llama.cpp loads it; whatever is tried, its weights must be where they were."""
    with loaded(path, plainly=True) as plain:
        before = places(plain)
        yield plain
        assert places(plain) == before


def places(model: Model) -> dict[str, tuple[int, int]]:
    return {weight.name: weight.place() for weight in weights_of(model._handle)}


def by_layer(model: Model) -> list[list[Weight]]:
    found = weights_of(model._handle)
    return [[weight for weight in found if weight.name.startswith(f"blk.{layer}.")] for layer in range(N_LAYER)]


# --- copies that fail -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [PAIR, Placement(0, 4), Placement(3, 2)])
@pytest.mark.parametrize("at_begin", [True, False])
def test_a_copy_that_fails_ends_the_decode_and_no_session(
    model: Model, expected: Talk, placement: Placement, at_begin: bool
) -> None:
    """Whichever copy of a pass it is, of this one's layers or of the next one's: once told, all is as it was."""
    for doomed in range(2 * (N_LAYER - placement.resident)):
        with transfers(lambda buffer: Failing(buffer, at_begin=at_begin)) as made:
            weights(model).place(placement)
        with live(model) as context:
            talk = Talk(context)
            talk.hear(0, PROMPTS[0])
            made[-1].arm(range(doomed, doomed + 1))
            with pytest.raises(LlamaError, match=r"a layer could not be brought to the device: .*the link is down") as told:
                hear_again_and_again(talk)
            assert isinstance(told.value.__cause__, LinkDown)
            talk.rows = talk.rows[:1]
            talk.forget(1)
            talk.hear(1, PROMPTS[1])
            talk.hear(2, PROMPTS[2])
            talk.say(4, 0, 1, 2)
        assert talk.rows == expected.rows, doomed


def hear_again_and_again(talk: Talk) -> None:
    for _ in range(4):
        talk.hear(1, PROMPTS[1])


def test_while_the_link_is_down_each_decode_says_so_and_when_it_is_back_all_is_well(model: Model, expected: Talk) -> None:
    with transfers(lambda buffer: Failing(buffer, at_begin=True)) as made:
        weights(model).place(PAIR)
    with live(model) as context:
        talk = Talk(context)
        made[-1].arm(range(1000))
        for _ in range(3):
            with pytest.raises(LlamaError, match="the link is down"):
                talk.hear(0, PROMPTS[0])  # of several passes, of which the first ends where the copy failed, and no other begins
            talk.forget(0)
        assert made[-1].tried == 3
    made[-1].arm(range(0))
    assert conversation(model).rows == expected.rows


def test_copies_that_fail_together_are_told_once(model: Model, expected: Talk) -> None:
    with transfers(lambda buffer: Failing(buffer, at_begin=False)) as made:
        weights(model).place(Placement(0, 4))
    made[-1].arm(range(3))
    with live(model) as context, pytest.raises(LlamaError, match="the link is down"):
        Talk(context).hear(0, PROMPTS[1])
    assert made[-1].tried == 4
    assert conversation(model).rows == expected.rows


def test_who_wants_the_process_to_end_is_heard_through_llama_cpp(model: Model, expected: Talk) -> None:
    with transfers(lambda buffer: Failing(buffer, at_begin=True, error=KeyboardInterrupt)) as made:
        weights(model).place(PAIR)
    made[-1].arm(range(1))
    with pytest.raises(KeyboardInterrupt):
        conversation(model)
    assert conversation(model).rows == expected.rows


@pytest.mark.parametrize("at_begin", [True, False])
def test_weights_that_could_not_be_brought_are_parked(model: Model, expected: Talk, at_begin: bool) -> None:
    def dead_on_arrival(buffer: Buffer) -> Failing:
        link = Failing(buffer, at_begin=at_begin)
        link.arm(range(2, 3))
        return link

    before = threading.active_count()
    with transfers(dead_on_arrival), pytest.raises(LinkDown):
        weights(model).place(whole(weights(model).blocks))
    assert (weights(model).placement, weights(model).ring) == (None, None)
    assert threading.active_count() == before
    assert conversation(model).rows == expected.rows
    weights(model).place(PAIR)
    assert conversation(model).rows == expected.rows


def test_a_pass_that_llama_cpp_ends_early_leaves_a_ring_that_goes_on(model: Model, expected: Talk) -> None:
    """Wherever it ends: the next pass begins with its first layer, whatever was on its way."""
    weights(model).place(PAIR)
    questions = Impatient(1 << 30)
    with live(model) as context, questions.ask_in(context):
        Talk(context).hear(0, PROMPTS[1])
    assert questions.asked > 4 * N_LAYER
    for eighths in range(8):
        with live(model) as context:
            talk = Talk(context)
            with Impatient(questions.asked * eighths // 8).ask_in(context), pytest.raises(LlamaError):
                talk.hear(0, PROMPTS[1])
            talk.forget(0)
            for slot, prompt in enumerate(PROMPTS):
                talk.hear(slot, prompt)
            talk.say(4, 0, 1, 2)
        assert talk.rows == expected.rows, eighths


class Impatient:
    """Ends a decode when llama.cpp has asked so often whether to."""

    def __init__(self, patience: int) -> None:
        self.asked, self._patience = 0, patience

    def _answer(self, _: object) -> bool:
        self.asked += 1
        return self.asked > self._patience

    @contextmanager
    def ask_in(self, context: Context) -> Iterator[None]:
        callback = ll.ggml_abort_callback(self._answer)
        ll.llama_set_abort_callback(context.handle, callback, None)
        yield
        ll.llama_set_abort_callback(context.handle, ll.ggml_abort_callback(), None)


# --- no room --------------------------------------------------------------------------------------------------------------


def test_without_room_on_the_device_the_weights_stay_at_home(model: Model, expected: Talk) -> None:
    weights(model).place(PAIR)
    with pytest.raises(LlamaError, match="bytes for weights are not to be had on the device"):
        weights(model).place(Placement(0, 1 << 40))
    assert (weights(model).placement, weights(model).ring) == (None, None)
    assert conversation(model).rows == expected.rows
    weights(model).place(PAIR)
    assert weights(model).placement == PAIR
    assert conversation(model).rows == expected.rows


@pytest.mark.parametrize("placement", [Placement(-1, 2), Placement(N_LAYER + 1, 0), Placement(N_LAYER, 2), Placement(0, 0)])
def test_a_placement_of_no_such_model_changes_nothing(model: Model, placement: Placement) -> None:
    weights(model).place(PAIR)
    with pytest.raises(ValueError, match="of a model of 7 layers"):
        weights(model).place(placement)
    assert weights(model).placement == PAIR


@pytest.mark.skipif(device(DeviceKind.CUDA) is not None, reason="there is a GPU")
def test_where_there_is_no_gpu_nothing_is_placed_on_one(path: Path) -> None:
    with pytest.raises(LlamaError, match="no cuda device"):
        Llama.instance().load_movable(str(path), DeviceKind.CUDA)
    with pytest.raises(LlamaError, match="not to be had"):
        measure_link(DeviceKind.CUDA, bytes=MIB)


# --- what is left behind --------------------------------------------------------------------------------------------------


def test_closing_puts_every_tensor_back_where_llama_cpp_had_it(plain: Model, expected: Talk) -> None:
    before = places(plain)
    moving = MovableWeights(plain._handle, DeviceKind.HOST)
    for placement in (None, PAIR, whole(moving.blocks)):
        if placement is not None:
            moving.place(placement)
        now = places(plain)
        assert [name for name in before if now[name][0] == before[name][0] or now[name][1] == before[name][1]] == []
    moving.close()
    assert places(plain) == before
    assert conversation(plain).rows == expected.rows
    moving.close()
    assert places(plain) == before


def test_thirty_models_come_and_go_and_leave_neither_memory_nor_threads(path: Path) -> None:
    process = psutil.Process()

    def round_trip(placement: Placement | None) -> None:
        with loaded(path) as model:
            weights(model).place(placement or whole(weights(model).blocks))
            weights(model).place(PAIR)
            with live(model) as context:
                Talk(context).hear(0, PROMPTS[1])
            weights(model).park()
            weights(model).place(PAIR)  # closed with a ring

    for _ in range(5):
        round_trip(None)
    bytes, threads = process.memory_info().rss, (threading.active_count(), process.num_threads())
    for n in range(30):
        round_trip(Placement(n % 5, 2))
    assert threading.active_count() == threads[0]
    assert process.num_threads() < threads[1] + 10  # of ninety; one that ended may be counted a moment longer
    with loaded(path) as model:
        home = weights(model).blocks.home_bytes
    assert process.memory_info().rss - bytes < 5 * home  # a home or a window left each time would be 30, or 10


def test_a_model_that_cannot_move_is_freed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[object] = []
    free = ll.llama_model_free
    monkeypatch.setattr(ll, "llama_model_free", lambda handle: (freed.append(handle), free(handle)))
    monkeypatch.setattr(tensors, "_TENSOR_MAP", "no_such_function")
    with pytest.raises(Unmovable, match="does not export no_such_function"):
        Llama.instance().load_movable(str(path), DeviceKind.HOST)
    assert len(freed) == 1


# --- structs that differ --------------------------------------------------------------------------------------------------

SPOILED: dict[str, tuple[str, object]] = {
    "another name": ("name", b"blk.3.attn_k.weighs"),
    "a view": ("view_src", 0x1000),
    "in no buffer": ("buffer", None),
    "nowhere": ("data", None),
}


@pytest.mark.parametrize("field", SPOILED)
def test_a_tensor_that_is_not_what_it_is_taken_for_is_not_moved_nor_any_other(plain: Model, field: str) -> None:
    weight = next(weight for weight in weights_of(plain._handle) if weight.name == "blk.3.attn_k.weight")
    with spoiled(weight, *SPOILED[field]), pytest.raises(Unmovable, match=r"the tensor blk\.3\.attn_k\.weight is laid out other"):
        MovableWeights(plain._handle, DeviceKind.HOST)


def test_a_tensor_that_is_not_of_one_piece_is_not_moved(plain: Model) -> None:
    weight = next(weight for weight in weights_of(plain._handle) if weight.name == "output.weight")
    strides = struct_at(weight.address).nb
    strides[3] += 256
    try:
        with pytest.raises(Unmovable, match=r"output\.weight"):
            MovableWeights(plain._handle, DeviceKind.HOST)
    finally:
        strides[3] -= 256


@contextmanager
def spoiled(weight: Weight, field: str, value: object) -> Iterator[None]:
    """Its struct says something else meanwhile."""
    struct = struct_at(weight.address)
    right = getattr(struct, field)
    setattr(struct, field, value)
    yield
    setattr(struct, field, right)


# --- graphs that do not let layers stream -----------------------------------------------------------------------------------


def test_layers_as_the_graph_has_them_may_stream(plain: Model) -> None:
    survey(plain._handle, by_layer(plain))


def test_a_weight_that_is_used_outside_of_its_layer_keeps_them_from_streaming(plain: Model) -> None:
    for stray in ("blk.2.attn_norm.weight", "output.weight", "token_embd.weight"):
        layers = by_layer(plain)
        weight = next(weight for weight in weights_of(plain._handle) if weight.name == stray)
        for layer in layers:
            if weight in layer:
                layer.remove(weight)
        layers[5].append(weight)
        with pytest.raises(Unmovable, match=r"uses weights outside of their layer: layer 5 in layer [027]$"):
            survey(plain._handle, layers)


def test_a_graph_with_other_layers_than_the_file_does_not_stream(plain: Model) -> None:
    layers = by_layer(plain)
    for others in (layers[:-1], [*layers, layers[0]], [layers[0] + layers[1], *layers[2:]]):
        with pytest.raises(Unmovable, match=r"does not tell where its \d layers end|outside of their layer"):
            survey(plain._handle, others)


@pytest.mark.parametrize("error", [Unmovable, LlamaError, KeyboardInterrupt])
def test_whatever_ends_the_survey_the_weights_are_back(
    plain: Model, expected: Talk, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def look(*_: object) -> None:
        raise error("no")

    monkeypatch.setattr(movable, "survey", look)
    with pytest.raises(error):
        MovableWeights(plain._handle, DeviceKind.HOST)
    assert conversation(plain).rows == expected.rows


# --- the memory and the link ------------------------------------------------------------------------------------------------


def test_what_llama_cpp_loaded_is_given_back_before_it_frees_it() -> None:
    process, size = psutil.Process(), 64 * MIB
    loaded = Buffer.on_device(DeviceKind.HOST, size)
    assert loaded is not None
    ctypes.memset(loaded.base, 1, size)
    before = process.memory_info().rss
    assert evacuate(loaded.handle, DeviceKind.HOST)
    assert before - process.memory_info().rss > size // 2
    assert Buffer(loaded.handle).base != loaded.base
    loaded.free()
    loaded.free()


def test_the_link_is_measured_with_copies_and_leaves_nothing() -> None:
    before = threading.active_count()
    assert 1e8 < measure_link(DeviceKind.HOST, bytes=8 * MIB) < 1e12
    assert threading.active_count() == before
    with pytest.raises(LlamaError, match="bytes to measure the link with are not to be had"):
        measure_link(DeviceKind.HOST, bytes=1 << 60)
