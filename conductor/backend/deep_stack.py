"""A call in a thread with a stack that is deep enough for a text of its length.

llama.cpp cuts texts into words with std::regex for a third of its pre-tokenizers (DeepSeek, Tekken, GPT-4o, Llama 4, BLOOM …),
which calls itself for each character of a match: 28,000 letters in a row end a thread of 8 MiB by SIGSEGV. That is 280 bytes of
stack each, measured with llama.cpp b11312 and libstdc++.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")

_SHORT_BYTES = 8192
_STACK_BYTES_PER_BYTE = 512
_MIB = 1 << 20
_size_lock = threading.Lock()  #: the size is the whole process's


def on_a_deep_stack(n_bytes: int, call: Callable[[], Result]) -> Result:
    """For a long text in a thread, whose stack is touched only as far as it is used. Raises RuntimeError if there can be none."""
    if n_bytes <= _SHORT_BYTES:
        return call()
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    with _size_lock:
        usual = threading.stack_size(_MIB + -(-n_bytes * _STACK_BYTES_PER_BYTE // _MIB) * _MIB)
        try:
            threading.Thread(target=run, name="tokenize").start()
        finally:
            threading.stack_size(usual)
    return done.result()
