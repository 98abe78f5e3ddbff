"""How much of a prompt is read beside those who generate: figures by hand."""

from __future__ import annotations

import random

from conductor.backend.pacing import Pacing


def paced(pacing: Pacing, *, step_s: float, token_s: float, steps: int = 40) -> int:
    """The chunk that it comes to, where a step takes just so long."""
    for _ in range(steps):
        tokens = pacing.most()
        pacing.generated(step_s)
        pacing.read(tokens, step_s + tokens * token_s, alone=False)
    return pacing.most()


def test_of_what_is_not_known_a_little_is_tried() -> None:
    assert Pacing(0.1).most() == 8


def test_a_chunk_fills_the_stall_that_is_allowed() -> None:
    assert paced(Pacing(0.1), step_s=0.02, token_s=0.001) in range(78, 82)


def test_somebody_always_reads_on_even_where_a_step_alone_takes_too_long() -> None:
    assert paced(Pacing(0.01), step_s=0.02, token_s=0.001) == 1


def test_a_chunk_grows_at_most_eightfold_from_one_measurement_to_the_next() -> None:
    pacing = Pacing(10.0)
    pacing.generated(1e-6)
    sizes = []
    for _ in range(4):
        sizes.append(pacing.most())
        pacing.read(sizes[-1], 1e-5, alone=False)
    assert sizes == [64, 512, 4096, 32768]


def test_reading_alone_says_what_a_token_takes() -> None:
    pacing = Pacing(0.1)
    pacing.read(512, 0.512, alone=True)
    assert pacing.most() == 100


def test_so_few_tokens_that_they_tell_of_the_step_are_not_measured() -> None:
    pacing = Pacing(0.1)
    pacing.read(100, 0.1, alone=True)
    before = pacing.most()
    for _ in range(50):
        pacing.read(2, 5.0, alone=False)
    assert pacing.most() == before


def test_whatever_is_measured_something_is_read() -> None:
    chance = random.Random(3)
    pacing = Pacing(0.05)
    for _ in range(2000):
        tokens = pacing.most()
        assert tokens >= 1
        if chance.random() < 0.5:
            pacing.generated(chance.choice([0.0, 1e-6, 0.01, 3.0]))
        pacing.read(min(tokens, 4096), chance.choice([1e-7, 1e-3, 2.0]), alone=chance.random() < 0.2)
