"""Which answers are kept, what is asked at all, and what is said where llama.cpp cannot tell."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conductor.backend.dry_run import ChildFailed, DryRun
from conductor.backend.estimator import Estimator
from conductor.backend.file_identity import FileIdentity
from conductor.backend.llama import Llama
from conductor.backend.memory_breakdown import MemoryBreakdown
from conductor.core.estimate import Footprint, ModelPlan, context_bytes, predicted
from conductor.errors import BadModelFile, ModelLoadFailed
from conductor.types import ContextSpec, DeviceKind
from conductor.units import GIB
from tests.support.plans import plan_of
from tests.support.tiny_gguf import write_tiny_gguf

SPEC = ContextSpec(window=4096, slots=2)


class Asked(DryRun):
    """A dry run that remembers what it was asked."""

    def __init__(self, *, works: bool = True) -> None:
        super().__init__()
        self.windows: list[list[int]] = []
        self._works = works

    def measure(self, plan: ModelPlan, identity: FileIdentity, specs: Sequence[ContextSpec]) -> list[Footprint]:
        if not self._works:
            raise ChildFailed("exit code 1")
        self.windows.append([spec.window for spec in specs])
        return super().measure(plan, identity, specs)


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def estimator(asked: Asked) -> Iterator[Estimator]:
    with contextlib.closing(Estimator(dry_run=asked)) as estimator:
        yield estimator


@pytest.fixture
def plan(tmp_path: Path) -> ModelPlan:
    return plan_of(write_tiny_gguf(tmp_path / "model.gguf", architecture="gemma3", n_layer=7))


def test_a_ladder_is_one_question_and_each_rung_as_if_asked_alone(estimator: Estimator, asked: Asked, plan: ModelPlan) -> None:
    windows = [256, 512, 1000, 4096]
    rungs = estimator.ladder(plan, SPEC, windows, at_most=GIB)
    assert asked.windows == [windows]
    with contextlib.closing(Estimator()) as another:
        assert rungs == tuple(another.estimate(plan, replace(SPEC, window=window), at_most=GIB) for window in windows)


def test_what_was_answered_is_not_asked_again(estimator: Estimator, asked: Asked, plan: ModelPlan) -> None:
    first = estimator.ladder(plan, SPEC, [256, 512], at_most=GIB)
    again = estimator.ladder(plan, SPEC, [512, 1024, 256, 256], at_most=GIB)
    assert asked.windows == [[256, 512], [1024]]
    assert (again[2], again[0], again[3]) == (*first, first[0])


def test_the_same_file_by_another_name_is_not_asked_again(estimator: Estimator, asked: Asked, plan: ModelPlan) -> None:
    link = Path(plan.path).with_name("link.gguf")
    os.link(plan.path, link)
    assert estimator.estimate(plan, SPEC, at_most=GIB) == estimator.estimate(plan_of(link), SPEC, at_most=GIB)
    assert len(asked.windows) == 1


def test_another_header_in_a_file_of_the_same_size_and_time_is_another_file(
    estimator: Estimator, asked: Asked, plan: ModelPlan
) -> None:
    before, times = os.stat(plan.path), (1_700_000_000, 1_700_000_000)
    os.utime(plan.path, times)
    narrow = estimator.estimate(plan, SPEC, at_most=GIB)
    write_tiny_gguf(plan.path, architecture="gemma3", n_layer=7, sliding_window=2048)
    os.utime(plan.path, times)
    assert os.stat(plan.path).st_size == before.st_size
    assert estimator.estimate(plan, SPEC, at_most=GIB).kv_bytes > narrow.kv_bytes


def test_only_so_many_answers_are_kept_and_the_oldest_goes_first(asked: Asked, plan: ModelPlan) -> None:
    with contextlib.closing(Estimator(keep=2, dry_run=asked)) as estimator:
        for window in (256, 512, 256, 1024, 256, 512):
            estimator.estimate(plan, replace(SPEC, window=window), at_most=GIB)
        assert asked.windows == [[256], [512], [1024], [512]]
        rungs = estimator.ladder(plan, SPEC, [256, 512, 1024, 2048], at_most=GIB)
        assert sorted(rung.kv_bytes for rung in rungs) == [rung.kv_bytes for rung in rungs]


def test_what_holds_for_one_kind_of_device_is_not_said_of_another(estimator: Estimator, plan: ModelPlan) -> None:
    on_host = estimator.estimate(plan, SPEC, at_most=GIB)
    on_gpu = estimator.estimate(replace(plan, device=DeviceKind.CUDA), SPEC, at_most=GIB)
    assert (on_host.host_weights_bytes, on_host.host_context_bytes, on_host.host_bytes) == (0, 0, 0)
    assert estimator.estimate(plan, SPEC, at_most=GIB) == on_host
    assert on_gpu.host_weights_bytes
    if not Llama.instance().supports_gpu:  # then all that a GPU would have is in host memory, and counted there
        assert (on_gpu.weights_bytes, on_gpu.context_bytes) == (0, 0)
        assert (on_gpu.host_weights_bytes, on_gpu.host_context_bytes) == (on_host.weights_bytes, on_host.context_bytes)


def test_windows_that_cannot_fit_are_priced_without_asking_llama(estimator: Estimator, asked: Asked, plan: ModelPlan) -> None:
    absurd = 2**31 - 1
    small, large = estimator.ladder(plan, replace(SPEC, slots=1), [256, absurd], at_most=GIB)
    assert asked.windows == [[256]]
    assert small.weights_bytes == large.weights_bytes
    assert large == predicted(plan, ContextSpec(window=absurd))
    assert large.kv_bytes > GIB
    assert "exact" in estimator.how


def test_parameters_that_llama_would_not_survive_are_refused_at_once(estimator: Estimator, asked: Asked, plan: ModelPlan) -> None:
    for spec in (replace(SPEC, slots=257), replace(SPEC, kv_type="i32"), replace(SPEC, window=2**31)):
        with pytest.raises(ModelLoadFailed):
            estimator.estimate(plan, spec, at_most=1 << 60)
    assert asked.windows == []


def test_without_the_symbol_the_formula_answers_and_says_how_far_it_may_be_off(
    plan: ModelPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llama.instance(), "breakdown", MemoryBreakdown(object()))
    with contextlib.closing(Estimator()) as estimator:
        took = estimator.estimate(plan, SPEC, at_most=GIB)
        assert took == predicted(plan, SPEC)
        assert took.context_bytes == context_bytes(plan.geometry, SPEC, device=DeviceKind.HOST)
        assert not estimator.exact
        assert "1.6 times" in estimator.how


def test_where_the_child_cannot_run_the_formula_answers(plan: ModelPlan, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(Estimator(dry_run=Asked(works=False))) as estimator:
        assert estimator.estimate(plan, SPEC, at_most=GIB) == predicted(plan, SPEC)
        assert not estimator.exact
    assert "no dry run" in caplog.text


@pytest.mark.parametrize("instead", ["nothing", "a directory", "a pipe"])
def test_a_file_that_is_gone_by_now_is_bad_and_nobody_waits_for_it(estimator: Estimator, plan: ModelPlan, instead: str) -> None:
    estimator.estimate(plan, SPEC, at_most=GIB)
    os.remove(plan.path)
    if instead != "nothing":
        (os.mkdir if instead == "a directory" else os.mkfifo)(plan.path)
    with pytest.raises(BadModelFile):
        estimator.estimate(plan, SPEC, at_most=GIB)
