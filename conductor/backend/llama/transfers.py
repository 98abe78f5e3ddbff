"""Copies from host memory into a buffer of the device, in order, beside whatever computes.

On CUDA on a stream of their own, ggml's, of a backend that nothing else uses; on the host device in a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from conductor.backend.llama.binding import LlamaError, function
from conductor.backend.llama.buffers import Buffer, device
from conductor.types import DeviceKind

_pointer, _size = ctypes.c_void_p, ctypes.c_size_t
_I8 = 24  # GGML_TYPE_I8


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _size), ("mem_buffer", _pointer), ("no_alloc", ctypes.c_bool)]


_init = function("ggml_init", _pointer, _InitParams)
_free_context = function("ggml_free", None, _pointer)
_overhead = function("ggml_tensor_overhead", _size)
_new_1d = function("ggml_new_tensor_1d", _pointer, _pointer, ctypes.c_int, ctypes.c_int64)
_place = function("ggml_backend_tensor_alloc", ctypes.c_int, _pointer, _pointer, _pointer)
_backend_of = function("ggml_backend_dev_init", _pointer, _pointer, ctypes.c_char_p)
_free_backend = function("ggml_backend_free", None, _pointer)
_synchronize = function("ggml_backend_synchronize", None, _pointer)
_copy_async = function("ggml_backend_tensor_set_async", None, _pointer, _pointer, _pointer, _size, _size)
_event_new = function("ggml_backend_event_new", _pointer, _pointer)
_event_free = function("ggml_backend_event_free", None, _pointer)
_event_record = function("ggml_backend_event_record", None, _pointer, _pointer)
_event_wait = function("ggml_backend_event_synchronize", None, _pointer)

#: of a copy: a future, or one of CUDA's events
Ticket = Any

#: long enough that starting a copy does not count, short enough for the start of a process
_PROBE_BYTES, _PROBES = 64 << 20, 5


class Transfers(Protocol):
    def copy(self, offset: int, source: int, bytes: int) -> Ticket:
        """Begin to copy from an address in host memory to an offset of the buffer, after the copies before it."""

    def wait(self, ticket: Ticket) -> None:
        """Until that copy is done; once for each ticket. Raises what the copy raised."""

    def close(self) -> None:
        """After the last copy."""


def transfers_into(buffer: Buffer, kind: DeviceKind) -> Transfers:
    return GpuTransfers(buffer) if kind is DeviceKind.CUDA else HostTransfers(buffer)


class HostTransfers:
    def __init__(self, buffer: Buffer) -> None:
        self._base = buffer.base
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transfer")

    def copy(self, offset: int, source: int, bytes: int) -> Ticket:
        return self._thread.submit(ctypes.memmove, self._base + offset, source, bytes)

    def wait(self, ticket: Ticket) -> None:
        future: Future[int] = ticket
        future.result()

    def close(self) -> None:
        self._thread.shutdown()


class GpuTransfers:
    """ggml ends the process where CUDA reports an error, so copies do not fail here. An event waited for is used again."""

    def __init__(self, buffer: Buffer) -> None:
        gpu = device(DeviceKind.CUDA)
        with contextlib.ExitStack() as undo:
            self._backend = _backend_of(gpu, None)
            if not self._backend:
                raise LlamaError("no stream for transfers could be made")
            undo.callback(_free_backend, self._backend)
            self._context = _init(_InitParams(2 * _overhead(), None, True))
            undo.callback(_free_context, self._context)
            self._whole = _new_1d(self._context, _I8, buffer.bytes)
            if _place(buffer.handle, self._whole, buffer.base) != 0:
                raise LlamaError("the buffer for transfers could not be described")
            self._undo = undo.pop_all()
        self._gpu = gpu
        self._spare: list[Any] = []
        self._made: list[Any] = []

    def copy(self, offset: int, source: int, bytes: int) -> Ticket:
        event = self._spare.pop() if self._spare else self._new_event()
        _copy_async(self._backend, self._whole, source, offset, bytes)
        _event_record(event, self._backend)
        return event

    def wait(self, ticket: Ticket) -> None:
        _event_wait(ticket)
        self._spare.append(ticket)

    def close(self) -> None:
        _synchronize(self._backend)
        for event in self._made:
            _event_free(event)
        self._undo.close()

    def _new_event(self) -> Any:
        event = _event_new(self._gpu)
        if not event:
            raise LlamaError("no event for transfers could be made")
        self._made.append(event)
        return event


def measure_link(kind: DeviceKind, *, bytes: int = _PROBE_BYTES) -> float:
    """Bytes a second from host memory, page-locked beside a GPU, to the device. Raises LlamaError if there is no room to try."""
    with contextlib.ExitStack() as undo:
        home = _until_the_end(undo, Buffer.in_host_memory(bytes, kind), bytes)
        target = _until_the_end(undo, Buffer.on_device(kind, bytes), bytes)
        transfers = transfers_into(target, kind)
        undo.callback(transfers.close)
        ctypes.memset(home.base, 1, bytes)  # else there may be no memory behind it to read
        transfers.wait(transfers.copy(0, home.base, bytes))  # nor behind the target, on the host device
        return bytes / statistics.median(_copy_s(transfers, home, bytes) for _ in range(_PROBES))


def _until_the_end(undo: contextlib.ExitStack, buffer: Buffer | None, size: int) -> Buffer:
    if buffer is None:
        raise LlamaError(f"{size} bytes to measure the link with are not to be had")
    undo.callback(buffer.free)
    return buffer


def _copy_s(transfers: Transfers, home: Buffer, bytes: int) -> float:
    began = time.perf_counter()
    transfers.wait(transfers.copy(0, home.base, bytes))
    return time.perf_counter() - began
