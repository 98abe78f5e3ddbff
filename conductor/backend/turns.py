"""The turns: those that run, in whichever pool, and those that stand still. By agent, since an agent has one at most.

Every method takes no time and may be called from the event loop; what takes time is done in threads, and answered in futures.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future
from dataclasses import dataclass

from conductor.backend.conversation import Prompter
from conductor.backend.llama import LlamaError
from conductor.backend.pool import Pool
from conductor.backend.seat import Seat
from conductor.backend.turn import Outgrown, Paused, TurnEnd, TurnOrder, TurnOutcome
from conductor.backend.turn_run import TurnRun
from conductor.errors import DecodeFailed, InternalError
from conductor.types import AgentId, FinishReason


@dataclass(slots=True, eq=False)
class _Running:
    run: TurnRun
    pool: Pool
    future: Future[TurnEnd]


class Turns:
    """`threads`: where prompts are rendered and tokenised, which may take long."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._running: dict[AgentId, _Running] = {}
        self._standing: dict[AgentId, TurnRun] = {}

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self, order: TurnOrder, pool: Pool, seat: Seat, prompter: Prompter) -> Future[TurnEnd]:
        """Begin a turn, or go on with the one that stands still, if that is the request's.

        The future raises InvalidRequest, ChatTemplateFailed, WindowFull, TurnCancelled, DecodeFailed, or what `emit` raised.
        """
        agent_id = order.agent_id
        if agent_id in self._running:
            raise InternalError(f"{agent_id} has a turn already")
        run = self._turn_of(order, seat)
        running = self._running[agent_id] = _Running(run, pool, Future())
        running.future.set_running_or_notify_cancel()  # it is ended by `stop`, and cannot be cancelled
        if run.prepared:
            self._join(running, order, seat)
        else:
            self._threads.submit(self._prepare, running, order, seat, prompter)
        return running.future

    def _turn_of(self, order: TurnOrder, seat: Seat) -> TurnRun:
        run = self._standing.get(order.agent_id)
        if run is not None and run.request is order.request:
            run.control.paused = run.control.held = False  # what was asked of it before; a stop is not forgotten
            return self._standing.pop(order.agent_id)
        self.drop(order.agent_id)  # if there was one: with another begun, it goes on no more
        return TurnRun(seat, order.request)

    def _prepare(self, running: _Running, order: TurnOrder, seat: Seat, prompter: Prompter) -> None:
        try:
            running.run.prepare(prompter, order)
        except LlamaError as error:
            self._ended(running, DecodeFailed(order.agent_id, str(error)))
        except Exception as error:
            self._ended(running, error)
        else:
            self._join(running, order, seat)

    def _join(self, running: _Running, order: TurnOrder, seat: Seat) -> None:
        running.pool.join(running.run, seat, order, lambda result: self._ended(running, result))

    def _ended(self, running: _Running, result: TurnEnd | Exception) -> None:
        """In the pool's thread, or in the one that prepared it."""
        run, agent_id = running.run, running.run.seat.agent_id
        if isinstance(result, Outgrown | Paused):
            self._standing[agent_id] = run
        else:
            run.close()
        del self._running[agent_id]
        if isinstance(result, Exception):
            running.future.set_exception(result)
        else:
            running.future.set_result(result)

    def progress(self) -> dict[AgentId, int]:
        """What each running turn has decoded so far, in tokens."""
        return {agent_id: running.run.computed for agent_id, running in list(self._running.items())}

    # --- what is asked of a running turn; of none, nothing --------------------------------------------------------------

    def stop(self, agent_id: AgentId, reason: FinishReason) -> None:
        if (running := self._running.get(agent_id)) is not None:
            running.run.control.end(reason)
            running.pool.attend()

    def pause(self, agent_id: AgentId) -> None:
        if (running := self._running.get(agent_id)) is not None:
            running.run.control.pause()
            running.pool.attend()

    def hold(self, agent_id: AgentId, held: bool) -> None:
        if (running := self._running.get(agent_id)) is not None:
            running.run.control.hold(held)
            running.pool.attend()

    # --- standing still ---------------------------------------------------------------------------------------------

    def drop(self, agent_id: AgentId) -> None:
        """A turn that stands still goes on no more: the session is as it was before."""
        run = self._standing.pop(agent_id, None)
        if run is not None:
            run.take_back()
            run.close()

    def end(self, agent_id: AgentId, reason: FinishReason) -> TurnOutcome | None:
        """A turn that stands still ends with what it made. None if that is nothing: the session is as it was before."""
        run = self._standing.get(agent_id)
        if run is None or not run.made:
            self.drop(agent_id)
            return None
        del self._standing[agent_id]
        try:
            return run.finish(reason)
        finally:
            run.close()

    def suspended_text(self, agent_id: AgentId) -> str:
        """What the agent's turn had made when it had to stand still."""
        run = self._standing.get(agent_id)
        return run.text if run else ""

    @property
    def standing(self) -> int:
        """How many stand still."""
        return len(self._standing)
