"""What every command shares: output for people or programs, and errors as messages with an exit code."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

from rich.console import Console, RenderableType
from rich.segment import Segment, Segments

from conductor.errors import AdmissionRefused, ConductorError, InvalidRequest, ModelError, ServiceFailed, WindowRefused
from pipelines import tables

out = Console(highlight=False, soft_wrap=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Exit(IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2  #: bad input
    REFUSED = 3  #: an admission, a reservation or a larger window was refused
    MODEL = 4  #: a model cannot be used


def show(value: Any, table: RenderableType, *, as_json: bool) -> None:
    """`value` as JSON on standard output, or `table`."""
    if as_json:
        print_json(value.to_json() if hasattr(value, "to_json") else value)
    else:
        out.print(table)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def printable(text: str) -> str:
    """A model's text without control characters: they would steer the terminal."""
    return text.translate(_CONTROL)


def print_text(text: str) -> None:
    """A piece of a model's text as it is: tabs stay tabs, nothing is wrapped, no line is ended."""
    out.print(Segments([Segment(printable(text))]), end="", soft_wrap=True)


@contextlib.contextmanager
def errors(*, as_json: bool = False) -> Iterator[None]:
    """Turn the project's errors into a message on standard error (or JSON on standard output) and an exit code."""
    try:
        yield
    except _messages() as raised:
        error = _told(raised)
        if as_json:
            print_json(_as_json(error))
        elif isinstance(error, AdmissionRefused):
            err.print(tables.refusal(error.refusal), crop=False)
            err.print(str(error).partition("\n")[2], markup=False, soft_wrap=True)
        else:
            err.print(f"error: {printable(str(error))}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(_exit_code(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _messages() -> tuple[type[BaseException], ...]:
    """What becomes a message: the project's errors and, where Ray was loaded and may have raised it, a conductor's end."""
    if "ray" not in sys.modules:
        return (ConductorError,)
    from ray.exceptions import RayActorError

    return (ConductorError, RayActorError)


def _told(raised: BaseException) -> BaseException:
    if "ray" not in sys.modules:
        return raised
    from ray.exceptions import RayActorError

    from actors.connection import own

    error = own(raised)
    if isinstance(error, RayActorError):
        why = str(error).partition("\n")[0]
        return ServiceFailed(f"the conductor ended during this call, and nobody is registered any more ({why})")
    return error


def _as_json(error: BaseException) -> dict[str, Any]:
    body: dict[str, Any] = {"error": type(error).__name__, "message": str(error)}
    if isinstance(error, (AdmissionRefused, WindowRefused)):
        body["refusal"] = error.refusal.to_json()
    return body


def _exit_code(error: BaseException) -> Exit:
    if isinstance(error, (AdmissionRefused, WindowRefused)):
        return Exit.REFUSED
    if isinstance(error, ModelError):
        return Exit.MODEL
    return Exit.USAGE if isinstance(error, InvalidRequest) else Exit.FAILED
