"""llama.cpp's own server as the peer: a process of its own with as many slots as there are agents, spoken to over HTTP.

`llama-server` if there is one, the same engine out of the wheel `xllamacpp` on the host otherwise. It is asked for what it
does fastest: greedy answers by its `top_k` sampler alone, and nothing kept of one prompt for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.readings import Reading
from conductor.types import ContextSpec, DeviceKind

_STARTS_WITHIN_S = 120.0
_EVENT_ENDS = b"\n\n"
_Process = subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class PeerKind:
    """Which server, and how it is started: `start` returns its process and what it says of itself, its address included."""

    name: str
    start: Callable[[str, ContextSpec, int, DeviceKind], tuple[_Process, dict[str, str]]]


def find(server: Path | None, kind: DeviceKind) -> PeerKind | str:
    """The peer there is, or why there is none. `server`: the llama-server to take, else the one on the path."""
    if found := str(server) if server else shutil.which("llama-server"):
        return PeerKind("llama-server", lambda *asked: _start_llama_server(found, *asked))
    if kind is not DeviceKind.HOST:
        return "no llama-server here, and xllamacpp's wheel has no CUDA"
    if importlib.util.find_spec("xllamacpp") is None:
        return "neither llama-server nor xllamacpp is installed here (pip install '.[peer]')"
    return PeerKind("xllamacpp", _start_xllamacpp)


class Peer:
    """A server that runs."""

    def __init__(self, about: dict[str, str]) -> None:
        self.about = {name: value for name, value in about.items() if name != "address"}
        self._port = int(about["address"].rpartition(":")[2])

    async def ask(self, prompts: Sequence[str], max_tokens: int, *, stream: bool) -> list[Reading]:
        """An answer to each prompt, all asked for at once; connections are there before the clock starts."""
        lines = [await asyncio.open_connection("127.0.0.1", self._port) for _ in prompts]
        began_at = time.perf_counter()
        return await asyncio.gather(
            *(self._answer(*line, prompt, max_tokens, stream, began_at) for line, prompt in zip(lines, prompts, strict=True))
        )

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, prompt: str, max_tokens: int, stream: bool, at: float
    ) -> Reading:
        body = json.dumps({
            "prompt": prompt, "n_predict": max_tokens, "stream": stream, "ignore_eos": True, "cache_prompt": False,
            "temperature": 0, "samplers": ["top_k"], "top_k": 1,
        }).encode()  # fmt: skip
        head = f"POST /completion HTTP/1.1\r\nHost: peer\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        reading, tail = Reading(at), b""
        try:
            while data := await reader.read(1 << 16):
                # An event ends with an empty line, which no JSON holds; the last one brings no token.
                if stream and (events := (tail[-1:] + data).count(_EVENT_ENDS)):
                    reading.arrived(events - (b'"stop":true' in data))
                tail = (tail + data)[-4096:]
        finally:
            writer.close()
        predicted = re.findall(rb'"tokens_predicted":(\d+)', tail)
        assert predicted, f"the peer gave no answer: {tail[-300:]!r}"
        reading.ended(int(predicted[-1]))
        return reading


@contextlib.contextmanager
def running(peer: PeerKind, path: str, spec: ContextSpec, *, n_threads: int, kind: DeviceKind) -> Iterator[Peer]:
    process, about = peer.start(path, spec, n_threads, kind)
    try:
        yield Peer(about)
    finally:
        process.terminate()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _start_xllamacpp(path: str, spec: ContextSpec, n_threads: int, _: DeviceKind) -> tuple[_Process, dict[str, str]]:
    wanted = {**spec.to_json(), "path": path, "threads": n_threads}
    program = Path(__file__).with_name("xllamacpp_server.py")
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, str(program), json.dumps(wanted)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said:
            raise _failed("xllamacpp", process, log)
    about: dict[str, str] = json.loads(said)
    return process, about


def _start_llama_server(
    program: str, path: str, spec: ContextSpec, n_threads: int, kind: DeviceKind
) -> tuple[_Process, dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options: dict[str, Any] = {
        "-m": path, "--host": "127.0.0.1", "--port": port, "-np": spec.slots, "-c": spec.slots * spec.window,
        "-b": spec.n_batch, "-ub": spec.n_ubatch, "-t": n_threads, "-tb": n_threads, "-ngl": 0 if kind is DeviceKind.HOST else 99,
        "-fa": "on" if spec.flash_attention else "off", "-ctk": spec.kv_type, "-ctv": spec.kv_type, "-fit": "off",
        "--cache-ram": 0, "--ctx-checkpoints": 0, "--slot-prompt-similarity": 0,
    }  # fmt: skip
    command = [program, *(str(part) for option in options.items() for part in option), "--no-cache-prompt", "--no-ui"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise _failed("llama-server", process, log)
            time.sleep(0.05)
    asked = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    version = next((line for line in (asked.stdout + asked.stderr).splitlines() if line.startswith("version:")), "")
    return process, {"address": f"127.0.0.1:{port}", "version": version.removeprefix("version:").strip()}


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _failed(name: str, process: _Process, log: IO[bytes]) -> RuntimeError:
    process.kill()
    code = process.wait()
    log.seek(0)
    said = log.read().decode("utf-8", "replace").splitlines()[-5:]
    return RuntimeError(f"{name} did not start (exit code {code}): {' '.join(said)}")
