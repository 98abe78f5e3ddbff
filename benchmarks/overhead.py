"""What the conductor costs: one agent's decode through the Ray actor against the bare llama.cpp loop, and a ledger decision.

    python benchmarks/overhead.py [--model coder] [--repeats 25] [--save FILE]

Both sides decode the same prompt greedily to the same number of tokens with the same parameters, in turns, in one run.
The actor's side is timed where its caller is, its first token by a turn of one token. Ratios are medians of the rounds'
own ratios.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import llama_cpp.llama_cpp as llama
import ray
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import actors
from benchmarks import harness
from benchmarks.bare import BareModel
from conductor.backend.catalog import Catalog
from conductor.config import Config, load_config
from conductor.core.books import Books
from conductor.core.estimate import ModelPlan, context_bytes
from conductor.core.events import AgentSpec, RequestId, Rung
from conductor.core.ledger import Ledger
from conductor.core.residency import Model
from conductor.core.sessions import Agent
from conductor.types import AgentId, ContextSpec, Status
from pipelines.console import out

_SHOWN = {"tokens_per_s": 0, "turn_tokens_per_s": 0, "first_token_ms": 2}
PROMPT = "import os\nimport sys\n\n\ndef main(arguments):\n"


class BareLoop:
    """llama-cpp-python's low-level loop and nothing else: the limit."""

    def __init__(self, model: BareModel, spec: ContextSpec, n_threads: int) -> None:
        self._model = model
        self._context = model.context(spec, n_threads=n_threads)

    def generate(self, prompt: str, max_tokens: int) -> tuple[list[int], float, float]:
        """Tokens, seconds to the first of them, seconds in all."""
        began = time.perf_counter()
        memory = llama.llama_get_memory(self._context)
        llama.llama_memory_clear(memory, True)
        read = self._model.tokenize(prompt)
        ids = (llama.llama_token * len(read))(*read)
        sampler = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        llama.llama_sampler_chain_add(sampler, llama.llama_sampler_init_greedy())
        one = (llama.llama_token * 1)()
        batch = llama.llama_batch_get_one(one, 1)
        assert llama.llama_decode(self._context, llama.llama_batch_get_one(ids, len(read))) == 0
        made: list[int] = []
        first = 0.0
        while True:
            token = llama.llama_sampler_sample(sampler, self._context, -1)
            made.append(token)
            first = first or time.perf_counter() - began
            if llama.llama_vocab_is_eog(self._model.vocab, token) or len(made) >= max_tokens:
                break
            one[0] = token
            assert llama.llama_decode(self._context, batch) == 0
        llama.llama_sampler_free(sampler)
        return made, first, time.perf_counter() - began


def prompt(number: int) -> str:
    """Prompts of one length that part at their first line, so that no KV of an earlier round can be reused."""
    return f"# {number:04d}\n{PROMPT}"


def decode_sides(conductor: Any, bare: BareLoop, max_tokens: int) -> dict[str, Callable[[], dict[str, float]]]:
    """The sides of a round: {side: run it once and return its figures}. The bare loop goes first."""
    numbers = {"bare": itertools.count(), "actor": itertools.count()}
    expected: dict[str, list[int]] = {}

    def limit() -> dict[str, float]:
        text = prompt(next(numbers["bare"]))
        harness.settle()
        expected[text], first, elapsed = bare.generate(text, max_tokens)
        return _figures(len(expected[text]), first, elapsed)

    def actor() -> dict[str, float]:
        text = prompt(next(numbers["actor"]))
        harness.settle()
        began = time.perf_counter()
        ray.get(conductor.decode.remote("bench", text, max_tokens=1, reset=True))
        first = time.perf_counter() - began
        ray.get(conductor.decode.remote("bench", "x", max_tokens=1, reset=True))  # the next call is to read its prompt itself
        harness.settle()
        began = time.perf_counter()
        result = ray.get(conductor.decode.remote("bench", text, max_tokens=max_tokens, reset=True))
        elapsed = time.perf_counter() - began
        assert list(result.tokens) == expected[text], "the actor's tokens differ from the bare loop's"
        assert result.prompt_tokens_reused <= 1, "the actor had read the prompt before"
        return _figures(result.generated_tokens, first, elapsed, result.time_to_first_token_ms / 1000)

    def empty_call() -> dict[str, float]:
        began = time.perf_counter()
        ray.get(conductor.check.remote())
        return {"ms": (time.perf_counter() - began) * 1000}

    return {"bare loop": limit, "actor": actor, "empty call": empty_call}


def _figures(tokens: int, first: float, elapsed: float, own_first: float | None = None) -> dict[str, float]:
    """The rate once the turn's own first token is there, the whole turn's rate, and the time to a first token."""
    return {
        "tokens_per_s": (tokens - 1) / (elapsed - (first if own_first is None else own_first)),
        "turn_tokens_per_s": tokens / elapsed,
        "first_token_ms": first * 1000,
    }


def ledger_sides(plan: ModelPlan, spec: ContextSpec, reservations: int) -> dict[str, Callable[[], dict[str, float]]]:
    """Decisions on a ledger of that many reservations, in microseconds each: without agents, and with as many of them."""
    price = context_bytes(plan.geometry, spec, device=plan.device)
    newcomer = AgentSpec(AgentId("newcomer"), plan, spec, (Rung(spec.window, price),))
    agents = {
        id: Agent(replace(newcomer, id=id), RequestId(i), 0, list(newcomer.ladder), loads_model=False)
        for i, id in enumerate(AgentId(f"agent-{i}") for i in range(reservations))
    }
    books = Books(Ledger(1 << 40), {}, {}, {})
    crowded = Books(Ledger(1 << 40), agents, {plan.id: Model(plan)}, {})
    for i in range(reservations):
        books.reserve(f"holder-{i}", 1 << 20, None)
        crowded.reserve(f"holder-{i}", 1 << 20, None)
    count = 200

    def admission() -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(count):
            books.decide(newcomer)
        return {"us": (time.perf_counter() - began) / count * 1e6}

    def booking() -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(count):
            books.release(books.reserve("newcomer", 1 << 20, None))
        return {"us": (time.perf_counter() - began) / count * 1e6}

    def admission_among_agents() -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(count // 10):
            crowded.decide(newcomer)
        return {"us": (time.perf_counter() - began) / (count // 10) * 1e6}

    return {
        "admission decision": admission,
        "reserve and release": booking,
        f"admission decision among {reservations} agents": admission_among_agents,
    }


def main(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration of the conductor.")] = None,
    model: Annotated[str, typer.Option(help="A key of the configuration.")] = "coder",
    max_tokens: Annotated[int, typer.Option(help="Tokens of each turn.")] = 400,
    repeats: Annotated[int, typer.Option(help="Counted rounds.")] = 25,
    reservations: Annotated[int, typer.Option(help="Size of the ledger.")] = 1000,
    save: Annotated[Path | None, typer.Option(help="Where the JSON goes (default: benchmarks/results).")] = None,
) -> None:
    """Print the ratios and save them."""
    settings: Config = load_config(config)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    conductor = actors.connect(settings)
    status: Status = ray.get(conductor.status.remote())
    plan = Catalog(settings).plan(model, status.device.kind)
    admission = ray.get(conductor.register.remote("bench", model))
    spec = settings.context_spec(plan.key, admission.window)
    bare = BareLoop(BareModel(plan), spec, n_threads=status.threads)
    decode = harness.in_turns(decode_sides(conductor, bare, max_tokens), repeats=repeats)
    ledger = harness.in_turns(ledger_sides(plan, spec, reservations), repeats=max(repeats, 25))
    actors.stop(conductor)
    ray.shutdown()

    empty_ms = harness.median(decode.pop("empty call")["ms"])
    rate, turn = (harness.median_ratio(decode["actor"][f], decode["bare loop"][f]) for f in ("tokens_per_s", "turn_tokens_per_s"))
    late = harness.median(decode["actor"]["first_token_ms"]) - harness.median(decode["bare loop"]["first_token_ms"])
    rows = [
        [side, *(f"{harness.median(figures[name]):.{digits}f}" for name, digits in _SHOWN.items())]
        for side, figures in decode.items()
    ]
    harness.table(f"{model} on {status.device.name}, one agent, greedy", ["", "tok/s", "whole turn", "first token, ms"], rows)
    out.print(
        f"actor / bare loop: [bold]{rate:.3f}[/] of the tok/s, {turn:.3f} of the whole turn's ({max_tokens} tokens), "
        f"[bold]{late:+.2f} ms[/] to the first token, of which an empty call of the actor takes {empty_ms:.2f}"
    )
    harness.table(f"ledger of {reservations} reservations", ["", "median µs"],
                  [[side, f"{harness.median(f['us']):.1f}"] for side, f in ledger.items()])  # fmt: skip
    result = {
        "model": model, "max_tokens": max_tokens, "repeats": repeats, "tokens_per_s_ratio": rate, "turn_ratio": turn,
        "first_token_ms_added": late, "empty_call_ms": empty_ms, "decode": decode, "reservations": reservations, "ledger": ledger,
    }  # fmt: skip
    harness.save(save or harness.RESULTS / f"overhead-{status.device.kind.value}-{model}.json", result, status)


if __name__ == "__main__":
    typer.run(main)
