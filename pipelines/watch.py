"""A conductor as somebody sees it who looks again and again: its status, its history as far as it is remembered, its speed.

What `conductor board` and `conductor top` have in common. One `look` is two calls of the actor, however many watch the outcome.
A conductor that does not answer is no error here: `problem` says so, what was seen last stays, and the next look finds it again,
wherever it was started anew.

See also: `lookout`, which does the asking.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from conductor.errors import ConductorError, NotRunning
from conductor.happenings import HistoryEntry
from conductor.types import Record, Status
from pipelines.lookout import Lookout
from pipelines.session import refuse_unless_there_is_ray, settings

_ENTRIES = 2000
_SAMPLES = 3000
#: the rate for people is of so many seconds, that for a chart from look to look
_RATE_OVER_S = 3.0


@dataclass(frozen=True, slots=True)
class Sample(Record):
    at_s: float  #: since the conductor's start
    tokens_per_s: float  #: since the sample before it
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class View:
    """What was seen up to now."""

    status: Status | None = None  #: as it was seen last
    problem: str = ""  #: why it is not seen now
    run: int = 0  #: counts the conductors that were seen: with a new one, history and samples begin anew
    entries: tuple[HistoryEntry, ...] = ()
    samples: tuple[Sample, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Of prompts and answers together, over the last seconds."""
        if len(self.samples) < 2 or self.problem:
            return 0.0
        last = self.samples[-1]
        past = next((s for s in reversed(self.samples) if last.at_s - s.at_s >= _RATE_OVER_S), self.samples[0])
        return (last.computed_tokens - past.computed_tokens) / max(last.at_s - past.at_s, 1e-3)


class Watch:
    """Close it, or use it as a context. One thread looks; any may read `view`, which is replaced and never changed."""

    def __init__(self, config: Path | None) -> None:
        self._config = config
        self._lookout: Lookout | None = None
        self.view = View()
        self._entries: deque[HistoryEntry] = deque(maxlen=_ENTRIES)
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lookout is not None:
            self._lookout.close()
            self._lookout = None

    def interrupt(self) -> None:
        """From another thread: the look that is under way ends soon, and sees nothing."""
        if (lookout := self._lookout) is not None:
            lookout.kill()

    def look(self) -> None:
        """See how things are, in a conductor that may come and go."""
        try:
            self.see()
        except ConductorError as error:
            why = "no conductor is running" if isinstance(error, NotRunning) else str(error).partition("\n")[0]
            self.view = replace(self.view, problem=why)

    def see(self) -> None:
        """See how things are. Raises ServiceFailed, NotRunning, ConfigError."""
        if self._lookout is None:
            settings(self._config)  # what can be told at once needs no process
            refuse_unless_there_is_ray()
            self._lookout = Lookout(self._config)
        before, run = self.view.status, self.view.run
        try:
            status, news = self._lookout.look(self._entries[-1].number if self._entries else 0)
            if before is None or status.started_at != before.started_at:
                if before is not None:  # another one under the same name: what was asked for was of the one before
                    status, news = self._lookout.look(0)
                run += 1
                self._entries.clear()
                self._samples.clear()
        except ConductorError:
            self.close()  # it may be found elsewhere next time
            raise
        self._entries += news
        self._take_sample(status)
        self.view = View(status, "", run, tuple(self._entries), tuple(self._samples))

    def _take_sample(self, status: Status) -> None:
        if not self._samples:
            self._samples.append(Sample(status.uptime_s, 0.0, status.computed_tokens))
            return
        before = self._samples[-1]
        passed_s, more = status.uptime_s - before.at_s, status.computed_tokens - before.computed_tokens
        if passed_s > 0:
            self._samples.append(Sample(status.uptime_s, more / passed_s, status.computed_tokens))
