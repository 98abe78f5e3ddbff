"""The machine that a measurement or a transcript comes from, without its name or paths."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import psutil
import ray

from conductor import __version__
from conductor.backend.llama import Llama
from conductor.types import Status


def describe(status: Status | None = None) -> dict[str, str | int]:
    """What a reader needs to judge figures by."""
    llama = Llama.instance()
    machine: dict[str, str | int] = {
        "conductor": __version__,
        "llama_cpp": llama.version,
        "llama_cpp_cuda": str(llama.supports_gpu).lower(),
        "ray": ray.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or 0,
        "threads": psutil.cpu_count() or 0,
        "memory_bytes": int(psutil.virtual_memory().total),
    }
    if status is not None:
        machine |= {"device": status.device.name, "device_bytes": status.device.total_bytes}
    return machine


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def without_directories(status: Status) -> Status:
    """For files that others read: where the models lie on this machine is not part of it."""
    return replace(status, models=tuple(replace(model, path=Path(model.path).name) for model in status.models))
