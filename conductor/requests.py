"""Arguments of the public calls, checked before anything happens: bad input gets an InvalidRequest that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from conductor.config import MAX_WINDOW
from conductor.errors import InvalidRequest
from conductor.types import MAX_SEED, AgentId, DecodeRequest, Message, ServiceClass

MAX_NAME_CHARACTERS = 128
MAX_BYTES = 2**63 - 1
MAX_PRIORITY = 1_000_000
MAX_WAIT_S = 86_400
MAX_TEXT_CHARACTERS = 1 << 24


def agent_id(value: object, *, argument: str = "agent_id") -> AgentId:
    return AgentId(_name(argument, value))


def holder(value: object) -> str:
    return _name("holder", value)


def window(value: object) -> int:
    return _integer("window", value, at_least=1, at_most=MAX_WINDOW)


def priority(value: object) -> int:
    return _integer("priority", value, at_least=-MAX_PRIORITY, at_most=MAX_PRIORITY)


def service_class(value: object) -> ServiceClass:
    try:
        return ServiceClass(value)
    except ValueError:
        known = ", ".join(known.value for known in ServiceClass)
        raise InvalidRequest("service_class", f"{_shown(value)} is none; there are: {known}") from None


def wait_s(value: object) -> float:
    return _number("wait_s", value, at_least=0, at_most=MAX_WAIT_S)


def timeout_s(value: object) -> float:
    return _number("timeout_s", value, at_least=0, at_most=MAX_WAIT_S)


def bytes_(value: object) -> int:
    return _integer("bytes", value, at_least=1, at_most=MAX_BYTES)


def text(argument: str, value: object) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise InvalidRequest(argument, f"text is expected, not {type(value).__name__}")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise InvalidRequest(argument, f"{len(value):,} characters, {MAX_TEXT_CHARACTERS:,} are allowed")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(argument, f"holds a lone surrogate at position {error.start}, which is no text") from error
    return value


def decode_request(
    prompt: object,
    *,
    messages: object,
    max_tokens: object,
    temperature: object,
    top_k: object,
    top_p: object,
    min_p: object,
    seed: object,
    stop: object,
    reset: object,
    context_shift: object,
) -> DecodeRequest:
    """One turn's arguments, all checked."""
    if prompt is not None and messages is not None:
        raise InvalidRequest("prompt", "give either prompt or messages, not both")
    return DecodeRequest(
        prompt=None if prompt is None else text("prompt", prompt),
        messages=None if messages is None else _messages(messages),
        max_tokens=_integer("max_tokens", max_tokens, at_least=1, at_most=MAX_WINDOW),
        temperature=_number("temperature", temperature, at_least=0),
        top_k=_integer("top_k", top_k, at_least=0, at_most=MAX_WINDOW),
        top_p=_number("top_p", top_p, at_least=0, at_most=1),
        min_p=_number("min_p", min_p, at_least=0, at_most=1),
        seed=None if seed is None else _integer("seed", seed, at_least=0, at_most=MAX_SEED),
        stop=_stop(stop),
        reset=_flag("reset", reset),
        context_shift=None if context_shift is None else _flag("context_shift", context_shift),
    )


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise InvalidRequest("messages", "a list of messages is expected, with at least one")
    return tuple(_message(i, item) for i, item in enumerate(value))


def _message(position: int, item: Any) -> Message:
    where = f"messages[{position}]"
    if not isinstance(item, (Mapping, Message)) or not {"role", "content"} <= set(item):
        raise InvalidRequest(where, 'each message is {"role": …, "content": …}')
    return Message(text(f"{where}.role", item["role"]), text(f"{where}.content", item["content"]))


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or isinstance(strings, bytes):
        raise InvalidRequest("stop", "a string or a list of strings is expected")
    stops = tuple(text("stop", item) for item in strings)
    if "" in stops:
        raise InvalidRequest("stop", "an empty string would stop everything")
    return stops


def _name(argument: str, value: object) -> str:
    name = text(argument, value)
    if not name.strip() or not name.isprintable():
        raise InvalidRequest(argument, f"a name of printable characters is expected, not {name[:40]!r}")
    if len(name) > MAX_NAME_CHARACTERS:
        raise InvalidRequest(argument, f"{len(name)} characters, {MAX_NAME_CHARACTERS} are allowed")
    return name


def _integer(argument: str, value: object, *, at_least: int, at_most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(argument, f"a whole number is expected, not {_shown(value)}")
    if not at_least <= value <= at_most:
        raise InvalidRequest(argument, f"{_shown(value)} is outside {at_least} to {at_most}")
    return value


def _number(argument: str, value: object, *, at_least: float, at_most: float = math.inf) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequest(argument, f"a finite number is expected, not {_shown(value)}")
    if not at_least <= number <= at_most:
        bounds = f"{at_least:g} to {at_most:g}" if math.isfinite(at_most) else f"{at_least:g} or more"
        raise InvalidRequest(argument, f"{number:g} is outside {bounds}")
    return number


def _flag(argument: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(argument, f"True or False is expected, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A value for a message, whatever its size."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
