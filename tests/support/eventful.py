"""A conductor to which everything happens that a metric tells of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

import actors
from conductor.errors import AdmissionRefused, UnknownModel
from conductor.types import DecodeResult, KvPlace
from conductor.units import MIB
from tests.support.conducting import Conduct, Conductor
from tests.support.eventually import eventually
from tests.support.talk import ENDLESS, SHIPPED

PROMPTS = tuple(f'\n\ndef task_{n}(x):\n    """Return x + {n}."""\n' * 4 for n in range(3))


def shortage(directory: Path) -> dict[str, Any]:
    """One seat, and host memory and disk for about one KV each."""
    disk = {"directory": str(directory / "kv"), "budget": "1MiB"}
    context = {"first_window": 256, "slots": 1}
    return {"context": context, "live_contexts": 1, "min_turn_ms": 10, "host_budget": "1MiB", "disk": disk}


def short_of_everything(conduct: Conduct, endless: Path, directory: Path) -> Conductor:
    return conduct({**SHIPPED, "endless": endless}, **shortage(directory))


def live_through_everything(conductor: Conductor, kv_directory: Path) -> int:
    """Ada's KV goes to disk and is damaged there, Bob's finds no place any more, and some are refused.

    Returns the tokens that were generated.
    """
    call, generated = conductor.call, stand_still(conductor) + park_and_return(conductor)
    for id, model in (("ada", "coder"), ("bob", "reviewer"), ("cy", "documenter"), ("di", "coder")):
        call("register", id, model, window=1024, service_class="best_effort" if id == "di" else "shared")
    for id in ("ada", "bob"):
        for prompt in PROMPTS:
            generated += call("decode", id, prompt, max_tokens=24).generated_tokens
    for id in ("cy", "di"):
        *_, result = actors.stream(conductor.handle, id, PROMPTS[0] + PROMPTS[1], max_tokens=24)
        assert isinstance(result, DecodeResult)
        generated += result.generated_tokens
    places = {agent.id: agent.kv for agent in call("list")}
    assert places == {"ada": KvPlace.DISK, "bob": KvPlace.TOKENS, "cy": KvPlace.HOST, "di": KvPlace.SLOT}
    [file] = [path for path in kv_directory.rglob("*") if path.is_file() and path.stat().st_size > 4096]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = call("decode", "ada", "def more(x):", max_tokens=4)
    assert again.recomputed_tokens > 0
    with pytest.raises(AdmissionRefused):
        call("register", "eve", "coder", window=100_000, service_class="guaranteed")
    with pytest.raises(UnknownModel):
        call("register", "eve", "coda")
    with pytest.raises(AdmissionRefused):
        call("reserve", "torch", 1 << 40)
    return int(generated + again.generated_tokens)


def stand_still(conductor: Conductor) -> int:
    """One seat, a turn that never ends, and somebody else who wants it. Returns the tokens that were generated."""
    call = conductor.call
    for id in ("eli", "fay"):
        call("register", id, "endless", window=256)  # one that does not grow: who stops to grow has not been made to stand still
    endless = conductor.handle.decode.remote("eli", "x", **ENDLESS)
    eventually(lambda: any(pool.running for pool in conductor.status().pools), within_s=20)
    other = call("decode", "fay", "x", max_tokens=4)
    eventually(lambda: conductor.is_busy("eli"), within_s=20)
    assert call("cancel", "eli") == 1
    ended = ray.get(endless, timeout=60)
    assert ended.pauses
    for id in ("eli", "fay"):
        call("unregister", id)
    return int(ended.generated_tokens + other.generated_tokens)


def park_and_return(conductor: Conductor) -> int:
    """Of two best-effort models one has to go for a stranger, and comes back. Returns the tokens that were generated."""
    call, generated = conductor.call, 0
    for id, model in (("gil", "coder"), ("hal", "reviewer")):
        call("register", id, model, window=256, service_class="best_effort")
        generated += call("decode", id, "def", max_tokens=2).generated_tokens
    ledger = conductor.status().ledger
    reservation = call("reserve", "torch", ledger.max_bytes - ledger.allocated_bytes + MIB)
    for id in ("gil", "hal"):
        generated += call("decode", id, "(x):", max_tokens=2).generated_tokens
    call("release", reservation)
    for id in ("gil", "hal"):
        call("unregister", id)
    return int(generated)
