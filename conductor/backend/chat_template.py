"""A model's own chat template: sandboxed Jinja, and a message's text can never say a control token.

Covers rendering messages to pieces of text that say how they are to be tokenised. Templates come from model files, so
they run in Jinja's immutable sandbox; an endless loop in one is still possible, and costs a turn's thread.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from conductor.errors import ChatTemplateFailed
from conductor.types import Message


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to tokenise; `special`: control strings in it are the template's own and become control tokens."""

    text: str
    special: bool


class ChatTemplate:
    """Compiled once for a model. Raises ChatTemplateFailed if the source is no template."""

    def __init__(self, model: str, source: str, *, bos: str, eos: str, control_strings: Sequence[str]) -> None:
        self._model, self._bos, self._eos = model, bos, eos
        self._control = re.compile("|".join(map(re.escape, control_strings))) if control_strings else None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals.update(raise_exception=self._raise, strftime_now=lambda form: datetime.now().strftime(form))
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # nested deeply enough, even the parser's recursion limit
            raise ChatTemplateFailed(model, f"cannot be compiled: {error}") from error

    def render(self, messages: Sequence[Message]) -> list[Piece]:
        """The conversation so far and the opening of the assistant's answer. Raises ChatTemplateFailed."""
        mark = f"x{secrets.token_hex(8)}x"  # letters at its ends: no digit of it is taken for one of the number's
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"{mark}{len(hidden) - 1}{mark}"

        def shield(text: str) -> str:
            return self._control.sub(hide, text) if self._control else text

        turns: list[dict[str, Any]] = [{"role": shield(m.role), "content": shield(m.content)} for m in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, bos_token=self._bos, eos_token=self._eos)
        except ChatTemplateFailed:
            raise
        except Exception as error:  # whatever a template does in its sandbox is the template's fault
            raise ChatTemplateFailed(self._model, f"{type(error).__name__}: {error}") from error
        parts = re.split(f"{mark}(\\d+){mark}", text)
        return [Piece(part if i % 2 == 0 else hidden[int(part)], special=i % 2 == 0) for i, part in enumerate(parts) if part]

    def _raise(self, message: object) -> NoReturn:
        raise ChatTemplateFailed(self._model, str(message))  # whatever the template passed
