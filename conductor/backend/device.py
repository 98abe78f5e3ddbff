"""The device: an NVIDIA GPU through NVML, or a slice of RAM with a byte budget. The only import of pynvml.

Booking is by the whole device's figures, not by process: in many virtual machines NVML's list of processes is empty.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import psutil
import pynvml

from conductor.config import DeviceConfig
from conductor.errors import ConfigError
from conductor.types import DeviceKind
from conductor.units import MIB


@dataclass(frozen=True, slots=True)
class Reading:
    total_bytes: int
    free_bytes: int


class Device(Protocol):
    kind: DeviceKind
    name: str
    chosen: str  #: why this device
    #: held by the driver and by strangers when first read, before this process took anything
    others_bytes: int

    def read(self) -> Reading: ...

    def taken_bytes(self) -> int:
        """What was taken since the first reading."""
        ...


class CudaDevice:
    """A GPU. With `limit`, treated as a card of that size: the rest of it is left alone."""

    kind = DeviceKind.CUDA

    def __init__(self, index: int, limit: int | None, chosen: str) -> None:
        self._handle = _handle(index)
        name = pynvml.nvmlDeviceGetName(self._handle)
        self.name = name.decode() if isinstance(name, bytes) else str(name)
        self.chosen = chosen
        first = self._memory()
        self._first_free = first.free_bytes
        self._total = min(first.total_bytes, limit or first.total_bytes)
        self.others_bytes = max(0, self._total - first.free_bytes)
        if limit:
            self.name += " (limited)"

    def read(self) -> Reading:
        return Reading(self._total, max(0, self._total - self.others_bytes - self.taken_bytes()))

    def taken_bytes(self) -> int:
        return max(0, self._first_free - self._memory().free_bytes)

    def _memory(self) -> Reading:
        memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
        return Reading(int(memory.total), int(memory.free))


class HostDevice:
    """`size` bytes of RAM. `used_bytes` tells what llama.cpp holds there, since the operating system cannot."""

    kind = DeviceKind.HOST

    def __init__(self, size: int, chosen: str, used_bytes: Callable[[], int]) -> None:
        self.name = "host memory"
        self.chosen = chosen
        self._size, self._used = size, used_bytes
        self.others_bytes = max(0, size - int(psutil.virtual_memory().available))

    def read(self) -> Reading:
        return Reading(self._size, max(0, self._size - self.others_bytes - self._used()))

    def taken_bytes(self) -> int:
        return self._used()


def open_device(config: DeviceConfig, *, llama_supports_gpu: bool, used_bytes: Callable[[], int]) -> Device:
    """The device that the configuration asks for. Raises ConfigError if a GPU is forced that cannot be used."""
    if config.kind == "host":
        return HostDevice(config.limit or config.host_bytes, "forced by device.kind", used_bytes)
    missing = _why_no_gpu(llama_supports_gpu, config.index)
    if missing is None:
        chosen = "forced by device.kind" if config.kind == "cuda" else "automatic: llama.cpp has CUDA and NVML sees a GPU"
        return CudaDevice(config.index, config.limit, chosen)
    if config.kind == "cuda":
        raise ConfigError("configuration", "device.kind", f"cuda is forced, but {missing}")
    return HostDevice(config.limit or config.host_bytes, f"automatic: {missing}", used_bytes)


def cap_bytes(device: Device, admission_percent: int) -> int:
    """What may be booked: a share of the device, less what others hold, in whole MiB so that Ray can say the same."""
    allowed = device.read().total_bytes * admission_percent // 100 - device.others_bytes
    return max(0, allowed) // MIB * MIB


def _why_no_gpu(llama_supports_gpu: bool, index: int) -> str | None:
    if not llama_supports_gpu:
        return "this llama-cpp-python was built without CUDA"
    try:
        pynvml.nvmlInit()
        _handle(index)
    except (pynvml.NVMLError, ValueError) as error:
        return f"NVML sees no such GPU ({error})"
    return None


def _handle(index: int) -> object:
    """NVML's handle of the GPU that CUDA calls `index`: CUDA_VISIBLE_DEVICES renumbers them, and NVML does not know."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    if not visible:
        return pynvml.nvmlDeviceGetHandleByIndex(index)
    if index >= len(visible):
        raise ValueError(f"device.index is {index}, and CUDA_VISIBLE_DEVICES names {len(visible)} devices")
    entry = visible[index]
    return pynvml.nvmlDeviceGetHandleByIndex(int(entry)) if entry.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(entry)
