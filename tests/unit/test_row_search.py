"""The highest of each row, found by several threads as numpy finds it alone."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from conductor.backend.llama.row_search import RowSearch

SEARCH = RowSearch(2)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16, 33])
@pytest.mark.parametrize("values", [10, 70_000])
def test_it_is_the_first_of_the_highest_as_numpy_says(rows: int, values: int) -> None:
    chance = np.random.default_rng(rows)
    matrix = chance.integers(0, 50, (rows, values)).astype(np.float32)  # of so few values that they tie
    assert SEARCH(matrix) == matrix.argmax(axis=1).tolist()


def test_what_is_no_number_is_found_as_numpy_finds_it() -> None:
    matrix = np.zeros((8, 70_000), np.float32)
    matrix[3, 5] = np.nan
    assert SEARCH(matrix) == matrix.argmax(axis=1).tolist()


def test_many_search_at_once_and_each_gets_its_own() -> None:
    matrices = [np.random.default_rng(n).standard_normal((16, 20_000), np.float32) for n in range(6)]
    found: dict[int, list[list[int]]] = {}

    def search(n: int) -> None:
        found[n] = [SEARCH(matrices[n]) for _ in range(50)]

    threads = [threading.Thread(target=search, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [matrix.argmax(axis=1).tolist()] * 50 for n, matrix in enumerate(matrices)}


def test_an_error_of_a_helper_is_the_callers() -> None:
    class Broken(np.ndarray):  # type: ignore[type-arg]
        def argmax(self, *_: object, **__: object) -> None:  # type: ignore[override]
            raise MemoryError

    with pytest.raises(MemoryError):
        SEARCH(np.zeros((16, 70_000), np.float32).view(Broken))
    assert SEARCH(np.ones((16, 70_000), np.float32)) == [0] * 16
