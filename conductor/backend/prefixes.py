"""Beginnings that agents of a pool have in common are read once: the others copy what the first one holds.

Whoever joins takes the longest beginning of its target that is to be had: a copy of another slot, or a state that was kept
(`snapshots`). If somebody is about to read more of it than that, it waits until that one has passed. Only the KV of the very
same tokens is taken, as reading them fresh gives it, and cut back only where the architecture can.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from conductor.backend.conversation import common_prefix
from conductor.backend.kv_seal import Label
from conductor.backend.llama import Context
from conductor.backend.seat import Seat
from conductor.backend.snapshots import Snapshots
from conductor.backend.turn_run import TurnRun
from conductor.types import AgentId

#: fewer tokens are read faster than a slot is copied
LEAST_TOKENS = 16


@dataclass(slots=True, eq=False)
class _Reader:
    run: TurnRun
    looks: bool = True  #: for what there is to be had, before it reads on
    leader: TurnRun | None = None  #: reads what both begin with
    until: int = 0  #: how many tokens that are
    stops: set[int] = field(default_factory=set)  #: where its reading pauses, for others to copy just that much


class Prefixes:
    """Used by the pool's thread, before each step. `label`: of a state of so many tokens of this pool."""

    def __init__(
        self, context: Context, seats: Mapping[AgentId, Seat], snapshots: Snapshots, label: Callable[[int], Label]
    ) -> None:
        self._context, self._seats, self._snapshots, self._label = context, seats, snapshots, label
        #: whether what a slot has passed cannot be had from it any more
        self._forgets = context.recurrent or context.sliding_window > 0
        self.readers: dict[TurnRun, _Reader] = {}  #: by when they joined

    def watch(self, run: TurnRun) -> None:
        """A turn joined; the short of what it lacks is not looked at."""
        if _lacks(run) > LEAST_TOKENS:
            self.readers[run] = _Reader(run)

    def settle(self, ready: Sequence[TurnRun], present: Collection[TurnRun]) -> Sequence[TurnRun]:
        """Bring readers as far as others are. Returns those of `ready` that take part in this step, at least one."""
        self.readers = {run: reader for run, reader in self.readers.items() if run in present and _lacks(run) > 1}
        waiting, here = set(), set(ready)
        for run, reader in self.readers.items():
            if run in here and (self._waits(reader, here) or self._has_to_wait(reader, here)):
                waiting.add(run)
        for run, reader in self.readers.items():
            run.read_to = min((stop for stop in reader.stops if stop > run.conversation.held), default=0)
        return [run for run in ready if run not in waiting] or ready

    def _waits(self, reader: _Reader, ready: Collection[TurnRun]) -> bool:
        """Whether somebody still reads what it is to copy."""
        leader = reader.leader
        if leader is None:
            return False
        if leader in ready and leader in self.readers and leader.conversation.held < reader.until:
            return True
        reader.leader, reader.looks = None, True
        return False

    def _has_to_wait(self, reader: _Reader, ready: Collection[TurnRun]) -> bool:
        """Take what there is, and leave what others may want; whether that has to wait."""
        if reader.looks:
            if self._follows(reader, ready):
                return True
            if not self._takes(reader):
                return True
            reader.looks = False
        return self._forgets and not self._kept(reader)

    # --- taking -----------------------------------------------------------------------------------------------------

    def _follows(self, reader: _Reader, ready: Collection[TurnRun]) -> bool:
        """Find who reads most of what it lacks before it, if that is more than what can be copied now."""
        run = reader.run
        have = run.conversation.held
        for other in self.readers.values():
            if other is reader:
                break  # those behind it follow it, not the other way round
            theirs = other.run.conversation
            if other.run not in ready or theirs.fresh < theirs.held:
                continue
            until = min(common_prefix(run.conversation.tokens, theirs.tokens), _most(run))
            if until >= have + LEAST_TOKENS and until > theirs.held:
                reader.leader, reader.until, have = other.run, until, until
        if reader.leader is None:
            return False
        if max(self._donor(run)[0], self._kept_tokens(run)) + LEAST_TOKENS > reader.until:
            reader.leader = None
            return False
        if self._forgets:
            self.readers[reader.leader].stops.add(reader.until)
        return True

    def _takes(self, reader: _Reader) -> bool:
        """Take the longest beginning there is, if it is worth it; False if that has to wait for the next decode."""
        run = reader.run
        least = run.conversation.held + LEAST_TOKENS
        tokens, donor = self._donor(run)
        kept = self._kept_tokens(run)
        if kept >= least and kept > tokens:
            if self._context.pending:  # what is restored now would be overwritten then, or copied instead
                return False
            if self._snapshots.restore(self._label(kept), run.conversation.tokens[:kept], run.seat.sequence):
                run.shares(kept)
            else:
                run.shares(0)
        elif donor is not None and tokens >= least:
            sequence = run.seat.sequence
            self._context.copy(donor.sequence.slot, sequence.slot)
            cut = tokens < donor.conversation.held and not sequence.truncate(tokens)
            run.shares(0 if cut else tokens)
        return True

    def _donor(self, run: TurnRun) -> tuple[int, Seat | None]:
        """Who holds most of a turn's beginning, and how much, at least one token less than all."""
        best, donor = 0, None
        for seat in self._seats.values():
            if seat is not run.seat and (tokens := self._usable(seat, run, more_than=best)) > best:
                best, donor = tokens, seat
        return best, donor

    def _usable(self, seat: Seat, run: TurnRun, *, more_than: int) -> int:
        conversation, wanted = seat.conversation, run.conversation.tokens
        theirs = conversation.tokens  # before `fresh` is read: who takes a turn back lowers that first
        fresh, held = conversation.fresh, conversation.held
        most = min(fresh, _most(run), len(theirs))
        if most <= more_than or (self._context.recurrent and most < held):
            return 0
        tokens = min(common_prefix(theirs, wanted), most)
        return tokens if tokens == held or (tokens > more_than and seat.sequence.can_truncate(tokens)) else 0

    # --- what is kept for those who come later ----------------------------------------------------------------------

    def _kept_tokens(self, run: TurnRun) -> int:
        return self._snapshots.longest(self._label(0), run.conversation.tokens[: _most(run)]) if self._forgets else 0

    def _kept(self, reader: _Reader) -> bool:
        """Keep the state at the end of the system message; False if that has to wait for the next decode."""
        run, conversation = reader.run, reader.run.conversation
        head = run.head
        if head < LEAST_TOKENS or conversation.held > head:
            return True
        label, tokens = self._label(head), conversation.tokens[:head]
        if self._snapshots.has(label, tokens):
            return True
        if conversation.held < head:
            reader.stops.add(head)
            return True
        if self._context.pending:
            return False
        if conversation.fresh >= head:
            self._snapshots.keep(label, tokens, run.seat.sequence)
        return True


def _lacks(run: TurnRun) -> int:
    return len(run.conversation.tokens) - run.conversation.held


def _most(run: TurnRun) -> int:
    """The last token is decoded, for its logits."""
    return len(run.conversation.tokens) - 1
