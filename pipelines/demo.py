"""The demo: what the conductor is for, shown step by step, every claim checked as it is made."""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

import actors
from actors import service
from actors._ray_private import authenticate
from actors.connection import init_ray
from conductor.config import MAX_WINDOW, Config
from conductor.errors import AdmissionRefused, InternalError, RefusalCode
from conductor.types import Admission, Chunk, DecodeResult, Kind, KvPlace, MirrorState, Status
from conductor.units import MIB, format_bytes
from pipelines import tables
from pipelines.code_crew import DOCUMENT, ROLES, CodeCrew, CrewResult
from pipelines.console import out, print_text, printable
from pipelines.machine import describe, without_directories

REQUEST = "Write a Python function that runs a shell command and returns its output."
_TOLD_WITHIN_S = 3.0
_QUESTIONS = {
    "documenter": (
        DOCUMENT.format(code="def add(a, b):\n    return a + b"),
        DOCUMENT.format(code="def read_json(path):\n    with open(path) as file:\n        return json.load(file)"),
    ),
    "coder": ("Write a Python function `is_prime(n)` that checks whether a number is prime.",),
}

_TO_CLONES = (
    "Write a Python function `largest(numbers)` that returns the largest number.",
    "Write a Python function `count_words(text)` that returns the number of words.",
    "Write a Python function `is_even(n)` that checks whether a number is even.",
)


@dataclass
class Transcript:
    """Everything shown, and every claim with whether it held."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    claims: list[tuple[str, bool]] = field(default_factory=list)

    def claim(self, text: str, holds: bool) -> None:
        """Show a claim and whether it holds."""
        self.claims.append((text, holds))
        out.print(Text("  ✓ " if holds else "  ✗ ", style="green" if holds else "bold red").append(text, style="default"))

    def step(self, name: str, **shown: Any) -> None:
        self.steps.append({"step": name, **shown})

    @property
    def holds(self) -> bool:
        return all(holds for _, holds in self.claims)

    def save(self, path: Path, status: Status) -> None:
        claims = [{"claim": text, "holds": holds} for text, holds in self.claims]
        body = {"machine": describe(status), "claims": claims, "steps": self.steps}
        path.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", "utf-8")


def run(config: Config, *, request: str | None = None, save: Path | None = None) -> bool:
    """Show everything on a Ray of its own; True if every claim held."""
    config = config.model_copy(update={"live_contexts": 1})  # so that the swap is seen
    out.print("[dim]starting Ray and the conductor …[/]")
    service.users_address()  # for what it forgets: the token of a service that may end before the demo does
    if "RAY_AUTH_MODE" not in os.environ:  # a token for the length of the demo, so that Ray writes none to the home directory
        authenticate({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    init_ray("local", include_dashboard=False)
    try:
        conductor = actors.connect(config)
        transcript = Transcript()
        status: Status = ray.get(conductor.status.remote())
        _Demo(conductor, config, transcript).show(request or REQUEST)
        if save is not None:
            transcript.save(save, status)
        failed = [text for text, holds in transcript.claims if not holds]
        if failed:
            out.print(Text(f"{len(failed)} of {len(transcript.claims)} claims do not hold", style="bold red"))
        else:
            out.print(f"[bold green]all {len(transcript.claims)} claims shown were checked and hold[/]")
        actors.stop(conductor)
    finally:
        ray.shutdown()
    return transcript.holds


class _Demo:
    def __init__(self, conductor: Any, config: Config, transcript: Transcript) -> None:
        self._conductor, self._config, self._transcript = conductor, config, transcript
        self._agents = {f"{role}-1": role for role in ROLES}
        self._chats: dict[str, list[dict[str, str]]] = {agent_id: [] for agent_id in self._agents}

    def show(self, request: str) -> None:
        self._device()
        self._register()
        self._look()
        self._take_turns()
        self._decode_together()
        self._refuse()
        self._crew(request)
        self._ray_beside_ledger("while three agents are registered")
        self._leave()

    def _status(self) -> Status:
        status: Status = ray.get(self._conductor.status.remote())
        return status

    def _device(self) -> None:
        status = self._status()
        out.print(Rule("the device"))
        cap = format_bytes(status.ledger.max_bytes)
        out.print(Text.assemble((status.device.name, "bold"), f" — {status.device.chosen}; {cap} may be booked"))
        self._transcript.step("device", status=without_directories(status).to_json())

    def _register(self) -> None:
        out.print(Rule("three agents, three models"))
        before = self._status().ledger.allocated_bytes
        admitted: list[Admission] = [
            ray.get(self._conductor.register.remote(agent_id, model)) for agent_id, model in self._agents.items()
        ]
        out.print(tables.admissions(admitted))
        self._transcript.step("register", admissions=[a.to_json() for a in admitted])
        booked = self._status().ledger.allocated_bytes - before
        promised = sum(a.weights_bytes for a in admitted) + max(a.context_bytes for a in admitted)
        self._transcript.claim("each model's weights were booked once, and loaded after", all(a.model_loaded for a in admitted))
        self._transcript.claim(f"booked: three models and the largest context, {booked:,} bytes", booked == promised)

    def _look(self) -> None:
        out.print(Rule("status and list"))
        ray.get(self._conductor.mirrored.remote())
        status = self._status()
        out.print(tables.status(status))
        self._transcript.step("status", status=without_directories(status).to_json())
        parts = sum(r.bytes for r in status.ledger.reservations)
        self._transcript.claim("the ledger is the sum of its reservations, and below its cap",
                               parts == status.ledger.allocated_bytes <= status.ledger.max_bytes)  # fmt: skip

    def _take_turns(self) -> None:
        a, b = "documenter-1", "coder-1"
        out.print(Rule(f"turns: {a} → {b} → {a}, one model live at a time"))
        first, second, third = turns = [self._turn(agent_id) for agent_id in (a, b, a)]
        out.print(tables.decodes(turns))
        self._transcript.step("turns", turns=[turn.to_json() for turn in turns])
        claim = self._transcript.claim
        claim(f"{a} began cold: nobody was evicted, nothing restored", not first.kv_swap_evicted and not first.kv_swap_restored)
        claim(f"{b} evicted {a}", second.kv_swap_evicted == a and not second.kv_swap_restored and second.swap_bytes > 0)
        claim(f"{a} evicted {b} and was restored", third.kv_swap_evicted == b and third.kv_swap_restored)
        held = first.prompt_tokens + first.generated_tokens - 1  # the last token made is decoded with what follows it
        claim(f"{a} went on where it was: {held} tokens kept, {third.prompt_tokens} new ones decoded",
              third.prompt_tokens_reused == held and third.recomputed_tokens == 0)  # fmt: skip
        places = {agent.id: agent.kv for agent in ray.get(self._conductor.list.remote())}
        claim(f"the KV of {a} is in its slot, that of {b} in host memory", (places[a], places[b]) == (KvPlace.SLOT, KvPlace.HOST))
        holders = [r.holder for r in self._status().ledger.reservations if r.kind is Kind.CONTEXT]
        claim(f"in the ledger the model of {a} alone holds a context", holders == [self._agents[a]])

    def _decode_together(self) -> None:
        """Two clones of an agent's conversation, and all three asked at once."""
        source, clones = "coder-1", ["coder-2", "coder-3"]
        out.print(Rule(f"{source} and two clones of it, in one batch"))
        for clone in clones:
            ray.get(self._conductor.fork.remote(source, clone))
        held = {agent.id: agent.tokens for agent in ray.get(self._conductor.list.remote())}
        chat = self._chats[source]
        asked = [[*chat, {"role": "user", "content": question}] for question in _TO_CLONES]
        calls = [
            self._conductor.decode.remote(agent_id, messages=messages, max_tokens=80)
            for agent_id, messages in zip([source, *clones], asked, strict=True)
        ]
        turns: list[DecodeResult] = ray.get(calls)
        out.print(tables.decodes(turns))
        status = self._status()
        out.print(tables.pools(status.pools))
        pools = [pool.to_json() for pool in status.pools]
        self._transcript.step("together", turns=[turn.to_json() for turn in turns], pools=pools)
        claim = self._transcript.claim
        claim("the clones went on from the conversation: it was not read again",
              all(turn.prompt_tokens_reused >= held[source] - 1 for turn in turns))  # fmt: skip
        claim("all three sit in one pool of the model", [pool.seated for pool in status.pools] == [3])
        for clone in clones:
            ray.get(self._conductor.unregister.remote(clone))

    def _turn(self, agent_id: str) -> DecodeResult:
        """The agent's next question, its answer printed as it comes."""
        chat = self._chats[agent_id]
        chat.append({"role": "user", "content": _QUESTIONS[self._agents[agent_id]][len(chat) // 2]})
        out.print(f"[bold]you → {agent_id}[/]:")
        out.print(Text(chat[-1]["content"], style="dim"))
        out.print(f"[bold cyan]{agent_id}[/]:")
        *chunks, result = map(self._shown, actors.stream(self._conductor, agent_id, messages=chat, max_tokens=120))
        out.print()
        if not isinstance(result, DecodeResult):
            raise InternalError("a stream did not end with its result")
        self._transcript.claim("the chunks add up to the result's text", "".join(c.text for c in chunks) == result.text)
        chat.append({"role": "assistant", "content": result.text})
        return result

    @staticmethod
    def _shown(item: Chunk | DecodeResult) -> Chunk | DecodeResult:
        if isinstance(item, Chunk):
            print_text(item.text)
        return item

    def _refuse(self) -> None:
        out.print(Rule("a fourth agent that does not fit"))
        before = self._status().ledger
        window = self._window_too_large()
        try:
            ray.get(self._conductor.register.remote("fourth", "coder", window=window, service_class="guaranteed"))
        except AdmissionRefused as refused:
            refusal = refused.refusal
        else:
            self._transcript.claim(f"an agent with a window of {window:,} tokens is refused", False)
            return
        out.print(f"fourth asks for {window:,} tokens, guaranteed to stay on the device:")
        out.print(tables.refusal(refusal), crop=False)
        self._transcript.step("refusal", window=window, refusal=refusal.to_json(), line=refusal.line)
        after = self._status()
        claim = self._transcript.claim
        claim("refused with code CAP: not now, though alone it would fit", refusal.code is RefusalCode.CAP)
        claim("its numbers say why: what it asks for is more than what is free", refusal.requested_bytes > refusal.free_bytes)
        claim("nothing changed: the ledger is as it was, and nobody new is registered",
              after.ledger == before and len(after.agents) == len(self._agents))  # fmt: skip

    def _window_too_large(self) -> int:
        """A window that does not fit beside those who are here, though alone it would: found by asking, halving the interval."""
        fits, never = 0, MAX_WINDOW
        while never - fits > 256:
            window = (fits + never) // 2
            try:
                ray.get(self._conductor.register.remote("fourth", "coder", window=window, service_class="guaranteed"))
            except AdmissionRefused as refused:
                if refused.code is RefusalCode.CAP:
                    return window
                never = window
            else:
                ray.get(self._conductor.unregister.remote("fourth"))
                fits = window
        return never

    def _crew(self, request: str) -> None:
        out.print(Rule("a code crew: coder, then reviewer and documenter"))
        out.print(Text.assemble(("request", "bold"), f": {request}"))
        with CodeCrew(self._conductor) as crew:
            result: CrewResult = crew.run(request, on_turn=self._show_turn)
        self._transcript.step("crew", **result.to_json())
        self._transcript.claim("all three answered", bool(result.code and result.review and result.documentation))
        names = [agent.id for agent in ray.get(self._conductor.list.remote())]
        self._transcript.claim("the crew has left, the others are still here", names == list(self._agents))

    def _show_turn(self, role: str, result: DecodeResult) -> None:
        cost = Text(tables.cost(result))
        out.print(Panel(Text(printable(result.text)), title=role, subtitle=cost, title_align="left", subtitle_align="left"))

    def _ray_beside_ledger(self, when: str) -> None:
        out.print(Rule(f"Ray's view, {when}"))
        mirror = ray.get(self._conductor.mirrored.remote(2.0))
        ledger = self._status().ledger
        resource = self._config.ray.resource
        free_mib = (ledger.max_bytes - ledger.allocated_bytes) / MIB
        available = _available_mib(resource, free_mib)
        out.print(tables.mirror(mirror))
        out.print(f'ray.available_resources()["{resource}"] = {available:.4f}; cap − booked = {free_mib:.4f} MiB')
        self._transcript.step("ray", when=when, mirror=mirror.to_json(), available=available, ledger_free_mib=free_mib)
        self._transcript.claim("Ray's accounting equals the ledger, to the MiB",
                               mirror.state is MirrorState.EQUAL and abs(available - free_mib) < 1)  # fmt: skip

    def _leave(self) -> None:
        out.print(Rule("everybody leaves"))
        for agent_id in self._agents:
            ray.get(self._conductor.unregister.remote(agent_id))
        status = self._status()
        own = [r for r in status.ledger.reservations if r.kind is Kind.OVERHEAD]
        self._transcript.claim("every byte is back: no model, no agent, only what the process itself takes",
                               not status.models and not status.agents and status.ledger.reservations == tuple(own))  # fmt: skip
        self._ray_beside_ledger("after the last has left")


def _available_mib(resource: str, expected_mib: float) -> float:
    """As Ray tells it, once it is what is expected: on a busy machine its figure comes some time after its books are right."""
    deadline = time.monotonic() + _TOLD_WITHIN_S
    while True:
        available = float(ray.available_resources().get(resource, 0.0))  # type: ignore[no-untyped-call]
        if abs(available - expected_mib) < 1 or time.monotonic() > deadline:
            return available
        time.sleep(0.05)
