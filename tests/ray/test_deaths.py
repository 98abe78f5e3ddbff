"""The death watch in a real actor, over real processes that really die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import ray

from actors import _ray_private
from actors.deaths import DeathWatch, Owner
from conductor.errors import InvalidRequest
from conductor.types import OwnerId
from tests.support.eventually import eventually

#: The promise to users: a dead agent's memory is given back within two seconds.
WITHIN_S = 2.0


@ray.remote(num_cpus=0, max_concurrency=100)
class Watcher:
    async def start(self, *, notices: bool) -> None:
        import asyncio

        if not notices:
            _ray_private.worker_deaths = _ray_private.node_deaths = _no_notices
        self._reports: list[tuple[OwnerId, str]] = []
        self._watch = DeathWatch(lambda owner_id, why: self._reports.append((owner_id, why)))
        self._task = asyncio.create_task(self._watch.run())

    async def watch(self, owner: Owner) -> None:
        self._watch.watch(owner)

    async def reports(self) -> list[tuple[OwnerId, str]]:
        return self._reports


async def _no_notices() -> AsyncIterator[str]:
    raise ImportError("no ray._private.gcs_pubsub in this Ray")
    yield ""


@ray.remote(num_cpus=0)
class Agent:
    def owner(self) -> tuple[Owner, int]:
        return Owner.current(), os.getpid()

    def leave(self) -> None:
        ray.actor.exit_actor()


@ray.remote(num_cpus=0, max_retries=0)
def long_task(watcher: Any, pid_file: str) -> None:
    owner = Owner.current()
    assert owner.actor_id is None
    ray.get(watcher.watch.remote(owner))
    with open(pid_file, "w") as file:
        file.write(f"{os.getpid()} {owner.worker_id}\n")
    signal.pause()


DRIVER = """
import sys, ray
ray.init(address=sys.argv[1], namespace="test", log_to_driver=False, logging_level="ERROR")
from actors.deaths import Owner
owner = Owner.current()
print(owner.worker_id, owner.node_id, owner.actor_id, flush=True)
sys.stdin.readline()
"""


class Watch:
    def __init__(self, *, notices: bool) -> None:
        self.actor: Any = Watcher.remote()
        ray.get(self.actor.start.remote(notices=notices))

    def watch(self, owner: Owner) -> None:
        ray.get(self.actor.watch.remote(owner))

    def reports(self, owner_id: OwnerId) -> list[str]:
        return [why for reported, why in ray.get(self.actor.reports.remote()) if reported == owner_id]


@pytest.fixture(params=[True, False], ids=["notices", "sweep-only"])
def watch(request: pytest.FixtureRequest, ray_session: None) -> Iterator[Watch]:
    watch = Watch(notices=request.param)
    yield watch
    ray.kill(watch.actor)


@pytest.fixture
def noticing(ray_session: None) -> Iterator[Watch]:
    watch = Watch(notices=True)
    yield watch
    ray.kill(watch.actor)


def test_a_killed_agent_is_reported_once_within_two_seconds(watch: Watch) -> None:
    agent, bystander = Agent.remote(), Agent.remote()
    owner, pid = ray.get(agent.owner.remote())
    other, _ = ray.get(bystander.owner.remote())
    watch.watch(owner)
    watch.watch(owner)
    watch.watch(other)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: watch.reports(owner.worker_id), WITHIN_S)
    late, _ = ray.get(Agent.remote().owner.remote())
    watch.watch(late)
    eventually(lambda: watch.reports(late.worker_id), 2 * WITHIN_S)  # at least one more sweep has passed
    assert len(watch.reports(owner.worker_id)) == 1
    assert watch.reports(other.worker_id) == []


def test_an_agent_that_leaves_by_itself_is_reported(watch: Watch) -> None:
    agent = Agent.remote()
    owner, _ = ray.get(agent.owner.remote())
    watch.watch(owner)
    agent.leave.remote()
    eventually(lambda: watch.reports(owner.worker_id), WITHIN_S)


def test_a_death_before_the_watch_is_reported(watch: Watch) -> None:
    agent = Agent.remote()
    owner, pid = ray.get(agent.owner.remote())
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: _ray_private.worker_death(owner.worker_id), WITHIN_S)
    watch.watch(owner)
    eventually(lambda: watch.reports(owner.worker_id), WITHIN_S)


def test_a_dead_owner_watched_again_is_reported_again(noticing: Watch) -> None:
    agent = Agent.remote()
    owner, pid = ray.get(agent.owner.remote())
    noticing.watch(owner)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(noticing.reports(owner.worker_id)) == 1, WITHIN_S)
    eventually(lambda: _ray_private.worker_death(owner.worker_id), WITHIN_S)
    noticing.watch(owner)
    eventually(lambda: len(noticing.reports(owner.worker_id)) == 2, WITHIN_S)


@pytest.mark.parametrize("id", ["", "ada", "0" * 55, "g" * 56])
def test_an_owner_whose_id_is_none_is_refused(id: str) -> None:
    with pytest.raises(InvalidRequest, match="owner: "):
        DeathWatch(lambda owner_id, why: None).watch(Owner(OwnerId(id), "0" * 56, None))


def test_the_worker_of_a_killed_task_is_reported(watch: Watch, tmp_path: Any) -> None:
    pid_file = tmp_path / "pid"
    task = long_task.remote(watch.actor, str(pid_file))
    pid, worker_id = eventually(
        lambda: pid_file.exists() and pid_file.read_text().endswith("\n") and pid_file.read_text(), 20
    ).split()
    os.kill(int(pid), signal.SIGKILL)
    eventually(lambda: watch.reports(OwnerId(worker_id)), WITHIN_S)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(task)


def test_a_driver_that_ends_normally_is_reported(noticing: Watch) -> None:
    address = ray.get_runtime_context().gcs_address
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        worker_id, node_id, actor_id = driver.stdout.readline().split()
        assert actor_id == "None"
        noticing.watch(Owner(OwnerId(worker_id), node_id, None))
        driver.stdin.close()
        eventually(lambda: noticing.reports(OwnerId(worker_id)), 20)  # its goodbye to Ray takes a second of its own


def test_an_owner_on_a_node_that_is_gone_is_reported(noticing: Watch) -> None:
    owner, _ = ray.get(Agent.remote().owner.remote())
    noticing.watch(Owner(owner.worker_id, "0" * 56, None))
    eventually(lambda: noticing.reports(owner.worker_id), WITHIN_S)


def test_a_report_says_how_the_process_ended(noticing: Watch) -> None:
    agent = Agent.remote()
    owner, pid = ray.get(agent.owner.remote())
    noticing.watch(owner)
    started = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    [why] = eventually(lambda: noticing.reports(owner.worker_id), WITHIN_S)
    assert "process died" in why
    assert time.monotonic() - started < WITHIN_S
