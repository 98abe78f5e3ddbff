"""Pipelines: agents at work together, as values that say who is asked what, and a runner that does it.

    from pipelines.library import Agent, Ask, Pipeline, load, run

    result = run(load("code_crew"), {"request": "Write a Python function …"})
    print(result.text, result.cost.generated_tokens)

`steps` has the vocabulary, `files` the YAML, `plan` the checks, `runner` the running; docs/pipelines.md tells the whole.
"""

from pipelines.library.files import examples, load, parse
from pipelines.library.plan import Planned, plan
from pipelines.library.results import (
    AgentAdmitted,
    AgentFailed,
    Cost,
    Event,
    RunResult,
    StepBegan,
    StepEnded,
    StepResult,
    StepState,
    Turn,
    TurnEnded,
)
from pipelines.library.runner import Running, arun, run, start
from pipelines.library.steps import Agent, Ask, Condition, Debate, FanOut, Map, Options, Pipeline

__all__ = [
    "Agent",
    "AgentAdmitted",
    "AgentFailed",
    "Ask",
    "Condition",
    "Cost",
    "Debate",
    "Event",
    "FanOut",
    "Map",
    "Options",
    "Pipeline",
    "Planned",
    "RunResult",
    "Running",
    "StepBegan",
    "StepEnded",
    "StepResult",
    "StepState",
    "Turn",
    "TurnEnded",
    "arun",
    "examples",
    "load",
    "parse",
    "plan",
    "run",
    "start",
]
