"""What a run makes of its agents' answers and failures, with agents that say what a test tells them to. No Ray, no model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from conductor.errors import DecodeFailed, InvalidRequest, ServiceFailed, TurnCancelled, UnknownModel
from conductor.types import AgentId, DecodeResult, FinishReason
from pipelines.library import (
    Agent,
    AgentFailed,
    Ask,
    Condition,
    Debate,
    Event,
    FanOut,
    Map,
    Options,
    Pipeline,
    RunResult,
    StepBegan,
    StepEnded,
    StepState,
    TurnEnded,
    arun,
    run,
    start,
)

Answer = str | Exception
Says = Callable[[str], Answer]


def result_of(text: str, finish_reason: FinishReason = FinishReason.EOS) -> DecodeResult:
    return DecodeResult(
        agent_id=AgentId("a"), text=text, tokens=(1, 2), prompt_tokens=3, prompt_tokens_reused=1, prefix_tokens_reused=1,
        generated_tokens=2, stopped_on_eos=True, finish_reason=finish_reason, seed=0, elapsed_ms=5.0, queue_ms=1.0,
        time_to_first_token_ms=2.0, longest_stall_ms=0.0, kv_swap_evicted=None, kv_swap_restored=False, swap_bytes=7,
        window_growths=0, pauses=0, recomputed_tokens=0,
    )  # fmt: skip


class Remote:
    """A method of a handle: the call is on its way as soon as it is made, whether anybody waits for it or not."""

    def __init__(self, call: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self.remote = lambda *arguments, **options: asyncio.create_task(call(*arguments, **options))


class Scripted:
    """Stands for an AgentActor's handle. Says what `says` makes of a prompt; "wait" waits until it is cancelled."""

    def __init__(self, says: Says, *, refused: Exception | None = None) -> None:
        self._says, self._refused = says, refused
        self.asked: list[tuple[str, bool, dict[str, Any]]] = []
        self.at_once = self.most_at_once = 0
        self.waits = asyncio.Event()
        self._cancelled = asyncio.Event()
        self.admission, self.ask, self.cancel = Remote(self._admission), Remote(self._ask), Remote(self._cancel)

    async def _admission(self) -> None:
        if self._refused is not None:
            raise self._refused

    async def _ask(self, text: str, *, fresh: bool, **options: Any) -> DecodeResult:
        self.asked.append((text, fresh, options))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        said = self._says(text)
        if isinstance(said, Exception):
            raise said
        if said != "wait":
            return result_of(said)
        self.waits.set()
        await self._cancelled.wait()
        return result_of("so f", FinishReason.CANCELLED)

    async def _cancel(self) -> int:
        self._cancelled.set()
        return 1


NOBODY: Any = object()  #: a conductor that nobody calls


def echo(text: str) -> str:
    return f"<{text}>"


async def running(steps: dict[str, Any], agents: dict[str, Scripted], **options: Any) -> RunResult:
    inputs = options.pop("inputs", {})
    given = options.pop("given", {})
    work = Pipeline(name="p", inputs=inputs, agents={name: Agent("m") for name in agents}, steps=steps)
    return await arun(work, given, conductor=NOBODY, agents=agents, **options)


def states(result: RunResult) -> dict[str, str]:
    return {step.step: step.state.value for step in result.steps}


# --- one step after another ---------------------------------------------------------------------------------------------


async def test_steps_see_the_texts_of_those_before_and_the_result_tells_each_cost() -> None:
    ada, bob = Scripted(echo), Scripted(lambda text: "```\ncode\n```")
    heard: list[Event] = []
    result = await running(
        {"code": Ask("bob", "{request} {many}", keep="code"), "review": Ask("ada", "see {code}", fresh=False)},
        {"ada": ada, "bob": bob},
        inputs={"request": None, "many": ("x", "y")},
        given={"request": "write {code}"},
        on_event=heard.append,
    )
    assert (result.ok, result.text) == (True, "<see code>")
    assert bob.asked == [("write {code} x\n\ny", True, {"max_tokens": 512})]
    assert ada.asked == [("see code", False, {"max_tokens": 512})]
    assert [type(event) for event in heard] == [StepBegan, TurnEnded, StepEnded] * 2
    review = result.step("review")
    assert (review.cost.turns, review.cost.generated_tokens, review.cost.reused_tokens, review.cost.swap_bytes) == (1, 2, 2, 7)
    assert (result.cost.turns, result.cost.queue_ms, review.finish_reason) == (2, 2.0, FinishReason.EOS)
    told: Any = result.to_json()
    assert [step["text"] for step in told["steps"]] == ["code", "<see code>"]
    assert (told["steps"][0]["cost"]["prompt_tokens"], told["steps"][0]["finish_reason"], told["steps"][0]["error"]) == (
        3,
        "eos",
        None,
    )


async def test_options_of_a_step_go_before_those_of_its_agent() -> None:
    ada = Scripted(echo)
    agents = {"ada": Agent("m", options=Options(max_tokens=9, seed=1))}
    work = Pipeline(name="p", agents=agents, steps={"s": Ask("ada", "x", options=Options(seed=2, timeout_s=1.5))})
    assert (await arun(work, conductor=NOBODY, agents={"ada": ada})).ok
    assert ada.asked == [("x", True, {"max_tokens": 9, "seed": 2, "timeout_s": 1.5})]


@pytest.mark.parametrize(
    ("condition", "states_and_text"),
    [
        ({"when": Condition("look", contains="flaw")}, ({"look": "done", "fix": "done", "show": "done"}, "<see <fix>>")),
        ({"unless": Condition("look", contains="flaw")}, ({"look": "done", "fix": "skipped", "show": "skipped"}, None)),
        (
            {"unless": Condition("look", contains="flaw"), "otherwise": "as {look}"},
            ({"look": "done", "fix": "skipped", "show": "done"}, "<see as <a flaw>>"),
        ),
    ],
)
async def test_a_step_is_skipped_if_its_condition_does_not_hold(condition: dict[str, Any], states_and_text: Any) -> None:
    steps = {"look": Ask("ada", "a flaw"), "fix": Ask("ada", "fix", **condition), "show": Ask("ada", "see {fix}")}
    result = await running(steps, {"ada": Scripted(echo)})
    assert (states(result), result.text) == states_and_text
    assert result.ok


async def test_a_failed_step_fails_those_that_need_it_and_no_others() -> None:
    def fails(text: str) -> Answer:
        return DecodeFailed(AgentId("bob"), "no luck")

    steps = {
        "broken": Ask("bob", "x"), "fine": Ask("ada", "y"), "after": Ask("ada", "{broken}"), "last": Ask("ada", "{after}{fine}"),
        "beside": Ask("ada", "{fine}"),
    }  # fmt: skip
    result = await running(steps, {"ada": Scripted(echo), "bob": Scripted(fails)})
    assert states(result) == {"broken": "failed", "fine": "done", "after": "blocked", "last": "blocked", "beside": "done"}
    assert (result.ok, result.text) == (False, "<<y>>")
    assert isinstance(result.step("broken").error, DecodeFailed)
    assert [result.step(name).note for name in ("after", "last")] == [
        "needs broken, which failed", "needs after, which could not be done",
    ]  # fmt: skip
    told: Any = result.step("broken").to_json()
    assert told["error"]["error"] == "DecodeFailed"
    assert "no luck" in told["turns"][0]["error"]["message"]


async def test_an_agent_that_is_refused_fails_its_own_steps() -> None:
    heard: list[Event] = []
    bob = Scripted(echo, refused=UnknownModel("m", ()))
    steps = {"s": Ask("ada", "x"), "t": Ask("bob", "x"), "u": Map("bob", "{item}", over="s")}
    result = await running(steps, {"ada": Scripted(echo), "bob": bob}, on_event=heard.append)
    assert states(result) == {"s": "done", "t": "failed", "u": "failed"}
    assert [event.agent for event in heard if isinstance(event, AgentFailed)] == ["bob"]
    assert bob.asked == []


async def test_an_agent_whose_process_died_is_an_error_of_its_step() -> None:
    result = await running({"s": Ask("ada", "x")}, {"ada": Scripted(lambda text: ActorDiedError())})
    error = result.step("s").error
    assert isinstance(error, ServiceFailed)
    assert "agent 'ada' does not answer" in str(error)


async def test_a_listener_that_raises_ends_the_run() -> None:
    def interrupt(event: Event) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        await running({"s": Ask("ada", "x"), "t": Ask("ada", "wait")}, {"ada": Scripted(lambda text: text)}, on_event=interrupt)


async def test_agents_that_are_not_of_the_pipeline_are_refused() -> None:
    work = Pipeline(name="p", agents={"ada": Agent("m")}, steps={"s": Ask("ada", "x")})
    with pytest.raises(InvalidRequest, match="agents: no agent 'bob'; there are: ada"):
        await arun(work, conductor=NOBODY, agents={"bob": "bob-1"})


# --- votes, debates, maps -----------------------------------------------------------------------------------------------


def voters(*answers: Answer) -> dict[str, Scripted]:
    return {f"v{i}": Scripted(lambda text, answer=answer: answer) for i, answer in enumerate(answers)}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("answers", "text", "note"),
    [
        (("a", "b", " B"), "b", "2 of 3 agree"),
        (("a", "b", "c"), "a", "1 of 3 agree"),
        (("a", ValueError, "c"), None, ""),
        (("a", DecodeFailed(AgentId("v1"), "x"), "a"), "a", "2 of 2 agree; 1 of 3 failed"),
    ],
)
async def test_the_majority_wins_and_who_fails_has_no_vote(answers: Any, text: str | None, note: str) -> None:
    if ValueError in answers:  # our own bug is not hidden as a vote that is missing
        answers = [ValueError("bug") if answer is ValueError else answer for answer in answers]
        with pytest.raises(ValueError, match="bug"):
            await running({"s": FanOut(("v0", "v1", "v2"), "q", vote="majority")}, voters(*answers))
        return
    result = (await running({"s": FanOut(("v0", "v1", "v2"), "q", vote="majority")}, voters(*answers))).step("s")
    assert (result.state, result.text, result.note) == (StepState.DONE, text, note)
    assert len(result.answers) == len(result.turns) == 3


async def test_a_vote_fails_only_if_nobody_answers() -> None:
    failures = voters(DecodeFailed(AgentId("v0"), "x"), DecodeFailed(AgentId("v1"), "y"))
    result = (await running({"s": FanOut(("v0", "v1"), "q", vote="majority")}, failures)).step("s")
    assert (result.state, str(result.error)[:32]) == (StepState.FAILED, "decoding for 'v0' failed: x (the")


@pytest.mark.parametrize(
    ("verdict", "text", "note"),
    [
        ("Answer 2.", "b", "the judge chose answer 2 of 2"),
        ("neither", "a", "the judge named none of 1 to 2, so the majority decides: 1 of 2"),
        (DecodeFailed(AgentId("judge"), "x"), None, "the judge failed"),
    ],
)
async def test_a_judge_chooses_by_number_where_they_do_not_agree(verdict: Answer, text: str | None, note: str) -> None:
    judge = Scripted(lambda text: verdict)
    steps = {"s": FanOut(("v0", "v1"), "q", vote="judge", judge="judge")}
    result = (await running(steps, {**voters("a", "b"), "judge": judge})).step("s")
    assert (result.text, result.note, result.answers) == (text, note, ("a", "b"))
    assert (result.state is StepState.DONE) == (text is not None)
    assert "Question:\n\nq\n\nAnswer 1:\n\na\n\nAnswer 2:\n\nb" in judge.asked[0][0]
    assert (await running(steps, {**voters("a", "A"), "judge": judge})).step("s").note == "2 of 2 agree"
    assert len(judge.asked) == 1


async def test_without_a_vote_all_answers_are_the_text() -> None:
    result = (await running({"s": FanOut(("v0", "v1"), "q")}, voters("a", "b"))).step("s")
    assert (result.text, result.note) == ("a\n\nb", "")


async def test_debaters_read_each_other_until_they_agree() -> None:
    ada = Scripted(lambda text: "4" if text == "2+2?" else text.removeprefix("they say "))
    bob = Scripted(lambda text: "5")
    steps = {"s": Debate(("ada", "bob"), "2+2?", rounds=4, reply="they say {other}")}
    result = (await running(steps, {"ada": ada, "bob": bob})).step("s")
    assert (result.text, result.note) == ("5", "they agree after 2 of 4 rounds")
    assert [(text, fresh) for text, fresh, _ in ada.asked] == [("2+2?", True), ("they say 5", False)]
    assert [text for text, _, _ in bob.asked] == ["2+2?", "they say 4"]


async def test_debaters_who_do_not_agree_are_judged_or_both_told() -> None:
    agents = {"ada": Scripted(lambda text: "4"), "bob": Scripted(lambda text: "5")}
    both = (await running({"s": Debate(("ada", "bob"), "2+2?")}, agents)).step("s")
    assert (both.text, both.note) == ("ada:\n\n4\n\nbob:\n\n5", "2 rounds, no agreement")
    judge = Scripted(echo)
    debate = Debate(("ada", "bob"), "2+2?", rounds=1, judge="judge", verdict="{question} {first} {second}")
    judged = (await running({"s": debate}, {**agents, "judge": judge})).step("s")
    assert (judged.text, judged.note, judged.cost.turns) == ("<2+2? 4 5>", "1 round, no agreement; judged by judge", 3)


async def test_a_debate_of_one_is_none() -> None:
    agents = {"ada": Scripted(echo), "bob": Scripted(lambda text: DecodeFailed(AgentId("bob"), "x"))}
    result = (await running({"s": Debate(("ada", "bob"), "2+2?")}, agents)).step("s")
    assert (result.state, type(result.error), result.cost.turns) == (StepState.FAILED, DecodeFailed, 1)


async def test_a_map_tries_every_item_and_keeps_their_order() -> None:
    def says(text: str) -> Answer:
        return DecodeFailed(AgentId("ada"), "x") if text == "on b" else echo(text)

    ada = Scripted(says)
    steps = {"s": Map("ada", "on {item}", over="things", concurrency=3)}
    result = (await running(steps, {"ada": ada}, inputs={"things": ("a", "b", "c")})).step("s")
    assert (result.state, result.text, result.answers) == (StepState.FAILED, None, ("<on a>", None, "<on c>"))
    assert result.note == "3 items; 1 at a time, since no more agents were admitted; 1 failed"
    assert isinstance(result.error, DecodeFailed)
    assert ada.most_at_once == 1
    whole = (await running(steps, {"ada": Scripted(echo)}, inputs={"things": "a\n\nc"})).step("s")
    assert (whole.text, whole.answers) == ("<on a>\n\n<on c>", ("<on a>", "<on c>"))
    nothing = (await running(steps, {"ada": Scripted(echo)}, inputs={"things": ""})).step("s")
    assert (nothing.state, nothing.text, nothing.note) == (StepState.DONE, "", "nothing in things")


# --- ending early -------------------------------------------------------------------------------------------------------

WAITING = Pipeline(
    name="p",
    agents={"ada": Agent("m"), "bob": Agent("m")},
    steps={"done": Ask("bob", "x"), "waits": Ask("ada", "wait"), "never": Ask("bob", "{waits}")},
)


def test_a_run_that_is_cancelled_tells_what_was_done_until_then() -> None:
    one_is_done = threading.Event()

    def hear(event: Event) -> None:
        if isinstance(event, StepEnded) and event.result.step == "done":
            one_is_done.set()

    agents = {"ada": Scripted(lambda text: text), "bob": Scripted(echo)}
    running = start(WAITING, conductor=NOBODY, agents=agents, on_event=hear)
    assert one_is_done.wait(20)
    running.cancel()
    result = running.result(timeout_s=20)
    assert running.done
    assert states(result) == {"done": "done", "waits": "cancelled", "never": "cancelled"}
    assert (result.ok, result.text) == (False, None)
    [turn] = result.step("waits").turns
    assert turn.result is None or turn.result.text == "so f"
    assert isinstance(result.step("waits").error, TurnCancelled)
    running.cancel()


async def test_a_task_that_is_cancelled_raises_as_tasks_do() -> None:
    ada = Scripted(lambda text: text)
    heard = asyncio.Event()

    def hear(event: Event) -> None:
        if isinstance(event, StepEnded):
            heard.set()

    task = asyncio.create_task(arun(WAITING, conductor=NOBODY, agents={"ada": ada, "bob": Scripted(echo)}, on_event=hear))
    await heard.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_turn_that_somebody_else_ends_fails_its_step() -> None:
    ada = Scripted(lambda text: text)

    async def cancel() -> None:
        await ada.waits.wait()
        await ada.cancel.remote()

    result, _ = await asyncio.gather(running({"s": Ask("ada", "wait")}, {"ada": ada}), cancel())
    assert (result.step("s").state, result.step("s").text) == (StepState.FAILED, None)


async def test_run_works_where_a_loop_runs() -> None:
    work = Pipeline(name="p", agents={"ada": Agent("m")}, steps={"s": Ask("ada", "x")})
    assert run(work, conductor=NOBODY, agents={"ada": Scripted(echo)}).text == "<x>"


def test_run_works_where_no_loop_runs() -> None:
    work = Pipeline(name="p", agents={"ada": Agent("m")}, steps={"s": Ask("ada", "x")})
    assert run(work, conductor=NOBODY, agents={"ada": Scripted(echo)}).text == "<x>"
