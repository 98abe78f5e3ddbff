"""`conductor estimate` without its command line: what it adds up, what it searches, what it does not take."""

from __future__ import annotations

from pathlib import Path

import pytest

from conductor.config import Config, parse_config
from conductor.errors import InvalidRequest
from conductor.units import MIB
from pipelines.estimates import Estimate, estimate
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_tiny_gguf(tmp_path / "llama.gguf", n_layer=4, trained_window=100_000)
    write_tiny_gguf(tmp_path / "mamba.gguf", architecture="mamba", trained_window=1000)
    models = {key: {"path": str(tmp_path / f"{key}.gguf"), "window": 2048} for key in ("llama", "mamba")}
    document = {"device": {"kind": "host", "host_bytes": "32MiB"}, "admission_percent": 100, "models": models}
    return parse_config(document, source="test", directory=tmp_path)


def fits(config: Config, model: str, window: int, slots: int) -> bool:
    return estimate(config, model, [window], slots=slots).windows[0].fits


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_the_largest_window_fits_and_one_step_more_does_not(config: Config, slots: int) -> None:
    largest = estimate(config, "llama", [256], slots=slots).largest_window
    assert largest
    assert fits(config, "llama", largest, slots)
    assert not fits(config, "llama", largest + 1, slots)


def test_a_window_is_searched_up_to_what_the_model_was_trained_with_or_asked_for(config: Config) -> None:
    assert estimate(config, "mamba", []).largest_window == 2048
    assert estimate(config, "mamba", [256]).largest_window == 1000
    assert estimate(config, "llama", [256], slots=256).largest_window is None


def test_as_many_agents_are_counted_as_fit_beside_one_copy_of_the_weights(config: Config) -> None:
    result: Estimate = estimate(config, "llama", [512, 1000, 50_000], slots=4)
    assert result.cap_bytes == 32 * MIB
    for row in result.windows:
        room = result.cap_bytes - result.weights_bytes - row.contexts * row.context_bytes
        assert 0 <= room < row.context_bytes
        assert row.agents == 4 * row.contexts
        assert row.total_bytes == result.weights_bytes + row.context_bytes
        assert row.context_bytes == row.kv_bytes + row.compute_bytes + row.pool_bytes
        assert row.fits == (row.total_bytes <= result.cap_bytes)
    assert [row.fits for row in result.windows] == [True, True, False]


@pytest.mark.parametrize(
    ("window", "slots", "argument"), [(0, 1, "window"), (256, 0, "slots"), (256, 257, "slots"), (2**31 - 1, 2, "window")]
)
def test_what_llama_cannot_take_is_a_bad_request_that_names_it(config: Config, window: int, slots: int, argument: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        estimate(config, "llama", [window], slots=slots)
    assert refused.value.argument == argument
