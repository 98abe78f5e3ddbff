"""Agents as actors, and everything that belongs to a process: it comes back when that process really dies."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

import actors
from actors.deaths import Owner
from conductor import errors
from conductor.errors import AdmissionRefused
from conductor.types import Kind, MirrorState
from conductor.units import MIB
from tests.support.conducting import WITHIN_S, Conduct, Conductor
from tests.support.eventually import eventually
from tests.support.talk import ANOTHER, ENDLESS, SHIPPED, TASK
from tests.support.tiny_gguf import write_tiny_gguf

# --- other tasks' bytes -----------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0, max_retries=0)
def borrow(conductor: Any, pid_file: str) -> None:
    returned = ray.get(conductor.reserve.remote("cupy", 3 * MIB))
    assert ray.get(conductor.release.remote(returned)) == 3 * MIB
    ray.get(conductor.reserve.remote("torch", 5 * MIB, owner=Owner.current()))
    Path(f"{pid_file}.new").write_text(str(os.getpid()))
    os.replace(f"{pid_file}.new", pid_file)
    signal.pause()


def test_what_a_task_reserves_comes_back_when_it_releases_it_and_when_it_dies(conduct: Conduct, tmp_path: Path) -> None:
    conductor = conduct()
    pid_file = tmp_path / "pid"
    task = borrow.remote(conductor.handle, str(pid_file))
    eventually(pid_file.exists, within_s=30)
    reserved = [(r.holder, r.kind, r.bytes) for r in conductor.status().ledger.reservations if r.bytes]
    assert reserved == [("torch", Kind.EXTERNAL, 5 * MIB)]
    assert conductor.call("mirrored").state is MirrorState.EQUAL
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    eventually(lambda: conductor.status().ledger.allocated_bytes == 0, WITHIN_S)
    assert conductor.call("mirrored").used_mib == 0
    with pytest.raises(WorkerCrashedError):
        ray.get(task)


# --- agents -----------------------------------------------------------------------------------------------------------


def test_an_agent_asks_streams_and_remembers(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED)
    agent = actors.spawn_agent("ada", "coder", conductor=conductor.handle, window=512, system="You write Python.")
    assert ray.get(agent.admission.remote()).window == 512
    first = ray.get(agent.ask.remote(TASK))
    assert first.stopped_on_eos
    assert "def add(a, b)" in first.text
    *chunks, second = [ray.get(item) for item in agent.stream.remote(ANOTHER)]
    assert "".join(chunk.text for chunk in chunks) == second.text
    assert second.prompt_tokens_reused == first.prompt_tokens + first.generated_tokens - 1
    said = ray.get(agent.messages.remote())
    assert [message["role"] for message in said] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in said[1:]] == [TASK, first.text, ANOTHER, second.text]
    with pytest.raises(errors.WindowFull):
        ray.get(agent.ask.remote("long " * 2000))
    assert ray.get(agent.messages.remote()) == said
    fresh = ray.get(agent.ask.remote(TASK, fresh=True))
    assert fresh.text == first.text
    ray.get(agent.close.remote())
    ray.get(agent.close.remote())
    assert conductor.is_empty()
    ray.kill(agent)


def test_an_agent_goes_on_after_its_conductor_was_restarted(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED)
    ada, bob = (actors.spawn_agent(name, "coder", conductor=conductor.handle) for name in ("ada", "bob"))
    ray.get(ada.ask.remote(TASK))
    restart(conductor)
    answer = ray.get(ada.ask.remote(ANOTHER))
    assert "def sub(a, b)" in answer.text
    said = [message["content"] for message in ray.get(ada.messages.remote())]
    assert (said[0], *said[2:]) == (TASK, ANOTHER, answer.text)
    restart(conductor)
    *chunks, result = [ray.get(item) for item in ada.stream.remote(TASK, fresh=True)]
    assert "".join(chunk.text for chunk in chunks) == result.text == said[1]
    ray.get([ada.close.remote(), bob.close.remote()])
    assert conductor.is_empty()


def restart(conductor: Conductor) -> None:
    ray.kill(conductor.handle, no_restart=False)

    def is_back() -> bool:
        with contextlib.suppress(ray.exceptions.RayActorError):
            return conductor.is_empty()
        return False

    eventually(is_back, within_s=30)


def test_an_agent_that_is_asked_before_it_was_admitted_registers_once(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED)
    agent = actors.AgentActor.remote(conductor.handle, "ada", "coder", window=512)
    answers = ray.get([agent.admission.remote(), agent.ask.remote(TASK), agent.admission.remote()])
    assert answers[0] == answers[2]
    ray.kill(agent)


def test_a_killed_agent_gives_everything_back_within_two_seconds(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED)
    doomed = actors.spawn_agent("ada", "coder", conductor=conductor.handle)
    survivor = actors.spawn_agent("bob", "reviewer", conductor=conductor.handle)
    ray.get([doomed.ask.remote(TASK), survivor.ask.remote("Review this."), doomed.ask.remote(ANOTHER)])
    os.kill(pid_of(doomed), signal.SIGKILL)

    def only_bob_is_left() -> bool:
        status = conductor.status()
        return [agent.id for agent in status.agents] == ["bob"] and [model.key for model in status.models] == ["reviewer"]

    eventually(only_bob_is_left, WITHIN_S)
    assert {reserved.holder for reserved in conductor.status().ledger.reservations} <= {"reviewer", "bob", "conductor"}
    assert ray.get(survivor.ask.remote("Review this again.")).generated_tokens
    os.kill(pid_of(survivor), signal.SIGKILL)
    eventually(conductor.is_empty, WITHIN_S)
    assert conductor.call("mirrored").used_mib == 0


def test_an_agent_killed_in_the_middle_of_its_turn_gives_everything_back(conduct: Conduct, endless: Path) -> None:
    conductor = conduct({"endless": endless})
    agent = actors.spawn_agent("ada", "endless", conductor=conductor.handle)
    turn = agent.ask.remote("x", **ENDLESS)
    eventually(lambda: conductor.is_busy("ada"), within_s=20)
    os.kill(pid_of(agent), signal.SIGKILL)
    eventually(conductor.is_empty, WITHIN_S)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(turn)


def test_an_owner_that_is_dead_when_its_registration_is_booked_keeps_nothing(conduct: Conduct, tmp_path: Path) -> None:
    conductor = conduct({"tiny": write_tiny_gguf(tmp_path / "tiny.gguf"), "slow": write_slow_to_read(tmp_path / "slow.gguf")})
    agent = actors.spawn_agent("ada", "tiny", conductor=conductor.handle)
    owner = ray.get(agent.__ray_call__.remote(lambda _: Owner.current()))
    os.kill(pid_of(agent), signal.SIGKILL)
    eventually(conductor.is_empty, WITHIN_S)
    late = conductor.handle.register.remote("late", "slow", window=256, owner=owner)
    with contextlib.suppress(errors.UnknownAgent):  # found dead while its model was loaded
        ray.get(late)
    eventually(conductor.is_empty, WITHIN_S)


def write_slow_to_read(path: Path) -> Path:
    """With a list of a million empty strings before all else in the header: longer to read than a death takes to be told."""
    content = write_tiny_gguf(path).read_bytes()
    count, (n_keys,) = 1_000_000, struct.unpack_from("<Q", content, 16)
    a_string, a_list = 8, 9
    strings = struct.pack("<Q8sIIQ", 8, b"padding.", a_list, a_string, count) + bytes(8 * count)
    assert len(strings) % 32 == 0, "the tensors' data must stay aligned"
    path.write_bytes(content[:16] + struct.pack("<Q", n_keys + 1) + strings + content[24:])
    return path


def pid_of(agent: Any) -> int:
    pid: int = ray.get(agent.__ray_call__.remote(lambda _: os.getpid()))
    return pid


def test_a_refused_agent_leaves_no_actor(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED)
    before = live_actors("AgentProcess")
    with pytest.raises(AdmissionRefused) as refused:
        actors.spawn_agent("ada", "coder", conductor=conductor.handle, window=100_000, service_class="guaranteed")
    assert not isinstance(refused.value, RayTaskError)
    assert refused.value.refusal.largest_window
    with pytest.raises(errors.UnknownModel):
        actors.spawn_agent("ada", "coda", conductor=conductor.handle)
    eventually(lambda: live_actors("AgentProcess") == before, within_s=10)
    assert conductor.is_empty()


def live_actors(kind: str) -> set[str]:
    from ray._private.state import actors as all_actors

    return {id for id, row in all_actors().items() if row["ActorClassName"] == kind and row["State"] != "DEAD"}
