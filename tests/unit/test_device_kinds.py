"""Which device is opened, and what it asks: NVML with two cards that a test plays, and the RAM of this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from conductor.backend.device import Device, Reading, open_device
from conductor.config import DeviceConfig
from conductor.errors import ConfigError
from conductor.types import DeviceKind
from conductor.units import GIB, MIB


@dataclass
class Nvml:
    """The driver's library, with two cards of which the second is ours."""

    monkeypatch: pytest.MonkeyPatch
    cores: int = 16896
    generation: tuple[int, int] = (9, 0)
    free: int = 7 * GIB
    answers: bool = True

    def __post_init__(self) -> None:
        for name in ("DeviceGetName", "DeviceGetMemoryInfo", "DeviceGetNumGpuCores", "DeviceGetCudaComputeCapability"):
            self.monkeypatch.setattr(pynvml, f"nvml{name}", getattr(self, name))
        self.monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        self.monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
        self.monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: {"GPU-ours": 1}[uuid])

    def DeviceGetName(self, handle: int) -> bytes:  # noqa: N802 - NVML's names
        return b"not ours" if handle == 0 else b"NVIDIA Test"

    def DeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        if not self.answers:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return SimpleNamespace(total=8 * GIB, free=self.free)

    def DeviceGetNumGpuCores(self, handle: int) -> int:  # noqa: N802
        return self.cores

    def DeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: N802
        return self.generation


def on_gpu(**options: object) -> Device:
    return open_device(DeviceConfig(**{"kind": "cuda", **options}), llama_supports_gpu=True, used_bytes=lambda: 0)


@pytest.mark.parametrize(
    ("cores", "generation", "multiprocessors"),
    [(16896, (9, 0), 132), (6912, (8, 0), 108), (10496, (8, 6), 82), (2560, (7, 5), 40), (24064, (12, 0), 188)],
)
def test_a_gpu_tells_its_multiprocessors(
    monkeypatch: pytest.MonkeyPatch, cores: int, generation: tuple[int, int], multiprocessors: int
) -> None:
    Nvml(monkeypatch, cores, generation)
    assert on_gpu().multiprocessors == multiprocessors


@pytest.mark.parametrize(("visible", "index"), [("", 1), ("1", 0), ("0, GPU-ours", 1)])
def test_the_gpu_is_the_one_that_cuda_means(monkeypatch: pytest.MonkeyPatch, visible: str, index: int) -> None:
    Nvml(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = on_gpu(index=index)
    assert (device.name, device.read()) == ("NVIDIA Test", Reading(8 * GIB, 7 * GIB, GIB))


def test_a_gpu_that_is_lost_leaves_its_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml(monkeypatch)
    device = on_gpu(index=1, limit=6 * GIB)
    nvml.answers = False
    assert (device.name, device.read()) == ("NVIDIA Test (limited)", Reading(6 * GIB, 6 * GIB, 0))


def test_a_gpu_that_does_not_tell_its_memory_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    Nvml(monkeypatch, answers=False)
    with pytest.raises(ConfigError, match=r"cuda is forced, but NVML does not tell the GPU's memory"):
        on_gpu()


def on_host(used_bytes: Callable[[], int] = lambda: 0, **options: int) -> Device:
    return open_device(DeviceConfig(kind="host", **options), llama_supports_gpu=False, used_bytes=used_bytes)


def test_on_the_host_the_budget_is_the_total_and_what_is_used_is_exact() -> None:
    used = 0
    device = on_host(lambda: used, host_bytes=64 * MIB)
    assert device.read() == Reading(64 * MIB, 64 * MIB, 0)
    used = 24 * MIB
    assert device.read() == Reading(64 * MIB, 40 * MIB, 0)
    assert device.taken_bytes() == 24 * MIB


def test_on_the_host_what_the_machine_lacks_of_the_budget_is_others() -> None:
    machine = psutil.virtual_memory()
    reading = on_host(host_bytes=machine.total * 2).read()
    assert reading.others_bytes >= machine.total
    assert reading.free_bytes <= machine.total


def test_a_gpu_that_is_forced_and_missing_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"cuda is forced, but this llama-cpp-python was built without CUDA"):
        open_device(DeviceConfig(kind="cuda"), llama_supports_gpu=False, used_bytes=lambda: 0)


def test_without_a_gpu_the_host_is_chosen_and_says_why() -> None:
    device = open_device(DeviceConfig(), llama_supports_gpu=False, used_bytes=lambda: 0)
    assert device.kind is DeviceKind.HOST
    assert device.chosen == "automatic: this llama-cpp-python was built without CUDA"
