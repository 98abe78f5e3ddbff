"""Pipelines as values: templates, the order of steps, and everything that a file may have wrong, named by file and key."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from conductor.errors import ConfigError, InvalidRequest
from pipelines.library import Agent, Ask, Condition, Debate, FanOut, Map, Options, Pipeline, examples, load, parse, plan
from pipelines.library.answers import code_in, items_of, kept, majority, named
from pipelines.library.runner import given_inputs
from pipelines.library.templates import fill, names_in

# --- templates ----------------------------------------------------------------------------------------------------------


def test_a_name_in_braces_is_replaced_once_and_nothing_else_is() -> None:
    template = 'Say {a} and {{a}} of {b}: {} {"json": 1} { a } }'
    assert names_in(template) == ("a", "b")
    assert fill(template, {"a": "{b}", "b": "\\1"}) == 'Say {b} and {a} of \\1: {} {"json": 1} { a } }'


@pytest.mark.parametrize("template", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>10}"])
def test_what_only_pythons_format_knows_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="only a name may stand in braces"):
        names_in(template)


# --- answers ------------------------------------------------------------------------------------------------------------


def test_what_is_kept_of_an_answer() -> None:
    answer = "Well:\n```python\nx = 1\n```\n\n  so be it  \n"
    assert [kept(answer, keep) for keep in ("text", "code", "first_line", "last_line")] == [  # type: ignore[arg-type]
        answer, "x = 1", "Well:", "so be it",
    ]  # fmt: skip
    assert (kept(" \n", "last_line"), code_in("")) == ("", "")


def test_a_list_is_taken_as_it_is_and_a_text_is_cut() -> None:
    assert items_of(("a\n\nb", ""), "lines") == ("a\n\nb", "")
    assert items_of(" a\n\n b c \n", "lines") == ("a", "b c")
    assert items_of("a\nb\n \t\n\nc\n", "paragraphs") == ("a\nb", "c")
    assert items_of(" \n", "lines") == ()


def test_the_majority_is_the_answer_met_first_of_those_most_agree_on() -> None:
    assert majority(["x", "A  b", "a b\n", "y"]) == (1, 2)
    assert majority(["y", "x", "X", "Y "]) == (0, 2)
    assert majority(["x"]) == (0, 1)


@pytest.mark.parametrize(
    ("verdict", "choice"),
    [("2", 1), ("Answer 3 is the best, then 1", 2), ("the 10th, no: 2", 1), ("none", None), ("0, or 4", None), ("1.5", None)],
)
def test_a_judge_names_an_answer_by_its_number(verdict: str, choice: int | None) -> None:
    assert named(verdict, 3) == choice


# --- the plan -----------------------------------------------------------------------------------------------------------


def pipeline(steps: dict[str, Any], **options: Any) -> Pipeline:
    return Pipeline(
        **{"name": "p", "inputs": {"request": None}, "agents": {"a": Agent("m"), "b": Agent("m")}, "steps": steps, **options}
    )


def test_a_step_waits_for_those_that_it_names_anywhere_and_for_no_others() -> None:
    crew = pipeline(
        {
            "last": Ask("a", "{code}", when=Condition("review", contains="x"), otherwise="{docs}", needs=("other",)),
            "code": Ask("a", "{request}"),
            "review": Ask("b", "{code} {request}"),
            "docs": Map("b", "{item}", over="code"),
            "other": FanOut(("a", "b"), "{request}"),
            "talk": Debate(("a", "b"), "x", reply="{other} {docs}", judge="a", verdict="{first}{second}{question}"),
        }
    )
    planned = plan(crew)
    assert list(planned) == ["code", "other", "review", "docs", "last", "talk"]
    assert {name: (step.needs, step.stage) for name, step in planned.items()} == {
        "code": ((), 0), "other": ((), 0), "review": (("code",), 1), "docs": (("code",), 1), "talk": (("docs",), 2),
        "last": (("code", "docs", "review", "other"), 2),
    }  # fmt: skip
    assert planned["talk"].agents == planned["other"].agents == ("a", "b")
    assert crew.outcome == "talk"
    assert pickle.loads(pickle.dumps(crew)) == crew


def test_a_templates_own_names_go_before_inputs_of_the_same_name() -> None:
    votes = FanOut(("a", "b"), "{question}", vote="judge", judge="a", verdict="{question} {answers}")
    assert plan(pipeline({"s": votes}, inputs={"question": None, "answers": "x"}))["s"].needs == ()


@pytest.mark.parametrize(
    ("steps", "key", "problem"),
    [
        ({"s": Ask("c", "x")}, "steps.s.ask", "no agent 'c'; there are: a, b"),
        ({"s": FanOut(("a", "c"), "x")}, "steps.s.fan_out.1", "no agent 'c'"),
        ({"s": Debate(("a", "b"), "x", judge="c")}, "steps.s.judge", "no agent 'c'"),
        ({"s": Ask("a", "{reqest}")}, "steps.s.prompt", "no input or step 'reqest'; there are: request, s; for the word"),
        ({"s": Ask("a", "{item}")}, "steps.s.prompt", "no input or step 'item'"),
        ({"s": Ask("a", "{request.x}")}, "steps.s.prompt", "only a name may stand in braces, not {request.x}"),
        ({"s": Debate(("a", "b"), "x", reply="{answers}")}, "steps.s.reply", "no input or step 'answers'; there are: request, s"),
        ({"s": Map("a", "{item}", over="lines")}, "steps.s.over", "no input or step 'lines'; there are: request, s"),
        ({"s": Ask("a", "x", when=Condition("request", equals="x"))}, "steps.s.when.step", "no step 'request'; there are: s"),
        ({"s": Ask("a", "x", needs=("t",))}, "steps.s.needs.0", "no step 't'"),
        ({"s": Ask("a", "x", otherwise="y")}, "steps.s.otherwise", "neither when nor unless"),
        ({"request": Ask("a", "x")}, "steps.request", "an input of this name"),
        ({"s": Ask("a", "{s}")}, "steps.s", "waits for itself: s → s"),
        ({"r": Ask("a", "{s}"), "s": Ask("a", "{t}"), "t": Ask("b", "{s}")}, "steps.s", "waits for itself: s → t → s"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit_are_named_with_what_there_is(steps: dict[str, Any], key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        plan(pipeline(steps), source="crew.yaml")
    assert (wrong.value.source, wrong.value.key) == ("crew.yaml", key)
    assert problem in wrong.value.problem


def test_the_result_is_a_step() -> None:
    with pytest.raises(ConfigError, match="p: result: no step 'x'; there are: s"):
        plan(pipeline({"s": Ask("a", "x")}, result="x"))


def test_one_agent_that_is_there_already_cannot_work_on_two_things_at_once() -> None:
    steps = {"s": Map("a", "{item}", over="request", concurrency=2)}
    with pytest.raises(ConfigError, match=r"steps\.s\.concurrency: 'a' is one existing agent"):
        plan(pipeline(steps, agents={"a": Agent(existing="ada")}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Agent(),
        lambda: Agent("m", existing="a"),
        lambda: Agent(existing="a", window=512),
        lambda: Agent("m", priority=10**9),
        lambda: Options(temperature=-1),
        lambda: Options(max_tokens=0),
        lambda: Options(max_tokens="1"),  # type: ignore[arg-type]
        lambda: Condition("s"),
        lambda: Condition("s", contains="x", equals="y"),
        lambda: Condition("s", matches="("),
        lambda: FanOut(("a",), "x"),
        lambda: FanOut(("a", "b"), "x", vote="judge"),
        lambda: FanOut(("a", "b"), "x", judge="c"),
        lambda: Debate(("a", "a"), "x"),
        lambda: Debate(("a", "b"), "x", rounds=0),
        lambda: Map("a", "x", over="y", concurrency=0),
        lambda: Ask("a b", "x"),
        lambda: Ask("a", "x", kepe="code"),  # type: ignore[call-arg]
        lambda: pipeline({}),
        lambda: pipeline({"s": "ask"}),
        lambda: pipeline({"s": Ask("a", "x")}, name="../x"),
    ],
)
def test_values_out_of_range_are_refused_when_they_are_made(make: Any) -> None:
    with pytest.raises(ValidationError):
        make()


def test_conditions_compare_texts() -> None:
    assert Condition("s", contains="b c").holds("a b c")
    assert Condition("s", matches=r"^\d+$").holds("12")
    assert not Condition("s", matches=r"^\d+$").holds("12a")
    assert Condition("s", equals=" yes").holds("yes\n")


# --- inputs -------------------------------------------------------------------------------------------------------------


def test_inputs_are_those_given_or_their_defaults() -> None:
    work = pipeline({"s": Ask("a", "x")}, inputs={"request": None, "style": "short", "many": ("x", "y")})
    assert given_inputs(work, {"request": ["a", "b"]}) == {"request": ("a", "b"), "style": "short", "many": ("x", "y")}
    for given, message in (
        ({}, "inputs.request: has no default and must be given"),
        ({"request": "x", "stile": "y"}, "inputs: no input 'stile'; there are: request, style, many"),
        ({"request": 1}, "inputs.request: a text or several are expected, not int"),
        ({"request": ["x", 1]}, "inputs.request: a text or several are expected, not list"),
    ):
        with pytest.raises(InvalidRequest) as wrong:
            given_inputs(work, given)  # type: ignore[arg-type]
        assert str(wrong.value) == message


# --- files --------------------------------------------------------------------------------------------------------------


def test_what_comes_along_is_found_by_name() -> None:
    assert list(examples()) == ["code_crew", "debate", "map", "vote"]
    for name in examples():
        assert load(name).name == name
    with pytest.raises(
        InvalidRequest, match="no file 'vtoe', and none that comes along; those are: code_crew, debate, map, vote"
    ):
        load("vtoe")


def test_a_file_says_the_same_as_python(tmp_path: Path) -> None:
    path = tmp_path / "explain.yaml"
    path.write_text(
        """
inputs: {request: null, many: [x, "y"]}
agents:
  a: {model: m, window: 512, service_class: best_effort, options: {seed: 1, stop: [END]}}
  b: {existing: ada}
steps:
  code: {ask: a, prompt: "{request}", keep: code, fresh: false}
  each: {map: b, prompt: "{item}", over: many, unless: {step: code, equals: ""}, needs: [code]}
  vote: {fan_out: [a, b], prompt: x, vote: judge, judge: a}
  talk: {debate: [a, b], prompt: x, rounds: 3}
result: code
"""
    )
    assert load(path) == load(str(path)) == Pipeline(
        name="explain",
        inputs={"request": None, "many": ("x", "y")},
        agents={
            "a": Agent("m", window=512, service_class="best_effort", options=Options(seed=1, stop=("END",))),
            "b": Agent(existing="ada"),
        },
        steps={
            "code": Ask("a", "{request}", keep="code", fresh=False),
            "each": Map("b", "{item}", over="many", unless=Condition("code", equals=""), needs=("code",)),
            "vote": FanOut(("a", "b"), "x", vote="judge", judge="a"),
            "talk": Debate(("a", "b"), "x", rounds=3),
        },
        result="code",
    )  # fmt: skip


A = "agents: {a: {model: m}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agents: {", "line 1: is not valid YAML"),
        ("- a", "a mapping with agents and steps is expected, not list"),
        ("", "a mapping with agents and steps is expected, not NoneType"),
        (A, "steps: is missing"),
        (A + "steps: {}", "steps: dictionary should have at least 1 item"),
        (A + "steps: {s: {ask: a}}", "steps.s.prompt: is missing"),
        (A + "steps: {s: {prompt: a}}", "steps.s: a step says first what it does: ask, fan_out, debate, map"),
        (A + "steps: {s: a}", "steps.s: a step says first what it does"),
        (A + "steps: {s: {ask: a, prompt: 1}}", "steps.s.prompt: input should be a valid string"),
        (A + "steps: {s: {ask: a, promt: x}}", "steps.s.p"),
        (A + "steps: {s: {ask: a, prompt: x, vote: majority}}", "steps.s.vote: unknown key; known here: ask, fresh, keep, needs"),
        (A + "steps: {s: {ask: a, prompt: x, options: {tmp: 1}}}", "steps.s.options.tmp: unknown key; known here: max_tokens"),
        (A + "steps: {s: {ask: a, prompt: x, when: {step: s}}}", "steps.s.when: exactly one of contains, matches and equals"),
        (A + "steps: {s: {ask: a, prompt: x, when: {stp: s}}}", "steps.s.when."),
        (A + "steps: {s: {ask: a, prompt: x}, s: {ask: a, prompt: y}}", "line 2: is not valid YAML: 's' is given twice"),
        (A + "steps: {s: {ask: a, prompt: x, keep: cod}}", "steps.s.keep: input should be 'text', 'code'"),
        (A + "steps: {s: {map: a, prompt: x, over: y, concurrency: 1.5}}", "steps.s.concurrency: "),
        (A + "steps: {s: {ask: a, prompt: x}}\nresult: t", "result: no step 't'"),
        (A + "steps: {s: {ask: a, prompt: x}}\ninput: {}", "input: unknown key; known here: about, agents, inputs, name"),
        (A + "inputs: {i: 3}\nsteps: {s: {ask: a, prompt: x}}", "inputs.i: "),
        (A + "inputs: {1: x}\nsteps: {s: {ask: a, prompt: x}}", "inputs.1"),
        (A + "steps: {s: {ask: a, prompt: 2026-01-01}}", "holds a value that no option takes"),
        ("agents: {a: {modle: m}}\nsteps: {s: {ask: a, prompt: x}}", "agents.a.modle: unknown key; known here: existing, model"),
        ("agents: {a: {}}\nsteps: {s: {ask: a, prompt: x}}", "agents.a: give model, or existing"),
        (
            A + "steps: {s: {ask: a, prompt: !!python/object/apply:os.system [ls]}}",
            "line 2: is not valid YAML: could not determine",
        ),
        ("&a [*a]", "a mapping with agents and steps is expected"),
        ("agents: &a {a: *a}", "holds a value that no option takes"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_by_file_and_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        parse(text, source="x.yaml", name="x")
    assert str(wrong.value).startswith(f"x.yaml: {message}"), str(wrong.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"#" * (1 << 20) + b"#", None], ids=["no text", "too large", "missing"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as wrong:
        load(path)
    assert wrong.value.source == str(path)
