"""Pipelines in a real cluster: the examples on the shipped models, where they may be run from, and that nobody is left."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

import actors
from actors._ray_private import advertise_resource
from conductor.errors import AdmissionRefused, ServiceFailed, UnknownAgent, UnknownModel
from conductor.types import FinishReason
from pipelines.library import (
    Agent,
    AgentAdmitted,
    Ask,
    Event,
    Map,
    Options,
    Pipeline,
    RunResult,
    StepEnded,
    arun,
    load,
    run,
    start,
)
from tests.support.conducting import WITHIN_S, Conduct, Conductor, config_of, document_of
from tests.support.eventually import eventually
from tests.support.talk import SHIPPED, TASK

SHELL = "Write a Python function that runs a shell command and returns its output."
ONE = Pipeline(name="one", inputs={"request": TASK}, agents={"ada": Agent("coder")}, steps={"code": Ask("ada", "{request}")})
ENDLESS = Options(max_tokens=100_000_000)


@pytest.fixture(scope="module")
def shipped(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conductor]:
    """With the shipped models, for all stories that break nothing of it."""
    resource = f"vram_{uuid.uuid4().hex[:8]}"
    conductor = Conductor(config_of(resource, tmp_path_factory.mktemp("shipped"), SHIPPED))
    yield conductor
    conductor.call("check")
    actors.stop(conductor.handle)
    advertise_resource(ray.get_runtime_context().get_node_id(), resource, 0)


@pytest.fixture
def conductor(shipped: Conductor) -> Iterator[Conductor]:
    """At the end nobody may be left."""
    yield shipped
    eventually(shipped.is_empty, WITHIN_S)


def names(conductor: Conductor) -> list[str]:
    return [agent.id for agent in conductor.call("list")]


def states(result: RunResult) -> dict[str, str]:
    return {step.step: step.state.value for step in result.steps}


# --- what comes along ---------------------------------------------------------------------------------------------------


def test_the_coder_minds_a_review_that_found_something(conductor: Conductor) -> None:
    heard: list[Event] = []
    result = run(load("code_crew"), {"request": SHELL}, conductor=conductor.handle, on_event=heard.append)
    assert conductor.is_empty(), "everybody has left when it returns"
    assert states(result) == dict.fromkeys(("code", "review", "documentation", "final"), "done")
    assert "shell=True" in (result.step("code").text or "")
    assert "command injection" in (result.step("review").text or "")
    assert "shell=True" not in (result.text or "")
    assert "def run_shell" in (result.text or "")
    assert [event.agent for event in heard if isinstance(event, AgentAdmitted)] == ["coder", "reviewer", "documenter"]
    assert result.cost.turns == 4
    assert result.cost.generated_tokens == sum(step.cost.generated_tokens for step in result.steps) > 50


@pytest.mark.slow
def test_the_coder_is_not_asked_again_if_the_review_found_nothing(conductor: Conductor) -> None:
    result = run(load("code_crew"), {"request": TASK}, conductor=conductor.handle)
    assert (result.ok, states(result)["final"], result.cost.turns) == (True, "skipped", 3)
    assert result.text == result.step("code").text


@pytest.mark.slow
def test_the_other_examples_run_on_the_shipped_models(conductor: Conductor) -> None:
    inputs: dict[str, dict[str, str]] = {"vote": {"question": TASK}, "debate": {"question": TASK}, "map": {}}
    done = {name: run(load(name), given, conductor=conductor.handle) for name, given in inputs.items()}
    assert all(result.ok for result in done.values()), [result.to_json() for result in done.values()]
    assert "def add(a, b)" in (done["vote"].text or "")
    assert done["debate"].text
    assert re.findall("^### `(.*)`", done["map"].text or "", re.MULTILINE)[:3] == ["add(a, b)", "is_even(n)", "read_json(path)"]
    assert [step.note for step in done["map"].steps] == ["4 items", "4 items"]
    assert names(conductor) == []


# --- where it runs from -------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
def in_a_task(conductor: Any) -> RunResult:
    return run(ONE, conductor=conductor)


@ray.remote(num_cpus=0)
class InAnActor:
    async def work(self, conductor: Any) -> RunResult:
        return await arun(ONE, conductor=conductor)


def test_it_runs_inside_tasks_and_actors_and_its_result_comes_back(conductor: Conductor) -> None:
    actor = InAnActor.remote()
    both = ray.get([in_a_task.remote(conductor.handle), actor.work.remote(conductor.handle)])
    here = run(ONE, conductor=conductor.handle)
    assert {result.text for result in both} == {here.text}
    assert here.ok


@pytest.mark.slow
async def test_it_runs_in_a_notebook_where_a_loop_runs_already(conductor: Conductor) -> None:
    awaited, called = await arun(ONE, conductor=conductor.handle), run(ONE, conductor=conductor.handle)
    assert awaited.text == called.text
    assert awaited.ok
    assert called.ok


@pytest.mark.slow
def test_without_a_handle_it_finds_the_conductor(conductor: Conductor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "conductor.yaml"
    path.write_text(yaml.safe_dump(document_of(conductor.config.ray.resource, tmp_path, SHIPPED)))
    monkeypatch.setenv("CONDUCTOR_CONFIG", str(path))
    assert run(ONE).ok
    assert conductor.status().computed_tokens > 0


# --- who works ----------------------------------------------------------------------------------------------------------


def test_agents_that_are_there_already_work_and_stay(conductor: Conductor) -> None:
    conductor.call("register", "ada-1", "coder")
    eve = actors.spawn_agent("eve-1", "reviewer", conductor=conductor.handle)
    work = Pipeline(
        name="reuse",
        agents={"ada": Agent(existing="ada-1", system="You write Python."), "eve": Agent("nobody's model")},
        steps={
            "code": Ask("ada", TASK, keep="code"),
            "again": Ask("ada", "Once more.", fresh=False, needs=("code",)),
            "review": Ask("eve", "Review this Python code for security flaws:\n\n```python\n{code}\n```"),
        },
    )
    result = run(work, conductor=conductor.handle, agents={"eve": eve})
    assert result.ok, result.to_json()
    first, second = (result.step(name).turns[0].result for name in ("code", "again"))
    assert first is not None
    assert second is not None
    assert (first.agent_id, second.prompt_tokens_reused) == ("ada-1", first.prompt_tokens + first.generated_tokens - 1)
    assert names(conductor) == ["ada-1", "eve-1"]
    ray.get(eve.close.remote())
    conductor.call("unregister", "ada-1")
    gone = run(work, conductor=conductor.handle, agents={"eve": "eve-1"})
    assert states(gone) == {"code": "failed", "again": "blocked", "review": "blocked"}
    assert isinstance(gone.step("code").error, UnknownAgent)


def test_an_agent_that_does_not_fit_fails_its_own_steps_only(conductor: Conductor) -> None:
    work = Pipeline(
        name="uneven",
        agents={
            "big": Agent("coder", window=100_000, service_class="guaranteed"), "poet": Agent("poet"), "ada": Agent("coder"),
        },
        steps={"huge": Ask("big", "x"), "poem": Ask("poet", "x"), "code": Ask("ada", TASK)},
    )  # fmt: skip
    result = run(work, conductor=conductor.handle)
    assert states(result) == {"huge": "failed", "poem": "failed", "code": "done"}
    refused = result.step("huge").error
    assert isinstance(refused, AdmissionRefused)
    assert refused.refusal.largest_window
    assert isinstance(result.step("poem").error, UnknownModel)
    assert names(conductor) == []


@pytest.mark.slow
def test_a_map_goes_on_with_as_many_agents_as_were_admitted(conductor: Conductor) -> None:
    agent = Agent("coder", window=2048, service_class="guaranteed")
    items = tuple(f"Write a Python function `add_{n}(a)` that returns a + {n}." for n in range(4))
    work = Pipeline(
        name="many",
        inputs={"items": items},
        agents={"ada": agent},
        steps={"s": Map("ada", "{item}", over="items", concurrency=4)},
    )
    held = conductor.call("reserve", "somebody else", 24 << 20)
    result = run(work, conductor=conductor.handle)
    assert (result.ok, len(result.step("s").answers)) == (True, 4)
    assert "since no more agents were admitted" in result.step("s").note
    conductor.call("release", held)


# --- ending early -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cancelled_run_ends_its_turns_and_lets_its_agents_go(conduct: Conduct, endless: Path) -> None:
    conductor = conduct({"endless": {"path": str(endless), "context_shift": True}})
    work = Pipeline(
        name="endless",
        agents={"ada": Agent("endless", options=ENDLESS), "bob": Agent("endless")},
        steps={"short": Ask("bob", "x", options=Options(max_tokens=3)), "long": Ask("ada", "x"), "after": Ask("bob", "{long}")},
    )
    ended: list[str] = []

    def hear(event: Event) -> None:
        if isinstance(event, StepEnded):
            ended.append(event.result.step)

    running = start(work, conductor=conductor.handle, on_event=hear)
    eventually(lambda: ended == ["short"], within_s=30)
    eventually(lambda: any(agent.tokens > 10 and agent.id.endswith("ada") for agent in conductor.call("list")), within_s=30)
    running.cancel()
    result = running.result(timeout_s=20)
    assert states(result) == {"short": "done", "long": "cancelled", "after": "cancelled"}
    [turn] = result.step("long").turns
    assert turn.result is not None
    assert (turn.result.finish_reason, turn.result.text[:3]) == (FinishReason.CANCELLED, "abc")
    assert conductor.is_empty()


@pytest.mark.slow
async def test_a_task_that_is_cancelled_leaves_nobody(conduct: Conduct, endless: Path) -> None:
    conductor = conduct({"endless": {"path": str(endless), "context_shift": True}})
    conductor.call("register", "stays", "endless")
    agents = {"ada": Agent("endless", options=ENDLESS), "bob": Agent(existing="stays", options=ENDLESS)}
    work = Pipeline(name="endless", agents=agents, steps={"s": Ask("ada", "x"), "t": Ask("bob", "x")})
    task = asyncio.create_task(arun(work, conductor=conductor.handle))
    while sum(agent.busy for agent in await conductor.handle.list.remote()) < 2:  # noqa: ASYNC110 (nobody tells when a turn begins)
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names(conductor) == ["stays"]
    eventually(lambda: not conductor.is_busy("stays"), within_s=5)
    conductor.call("unregister", "stays")


@pytest.mark.slow
def test_whatever_a_listener_raises_nobody_stays(conductor: Conductor) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepEnded):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ONE, conductor=conductor.handle, on_event=interrupt)
    assert names(conductor) == []


@pytest.mark.slow
def test_an_agent_that_is_killed_at_work_fails_its_step_and_no_other(conduct: Conduct, endless: Path) -> None:
    conductor = conduct({"endless": {"path": str(endless), "context_shift": True}})
    doomed = actors.spawn_agent("doomed", "endless", conductor=conductor.handle)
    pid = ray.get(doomed.__ray_call__.remote(lambda _: os.getpid()))
    agents = {"ada": Agent("endless", options=ENDLESS), "bob": Agent("endless")}
    steps = {"long": Ask("ada", "x"), "short": Ask("bob", "x", options=Options(max_tokens=3))}
    running = start(Pipeline(name="mortal", agents=agents, steps=steps), conductor=conductor.handle, agents={"ada": doomed})
    eventually(lambda: conductor.is_busy("doomed"), within_s=30)
    os.kill(pid, signal.SIGKILL)
    result = running.result(timeout_s=30)
    assert states(result) == {"long": "failed", "short": "done"}
    assert isinstance(result.step("long").error, ServiceFailed)
    eventually(conductor.is_empty, WITHIN_S)
