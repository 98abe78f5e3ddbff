"""What Ray's own views show of a conductor: names that say whose an actor and a call are, and a log without conversations."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ray

import actors
from actors._ray_private import log_directory
from actors.agent import AgentProcess
from actors.logs import log_directory as directory_of
from conductor.errors import ConductorError
from conductor.happenings import Happening
from conductor.log_file import BEGINS, path_of
from conductor.types import MirrorState
from conductor.units import MIB
from tests.support.conducting import WITHIN_S, Conduct, Conductor
from tests.support.eventually import eventually
from tests.support.talk import SHIPPED
from tests.support.tiny_gguf import write_tiny_gguf

SECRET = "Xq7secretZz"


def lines_of(conductor: Conductor) -> list[dict[str, Any]]:
    path = path_of(conductor.config, Path(log_directory()))
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def kinds_of(conductor: Conductor, agent: str) -> list[str]:
    return [line["kind"] for line in lines_of(conductor) if line["agent"] == agent]


def task_names() -> set[str]:
    return {event["cat"].removeprefix("task::") for event in ray.timeline() if event["cat"].startswith("task::")}


def test_actors_and_calls_are_named_after_their_agent(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED)
    ada = actors.spawn_agent("ada", "coder", conductor=conductor.handle)
    assert ray.get_actor("vram:ada:coder") == ada
    ray.get(ada.ask.remote("Hello", max_tokens=4))
    list(actors.stream(conductor.handle, "ada", "more", max_tokens=4))
    expected = {"vram:ada:register", "vram:ada:decode", "vram:ada:stream"}
    eventually(lambda: expected <= task_names(), 20, every_s=0.5)
    ray.get(ada.close.remote())


def test_whatever_an_agent_is_called_its_name_is_one_word() -> None:
    """Ray shows the actor and its calls by its repr, and a model may be a path."""
    assert repr(AgentProcess(None, "a b\n/<c>" + "d" * 90, "/models/x y.gguf")) == f"vram:a-b-/-c-{'d' * 52}:x-y.gguf"


def test_an_agent_whose_name_is_taken_is_an_agent_all_the_same(conduct: Conduct) -> None:
    """As after one that was closed and whose handle is still there, or beside one of another conductor."""
    conductor = conduct(SHIPPED)
    first = actors.spawn_agent("bea", "coder", conductor=conductor.handle)
    ray.get(first.close.remote())
    second = actors.spawn_agent("bea", "coder", conductor=conductor.handle)
    assert ray.get_actor("vram:bea:coder") == first
    assert ray.get(second.ask.remote("Hello", max_tokens=4)).generated_tokens > 0
    ray.get(second.close.remote())
    ray.kill(first)
    eventually(lambda: "vram:bea:coder" not in ray.util.list_named_actors(), WITHIN_S)
    third = actors.spawn_agent("bea", "coder", conductor=conductor.handle)
    assert ray.get_actor("vram:bea:coder") == third
    ray.get(third.close.remote())


def test_each_decision_is_a_line_in_rays_log_directory(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED)
    ada = actors.spawn_agent("ada", "coder", conductor=conductor.handle)
    ray.get(ada.ask.remote("Hello", max_tokens=4))
    ray.get(ada.close.remote())
    eventually(lambda: conductor.is_empty() and "unloaded" in [line["kind"] for line in lines_of(conductor)], WITHIN_S)
    assert lines_of(conductor)[0]["text"] == BEGINS
    assert kinds_of(conductor, "ada") == ["asked", "admitted", "asked", "turn_began", "turn_ended", "left"]
    kept = [entry.kind.value for entry in conductor.call("history")]
    assert [line["kind"] for line in lines_of(conductor) if line["kind"] in kept] == kept
    turn = {line["request"] for line in lines_of(conductor) if line["kind"] in ("turn_began", "turn_ended")}
    assert len(turn) == 1
    assert {line["conductor"] for line in lines_of(conductor)} == {conductor.config.ray.name}


def test_no_word_of_a_conversation_is_in_a_log(conduct: Conduct, tmp_path: Path) -> None:
    """Whatever goes wrong with it."""
    template = "{% for m in messages %}{{ raise_exception('no: ' + m.content) }}{% endfor %}"
    write_tiny_gguf(tmp_path / "strict.gguf", chat_template=template)
    conductor = conduct({**SHIPPED, "strict": tmp_path / "strict.gguf"}, log={"level": "debug"})
    conductor.call("register", "ada", "coder", window=256)
    chat = [{"role": "user", "content": f"{SECRET} {SECRET}"}]
    conductor.call("decode", "ada", messages=chat, max_tokens=8, stop=(SECRET,))
    list(actors.stream(conductor.handle, "ada", f"{SECRET}\n", max_tokens=4))
    conductor.call("register", "eve", "strict")
    for agent, asked in (
        ("ada", {"prompt": SECRET * 500}), ("ada", {"prompt": f"{SECRET}\ud800"}), ("ada", {"messages": [{"role": SECRET}]}),
        ("ada", {"prompt": "x", "stop": (SECRET, 5)}), ("eve", {"messages": chat}), (SECRET[:3], {"prompt": SECRET}),
    ):  # fmt: skip
        with pytest.raises(ConductorError):
            conductor.call("decode", agent, **asked)
    conductor.call("unregister", "ada")
    eventually(lambda: "left" in kinds_of(conductor, "ada"), WITHIN_S)
    logged = path_of(conductor.config, Path(log_directory())).read_text("utf-8")
    assert "WindowFull" in logged
    assert SECRET not in logged
    said = [path for path in Path(log_directory()).iterdir() if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert said == []


def test_a_log_may_be_in_a_directory_of_ones_own_and_for_people(conduct: Conduct, tmp_path: Path) -> None:
    own = conduct(SHIPPED, log={"directory": "logs", "format": "text"})
    own.call("register", "ada", "coder")
    path = path_of(own.config, directory_of(own.config))
    assert path.parent == tmp_path / "logs"
    eventually(lambda: path.exists() and " admitted #1 ada coder " in path.read_text(), WITHIN_S)
    own.call("unregister", "ada")


def test_a_conductor_without_a_place_for_its_log_works(conduct: Conduct, tmp_path: Path) -> None:
    (tmp_path / "in-the-way").write_text("")
    conductor = conduct(SHIPPED, log={"directory": str(tmp_path / "in-the-way")})
    conductor.call("register", "ada", "coder")
    assert conductor.call("decode", "ada", "x", max_tokens=4).generated_tokens == 4
    conductor.call("unregister", "ada")
    assert conductor.is_empty()


def test_when_the_conductor_stops_its_last_lines_are_there(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED)
    conductor.call("register", "ada", "coder")
    conductor.call("close")
    assert lines_of(conductor)[-1]["kind"] == Happening.UNLOADED.value
    assert os.stat(path_of(conductor.config, Path(log_directory()))).st_mode & 0o777 == 0o600


def test_placement_groups_say_what_is_booked_and_for_whom(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED)
    conductor.call("register", "ada", "coder")
    conductor.call("register", "dee", "reviewer", service_class="guaranteed")
    held = conductor.call("reserve", "my task: CuPy", 3 * MIB)
    assert conductor.call("mirrored", 10).state is MirrorState.EQUAL
    groups = ray.util.placement_group_table().values()
    mine = [group for group in groups if conductor.config.ray.resource in group["bundles"][0] and group["state"] == "CREATED"]
    assert {group["name"].rpartition(":")[0] for group in mine} == {
        "vram:weights:coder", "vram:weights:reviewer", "vram:turns", "vram:dee:reviewer", "vram:external:my-task-CuPy",
    }  # fmt: skip
    conductor.call("release", held)
