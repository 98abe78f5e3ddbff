"""Whatever part of a model's weights is on the device, the same is said, to the last bit of every logit.

With real llama.cpp on the host device, whose copies are real: tiny models of each kind, placed in each way.
See also: `test_unmovable_weights.py`, what is not moved, what fails, and what is left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from conductor.backend.llama import Model
from conductor.backend.llama.transfers import HostTransfers
from conductor.core.streaming import LEAST_SLOTS, USUAL_SLOTS, Placement, streamed_bytes, whole
from tests.support.moving import (
    KINDS,
    N_LAYER,
    PROMPTS,
    REPACKED,
    Astray,
    AtLast,
    AtOnce,
    Talk,
    Unawaited,
    conversation,
    live,
    loaded,
    partial,
    transfers,
    weights,
    write,
)  # fmt: skip

PAIR = Placement(0, LEAST_SLOTS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moving")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str, directory: Path) -> Iterator[Model]:
    with loaded(write(kind, directory)) as model:
        yield model


@pytest.fixture
def expected(model: Model) -> Talk:
    """What is said with all of the weights on the device."""
    weights(model).place(whole(weights(model).blocks))
    return conversation(model)


@pytest.fixture
def llama(directory: Path) -> Iterator[Model]:
    with loaded(write("llama", directory)) as model:
        yield model


# --- the same, to the last bit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in REPACKED], indirect=True)
def test_all_of_them_on_the_device_is_what_llama_cpp_loads(kind: str, directory: Path, expected: Talk) -> None:
    with loaded(write(kind, directory), plainly=True) as plain:
        assert conversation(plain).rows == expected.rows
    assert all(np.isfinite(np.frombuffer(row, np.float32)).all() for row in expected.rows)
    assert len({*expected.rows}) == len(expected.rows)


def test_parked_weights_compute_where_they_are_at_home(model: Model, expected: Talk) -> None:
    weights(model).park()
    assert conversation(model).rows == expected.rows


@pytest.mark.parametrize("copies", [HostTransfers, AtOnce, AtLast])
def test_with_any_part_of_them_on_the_device_each_bit_is_the_same(
    model: Model, expected: Talk, copies: Callable[..., HostTransfers]
) -> None:
    """However early or late copies are done: none begins before its slot is free, and none is computed with before it is done."""
    moving = weights(model)
    for placement in partial(model):
        with transfers(copies):
            moving.place(placement)
        assert conversation(model).rows == expected.rows, placement
        assert moving.ring is not None
        passage = moving.ring.passage
        assert passage.passes == expected.passes
        assert passage.bytes == expected.passes * streamed_bytes(moving.blocks, placement)
        assert 0 <= passage.waited_s <= passage.elapsed_s


def test_one_copy_after_the_other_each_bit_is_the_same(model: Model, expected: Talk) -> None:
    for placement in partial(model):
        with transfers(AtLast):
            weights(model).place(placement, overlap=False)
        assert conversation(model).rows == expected.rows, placement


@pytest.mark.parametrize("slots", [1, 3, 5, N_LAYER, N_LAYER + 2])
def test_a_ring_may_have_any_number_of_slots(llama: Model, slots: int) -> None:
    weights(llama).park()
    expected = conversation(llama)
    for copies in (AtOnce, AtLast):
        with transfers(copies):
            weights(llama).place(Placement(0, slots))
        assert conversation(llama).rows == expected.rows


def test_a_layer_that_is_not_the_right_one_would_show(llama: Model) -> None:
    weights(llama).park()
    expected = conversation(llama)
    with transfers(Astray) as made:
        weights(llama).place(PAIR)
        made[-1].armed = True
        assert conversation(llama).rows != expected.rows


def test_a_layer_that_has_not_arrived_would_show(llama: Model) -> None:
    weights(llama).park()
    expected = conversation(llama)
    with transfers(Unawaited) as made:
        weights(llama).place(PAIR)
        made[-1].armed = True
        assert conversation(llama).rows != expected.rows


# --- sessions -------------------------------------------------------------------------------------------------------------


class Saved:
    """A sequence as it was saved, and what it is about to say."""

    def __init__(self, talk: Talk, slot: int) -> None:
        sequence = talk.context.sequence(slot)
        self.state = np.zeros(sequence.state_bytes(), np.uint8)
        form = sequence.save(self.state)
        assert form is not None
        self.form, self.past, self.next = form.packed(self.state), talk.past[slot], talk.next[slot]

    def restore(self, talk: Talk, slot: int) -> None:
        assert talk.context.sequence(slot).restore(self.state, self.form)
        talk.past[slot], talk.next[slot] = self.past, self.next


def story(model: Model, *chapters: Placement) -> list[bytes]:
    """In each chapter one is cut back and hears something else; another moves on to the next chapter as it was saved."""
    rows: list[bytes] = []
    saved: Saved | None = None
    for chapter, placement in enumerate(chapters):
        weights(model).place(placement)
        mover = 1 + chapter % 2  # from slot to slot
        with live(model) as context:
            talk = Talk(context)
            talk.hear(0, PROMPTS[0])
            talk.say(3, 0)
            talk.past[0] = talk.past[0] - 2 if context.sequence(0).truncate(talk.past[0] - 2) else 0
            talk.hear(0, PROMPTS[2])
            if saved is None:
                talk.hear(mover, PROMPTS[1])
            else:
                saved.restore(talk, mover)
            talk.say(3, 0, mover)
            saved = Saved(talk, mover)
        rows += talk.rows
    return rows


def test_sessions_are_cut_saved_and_restored_as_if_the_weights_had_not_moved(model: Model) -> None:
    blocks = weights(model).blocks
    everything = whole(blocks)
    stays = story(model, everything, everything, everything)
    assert story(model, PAIR, Placement(3, LEAST_SLOTS), everything) == stays
    assert story(model, everything, Placement(0, USUAL_SLOTS), PAIR) == stays


def test_a_window_that_slides_is_shifted_as_if_all_weights_were_there(llama: Model) -> None:
    def shifted() -> list[bytes]:
        with live(llama) as context:
            talk = Talk(context)
            talk.hear(0, PROMPTS[0])
            assert context.sequence(0).shift(4, 20)
            talk.past[0] -= 16
            talk.hear(0, PROMPTS[2])  # of several passes, after the graph that turns the keys
            talk.say(3, 0)
            return talk.rows

    weights(llama).park()
    expected = shifted()
    for copies in (AtOnce, AtLast):
        with transfers(copies):
            weights(llama).place(PAIR)
        assert shifted() == expected


def test_a_context_of_another_model_decodes_beside(llama: Model, directory: Path) -> None:
    weights(llama).park()
    expected = conversation(llama)
    weights(llama).place(PAIR)
    with loaded(write("mamba", directory)) as other, live(llama) as context, live(other) as beside:
        one, two = Talk(context), Talk(beside)
        for slot, prompt in enumerate(PROMPTS):
            one.hear(slot, prompt)
            two.hear(slot, prompt)
        one.say(4, 0, 1, 2)
    assert one.rows == expected.rows


def test_two_contexts_decode_over_one_ring_in_two_threads(llama: Model) -> None:
    weights(llama).park()
    expected = conversation(llama, steps=12)
    weights(llama).place(Placement(1, LEAST_SLOTS))
    talks: dict[int, Talk] = {}
    together = threading.Barrier(2)

    def speak(n: int) -> None:
        together.wait()
        talks[n] = conversation(llama, steps=12)

    threads = [threading.Thread(target=speak, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [talks[n].rows == expected.rows for n in range(2)] == [True, True]
    ring = weights(llama).ring
    assert ring is not None
    assert ring.passage.passes == 2 * expected.passes


def test_passes_are_rehearsed_between_decodes(llama: Model) -> None:
    weights(llama).park()
    expected = conversation(llama)
    weights(llama).place(PAIR)
    ring = weights(llama).ring
    assert ring is not None
    with live(llama) as context:
        talk = Talk(context)
        for slot, prompt in enumerate(PROMPTS):
            talk.hear(slot, prompt)
            assert ring.rehearse(3) > 0
        talk.say(4, 0, 1, 2)
    assert talk.rows == expected.rows
    assert ring.passage.passes == expected.passes


# --- what is measured -----------------------------------------------------------------------------------------------------


def test_long_prompts_pass_in_as_many_passes_as_steps(llama: Model) -> None:
    weights(llama).place(PAIR)
    with live(llama) as context:
        talk = Talk(context)
        talk.hear(0, [n % 250 for n in range(60)])
    ring = weights(llama).ring
    assert ring is not None
    assert ring.passage.passes == 4
