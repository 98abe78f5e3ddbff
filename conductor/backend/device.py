"""The device: an NVIDIA GPU through NVML, or a slice of RAM with a byte budget. The only import of pynvml.

Covers how much there is, how much is free, and whose the rest is: ours, as far as we can account for it, or others'.
Booking is by the whole device's figures, not by process: in many virtual machines NVML's list of processes is empty. Does
not cover what may be booked by whom (`core.admission`) or what CUDA adds to a context (`core.pool`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pynvml

from conductor.config import DeviceConfig
from conductor.errors import ConfigError
from conductor.types import DeviceKind
from conductor.units import MIB

_log = logging.getLogger(__name__)

#: What the first decodes of a process load that its start did not: kernels of the models' types and shapes, and the driver's
#: room for them. `benchmarks/estimate.py` measured 70 MiB on an H200, once for all models; the rest is for other cards.
KERNELS_BYTES = 96 * MIB


@dataclass(frozen=True, slots=True)
class Reading:
    """The device at one moment."""

    total_bytes: int
    free_bytes: int
    others_bytes: int  #: held by the driver and by strangers


class Unreadable(Exception):
    """The driver does not answer now."""


class Device:
    """Live figures of a device. Thread-safe, and cheap enough for every admission.

    What is held beyond what is accounted for is of unknown origin. As much of it as the margin is taken for ours (temporary
    buffers, kernels that the driver loads late), what exceeds that for others'; and the least that was ever unexplained is
    not ours for certain. With `limit`, the device is treated as one of that size, and the rest of it is left alone.

    `memory`: total and free bytes now; raises Unreadable. `used_bytes`: what models and contexts hold, by llama.cpp's own
    account. `margin_bytes`: what is booked for what nobody can account for.
    """

    def __init__(
        self,
        kind: DeviceKind,
        name: str,
        chosen: str,
        memory: Callable[[], tuple[int, int]],
        *,
        used_bytes: Callable[[], int],
        margin_bytes: Callable[[], int] = lambda: 0,
        limit: int | None = None,
        multiprocessors: int | None = None,
    ) -> None:
        self.kind = kind
        self.name = f"{name} (limited)" if limit else name
        self.chosen = chosen  #: why this device
        self.multiprocessors = multiprocessors  #: None where they do not matter, or nobody tells
        self._memory, self._used, self._margin = memory, used_bytes, margin_bytes
        self._lock = threading.Lock()
        self._moves = 0
        self._overhead = 0
        self._answers = True
        total, self._first_free = memory()
        self._free = self._first_free
        self._total = min(total, limit or total)
        self._least_unexplained = self._total - self._first_free
        self._last = self._attribute(self._first_free, used=0, margin=0)

    def claim(self, overhead_bytes: int) -> None:
        """What the process holds for good, beside all that `used_bytes` and `margin_bytes` tell: ours from now on."""
        with self._lock:
            self._overhead = overhead_bytes

    @contextmanager
    def moving(self) -> Iterator[None]:
        """While buffers of ours come or go, the account and the driver cannot agree: readings wait until it is over."""
        with self._lock:
            self._moves += 1
        try:
            yield
        finally:
            with self._lock:
                self._moves -= 1

    def read(self) -> Reading:
        """The device now; as it was last while buffers of ours are moving, and while the driver does not answer."""
        with self._lock:
            account = self._used(), self._margin()
            if not self._moves and self._refresh() and account == (self._used(), self._margin()):
                used, margin = account
                self._last = self._attribute(self._free, used=used, margin=margin)
            return self._last

    def taken_bytes(self) -> int:
        """What was taken since the device was opened, whoever took it; on the host, where much goes on, by our account."""
        if self.kind is DeviceKind.HOST:
            return self._used()
        with self._lock:
            self._refresh()
            return max(0, self._first_free - self._free)

    def _refresh(self) -> bool:
        """Ask what is free; False if nobody answers, which is said once."""
        try:
            _, self._free = self._memory()
        except Unreadable as problem:
            if self._answers:
                _log.warning("the device does not answer, so its last reading stands: %s", problem)
            self._answers = False
            return False
        self._answers = True
        return True

    def _attribute(self, free: int, *, used: int, margin: int) -> Reading:
        unexplained = self._total - free - self._overhead - used
        self._least_unexplained = min(self._least_unexplained, unexplained)
        ours = min(margin, unexplained - self._least_unexplained)
        others = max(0, unexplained - ours)
        left = self._total - others - self._overhead - used - ours
        return Reading(self._total, max(0, min(free, left)), others)


def open_device(
    config: DeviceConfig,
    *,
    llama_supports_gpu: bool,
    used_bytes: Callable[[], int],
    margin_bytes: Callable[[], int] = lambda: 0,
) -> Device:
    """The device that the configuration asks for. Raises ConfigError if a GPU is forced that cannot be used."""
    if config.kind == "host":
        return _host(config, "forced by device.kind", used_bytes)
    chosen = "forced by device.kind" if config.kind == "cuda" else "automatic: llama.cpp has CUDA and NVML sees a GPU"
    try:
        if not llama_supports_gpu:
            raise Unreadable("this llama-cpp-python was built without CUDA")
        return _gpu(config, chosen, used_bytes, margin_bytes)
    except Unreadable as missing:
        if config.kind == "cuda":
            raise ConfigError("configuration", "device.kind", f"cuda is forced, but {missing}") from None
        return _host(config, f"automatic: {missing}", used_bytes)


def cap_bytes(reading: Reading, admission_percent: int) -> int:
    """What may be booked: a share of the device, less what others hold, in whole MiB so that Ray can say the same."""
    allowed = reading.total_bytes * admission_percent // 100 - reading.others_bytes
    return max(0, allowed) // MIB * MIB


def physical_bytes(reading: Reading) -> int:
    """What there is for us, booked or not."""
    return reading.total_bytes - reading.others_bytes


def margins(kind: DeviceKind) -> tuple[tuple[str, int], ...]:
    """What is booked for what nobody can account for, once for the process: (name, bytes). Pools are the contexts' own."""
    return (("kernels and libraries", KERNELS_BYTES),) if kind is DeviceKind.CUDA else ()


# --- the two kinds ------------------------------------------------------------------------------------------------------


def _host(config: DeviceConfig, chosen: str, used_bytes: Callable[[], int]) -> Device:
    """RAM. What llama.cpp holds there is known exactly, so there is no margin."""
    size = config.limit or config.host_bytes
    memory = lambda: (size, int(psutil.virtual_memory().available))
    return Device(DeviceKind.HOST, "host memory", chosen, memory, used_bytes=used_bytes)


def _gpu(config: DeviceConfig, chosen: str, used_bytes: Callable[[], int], margin_bytes: Callable[[], int]) -> Device:
    try:
        pynvml.nvmlInit()
        handle = _handle(config.index)
        name = pynvml.nvmlDeviceGetName(handle)
    except (pynvml.NVMLError, ValueError) as error:
        raise Unreadable(f"NVML sees no such GPU ({error})") from None

    def memory() -> tuple[int, int]:
        try:
            now = pynvml.nvmlDeviceGetMemoryInfo(handle)
        except pynvml.NVMLError as error:
            raise Unreadable(f"NVML does not tell the GPU's memory ({error})") from None
        return int(now.total), int(now.free)

    return Device(
        DeviceKind.CUDA,
        name.decode() if isinstance(name, bytes) else str(name),
        chosen,
        memory,
        used_bytes=used_bytes,
        margin_bytes=margin_bytes,
        limit=config.limit,
        multiprocessors=_multiprocessors(handle),
    )


def _multiprocessors(handle: object) -> int | None:
    """The size of a context's pool depends on them. NVML counts cores; how many make a multiprocessor is in CUDA's manual."""
    try:
        cores = int(pynvml.nvmlDeviceGetNumGpuCores(handle))
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:
        return None
    return cores // (64 if major == 7 or (major, minor) in ((6, 0), (8, 0)) else 128) or None


def _handle(index: int) -> object:
    """NVML's handle of the GPU that CUDA calls `index`: CUDA_VISIBLE_DEVICES renumbers them, and NVML does not know."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    if not visible:
        return pynvml.nvmlDeviceGetHandleByIndex(index)
    if index >= len(visible):
        raise ValueError(f"device.index is {index}, and CUDA_VISIBLE_DEVICES names {len(visible)} devices")
    entry = visible[index]
    return pynvml.nvmlDeviceGetHandleByIndex(int(entry)) if entry.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(entry)
