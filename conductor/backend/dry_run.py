"""What a model and a context will take, measured by a dry run of llama.cpp itself before anything is loaded.

llama.cpp lays out its buffers without allocating them. It does so in a child process: a file that passes the header's
checks may still abort llama.cpp, and then only the child dies. The child answers many questions, since starting it
costs most of the time, and goes when nobody asked for a while. It never sees a GPU: a CUDA context of its own would
take half a GiB that nobody booked.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import conductor
from conductor.backend.file_identity import FileIdentity
from conductor.backend.llama import Llama, LlamaError, Model
from conductor.core.estimate import Footprint, ModelPlan, step_tokens
from conductor.errors import BadModelFile, ModelLoadFailed
from conductor.types import ContextSpec, DeviceKind

#: how long a question may take: an 8B model's vocabulary costs some 0.2 s
_ANSWER_WITHIN_S = 20.0
_IDLE_S = 10.0
#: exit codes of a child that llama.cpp ended, or that gave no answer in time (SIGALRM)
_FATAL = tuple(-number for number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGFPE, signal.SIGBUS, signal.SIGALRM))
#: more than any geometry and recurrent state needs; some vocabularies make llama.cpp's tokenizers ask for all there is
_MEMORY_BYTES = 16 << 30

#: Below so many tokens a slot, generating may take more than reading (`lay_out`). In 3,000 contexts it did up to 4.
_FEW_TOKENS = 16


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[str]
    complaints: IO[bytes]


class ChildFailed(Exception):
    """The child cannot run here; that says nothing about the file."""


class DryRun:
    """Asks the child, about the host device. Blocking; one thread at a time."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        #: of the last child: exit code and what it said
        self._death: tuple[int, str] = (0, "")

    def measure(self, plan: ModelPlan, identity: FileIdentity, specs: Sequence[ContextSpec]) -> list[Footprint]:
        """Raises BadModelFile if llama.cpp cannot survive the file, ModelLoadFailed if it refuses file or parameters,
        ChildFailed if the child itself cannot run.
        """
        question = json.dumps({"path": plan.path, "identity": identity, "specs": [spec.to_json() for spec in specs]})
        answer = self._exchange(question)
        if answer is None and self._death[0] not in _FATAL:  # it may just have gone idle
            answer = self._exchange(question)
        if answer is None and self._death[0] >= 0:
            raise ChildFailed(self._last_words())
        if answer is None:
            raise BadModelFile(plan.path, f"llama.cpp does not survive it: {self._last_words()}")
        if "refused" in answer:
            raise ModelLoadFailed(plan.path, str(answer["refused"]))
        return [Footprint(**took) for took in answer["took"]]

    @property
    def child_pid(self) -> int | None:
        """The child's, while there is one."""
        return self._child.process.pid if self._child else None

    def close(self) -> None:
        self._end()

    def _exchange(self, question: str) -> dict[str, Any] | None:
        """The child's answer; None if it died, or had to be killed, over it."""
        child = self._started()
        assert child.process.stdin is not None
        assert child.process.stdout is not None
        try:
            child.process.stdin.write(question + "\n")
            child.process.stdin.flush()
            ready, _, _ = select.select([child.process.stdout], [], [], _ANSWER_WITHIN_S)
            line = child.process.stdout.readline() if ready else ""
            if not ready:
                child.process.send_signal(signal.SIGALRM)
                child.process.wait()
        except OSError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._end()
        return None

    def _started(self) -> _Child:
        if self._child is not None and self._child.process.poll() is None:
            return self._child
        self._end()
        complaints = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the child
        process = subprocess.Popen(
            [sys.executable, "-c", "from conductor.backend.dry_run import main; main()"],
            cwd=Path(conductor.__file__).parent.parent,  # where python looks first: not at what lies around the caller
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=os.environ
            | {
                "GGML_NO_BACKTRACE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )
        self._child = _Child(process, complaints)
        return self._child

    def _end(self) -> None:
        if self._child is None:
            return
        child, self._child = self._child, None
        child.process.kill()
        child.process.communicate()
        self._death = (child.process.returncode, _tail(child.complaints))
        child.complaints.close()

    def _last_words(self) -> str:
        code, said = self._death
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}; {said}" if said else how


def _tail(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def lay_out(model: Model, spec: ContextSpec) -> Footprint:
    """What a context of a model that was loaded dry would take. Raises LlamaError.

    llama.cpp lays its buffers out for reading a prompt and for generating (a token of each slot), and allocates for the
    larger; a dry run tells of reading only. That is the larger but where a step has few tokens of each slot, so there
    generating is asked about as well.
    """
    took = _footprint(model, spec)
    if step_tokens(spec) >= _FEW_TOKENS * spec.slots:
        return took
    generating = _footprint(model, spec, step=spec.slots)
    host = max(took.host_context_bytes or 0, generating.host_context_bytes or 0)
    return replace(took, compute_bytes=max(took.compute_bytes, generating.compute_bytes), host_context_bytes=host)


def _footprint(model: Model, spec: ContextSpec, *, step: int | None = None) -> Footprint:
    took = model.footprint(spec, step=step)
    if took is None:
        raise LlamaError("this llama.cpp does not tell what it would take")
    return took


def _answer(llama: Llama, question: dict[str, Any], open_models: dict[str, Model]) -> dict[str, Any]:
    """Measure in this process. The last model stays open: another context of it costs a few milliseconds."""
    identity = question["identity"]
    try:
        if identity not in open_models:
            while open_models:
                open_models.popitem()[1].close()
            open_models[identity] = llama.load(question["path"], DeviceKind.HOST, dry=True)
        took = [lay_out(open_models[identity], ContextSpec(**spec)) for spec in question["specs"]]
    except LlamaError as error:
        return {"refused": str(error)}
    return {"took": [footprint.to_json() for footprint in took]}


def main() -> None:
    """The child: a question a line, an answer a line, until nobody asks any more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    llama, open_models = Llama.instance(), dict[str, Model]()
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        while select.select([sys.stdin], [], [], _IDLE_S)[0] and (line := sys.stdin.readline()):
            print(json.dumps(_answer(llama, json.loads(line), open_models)), flush=True)


if __name__ == "__main__":
    main()
