"""Chat templates in a child process: they come from model files, and one may loop for ever or ask for all the memory there is.

In this process nothing could stop it: `{{ 9**(9**9) }}` holds the interpreter, at its compilation already. The child has a time
and a memory limit; it goes when nobody chatted for a while, and with `close`. One for each model, started at its first chat.
See also: `chat_template.py`, what runs in the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import conductor
from conductor.backend.chat_template import ChatTemplate, Piece
from conductor.errors import ChatTemplateFailed
from conductor.types import Message

_ANSWER_WITHIN_S = 5.0
_IDLE_S = 60.0
_MEMORY_BYTES = 512 << 20
_OUTPUT_CHARACTERS = 8 << 20


class TemplateChild:
    """As `ChatTemplate`, from any thread."""

    def __init__(self, model: str, source: str, *, bos: str, eos: str, control_strings: Sequence[str]) -> None:
        self._model = model
        self._template = {"model": model, "source": source, "bos": bos, "eos": eos, "control_strings": list(control_strings)}
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(self, messages: Sequence[Message]) -> list[Piece]:
        """The conversation so far and the opening of the assistant's answer. Raises ChatTemplateFailed."""
        with self._lock:
            answer = self._exchange(messages)
            if answer is None and self._end() == 0:  # it had just gone idle
                answer = self._exchange(messages)
            if answer is None:
                self._end()
                raise ChatTemplateFailed(self._model, f"it took longer than {_ANSWER_WITHIN_S:.0f} s, or too much memory")
        if "failed" in answer:
            raise ChatTemplateFailed(self._model, str(answer["failed"]))
        return [Piece(**piece) for piece in answer["pieces"]]

    def close(self) -> None:
        with self._lock:
            self._end()

    def __del__(self) -> None:
        self._end()

    def _exchange(self, messages: Sequence[Message]) -> dict[str, Any] | None:
        """The child's answer; None if it died over it or says nothing."""
        question: dict[str, Any] = {"messages": [message.to_json() for message in messages]}
        if self._child is None:
            self._child = _start()
            question["template"] = self._template
        child, line = self._child, ""
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(OSError):
            child.stdin.write(json.dumps(question) + "\n")
            child.stdin.flush()
            ready, _, _ = select.select([child.stdout], [], [], _ANSWER_WITHIN_S)
            line = child.stdout.readline() if ready else ""
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer

    def _end(self) -> int | None:
        """Its exit code, if there was one."""
        if self._child is None:
            return None
        child, self._child = self._child, None
        child.kill()
        child.communicate()  # closes the pipes too
        return child.returncode


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from conductor.backend.template_child import main; main()"],
        cwd=Path(conductor.__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def main() -> None:
    """The child: messages a line, the first time with the template, and pieces a line, until nobody asks any more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    source: dict[str, Any] = {}
    template: ChatTemplate | None = None
    while select.select([sys.stdin], [], [], _IDLE_S)[0] and (line := sys.stdin.readline()):
        question = json.loads(line)
        source = question.get("template", source)
        try:
            template = template or ChatTemplate(**source)
            pieces = template.render([Message(**message) for message in question["messages"]])
            if (length := sum(len(piece.text) for piece in pieces)) > _OUTPUT_CHARACTERS + 4 * len(line):
                raise ChatTemplateFailed(source["model"], f"it wrote {length} characters")
            answer: dict[str, Any] = {"pieces": [asdict(piece) for piece in pieces]}
        except ChatTemplateFailed as failure:
            answer = {"failed": failure.problem}
        print(json.dumps(answer), flush=True)
