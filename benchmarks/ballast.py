"""A large card made small: all of it but so many bytes is held by another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

#: Holds the card but for argv[1] bytes, says what is left, and goes when its standard input ends.
_BALLAST = """
import sys
from cupy.cuda import runtime
runtime.setDevice(0)
excess = runtime.memGetInfo()[0] - int(sys.argv[1])
held = runtime.malloc(excess) if excess > 0 else None
print(runtime.memGetInfo()[0], flush=True)
sys.stdin.read()
"""


@contextmanager
def ballast(leave: int) -> Iterator[int]:
    """The rest of the card is held by another process meanwhile. Yields what CUDA says is left."""
    child = subprocess.Popen(
        [sys.executable, "-c", _BALLAST, str(leave)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        left = child.stdout.readline()
        if not left:
            raise typer.BadParameter(f"the rest of the card cannot be held; exit code {child.wait()} (CuPy is needed)")
        yield int(left)
    finally:
        child.communicate()  # closes its standard input, and waits
