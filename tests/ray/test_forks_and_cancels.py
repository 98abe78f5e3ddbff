"""Forks, cancellations and slow readers as Ray users meet them: across processes, some of which are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import WorkerCrashedError

import actors
from actors.deaths import Owner
from conductor.errors import DuplicateAgent, InvalidRequest, TurnCancelled, UnknownAgent
from conductor.types import Chunk, DecodeResult, FinishReason, MirrorState
from tests.support.conducting import WITHIN_S, Conduct, Conductor
from tests.support.eventually import eventually
from tests.support.talk import ENDLESS, SHIPPED

#: more than what may wait for a reader here, in Ray and in the conductor
LONG = 8000
ONE_SEAT: dict[str, Any] = {"context": {"slots": 1}, "min_turn_ms": 600_000, "stream_interval_ms": 0}


def write_pid(file: str) -> None:
    Path(f"{file}.new").write_text(str(os.getpid()))
    os.replace(f"{file}.new", file)


def kill(file: Path) -> None:
    os.kill(int(file.read_text()), signal.SIGKILL)


def agents_of(conductor: Conductor) -> list[str]:
    return [agent.id for agent in conductor.call("list")]


# --- forks --------------------------------------------------------------------------------------------------------------


def test_a_clone_goes_on_as_its_source_does_and_is_mirrored(conduct: Conduct) -> None:
    conductor = conduct({"coder": SHIPPED["coder"]})
    conductor.call("register", "ada", "coder")
    conductor.call("decode", "ada", "import os\n", max_tokens=20)
    admission = conductor.call("fork", "ada", "twin")
    assert (admission.agent_id, admission.model) == ("twin", "coder")
    said = [conductor.call("decode", agent, "def ", max_tokens=20) for agent in ("twin", "ada")]
    assert said[0].tokens == said[1].tokens
    assert said[0].recomputed_tokens == 0
    assert conductor.call("mirrored").state is MirrorState.EQUAL
    for arguments, error in ((("nobody", "x"), UnknownAgent), (("ada", "twin"), DuplicateAgent), (("ada", ""), InvalidRequest)):
        with pytest.raises(error):
            conductor.call("fork", *arguments)
    for agent in ("ada", "twin"):
        conductor.call("unregister", agent)
    assert conductor.is_empty()


@ray.remote(num_cpus=0, max_retries=0)
def fork_and_wait(conductor: Any, pid_file: str) -> None:
    ray.get(conductor.fork.remote("ada", "twin", owner=Owner.current()))
    write_pid(pid_file)
    signal.pause()


def test_a_clone_dies_with_its_owner_and_the_source_stays(conduct: Conduct, tmp_path: Path) -> None:
    conductor = conduct({"coder": SHIPPED["coder"]})
    conductor.call("register", "ada", "coder")
    conductor.call("decode", "ada", "import os\n", max_tokens=20)
    pid_file = tmp_path / "pid"
    task = fork_and_wait.remote(conductor.handle, str(pid_file))
    eventually(pid_file.exists, within_s=30)
    assert agents_of(conductor) == ["ada", "twin"]
    kill(pid_file)
    eventually(lambda: agents_of(conductor) == ["ada"], WITHIN_S)
    with pytest.raises(WorkerCrashedError):
        ray.get(task)


def test_a_fork_whose_caller_is_killed_while_it_waits_leaves_nothing(conduct: Conduct, endless: Path, tmp_path: Path) -> None:
    conductor = conduct({"endless": endless})
    conductor.call("register", "ada", "endless")
    turn = conductor.handle.decode.remote("ada", "x", **ENDLESS)
    eventually(lambda: conductor.is_busy("ada"), within_s=20)
    pid_file = tmp_path / "pid"
    task = say_pid_and_fork.remote(conductor.handle, str(pid_file))
    eventually(lambda: agents_of(conductor) == ["ada", "twin"], within_s=30)
    kill(pid_file)
    eventually(lambda: agents_of(conductor) == ["ada"], WITHIN_S)
    assert conductor.is_busy("ada")
    conductor.call("cancel", "ada")
    ray.wait([turn])
    with pytest.raises(WorkerCrashedError):
        ray.get(task)


@ray.remote(num_cpus=0, max_retries=0)
def say_pid_and_fork(conductor: Any, pid_file: str) -> None:
    write_pid(pid_file)
    ray.get(conductor.fork.remote("ada", "twin", owner=Owner.current()))


# --- cancel, timeout_s --------------------------------------------------------------------------------------------------


def test_whoever_awaits_a_cancelled_turn_gets_what_it_made(conduct: Conduct, endless: Path) -> None:
    conductor = conduct({"endless": endless}, stream_interval_ms=0)
    conductor.call("register", "ada", "endless")
    items = actors.stream(conductor.handle, "ada", "x", **ENDLESS)
    text = next(items).text
    waiting = conductor.handle.decode.remote("ada", "x")
    eventually(lambda: conductor.status().waiting, within_s=20)
    assert conductor.call("cancel", "ada") == 2
    *chunks, result = items
    assert isinstance(result, DecodeResult)
    assert result.finish_reason is FinishReason.CANCELLED
    assert text + "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)) == result.text
    with pytest.raises(TurnCancelled):
        ray.get(waiting)
    assert conductor.call("cancel", "ada") == 0
    with pytest.raises(UnknownAgent):
        conductor.call("cancel", "nobody")


def test_a_turn_has_as_long_as_its_caller_says(conduct: Conduct, endless: Path) -> None:
    conductor = conduct({"endless": endless})
    conductor.call("register", "ada", "endless")
    result = conductor.call("decode", "ada", "x", timeout_s=1.0, **ENDLESS)
    assert result.finish_reason is FinishReason.TIMEOUT
    assert result.generated_tokens == len(result.text) > 0
    with pytest.raises(InvalidRequest):
        conductor.call("decode", "ada", "x", timeout_s=-1)


# --- readers ------------------------------------------------------------------------------------------------------------


def two_on_one_seat(conduct: Conduct, endless: Path) -> Conductor:
    conductor = conduct({"endless": {"path": str(endless), "window": 4096}}, **ONE_SEAT)
    for agent in ("slow", "quick"):
        conductor.call("register", agent, "endless")
    return conductor


@pytest.mark.slow
def test_who_does_not_read_gives_its_seat_up_and_misses_nothing(conduct: Conduct, endless: Path) -> None:
    conductor = two_on_one_seat(conduct, endless)
    options: dict[str, Any] = {"max_tokens": LONG, "context_shift": True}
    stream = conductor.handle.stream.remote("slow", "x", **options)
    first = ray.get(next(stream))
    quick = conductor.call("decode", "quick", "x", **options)  # the only seat is its own as soon as the other's turn is held
    assert [waiting.agent_id for waiting in conductor.status().waiting] == ["slow"]
    *chunks, result = [first, *(ray.get(reference) for reference in stream)]
    assert "".join(chunk.text for chunk in chunks) == result.text == quick.text
    assert result.pauses == 1


@ray.remote(num_cpus=0, max_retries=0)
def read_once(conductor: Any, pid_file: str) -> None:
    stream = conductor.stream.remote("slow", "x", **ENDLESS)
    ray.get(next(stream))
    write_pid(pid_file)
    signal.pause()


def test_a_reader_that_is_killed_while_its_turn_is_held_leaves_its_seat(conduct: Conduct, endless: Path, tmp_path: Path) -> None:
    conductor = two_on_one_seat(conduct, endless)
    pid_file = tmp_path / "pid"
    reader = read_once.remote(conductor.handle, str(pid_file))
    eventually(pid_file.exists, within_s=30)
    kill(pid_file)
    assert conductor.call("decode", "quick", "x", max_tokens=3).text == "abc"
    eventually(lambda: not conductor.status().waiting and not conductor.is_busy("slow"), within_s=20)
    assert conductor.call("decode", "slow", "x", max_tokens=3, reset=True).text == "abc"
    with pytest.raises(WorkerCrashedError):
        ray.get(reader)


def test_a_reader_that_closes_its_generator_leaves_its_seat(conduct: Conduct, endless: Path) -> None:
    conductor = two_on_one_seat(conduct, endless)
    reading = actors.stream(conductor.handle, "slow", "x", **ENDLESS)
    next(reading)
    reading.close()
    assert conductor.call("decode", "quick", "x", max_tokens=3).text == "abc"
