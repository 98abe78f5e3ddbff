"""An agent as a Ray actor: registers itself, talks, and is taken back by the conductor when its process dies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import ray
from ray.exceptions import RayTaskError

from actors.connection import connect, own
from actors.deaths import Owner
from actors.naming import agent_name, call_of
from actors.streams import STREAM_BACKPRESSURE
from conductor.errors import ConductorError, UnknownAgent
from conductor.types import Admission, Chunk, DecodeResult, ServiceClass


class AgentProcess:
    """One agent and its chat. Keeps the messages; the conductor keeps the tokens and their KV.

    `system` opens every conversation. The options of `ask` and `stream` are those of the conductor's `decode`, and so is what
    they raise. One turn at a time: a second `ask` waits for the first.
    """

    def __init__(
        self,
        conductor: Any,
        agent_id: str,
        model: str,
        *,
        window: int | None = None,
        service_class: str = ServiceClass.SHARED.value,
        priority: int = 0,
        wait_s: float = 0,
        system: str | None = None,
    ) -> None:
        self._conductor, self._id, self._model = conductor, agent_id, model
        self._terms = {"window": window, "service_class": service_class, "priority": priority, "wait_s": wait_s}
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = list(self._opening)
        self._admission: Admission | None = None
        #: a registration that nobody knows the outcome of
        self._doubtful: Any = None
        self._one_turn, self._one_registration = asyncio.Lock(), asyncio.Lock()

    def __repr__(self) -> str:
        """Ray's views name the actor and its calls by it."""
        return agent_name(self._id, self._model)

    def _call(self, name: str) -> Any:
        return call_of(self._conductor, name, self._id)

    async def admission(self) -> Admission:
        """Register on the first call; afterwards what was promised. Raises what the conductor's register raises."""
        async with self._one_registration:
            if self._admission is None:
                await self._settle_doubt()
                self._doubtful = self._call("register").remote(self._id, self._model, owner=Owner.current(), **self._terms)
                try:
                    self._admission = await _result(self._doubtful)
                except ConductorError:
                    self._doubtful = None
                    raise
                self._doubtful = None
            return self._admission

    async def _settle_doubt(self) -> None:
        """A registration that was cancelled may have been carried out all the same: Ray does not tell."""
        if self._doubtful is not None:
            with contextlib.suppress(Exception):
                await self._doubtful
            with contextlib.suppress(UnknownAgent):
                await _result(self._call("unregister").remote(self._id))

    async def ask(self, text: str, *, fresh: bool = False, **options: Any) -> DecodeResult:
        """Say something and get the answer. `fresh` begins a new conversation. A failed turn leaves no message behind."""
        async with self._one_turn:
            await self.admission()
            messages = self._with(text, fresh)
            try:
                result = await self._decode(messages, options)
            except UnknownAgent:
                await self._register_again()
                result = await self._decode(messages, options)
            self._messages = [*messages, {"role": "assistant", "content": result.text}]
            return result

    async def _decode(self, messages: list[dict[str, str]], options: dict[str, Any]) -> DecodeResult:
        result: DecodeResult = await _result(self._call("decode").remote(self._id, messages=messages, **options))
        return result

    async def _register_again(self) -> None:
        """The conductor was restarted, or let this agent go after a long rest: it knows it no more. All messages are sent with
        each turn, so the conversation goes on.
        """
        self._admission = None
        await self.admission()

    @ray.method(_generator_backpressure_num_objects=STREAM_BACKPRESSURE)
    async def stream(self, text: str, *, fresh: bool = False, **options: Any) -> AsyncIterator[Chunk | DecodeResult]:
        """`ask` with the answer as it is made, the DecodeResult last."""
        async with self._one_turn:
            await self.admission()
            messages = self._with(text, fresh)
            for may_register_again in (True, False):
                try:
                    async with contextlib.aclosing(self._streamed(messages, options)) as turn:
                        async for item in turn:
                            yield item
                    return
                except UnknownAgent:  # told before the first chunk
                    if not may_register_again:
                        raise
                    await self._register_again()

    async def _streamed(self, messages: list[dict[str, str]], options: dict[str, Any]) -> AsyncGenerator[Chunk | DecodeResult]:
        turn = self._call("stream").remote(self._id, messages=messages, **options)
        try:
            async for reference in turn:
                item = await _result(reference)
                if isinstance(item, DecodeResult):
                    self._messages = [*messages, {"role": "assistant", "content": item.text}]
                yield item
        finally:
            ray.cancel(turn)

    async def cancel(self) -> int:
        """End the turn that runs or waits, with what it made; returns how many ended."""
        turns: int = await _result(self._call("cancel").remote(self._id))
        return turns

    async def messages(self) -> list[dict[str, str]]:
        """The conversation so far."""
        return list(self._messages)

    async def close(self) -> None:
        """Unregister. The actor itself ends when its handle goes."""
        async with self._one_turn:
            if self._admission is not None:
                with contextlib.suppress(UnknownAgent):  # the conductor was restarted: nothing of ours is left to give back
                    await _result(self._call("unregister").remote(self._id))
                self._admission = None

    def _with(self, text: str, fresh: bool) -> list[dict[str, str]]:
        return [*(self._opening if fresh else self._messages), {"role": "user", "content": text}]


async def _result(reference: Any) -> Any:
    """Await a call of the conductor; its errors become plain again, so that Ray does not wrap them twice."""
    try:
        return await reference
    except RayTaskError as error:
        raise own(error) from None


_OPTIONS: dict[str, Any] = {"num_cpus": 0}
#: AgentProcess as an actor; `spawn_agent` makes one.
AgentActor: Any = ray.remote(**_OPTIONS)(AgentProcess)


def create_agent(conductor: Any, agent_id: str, model: str, **terms: Any) -> Any:
    """An AgentActor, not registered yet, under its name in the caller's namespace; under none if somebody there has that name.

    That may be one of the same id that was closed, or that another conductor knows; Ray shows this one by the same name.
    """
    try:
        return AgentActor.options(name=agent_name(agent_id, model)).remote(conductor, agent_id, model, **terms)
    except ValueError:
        return AgentActor.remote(conductor, agent_id, model, **terms)


def spawn_agent(agent_id: str, model: str, *, conductor: Any = None, **terms: Any) -> Any:
    """Start an agent in a process of its own and register it; returns the actor's handle, with the calls of AgentProcess.

    `conductor`: its handle; None finds it, or starts it. `terms`: window, service_class, priority and wait_s as `register` takes
    them, and system, the message that opens every conversation. Raises what `register` raises, and leaves nothing then.
    """
    conductor = connect() if conductor is None else conductor
    agent = create_agent(conductor, agent_id, model, **terms)
    try:
        ray.get(agent.admission.remote())
    except RayTaskError as error:
        ray.kill(agent)
        raise own(error) from None
    return agent
