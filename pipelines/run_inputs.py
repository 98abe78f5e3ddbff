"""What the options of `conductor run` say: a pipeline's inputs, and agents that are there already."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from conductor.errors import InvalidRequest
from pipelines.library import Pipeline
from pipelines.library.templates import NAME

_KEYED = re.compile(rf"({NAME})=(.*)", re.DOTALL)
_STANDARD_INPUT = "-"


def given(pipeline: Pipeline, options: list[str]) -> dict[str, str | list[str]]:
    """The inputs that the options name. One without a name is the first input that has no default, or the first of all.

    Raises InvalidRequest for a name that is none.
    """
    texts: dict[str, list[str]] = {}
    for option in options:
        name, value = _named(pipeline, option)
        texts.setdefault(name, []).append(_text(value))
    return {name: values if len(values) > 1 else values[0] for name, values in texts.items()}


def _named(pipeline: Pipeline, option: str) -> tuple[str, str]:
    keyed = _KEYED.fullmatch(option)
    if keyed is not None and keyed[1] in pipeline.inputs:
        return keyed[1], keyed[2]
    known = ", ".join(pipeline.inputs) or "none"
    if keyed is not None:
        raise InvalidRequest(
            "--input", f"no input {keyed[1]!r}; there are: {known}; a text that begins so needs its NAME= before it"
        )
    must_be_given = [name for name, default in pipeline.inputs.items() if default is None]
    if not pipeline.inputs:
        raise InvalidRequest("--input", f"{pipeline.name} takes none")
    return [*must_be_given, *pipeline.inputs][0], option


def _text(value: str) -> str:
    try:
        if value == _STANDARD_INPUT:
            return sys.stdin.read()
        if value.startswith("@"):
            return Path(value[1:]).read_text("utf-8")
    except (OSError, ValueError) as error:
        what = "standard input" if value == _STANDARD_INPUT else value[1:]
        raise InvalidRequest("--input", f"{what} cannot be read: {error}") from None
    return value


def existing(options: list[str]) -> dict[str, str]:
    ids = {}
    for option in options:
        name, equals, agent_id = option.partition("=")
        if not equals or not agent_id:
            raise InvalidRequest("--agent", f"NAME=ID is expected, not {option!r}")
        ids[name] = agent_id
    return ids
