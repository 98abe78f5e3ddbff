"""What a pipeline is: agents, inputs and steps that say who is asked what. Values that can be written in Python or in YAML.

    Pipeline(
        name="explain",
        inputs={"request": None},
        agents={"coder": Agent("coder"), "documenter": Agent("documenter")},
        steps={
            "code": Ask("coder", "{request}", keep="code"),
            "explained": Ask("documenter", "Write the documentation for this Python function:\n\n{code}"),
        },
    )

A step begins as soon as the steps that its texts name are done; whatever does not wait for another runs at the same time.

See also: `files` reads them, `plan` holds the names against each other, `work` says what each kind of step does.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag
from pydantic.dataclasses import dataclass

from conductor.config import MAX_WINDOW
from conductor.requests import MAX_PRIORITY, MAX_WAIT_S
from conductor.types import MAX_SEED
from pipelines.library.templates import NAME

_STRICT = ConfigDict(extra="forbid", strict=True)
#: of names: they become parts of agents' ids
_MAX_CHARACTERS = 40

Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$", max_length=_MAX_CHARACTERS)]
PipelineName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=_MAX_CHARACTERS)]
Seconds = Annotated[float, Field(ge=0, le=MAX_WAIT_S)]
Share = Annotated[float, Field(ge=0, le=1)]
#: a text, several, or None: whoever runs the pipeline must give it
Input = str | tuple[str, ...] | None
#: which part of an answer a step keeps as its text
Keep = Literal["text", "code", "first_line", "last_line"]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Options:
    """Of turns, as DecodeRequest explains them. What is None is left to the agent's options, then to the conductor."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_WINDOW)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_WINDOW)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] | None = None
    wait_s: Seconds | None = None  #: how long it may wait for its seat, and for room if its window must grow
    timeout_s: Seconds | None = None  #: it ends then, with what it made

    def given(self) -> dict[str, Any]:
        return {field.name: value for field in dataclasses.fields(self) if (value := getattr(self, field.name)) is not None}


@dataclass(frozen=True, slots=True, config=_STRICT)
class Agent:
    """Who works: registered for the run with `model` on these terms, or, as `existing`, an agent that is registered already."""

    model: str | None = None  #: its key in the configuration
    existing: str | None = None  #: the id of a registered agent
    window: Annotated[int, Field(gt=0, le=MAX_WINDOW)] | None = None  #: tokens
    service_class: Literal["guaranteed", "shared", "best_effort"] = "shared"
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    wait_s: Seconds = 0  #: how long it may wait for its admission
    system: str | None = None  #: opens each of its conversations
    options: Options = Options()  #: of its turns, unless the step says otherwise

    def __post_init__(self) -> None:
        if (self.model is None) == (self.existing is None):
            raise ValueError("give model, or existing: the id of an agent that is registered already")
        if self.existing is not None and (self.window, self.service_class, self.priority, self.wait_s) != (None, "shared", 0, 0):
            raise ValueError("window, service_class, priority and wait_s are those that the existing agent has")


@dataclass(frozen=True, slots=True, config=_STRICT)
class Condition:
    """Of a step's text. One of the three is given."""

    step: Name
    contains: str | None = None  #: a part of it
    matches: str | None = None  #: a regular expression, found anywhere
    equals: str | None = None  #: white space around it aside

    def __post_init__(self) -> None:
        if sum(what is not None for what in (self.contains, self.matches, self.equals)) != 1:
            raise ValueError("exactly one of contains, matches and equals is expected")
        if self.matches is not None:
            try:
                re.compile(self.matches)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"matches is no regular expression: {error}") from None

    def holds(self, text: str) -> bool:
        """Of that text."""
        if self.contains is not None:
            return self.contains in text
        if self.matches is not None:
            return re.search(self.matches, text) is not None
        return text.strip() == (self.equals or "").strip()


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class _Any:
    """What every step may say. One whose condition does not hold is skipped: its text is `otherwise`, or it has none."""

    keep: Keep = "text"  #: of an answer: all, the first fenced block, its first or its last line
    options: Options = Options()  #: of its turns
    when: Condition | None = None  #: it is done only if this holds
    unless: Condition | None = None  #: it is done only if this does not
    otherwise: str | None = None  #: its text if it is skipped
    needs: tuple[Name, ...] = ()  #: steps to wait for beside those that are named in its texts


@dataclass(frozen=True, slots=True, config=_STRICT)
class Ask(_Any):
    """One turn of one agent. `fresh` begins a conversation; without it the agent's conversation in this run goes on."""

    ask: Name  #: the agent
    prompt: str
    fresh: bool = True


@dataclass(frozen=True, slots=True, config=_STRICT)
class FanOut(_Any):
    """The same prompt to several agents at once, and a vote: the answer that most agree on, or the one that a judge names.

    Without a vote the text is all answers, one below the other. An agent that fails has no vote.
    """

    fan_out: Annotated[tuple[Name, ...], Field(min_length=2)]  #: the agents
    prompt: str
    vote: Literal["majority", "judge"] | None = None
    judge: Name | None = None
    verdict: str = (
        "Which of these answers to the question is the best? Reply with its number only.\n\nQuestion:\n\n{question}\n\n{answers}"
    )

    def __post_init__(self) -> None:
        if (self.vote == "judge") != (self.judge is not None):
            raise ValueError("a judge is named if, and only if, vote is judge")


@dataclass(frozen=True, slots=True, config=_STRICT)
class Debate(_Any):
    """Two agents answer at the same time, then again, each having read the other's answer, until they agree or `rounds` are over.

    The text is what the judge makes of it, or both last answers; one, if they agree.
    """

    debate: tuple[Name, Name]  #: the agents
    prompt: str
    rounds: Annotated[int, Field(ge=1, le=20)] = 2  #: at most 20
    reply: str = (
        "Somebody else answered:\n\n{other}\n\nAnswer again: keep what is right in yours, and take what is better in theirs."
    )
    judge: Name | None = None
    verdict: str = "Question:\n\n{question}\n\nOne answer:\n\n{first}\n\nAnother answer:\n\n{second}\n\nGive the best answer."

    def __post_init__(self) -> None:
        if self.debate[0] == self.debate[1]:
            raise ValueError("two different agents are expected")


@dataclass(frozen=True, slots=True, config=_STRICT)
class Map(_Any):
    """The prompt once for each `{item}` of `over`: an input or a step, a list as it is, a text cut by lines or paragraphs.

    `concurrency` agents of the same kind share the items. All are tried; the step has failed if one of them did.
    """

    map: Name  #: the agent
    prompt: str
    over: Name  #: the input or step that has the items
    concurrency: Annotated[int, Field(ge=1, le=64)] = 1  #: at most 64
    split: Literal["lines", "paragraphs"] = "lines"


#: what a step says first is what it does
KINDS: dict[str, type[Ask] | type[FanOut] | type[Debate] | type[Map]] = {
    "ask": Ask, "fan_out": FanOut, "debate": Debate, "map": Map,
}  # fmt: skip


def kind_of(step: Any) -> str:
    """The key in KINDS of a step, or of a step as a mapping; "" of anything else."""
    return next((kind for kind, of in KINDS.items() if isinstance(step, of) or (isinstance(step, dict) and kind in step)), "")


AnyStep: TypeAlias = Ask | FanOut | Debate | Map
_Tagged: TypeAlias = (
    Annotated[Ask, Tag("ask")] | Annotated[FanOut, Tag("fan_out")] | Annotated[Debate, Tag("debate")] | Annotated[Map, Tag("map")]
)
Step: TypeAlias = Annotated[_Tagged, Discriminator(kind_of)]


class Pipeline(BaseModel):
    """Agents at work together. `result` names the step whose text is the outcome; None: the last one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: PipelineName
    about: str = ""
    inputs: dict[Name, Input] = {}  #: by name, a default: a text or several; None: whoever runs it must give it
    agents: Annotated[dict[Name, Agent], Field(min_length=1)]
    steps: Annotated[dict[Name, Step], Field(min_length=1)]  #: `Ask`, `FanOut`, `Debate` or `Map`, by name
    result: Name | None = None

    @property
    def outcome(self) -> str:
        """The step whose text is the pipeline's."""
        return self.result or list(self.steps)[-1]
