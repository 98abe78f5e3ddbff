"""A pool: one live context, the agents that sit in it, and the thread that decodes for all of them together.

Between two steps turns join and leave, and at most one thing that takes time is done while others decode: a seat taken with
its KV restored, or left with it saved. Agents that sit idle keep their KV in their slot. Whose error is whose is the
stepper's; here an error ends turns, never the thread.

Only the thread touches the context; what others ask comes in through `call`, `join` and the turns' controls.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from conductor.backend.kv_seal import Label
from conductor.backend.llama import Context, LlamaError
from conductor.backend.prefixes import Prefixes
from conductor.backend.seat import Seat
from conductor.backend.seating import Seating
from conductor.backend.snapshots import Snapshots
from conductor.backend.stepper import Ending, Stepper
from conductor.backend.thread_budget import ThreadBudget
from conductor.backend.turn import Outgrown, Paused, TurnEnd, TurnOrder
from conductor.backend.turn_run import TurnRun
from conductor.errors import DecodeFailed, InternalError
from conductor.types import FinishReason, PoolId

log = logging.getLogger("conductor")
T = TypeVar("T")

#: hears, in the pool's thread, what an order came to
Done = Callable[[TurnEnd | Exception], None]


class Pool:
    """`budget`: where steps take `n_threads` from, on the host device. Close it when nobody sits in it any more.

    `label`: of a state of so many tokens.
    """

    def __init__(
        self,
        id: PoolId,
        context: Context,
        *,
        weights_bytes: int,
        slot_bytes: int,
        max_stall_s: float,
        budget: ThreadBudget | None,
        n_threads: int,
        snapshots: Snapshots,
        label: Callable[[int], Label],
    ) -> None:
        self.id, self.context = id, context
        self.seating = Seating(context, weights_bytes=weights_bytes, slot_bytes=slot_bytes)
        self._prefixes = Prefixes(context, self.seating.seats, snapshots, label)
        self._stepper = Stepper(context, max_stall_s=max_stall_s)
        self._budget, self._n_threads, self._has_threads = budget, n_threads, False
        self._calls: deque[Callable[[], None]] = deque()
        self._joining: deque[tuple[TurnRun, Seat, TurnOrder, Done]] = deque()
        self._done: dict[TurnRun, Done] = {}
        self._ready: list[TurnRun] = []  #: those of them that are not held, by slot
        self._joined = 0
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=f"pool {id}", daemon=True)
        self._thread.start()

    # --- from any thread --------------------------------------------------------------------------------------------

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have something done with the context between two steps, after what was asked for before."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled

        def do() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._calls.append(do)
        self._wake.set()
        return future

    def join(self, run: TurnRun, seat: Seat, order: TurnOrder, done: Done) -> None:
        """A turn that takes part from the next step on."""
        self._joining.append((run, seat, order, done))
        self._wake.set()

    def attend(self) -> None:
        """Something was asked of a turn: have a look, even if there is nothing to decode."""
        self._wake.set()

    def close(self) -> None:
        """End the thread and free the context. Raises InternalError if somebody has a seat."""
        if self.seating.seats:
            raise InternalError(f"pool {self.id} is closed under {', '.join(self.seating.seats)}")
        self._closing = True
        self._wake.set()
        self._thread.join()
        self.context.close()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closing or self._calls:
            try:
                if not self._round():
                    self._end_all(self._stepper.tell())
                    self._give_threads_back()
                    self._wake.wait()
                    self._wake.clear()
            except Exception as bug:
                log.exception("pool %s", self.id)
                self._break(bug)
        self._give_threads_back()

    def _round(self) -> bool:
        """Do what was asked for, and a step; False if there was nothing to do."""
        called = bool(self._calls)
        while self._calls:
            self._calls.popleft()()
            self.seating.sweep()  # who called has heard by now
            if self._ready:
                break  # one, and then those who decode go on
        while self._joining:
            self._let_in(*self._joining.popleft())
        for run in self._done:
            if run.control.attention:
                self._attend()
                break
        if not self._ready:
            return called
        if len(self._ready) > 1:
            self._close_gaps()
        going: Sequence[TurnRun] = self._ready
        if self._prefixes.readers:
            going = self._prefixes.settle(going, self._done)
        self._take_threads()
        self._end_all(self._stepper.step(going))
        return True

    def _let_in(self, run: TurnRun, seat: Seat, order: TurnOrder, done: Done) -> None:
        self._joined += 1
        run.number = self._joined
        self._done[run] = done
        try:
            outgrown = run.join(order, seat)
        except Exception as error:
            self._end(run, error)
        else:
            if outgrown is not None:
                self._end(run, outgrown)
            else:
                self._prefixes.watch(run)
        self._sort()

    def _attend(self) -> None:
        """Hear what is asked of turns."""
        for run in list(self._done):
            if run.control.attention:
                try:
                    ending: Ending | None = run.attend()
                except Exception as error:
                    ending = error
                if ending is not None:
                    self._end(run, ending)
        self._sort()

    def _sort(self) -> None:
        self._ready = sorted((run for run in self._done if not run.held), key=lambda run: run.seat.sequence.slot)

    def _close_gaps(self) -> None:
        """Readers do not count: their tokens take a pass of their own anyway."""
        slots = [run.seat.sequence.slot for run in self._ready if len(run.conversation.tokens) - run.conversation.held == 1]
        if self.seating.has_to_close(slots):
            self.seating.close_gaps(slots)
            self._sort()

    # --- endings ----------------------------------------------------------------------------------------------------

    def _end_all(self, ended: list[tuple[TurnRun, Ending]]) -> None:
        if not ended:
            return
        for run, ending in ended:
            if run in self._done:  # its listener may have failed when it had ended already
                self._end(run, ending)
        if self.context.pending:  # a decode failed before slots were moved, though they read as if they had been
            self._lose_everything()
        self._sort()

    def _end(self, run: TurnRun, ending: Ending) -> None:
        done, seat = self._done.pop(run), run.seat
        try:
            outcome = self._settled(run, ending)
        except Exception as error:  # whoever listened to its text
            outcome = error
        try:
            seat.measure()
        finally:
            done(outcome)

    def _settled(self, run: TurnRun, ending: Ending) -> TurnEnd | Exception:
        if isinstance(ending, FinishReason):
            return run.finish(ending)
        if isinstance(ending, Outgrown | Paused):
            run.stand_still()
            return ending
        run.fail()
        if isinstance(ending, LlamaError):
            # What llama.cpp holds after a failed step is not certain: keep the tokens, drop the cache.
            run.seat.drop_cache()
            return DecodeFailed(run.seat.agent_id, str(ending))
        return ending

    def _lose_everything(self) -> None:
        for run in list(self._done):
            self._end(run, LlamaError("a decode failed in which it was moved"))
        for seat in self.seating.seats.values():
            seat.drop_cache()

    def _break(self, bug: Exception) -> None:
        """Nobody knows what the context holds now: every turn ends, every cache is dropped, the tokens are kept."""
        for run in list(self._done):
            done = self._done.pop(run)
            with contextlib.suppress(Exception):
                run.fail()
            done(InternalError(f"{type(bug).__name__}: {bug}"))
        for seat in self.seating.seats.values():
            seat.drop_cache()
        self._ready = []

    # --- CPU threads ------------------------------------------------------------------------------------------------

    def _take_threads(self) -> None:
        if self._budget is None:
            return
        if self._has_threads and self._budget.contended:
            self._give_threads_back()
        if not self._has_threads:
            self._budget.acquire(self._n_threads)
            self._has_threads = True

    def _give_threads_back(self) -> None:
        if self._budget is not None and self._has_threads:
            self._has_threads = False
            self._budget.release(self._n_threads)
