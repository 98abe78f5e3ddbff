"""Who waits for whom: a pipeline's names held against each other, before anything runs. Pure.

Wrong ones are a ConfigError that names the file, the key, and what there is instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from conductor.errors import ConfigError
from conductor.types import Record
from pipelines.library.steps import Agent, AnyStep, Ask, Debate, FanOut, Map, Pipeline
from pipelines.library.templates import names_in

#: what a template may name beside steps and inputs, and before those of the same name, by its key
_OWN = {
    (Map, "prompt"): ("item",),
    (FanOut, "verdict"): ("question", "answers"),
    (Debate, "reply"): ("question", "other"),
    (Debate, "verdict"): ("question", "first", "second"),
}


@dataclass(frozen=True, slots=True)
class Planned(Record):
    """A step's place in its pipeline."""

    step: str
    needs: tuple[str, ...]  #: the steps that it waits for
    stage: int  #: 0 waits for nobody; else one more than the latest it waits for
    agents: tuple[str, ...]  #: that it asks, each once


def plan(pipeline: Pipeline, *, source: str = "") -> dict[str, Planned]:
    """The steps, none before one that it needs. Raises ConfigError, which names `source`, else the pipeline."""
    check = _Check(pipeline, source or pipeline.name)
    needs = {name: check.needs_of(name, step) for name, step in pipeline.steps.items()}
    if pipeline.outcome not in pipeline.steps:
        raise check.error("result", f"no step {pipeline.outcome!r}; there are: {', '.join(pipeline.steps)}")
    return {
        name: Planned(name, needs[name], stage, agents_of(pipeline.steps[name]))
        for name, stage in _stages(needs, check)
    }  # fmt: skip


def agents_of(step: AnyStep) -> tuple[str, ...]:
    """The agents that a step asks, each once."""
    return tuple(dict.fromkeys(name for _, name in _asked(step)))


def texts_of(step: AnyStep) -> Iterator[tuple[str, str]]:
    """(key, template) of all texts of a step."""
    for key in ("prompt", "otherwise", *(("reply",) if isinstance(step, Debate) else ())):
        if (template := getattr(step, key)) is not None:
            yield key, template
    if isinstance(step, (FanOut, Debate)) and step.judge is not None:
        yield "verdict", step.verdict


def _asked(step: AnyStep) -> Iterator[tuple[str, str]]:
    """(key, agent) of all agents of a step, as often as it names them."""
    if isinstance(step, Ask):
        yield "ask", step.ask
    elif isinstance(step, Map):
        yield "map", step.map
    else:
        key, names = ("fan_out", step.fan_out) if isinstance(step, FanOut) else ("debate", step.debate)
        yield from ((f"{key}.{i}", name) for i, name in enumerate(names))
        if step.judge is not None:
            yield "judge", step.judge


class _Check:
    def __init__(self, pipeline: Pipeline, source: str) -> None:
        self._pipeline, self._source = pipeline, source
        for name in pipeline.steps:
            if name in pipeline.inputs:
                raise self.error(f"steps.{name}", "there is an input of this name; a prompt could not tell them apart")

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(self._source, key, problem)

    def needs_of(self, name: str, step: AnyStep) -> tuple[str, ...]:
        """The steps that must end before this one; all its names are checked on the way."""
        at = f"steps.{name}"
        for key, agent in _asked(step):
            if agent not in self._pipeline.agents:
                raise self.error(f"{at}.{key}", _unknown("agent", agent, self._pipeline.agents))
        named = [*self._in_texts(at, step), *self._in_conditions(at, step)]
        if isinstance(step, Map):
            named.append(self._over(at, step))
        for i, needed in enumerate(step.needs):
            named.append(self._a_step(f"{at}.needs.{i}", needed))
        return tuple(dict.fromkeys(need for need in named if need in self._pipeline.steps))

    def _in_texts(self, at: str, step: AnyStep) -> Iterator[str]:
        for key, template in texts_of(step):
            own = _OWN.get((type(step), key), ())
            try:
                names = names_in(template)
            except ValueError as error:
                raise self.error(f"{at}.{key}", str(error)) from None
            for name in names:
                if name not in own and name not in self._texts:
                    raise self.error(f"{at}.{key}", _unknown("input or step", name, [*self._texts, *own], braces=True))
                if name not in own:
                    yield name

    def _in_conditions(self, at: str, step: AnyStep) -> Iterator[str]:
        for key in ("when", "unless"):
            if (condition := getattr(step, key)) is not None:
                yield self._a_step(f"{at}.{key}.step", condition.step)
        if step.otherwise is not None and step.when is None and step.unless is None:
            raise self.error(f"{at}.otherwise", "the step has neither when nor unless, so it is never skipped")

    def _over(self, at: str, step: Map) -> str:
        if step.over not in self._texts:
            raise self.error(f"{at}.over", _unknown("input or step", step.over, self._texts))
        if self._pipeline.agents[step.map].existing is not None and step.concurrency > 1:
            problem = f"{step.map!r} is one existing agent, which takes one turn at a time; with model there can be more"
            raise self.error(f"{at}.concurrency", problem)
        return step.over

    def _a_step(self, key: str, name: str) -> str:
        if name not in self._pipeline.steps:
            raise self.error(key, _unknown("step", name, self._pipeline.steps))
        return name

    @property
    def _texts(self) -> list[str]:
        return [*self._pipeline.inputs, *self._pipeline.steps]


def _unknown(what: str, name: str, known: Mapping[str, Agent | AnyStep] | list[str], *, braces: bool = False) -> str:
    way_out = f"; for the word in braces write {{{{{name}}}}}" if braces else ""
    return f"no {what} {name!r}; there are: {', '.join(known) or 'none'}{way_out}"


def _stages(needs: Mapping[str, tuple[str, ...]], check: _Check) -> Iterator[tuple[str, int]]:
    """(step, stage) in an order in which each could run."""
    stages: dict[str, int] = {}
    left = list(needs)
    while left:
        ready = [name for name in left if all(need in stages for need in needs[name])]
        if not ready:
            circle = _circle(needs, left)
            raise check.error(f"steps.{circle[0]}", f"waits for itself: {' → '.join(circle)}")
        for name in ready:
            stages[name] = max((stages[need] + 1 for need in needs[name]), default=0)
            yield name, stages[name]
        left = [name for name in left if name not in stages]


def _circle(needs: Mapping[str, tuple[str, ...]], left: list[str]) -> list[str]:
    """One of the circles among steps each of which waits for another of them."""
    way = [left[0]]
    while way[-1] not in way[:-1]:
        way.append(next(need for need in needs[way[-1]] if need in left))
    return way[way.index(way[-1]) :]
