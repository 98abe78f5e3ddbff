"""What each kind of step does with its agents. Turns come back as values; a failed one fails what cannot be done without it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conductor.errors import ConductorError, TurnCancelled
from conductor.types import AgentId
from pipelines.library.answers import items_of, kept, majority, named, numbered
from pipelines.library.results import Turn
from pipelines.library.steps import AnyStep, Ask, Debate, FanOut, Map
from pipelines.library.templates import fill

if TYPE_CHECKING:
    from pipelines.library.team import Member, Team

#: a turn that nobody bounds ends there
_MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a step: its text, or its error, or neither if a turn was cancelled."""

    turns: Sequence[Turn]
    text: str | None = None
    answers: tuple[str | None, ...] = ()
    note: str = ""
    error: ConductorError | None = None


class Worker:
    """Does one step. `texts`: of inputs and steps by name; lists joined. `lists`: the inputs that are lists."""

    def __init__(
        self, team: Team, texts: Mapping[str, str], lists: Mapping[str, tuple[str, ...]], *, tell: Callable[[Turn], None]
    ) -> None:
        self._team, self._texts, self._lists, self._tell = team, texts, lists, tell

    async def do(self, step: AnyStep) -> Outcome:
        """Raises nothing of the project's own."""
        if isinstance(step, Ask):
            return await self._ask(step)
        if isinstance(step, FanOut):
            return await self._fan_out(step)
        if isinstance(step, Debate):
            return await self._debate(step)
        return await self._map(step)

    async def _ask(self, step: Ask) -> Outcome:
        turn = await self._turn(step.ask, fill(step.prompt, self._texts), step, fresh=step.fresh)
        return _of_all([turn], _kept(turn, step))

    async def _fan_out(self, step: FanOut) -> Outcome:
        question = fill(step.prompt, self._texts)
        turns = await asyncio.gather(*(self._turn(agent, question, step) for agent in step.fan_out))
        answers = tuple(_kept(turn, step) for turn in turns)
        given = [answer for answer in answers if answer is not None]
        if not given:
            return _of_all(turns, None, answers)
        missing = f"; {len(answers) - len(given)} of {len(answers)} failed" if len(given) < len(answers) else ""
        if step.vote is None:
            return Outcome(turns, "\n\n".join(given), answers, missing.removeprefix("; "))
        choice, count = majority(given)
        if step.judge is None or count == len(given):
            return Outcome(turns, given[choice], answers, f"{count} of {len(given)} agree{missing}")
        asked = fill(step.verdict, {**self._texts, "question": question, "answers": numbered(given)})
        judged = await self._turn(step.judge, asked, step)
        turns.append(judged)
        if judged.result is None or judged.cancelled:
            return Outcome(turns, None, answers, "the judge failed", _why([judged]))
        chosen = named(judged.result.text, len(given))
        if chosen is None:
            note = f"the judge named none of 1 to {len(given)}, so the majority decides: {count} of {len(given)}{missing}"
            return Outcome(turns, given[choice], answers, note)
        return Outcome(turns, given[chosen], answers, f"the judge chose answer {chosen + 1} of {len(given)}{missing}")

    async def _debate(self, step: Debate) -> Outcome:
        question = fill(step.prompt, self._texts)
        turns: list[Turn] = []
        asked, last = [question, question], ["", ""]
        for round in range(step.rounds):
            both = await asyncio.gather(
                *(self._turn(agent, text, step, fresh=round == 0) for agent, text in zip(step.debate, asked, strict=True))
            )
            turns += both
            answers = [_kept(turn, step) for turn in both]
            if answers[0] is None or answers[1] is None:
                return _of_all(turns, None)
            last = [answers[0], answers[1]]
            if majority(last)[1] == 2:
                return Outcome(turns, last[0], note=f"they agree after {round + 1} of {step.rounds} rounds")
            asked = [fill(step.reply, {**self._texts, "question": question, "other": other}) for other in reversed(last)]
        note = f"{step.rounds} round{'s' if step.rounds > 1 else ''}, no agreement"
        if step.judge is None:
            text = "\n\n".join(f"{agent}:\n\n{answer}" for agent, answer in zip(step.debate, last, strict=True))
            return Outcome(turns, text, note=note)
        asked_of_judge = fill(step.verdict, {**self._texts, "question": question, "first": last[0], "second": last[1]})
        judged = await self._turn(step.judge, asked_of_judge, step)
        return _of_all([*turns, judged], _kept(judged, step), note=f"{note}; judged by {step.judge}")

    async def _map(self, step: Map) -> Outcome:
        items = items_of(self._lists.get(step.over, self._texts[step.over]), step.split)
        if not items:
            return Outcome((), "", note=f"nothing in {step.over}")
        workers = min(step.concurrency, len(items))
        try:
            members = await self._team.several(step.map, workers)
        except ConductorError as error:
            return Outcome((), error=error)
        turns: list[Turn] = [Turn(step.map, "", None)] * len(items)
        waiting = iter(enumerate(items))

        async def work(member: Member) -> None:
            for i, item in waiting:
                prompt = fill(step.prompt, {**self._texts, "item": item})
                turns[i] = await self._turn_of(_already(member), step.map, prompt, step)

        await asyncio.gather(*map(work, members))
        answers = tuple(_kept(turn, step) for turn in turns)
        notes = [f"{len(items)} items"]
        if len(members) < workers:
            notes.append(f"{len(members)} at a time, since no more agents were admitted")
        failed = answers.count(None)
        if failed:
            notes.append(f"{failed} failed")
        text = None if failed else "\n\n".join(answer or "" for answer in answers)
        return _of_all(turns, text, answers, note="; ".join(notes))

    async def _turn(self, agent: str, prompt: str, step: AnyStep, *, fresh: bool = True) -> Turn:
        return await self._turn_of(self._team.member(agent), agent, prompt, step, fresh=fresh)

    async def _turn_of(self, member: Awaitable[Member], agent: str, prompt: str, step: AnyStep, *, fresh: bool = True) -> Turn:
        options: dict[str, Any] = {"max_tokens": _MAX_TOKENS} | self._team.options(agent) | step.options.given()
        try:
            turn = Turn(agent, prompt, await self._team.turn(agent, await member, prompt, fresh=fresh, options=options))
        except ConductorError as error:
            turn = Turn(agent, prompt, None, error)
        self._tell(turn)
        return turn


async def _already(member: Member) -> Member:
    return member


def _kept(turn: Turn, step: AnyStep) -> str | None:
    """What the step keeps of an answer; None of a turn that failed or was cut short by a cancellation."""
    return None if turn.result is None or turn.cancelled else kept(turn.result.text, step.keep)


def _of_all(turns: Sequence[Turn], text: str | None, answers: tuple[str | None, ...] = (), note: str = "") -> Outcome:
    """With the error that left the step without a text, if it has none."""
    return Outcome(turns, text, answers, note, _why(turns) if text is None else None)


def _why(turns: Sequence[Turn]) -> ConductorError:
    """The first error; or, if there is none, that one of the turns was cut short."""
    errors = [turn.error for turn in turns if turn.error is not None]
    whose = next((turn.agent for turn in turns if turn.cancelled), turns[0].agent)
    return errors[0] if errors else TurnCancelled(AgentId(whose), "it was ended before its answer was whole")
