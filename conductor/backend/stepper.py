"""One step of a pool: a token of everybody who generates, pieces of the prompts of others, and what comes of it.

Covers the batch, the decode, the draws and whose error is whose. Who takes part, and what becomes of those who end, is the
pool's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeAlias

from conductor.backend.llama import Context, LlamaError, NoRoom
from conductor.backend.pacing import Pacing
from conductor.backend.portions import portions
from conductor.backend.turn import Outgrown, Paused
from conductor.backend.turn_run import TurnRun
from conductor.types import FinishReason

#: Why a turn takes part no longer. A LlamaError leaves nobody knowing what its slot holds.
Ending: TypeAlias = FinishReason | Outgrown | Paused | Exception

#: (the turn, how many of its tokens are in the batch, the place of the one whose logits were asked for)
_Member: TypeAlias = tuple[TurnRun, int, int | None]


class Stepper:
    """Used by the pool's thread."""

    def __init__(self, context: Context, *, max_stall_s: float) -> None:
        self._context, self._batch = context, context.batch
        self._pacing = Pacing(max_stall_s)
        #: whose text is due; on a GPU it is seen to while the next step is computed
        self._due: list[TurnRun] = []

    def step(self, runs: Sequence[TurnRun]) -> list[tuple[TurnRun, Ending]]:
        """Decode once, for these turns in the order of their slots. Returns those that end or stand still."""
        members = self._fill(runs)
        began = time.monotonic()
        try:
            self._context.decode()
        except NoRoom as error:
            if len(members) == 1:
                return [(members[0][0], error)]
            alone = [self.step([run]) for run, _, _ in members]  # nothing was decoded: find out who it is
            return [ended for each in alone for ended in each]
        except LlamaError as error:
            return [(run, error) for run, _, _ in members]
        for run, n_tokens, _ in members:
            run.advance(n_tokens)
        ended = self.tell()
        if self._context.works_on:
            for run, _, _ in members:
                run.telling.keep_up()  # while it computes; at its end all would wait for that
        self._context.synchronize()
        now = time.monotonic()
        ended += self._draw([(run, place) for run, _, place in members if place is not None], now)
        self._measure(members, now - began)
        if self._due and not self._context.works_on:
            ended += self.tell()
        return ended

    def _draw(self, drawing: Sequence[tuple[TurnRun, int]], now: float) -> list[tuple[TurnRun, Ending]]:
        """The next token of each, whose logits are at that place. Returns those that end with it."""
        ended: list[tuple[TurnRun, Ending]] = []
        for (run, place), likeliest in zip(drawing, self._context.likeliest(len(drawing)), strict=True):
            try:
                token = likeliest if run.sampler is None else run.sampler.draw(self._context, place)
                if (end := run.take(token, now)) is not None:
                    ended.append((run, end))
                elif now >= run.telling.next_at:
                    self._due.append(run)
            except Exception as error:
                ended.append((run, error))
        return ended

    def tell(self) -> list[tuple[TurnRun, Ending]]:
        """Hand on the text that is due. Returns those whose listener failed."""
        failed: list[tuple[TurnRun, Ending]] = []
        if not self._due:
            return failed
        due, self._due, now = self._due, [], time.monotonic()
        for run in due:
            try:
                run.telling.show(now)
            except Exception as error:
                failed.append((run, error))
        return failed

    # --- the batch --------------------------------------------------------------------------------------------------

    def _fill(self, runs: Sequence[TurnRun]) -> list[_Member]:
        batch, members = self._batch, list[_Member]()
        batch.clear()
        for run in runs:
            conversation = run.conversation
            held = conversation.held
            if len(conversation.tokens) - held != 1:
                return self._fill_with_prompts(runs)
            members.append((run, 1, batch.add_one(conversation.tokens[held], held, run.seat.sequence.slot)))
        return members

    def _fill_with_prompts(self, runs: Sequence[TurnRun]) -> list[_Member]:
        shares = self._shares(runs)
        batch, members = self._batch, list[_Member]()
        batch.clear()
        for run in runs:
            share = shares.get(run)
            if not share:
                continue
            tokens, held = run.conversation.tokens, run.conversation.held
            reaches_end = held + share == len(tokens)
            place = batch.add(tokens[held : held + share], held, run.seat.sequence.slot, output=reaches_end)
            members.append((run, share, place if reaches_end else None))
        return members

    def _shares(self, runs: Sequence[TurnRun]) -> dict[TurnRun, int]:
        """How many tokens of each turn: one for who needs one, and of others' prompts what there is room for."""
        lacks = {run: len(run.conversation.tokens) - run.conversation.held for run in runs}
        shares = {run: 1 for run, lack in lacks.items() if lack == 1}
        room = self._batch.capacity - len(shares)
        if shares:
            room = min(room, self._pacing.most())
        readers = sorted((run for run in runs if run not in shares), key=lambda run: run.number)
        stops = [min(lacks[run], run.read_to - run.conversation.held) if run.read_to else lacks[run] for run in readers]
        return shares | dict(zip(readers, portions(stops, room), strict=True))

    def _measure(self, members: Sequence[_Member], seconds: float) -> None:
        read = 0
        for run, n_tokens, _ in members:
            if n_tokens > 1:
                run.reading.add(n_tokens, seconds * n_tokens / self._batch.count)
                read += n_tokens
        if read:
            self._pacing.read(read, seconds, alone=read == self._batch.count)
        else:
            self._pacing.generated(seconds)
