"""Models as files: which names mean the same one, what is booked for them, and what a bad one leaves behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conductor.errors import AdmissionRefused, BadModelFile, ModelLoadFailed, PathNotAllowed, RefusalCode, UnknownModel
from conductor.gpu_conductor import GpuConductor
from conductor.types import ContextSpec, Kind, ModelState
from tests.conftest import ROOT, Start
from tests.support.breakdown import measure, opened_model
from tests.support.tiny_gguf import write_tiny_gguf

SHIPPED = {name: ROOT / "models" / f"{name}.gguf" for name in ("coder", "reviewer", "documenter")}


async def booked(conductor: GpuConductor, kind: Kind) -> list[tuple[str, int]]:
    ledger = (await conductor.status()).ledger
    return [(reserved.holder, reserved.bytes) for reserved in ledger.reservations if reserved.kind is kind and reserved.bytes]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


# --- names --------------------------------------------------------------------------------------------------------------


async def test_a_file_by_any_path_is_one_model(start: Start, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny.parent / "link.gguf").symlink_to(tiny)
    (tiny.parent / "hard.gguf").hardlink_to(tiny)
    (tiny.parent / "folder").mkdir()
    monkeypatch.chdir(tiny.parent / "folder")
    conductor = await start({"tiny": tiny})
    names = ["tiny", str(tiny), "link.gguf", "hard.gguf", "../tiny.gguf", f"{tiny.parent}/folder/../link.gguf"]
    admissions = [await conductor.register(f"agent {n}", name) for n, name in enumerate(names)]
    assert [admission.model_loaded for admission in admissions] == [True] + [False] * 5
    assert [admission.charged_bytes for admission in admissions[1:]] == [0] * 5
    assert await booked(conductor, Kind.WEIGHTS) == [("tiny", admissions[0].weights_bytes)]
    [model] = (await conductor.status()).models
    assert (model.agents, model.state, model.path) == (6, ModelState.RESIDENT, str(tiny))


async def test_another_content_under_the_same_path_is_another_model(start: Start, tiny: Path) -> None:
    conductor = await start()
    await conductor.register("ada", str(tiny))
    before = await conductor.decode("ada", "hello", max_tokens=8)
    os.replace(write_tiny_gguf(tiny.parent / "new.gguf", seed=1), tiny)
    await conductor.register("bob", str(tiny))
    assert len((await conductor.status()).models) == 2
    assert (await conductor.decode("bob", "hello", max_tokens=8)).tokens != before.tokens
    assert (await conductor.decode("ada", "hello", max_tokens=8, reset=True)).tokens == before.tokens


async def test_a_path_outside_the_allowed_directories_is_refused(start: Start, tiny: Path) -> None:
    conductor = await start(model_dirs=[str(tiny.parent / "allowed")])
    (tiny.parent / "allowed").mkdir()
    (tiny.parent / "allowed" / "way-out.gguf").symlink_to(tiny)
    for name in (str(tiny), str(SHIPPED["coder"]), "/etc/passwd", "way-out.gguf", "../tiny.gguf", "/no/such.gguf"):
        with pytest.raises(PathNotAllowed) as refused:
            await conductor.register("ada", name)
        assert refused.value.allowed == (str(tiny.parent / "allowed"),)


async def test_an_unknown_key_is_told_with_the_known_ones(start: Start) -> None:
    conductor = await start(SHIPPED)
    with pytest.raises(UnknownModel) as refused:
        await conductor.register("ada", "coda")
    assert refused.value.known == ("coder", "documenter", "reviewer")


# --- bytes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("window", [256, 1000])
async def test_what_is_booked_is_what_llama_cpp_says_it_took(start: Start, name: str, window: int) -> None:
    conductor = await start(SHIPPED)
    await conductor.register("ada", name, window=window)
    await conductor.decode("ada", "hello", max_tokens=1)
    with opened_model(SHIPPED[name]) as model:
        real = measure(model, ContextSpec(window=window))
    assert await booked(conductor, Kind.WEIGHTS) == [(name, real.model_bytes)]
    assert await booked(conductor, Kind.CONTEXT) == [(name, real.context_bytes + real.compute_bytes)]
    device, ledger = (await conductor.status()).device, (await conductor.status()).ledger
    assert device.total_bytes - device.free_bytes == ledger.allocated_bytes == sum(real_bytes(real))


def real_bytes(real: Any) -> tuple[int, int, int]:
    return real.model_bytes, real.context_bytes, real.compute_bytes


async def test_the_last_to_leave_unloads_the_model_and_brings_its_bytes_back(start: Start) -> None:
    conductor = await start(SHIPPED)
    empty = (await conductor.status()).device.free_bytes
    for agent in ("ada", "bob"):
        await conductor.register(agent, "coder", window=512)
        await conductor.decode(agent, "def", max_tokens=2)
    await conductor.unregister("ada")
    [model] = (await conductor.status()).models
    assert (model.agents, model.state) == (1, ModelState.RESIDENT)
    assert (await conductor.decode("bob", max_tokens=2)).generated_tokens == 2
    await conductor.unregister("bob")
    status = await conductor.status()
    assert (status.models, status.ledger.allocated_bytes, status.device.free_bytes) == ((), 0, empty)
    assert (await conductor.register("cleo", "coder", window=512)).model_loaded


async def test_everybody_who_comes_while_a_model_loads_shares_it(start: Start) -> None:
    conductor = await start(SHIPPED)
    admissions = await asyncio.gather(*(conductor.register(f"agent {n}", "coder", window=256) for n in range(10)))
    assert sum(admission.model_loaded for admission in admissions) == 1
    assert len(await booked(conductor, Kind.WEIGHTS)) == 1


async def test_registering_while_the_model_is_unloaded_loads_it_again(start: Start) -> None:
    conductor = await start(SHIPPED)
    await conductor.register("ada", "coder", window=256)
    _, admission = await asyncio.gather(conductor.unregister("ada"), conductor.register("bob", "coder", window=256))
    assert (await conductor.decode("bob", "def", max_tokens=2)).generated_tokens == 2
    assert admission.model_loaded


async def test_a_window_longer_than_trained_is_admitted_with_a_warning(start: Start, tmp_path: Path) -> None:
    conductor = await start({"tiny": write_tiny_gguf(tmp_path / "tiny.gguf", trained_window=300)})
    assert (await conductor.register("ada", "tiny")).window == 300
    assert (await conductor.register("bob", "tiny", window=300)).warnings == ()
    [warning] = (await conductor.register("cleo", "tiny", window=600)).warnings
    assert "600" in warning
    assert "300" in warning


async def test_a_window_that_no_device_of_this_size_holds_is_never_guaranteed(start: Start, tiny: Path) -> None:
    conductor = await start({"tiny": tiny})
    with pytest.raises(AdmissionRefused) as refused:
        await conductor.register("ada", "tiny", window=2**31 - 1, service_class="guaranteed")
    assert refused.value.code is RefusalCode.NEVER
    window = refused.value.refusal.largest_window
    assert window is not None
    await conductor.register("ada", "tiny", window=window, service_class="guaranteed")
    assert (await conductor.decode("ada", "hello", max_tokens=1)).generated_tokens == 1


async def test_a_shared_agent_is_told_how_much_of_an_endless_window_it_can_ever_have(start: Start, tiny: Path) -> None:
    conductor = await start({"tiny": tiny})
    admission = await conductor.register("ada", "tiny", window=2**31 - 1)
    assert admission.first_window == 4096
    assert any("no more than" in warning for warning in admission.warnings)
    assert (await conductor.decode("ada", "hello", max_tokens=1)).generated_tokens == 1


async def test_a_file_that_was_replaced_while_its_weights_were_parked_is_not_loaded_as_if_it_were_the_same(
    start: Start, tmp_path: Path
) -> None:
    one, other = write_tiny_gguf(tmp_path / "one.gguf", seed=1), write_tiny_gguf(tmp_path / "other.gguf", seed=2)
    conductor = await start({"one": one})
    await conductor.register("ada", "one", service_class="best_effort")  # its weights are loaded for its turn
    os.replace(other, one)
    with pytest.raises(ModelLoadFailed, match="another one than when it was admitted"):
        await conductor.decode("ada", "hello", max_tokens=1)
    await conductor.unregister("ada")
    await conductor.register("ada", "one")
    assert (await conductor.decode("ada", "hello", max_tokens=1)).generated_tokens == 1


# --- bad files ----------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    os.truncate(write_tiny_gguf(path), 300_000)


def cut_in_its_header(path: Path) -> None:
    os.truncate(write_tiny_gguf(path), 1_000)


def not_gguf(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def empty(path: Path) -> None:
    path.touch()


def directory(path: Path) -> None:
    path.mkdir()


def missing(path: Path) -> None:
    pass


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nothing")


@pytest.mark.parametrize("make", [truncated, cut_in_its_header, not_gguf, empty, directory, missing])
async def test_a_file_that_is_no_model_is_refused_and_leaves_nothing(
    start: Start, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "bad.gguf")
    conductor = await start({"bad": tmp_path / "bad.gguf"})
    before = (await conductor.status()).ledger
    for name in ("bad", str(tmp_path / "bad.gguf")):
        with pytest.raises(BadModelFile) as refused:
            await conductor.register("ada", name)
        assert refused.value.path == str(tmp_path / "bad.gguf")
    assert (await conductor.status()).ledger == before


async def test_a_link_to_nowhere_is_refused(start: Start, tmp_path: Path) -> None:
    dangling(tmp_path / "bad.gguf")
    conductor = await start({"bad": tmp_path / "bad.gguf"})
    with pytest.raises(BadModelFile):
        await conductor.register("ada", "bad")


def of_unknown_architecture(path: Path) -> None:
    write_tiny_gguf(path, architecture="nonesuch")


def without_a_tensor(path: Path) -> None:
    content = write_tiny_gguf(path).read_bytes()
    assert content.count(b"blk.1.ffn_down.weight") == 1
    path.write_bytes(content.replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_dawn.weight"))


@pytest.mark.parametrize("make", [of_unknown_architecture, without_a_tensor])
async def test_a_model_that_llama_cpp_refuses_unwinds_to_nothing(
    start: Start, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    """Their headers are fine, so they are booked first; everybody who waits for the load is told."""
    make(tmp_path / "bad.gguf")
    conductor = await start({"bad": tmp_path / "bad.gguf", **SHIPPED})
    before = (await conductor.status()).ledger
    answers = await asyncio.gather(*(conductor.register(f"agent {n}", "bad") for n in range(3)), return_exceptions=True)
    for answer in answers:
        assert isinstance(answer, ModelLoadFailed)
        assert answer.path == str(tmp_path / "bad.gguf")
        assert answer.problem
    status = await conductor.status()
    assert (status.ledger, status.models, status.agents) == (before, (), ())
    await conductor.register("agent 0", "coder", window=256)
    assert (await conductor.decode("agent 0", "def", max_tokens=2)).generated_tokens == 2
