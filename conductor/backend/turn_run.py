"""One turn of one agent, as it takes part in its pool's steps: prompt in, tokens out, the conversation kept whole.

What is to be decoded next is always what the KV lacks of the conversation's tokens: the prompt, what was lost and has to be
computed again, or the newest token. After a step that reached the end a token is drawn and taken.

A turn can stand still between two steps, whole, and go on in another slot, or another context, as the same turn: sampler,
text and stream are those it began with. A turn that ends before its first token, by an error or a cancellation, leaves the
conversation as it was, and so does one that is taken back while it stands still; later, what was made stays.
"""

from __future__ import annotations

import secrets
import time

from conductor.backend.conversation import Prompter, common_prefix, first_to_drop
from conductor.backend.llama import Sampler
from conductor.backend.reading import Reading
from conductor.backend.seat import Seat
from conductor.backend.target import Target, fit_window
from conductor.backend.telling import Telling
from conductor.backend.turn import Outgrown, Paused, TurnOrder, TurnOutcome
from conductor.backend.turn_control import TurnControl
from conductor.errors import InternalError, TurnCancelled
from conductor.types import MAX_SEED, DecodeRequest, FinishReason


class TurnRun:
    """From its first order to its end; close it. Standing still it knows no context: even its model may be gone.

    `prepare` runs in any thread before the first `join`; from there until the turn ends or stands still all is the pool's.
    """

    def __init__(self, seat: Seat, request: DecodeRequest) -> None:
        conversation = seat.conversation
        self.request = request
        self.conversation = conversation
        self.seat = seat
        self.control = TurnControl()
        self.sampler: Sampler | None = None  #: greedy turns need none
        self.reading = Reading()
        self.made: list[int] = []
        self.computed = 0  #: tokens decoded for it, again ones included
        self.held = False  #: it keeps its seat and takes part in no step
        self.number = 0  #: which of the pool's turns it was to join
        self.read_to = 0  #: a step reads no further than to this token; 0: as far as it goes
        self.head = 0  #: tokens that it begins with as others may
        self._before = conversation.tokens
        #: how many tokens at the cache's start are still those of `_before`, were it to hold as many
        self._untouched = len(self._before)
        self._max_tokens = request.max_tokens
        self._seed = request.seed if request.seed is not None else secrets.randbelow(MAX_SEED + 1)
        self._target: Target | None = None
        self._order: TurnOrder | None = None
        self._read = False  #: the target is the conversation now
        self._full = False  #: the window has no room for another token: the oldest half is to go
        self._length = self._limit = self._desired = self._prompt_tokens = self._reused = self._recomputed = 0
        self._shared = 0  #: tokens of its prompt that another's KV held
        self._reached = 0  #: so many tokens the KV had held when it stood still last
        self._known_to = 0  #: so many tokens had been computed before, here or in another turn
        self._ends: frozenset[int] = frozenset()
        self._first_token_at = self._token_at = self._longest_stall_s = 0.0
        continues = request.prompt is None and request.messages is None
        self.telling = Telling(self.made, request.stop, partial=conversation.partial if continues else b"")

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None

    # --- before it runs, and while it stands still ------------------------------------------------------------------

    @property
    def prepared(self) -> bool:
        return self._target is not None

    def prepare(self, prompter: Prompter, order: TurnOrder) -> None:
        """Find out what is to be decoded. Raises what `fit_window` does."""
        self._target = fit_window(self.conversation, prompter, order)
        self._length = len(self._target.tokens)  # the list itself becomes the conversation's, and grows

    @property
    def text(self) -> str:
        """What has been handed on so far: all that was made, while it stands still."""
        return "".join(self.telling.text)

    def take_back(self) -> None:
        """Leave the conversation as it was before the turn. Does not touch the context: another thread may be saving it."""
        self.conversation.valid = min(self.conversation.valid, self._untouched)
        self.conversation.tokens = self._before  # last: at no moment are these said to be in the cache and are not

    def fail(self) -> None:
        """End it with an error: what was made stays, what was only read does not."""
        if self.made:
            self.conversation.partial = self.telling.finish()
        else:
            self.take_back()

    def finish(self, reason: FinishReason) -> TurnOutcome:
        """End it with what it made. Raises what handing on the last text raises; it is ended all the same."""
        self.conversation.partial = self.telling.finish()
        self.telling.show(time.monotonic())
        return TurnOutcome(
            text=self.text,
            tokens=tuple(self.made),
            prompt_tokens=self._prompt_tokens,
            prompt_tokens_reused=self._reused,
            recomputed_tokens=self._recomputed,
            finish_reason=reason,
            seed=self._seed,
            first_token_at=self._first_token_at,
            prefill_s_per_token=self.reading.s_per_token,
            prefix_tokens_reused=self._shared,
            longest_stall_s=self._longest_stall_s,
            computed_tokens=self.computed,
        )

    # --- in the pool ------------------------------------------------------------------------------------------------

    def join(self, order: TurnOrder, seat: Seat) -> Outgrown | None:
        """Begin, or go on, in this seat; Outgrown if there is no room for it, and nothing was touched then."""
        target, conversation = self._target, self.conversation
        if target is None:
            raise InternalError(f"a turn of {order.agent_id} joined before it was prepared")
        self._desired = min(order.window, self._length + self.request.max_tokens)
        self._order, self.seat, self.held, self.read_to = order, seat, False, 0
        model = seat.sequence.model
        self.telling.go_on(model, order.emit, order.chunk_interval_s)
        length = len(conversation.tokens) if self._read else self._length
        if order.room <= length < order.window:
            return self._outgrown(length)
        if not self._read:
            self._apply(target)
        conversation.rewind(seat.sequence, length - 1)  # the last token's logits are needed: decode it again
        conversation.has_decoded(conversation.cached)
        self._ends, self._limit, self._token_at = model.end_tokens, min(order.room, order.window), 0.0
        self._full = length >= order.window
        self.control.attention = True  # it may have been stopped, or held, before
        return None

    def _apply(self, target: Target) -> None:
        """Make the target the conversation, and keep what of its cache is the target's too."""
        known = self._shift(target)
        conversation, length = self.conversation, self._length
        conversation.rewind(self.seat.sequence, min(known, length - 1))
        conversation.tokens = target.tokens
        self._read = True
        self._reused = conversation.cached
        self._prompt_tokens = length - self._reused
        self._known_to = known - 1
        self.head = target.head
        if self.request.temperature > 0:
            self.sampler = Sampler(self.request, self._seed)

    def _shift(self, target: Target) -> int:
        """Take out of the conversation what the target lacks; returns how many tokens both begin with."""
        self._untouched = target.known
        if not target.dropped:
            return target.known
        conversation = self.conversation
        self._untouched = target.first
        conversation.rewind(self.seat.sequence, target.known)
        conversation.drop(self.seat.sequence, target.first, target.dropped)
        return common_prefix(conversation.tokens, target.tokens)

    def attend(self) -> FinishReason | Paused | None:
        """Do what was asked since the last step. Raises TurnCancelled."""
        control = self.control
        control.attention = False
        if control.stop is not None:
            if not self.made:
                late = "its time was up" if control.stop is FinishReason.TIMEOUT else "it ended"
                raise TurnCancelled(self.seat.agent_id, f"{late} while its prompt was being decoded")
            return control.stop
        if control.paused:
            return Paused(self.computed, bool(self.made))
        if self.held != control.held:
            self.held, self._token_at = control.held, 0.0
        if self._full and not self.held:
            self._make_room()
        return None

    def _make_room(self) -> None:
        """Drop the oldest half of the window."""
        conversation, sequence = self.conversation, self.seat.sequence
        length, lost = len(conversation.tokens), max(0, self._known_to - conversation.cached)
        first = first_to_drop(sequence.model)
        conversation.drop(sequence, first, max(1, (length - first) // 2))
        conversation.has_decoded(conversation.cached)
        self._known_to, self._full = conversation.cached + lost, False

    def advance(self, n_tokens: int) -> None:
        """The KV holds so many tokens more."""
        conversation = self.conversation
        held = conversation.held
        if held < self._known_to:
            self._recomputed += min(n_tokens, self._known_to - held)
        conversation.held = conversation.valid = held + n_tokens
        self.computed += n_tokens

    def shares(self, n_tokens: int) -> None:
        """The slot holds so many of its tokens now, that another one held, in place of what it held itself."""
        new = min(n_tokens, self._length) - max(self.conversation.held, self._reached)
        if new > 0:
            self._shared += new
            self._prompt_tokens -= new
        self.conversation.has_decoded(n_tokens)

    def take(self, token: int, now: float) -> FinishReason | Outgrown | None:
        """Keep the next token; why no other follows it here. A tiny model comes here thousands of times a second."""
        tokens, made = self.conversation.tokens, self.made
        tokens.append(token)
        made.append(token)
        if self._token_at:
            if now - self._token_at > self._longest_stall_s:
                self._longest_stall_s = now - self._token_at
        elif not self._first_token_at:
            self._first_token_at = now
        self._token_at = now
        if token in self._ends:
            self.telling.end()
            return FinishReason.EOS
        if self.telling.heeds_stop and self.telling.keep_up():
            return FinishReason.STOP
        if len(made) >= self._max_tokens:
            return FinishReason.LENGTH
        return self._at_limit(len(tokens)) if len(tokens) >= self._limit else None

    def _at_limit(self, length: int) -> FinishReason | Outgrown | None:
        order, control = self._order, self.control
        assert order is not None
        if length >= order.window:
            if not order.context_shift:
                return FinishReason.WINDOW
            self._full = control.attention = True  # with the next step, if there is one
            return None
        return control.stop or self._outgrown(length)

    def _outgrown(self, length: int) -> Outgrown:
        return Outgrown(length + 1, self._desired, self.computed, bool(self.made))

    def stand_still(self) -> None:
        """Leave the pool, whole. Raises what handing on text raises."""
        if self._read:  # before that, what the KV holds is of the conversation as it was
            self._reached = max(self._reached, self.conversation.held)
            self._known_to = max(self._known_to, self.conversation.held)
        self._order = None
        self.telling.stand_still(time.monotonic())
