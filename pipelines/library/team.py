"""The agents of a run: each in a process of its own, registered together, let go at the end, whatever happened.

`Member` is one agent however it came here: spawned for the run, given as a handle, or known to the conductor by its id. A map
that works on several items at once is given more of a kind (`Team.several`).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, TaskCancelledError

from actors.agent import create_agent
from actors.connection import own
from actors.naming import call_of
from conductor.errors import ConductorError, ServiceFailed, TurnCancelled
from conductor.types import Admission, AgentId, DecodeResult
from pipelines.library.results import AgentAdmitted, AgentFailed
from pipelines.library.steps import Agent

#: how long the conductor may take to let an agent go; afterwards its process is ended, which lets it go too
_LEAVE_WITHIN_S = 10.0


class Member(Protocol):
    """Raises ConductorError and nothing else of its own."""

    async def admission(self) -> Admission | None: ...

    async def ask(self, text: str, *, fresh: bool, options: Mapping[str, Any]) -> DecodeResult: ...

    async def cancel(self) -> None: ...


class _Actor:
    """An AgentActor; its handle's owner decides how long it lives."""

    def __init__(self, name: str, handle: Any) -> None:
        self._name, self.handle = name, handle

    async def admission(self) -> Admission | None:
        admission: Admission = await answer(self.handle.admission.remote(), self._name)
        return admission

    async def ask(self, text: str, *, fresh: bool, options: Mapping[str, Any]) -> DecodeResult:
        try:
            result: DecodeResult = await answer(self.handle.ask.remote(text, fresh=fresh, **options), self._name)
        except asyncio.CancelledError:
            self.handle.cancel.remote()  # whoever brought the agent keeps it, and its turn would go on
            raise
        return result

    async def cancel(self) -> None:
        await answer(self.handle.cancel.remote(), self._name)


class _Registered:
    """An agent that is registered already, by its id. Its conversation in this run is kept here; its session follows it."""

    def __init__(self, conductor: Any, name: str, agent_id: str, system: str | None) -> None:
        self._conductor, self._name, self._id = conductor, name, agent_id
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._one_turn = asyncio.Lock()

    async def admission(self) -> Admission | None:
        return None

    async def ask(self, text: str, *, fresh: bool, options: Mapping[str, Any]) -> DecodeResult:
        async with self._one_turn:
            messages = [*(self._opening if fresh else self._messages), {"role": "user", "content": text}]
            turn = call_of(self._conductor, "decode", self._id).remote(self._id, messages=messages, **options)
            try:
                result: DecodeResult = await answer(turn, self._name)
            except asyncio.CancelledError:
                ray.cancel(turn)  # the agent stays, and its turn would go on
                raise
            self._messages = [*messages, {"role": "assistant", "content": result.text}]
            return result

    async def cancel(self) -> None:
        await answer(call_of(self._conductor, "cancel", self._id).remote(self._id), self._name)


async def answer(reference: Any, agent: str) -> Any:
    """Await a call. Whatever went wrong is a ConductorError: the project's own as it is, a dead process as ServiceFailed."""
    try:
        return await reference
    except TaskCancelledError:
        raise TurnCancelled(AgentId(agent), "the call was cancelled") from None
    except (RayError, ConductorError) as raised:
        error = own(raised)
        if isinstance(error, ConductorError):
            raise error from None
        problem = str(error).partition("\n")[0]
        raise ServiceFailed(f"agent {agent!r} does not answer: {type(error).__name__}: {problem}") from None


class Team:
    """Use it as an async context. `given`: handles or ids of agents that are there already, by their names in the pipeline.

    Processes start side by side, and register one after the other in the order of the pipeline. One that is not admitted is
    told to `tell` and to whoever asks for it.
    """

    def __init__(
        self,
        conductor: Any,
        agents: Mapping[str, Agent],
        *,
        prefix: str,
        given: Mapping[str, Any],
        tell: Callable[[AgentAdmitted | AgentFailed], None],
    ) -> None:
        self._conductor, self._agents, self._given, self._tell = conductor, agents, given, tell
        self._prefix = f"{prefix}-{secrets.token_hex(3)}"
        self._spawned: list[tuple[str, _Actor]] = []
        self._members: dict[str, list[asyncio.Task[Member]]] = {}
        #: who has a turn, as often as it has one
        self._busy: list[Member] = []
        self._stopping = False

    async def __aenter__(self) -> Team:
        before: asyncio.Task[Member] | None = None
        for name in self._agents:
            before = self._add(name, before)
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._leave()

    def options(self, name: str) -> dict[str, Any]:
        return self._agents[name].options.given()

    async def member(self, name: str) -> Member:
        """Once it is admitted. Raises what refused it."""
        task = self._members[name][0]
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise _cancelled(name) from None
            raise

    async def several(self, name: str, count: int) -> list[Member]:
        """`count` of a kind, or as many as were admitted; at least the first. Raises what refused that one."""
        first = await self.member(name)
        if name in self._given or self._agents[name].existing is not None:
            return [first]
        kind = self._members[name]
        while len(kind) < count:
            self._add(name, kind[-1])
        others = await asyncio.gather(*map(asyncio.shield, kind[1:count]), return_exceptions=True)
        return [first, *(other for other in others if not isinstance(other, BaseException))]

    async def turn(self, name: str, member: Member, text: str, *, fresh: bool, options: Mapping[str, Any]) -> DecodeResult:
        """Of the agent `name`. Raises what the conductor's decode raises, and TurnCancelled once turns are cancelled."""
        if self._stopping:
            raise _cancelled(name)
        self._busy.append(member)
        try:
            return await member.ask(text, fresh=fresh, options=options)
        finally:
            self._busy.remove(member)

    async def cancel_turns(self) -> None:
        """End all turns that run, and all waiting for admission; none begins any more. One that is just on its way to the
        conductor goes on: call it again.
        """
        self._stopping = True
        for tasks in self._members.values():
            for task in tasks:
                task.cancel()
        busy = {id(member): member for member in self._busy}.values()
        await asyncio.gather(*(member.cancel() for member in busy), return_exceptions=True)

    def _add(self, name: str, after: asyncio.Task[Member] | None) -> asyncio.Task[Member]:
        kind = self._members.setdefault(name, [])
        member = self._member(name, len(kind) + 1)
        task = asyncio.create_task(self._admitted(name, member, after))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # whoever asks for it hears of it, if anybody
        kind.append(task)
        return task

    def _member(self, name: str, number: int) -> Member:
        agent, given = self._agents[name], self._given.get(name, self._agents[name].existing)
        if isinstance(given, str):
            return _Registered(self._conductor, name, given, agent.system)
        if given is not None:
            return _Actor(name, given)
        assert agent.model is not None  # as whoever is not there already has one
        agent_id = f"{self._prefix}-{name}" + (f"-{number}" if number > 1 else "")
        terms = {"window": agent.window, "service_class": agent.service_class, "priority": agent.priority, "wait_s": agent.wait_s}
        spawned = _Actor(name, create_agent(self._conductor, agent_id, agent.model, system=agent.system, **terms))
        self._spawned.append((agent_id, spawned))
        return spawned

    async def _admitted(self, name: str, member: Member, after: asyncio.Task[Member] | None) -> Member:
        if after is not None:
            await asyncio.wait([after])
        try:
            admission = await member.admission()
        except ConductorError as error:
            self._tell(AgentFailed(name, error))
            raise
        if admission is not None:
            self._tell(AgentAdmitted(name, admission))
        return member

    async def _leave(self) -> None:
        for tasks in self._members.values():
            for task in tasks:
                task.cancel()
        try:
            calls = ((id, call_of(self._conductor, "unregister", id)) for id, _ in self._spawned)
            leaving = [answer(call.remote(id), id) for id, call in calls]
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.gather(*leaving, return_exceptions=True), _LEAVE_WITHIN_S)
        finally:
            for _, spawned in self._spawned:
                ray.kill(spawned.handle)


def _cancelled(name: str) -> TurnCancelled:
    return TurnCancelled(AgentId(name), "the run was cancelled")
