"""Errors in a batch: whose it is ends, and nobody else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.backend.llama import Context, LlamaError, NoRoom
from conductor.backend.turn import TurnOutcome
from conductor.errors import DecodeFailed, InternalError
from conductor.types import Chunk, PoolId
from tests.support.company import alone, prompt, same
from tests.support.growing import WITHIN_S, Stage, all_of

pytestmark = pytest.mark.usefixtures("samplers_are_closed")


def failing(monkeypatch: pytest.MonkeyPatch, error: LlamaError, when: Callable[[Context], bool], *, times: int = 10**9) -> None:
    """A decode that fails instead of being done, with nothing changed."""
    inner, left = Context.decode, [times]

    def decode(self: Context) -> None:
        if left[0] and when(self):
            left[0] -= 1
            raise error
        inner(self)

    monkeypatch.setattr(Context, "decode", decode)


def test_whose_cache_is_full_fails_alone(together: Callable[..., tuple[Stage, PoolId]], monkeypatch: pytest.MonkeyPatch) -> None:
    stage, pool = together()
    prompts = {f"agent {n}": prompt(n) for n in range(4)}
    expected = alone(stage, prompts, max_tokens=40)
    agents = {name: stage.sits(name, pool) for name in prompts}
    culprit = agents["agent 2"]

    def is_in_it(context: Context) -> bool:
        batch = context.batch
        runs = culprit.tokens > 60 and culprit.id in stage.engine.progress()
        return runs and culprit.slot in batch._sequence[: batch.count]

    failing(monkeypatch, NoRoom("full"), is_in_it)
    turns = {name: agents[name].begins(agents[name].request(text, max_tokens=40)) for name, text in prompts.items()}
    with pytest.raises(DecodeFailed, match="full"):
        turns.pop("agent 2").result(WITHIN_S)
    for name, turn in turns.items():
        end = turn.result(WITHIN_S)
        assert isinstance(end, TurnOutcome)
        assert same(stage, agents[name], end.tokens, expected[name])
    assert culprit.cached == 0
    assert culprit.tokens > 60


def test_a_fatal_error_ends_all_turns_of_its_step_and_keeps_their_tokens(
    together: Callable[..., tuple[Stage, PoolId]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, pool = together()
    agents = [stage.sits(f"agent {n}", pool) for n in range(3)]
    idle = stage.sits("idle", pool)
    idle.says("hello ", max_tokens=10)
    with monkeypatch.context() as broken:
        failing(broken, LlamaError("out of order"), lambda context: agents[0].tokens > 40, times=1)
        with idle.busy():
            turns = [agent.begins(agent.request("hello agent " * 3, max_tokens=60)) for agent in agents]
        for turn in turns:
            with pytest.raises(DecodeFailed, match="out of order"):
                turn.result(WITHIN_S)
    assert [agent.cached for agent in agents] == [0, 0, 0]
    assert all(agent.tokens > 30 for agent in agents)
    assert idle.cached > 0
    for n, agent in enumerate(agents):  # who comes after the first takes what it holds of the same tokens
        held, said = agent.tokens, agent.says("and ", max_tokens=5)
        assert said.recomputed_tokens == held - 1 if n == 0 else said.prefix_tokens_reused >= held - 1


def test_who_does_not_listen_ends_alone(together: Callable[..., tuple[Stage, PoolId]]) -> None:
    stage, pool = together()
    deaf, other = stage.sits("deaf", pool), stage.sits("other", pool)

    def broken(chunk: Chunk) -> None:
        raise OSError("nobody listens")

    with deaf.busy():
        turns = [deaf.begins(deaf.request("hello ", max_tokens=30), emit=broken), other.begins(other.request("x", max_tokens=30))]
    with pytest.raises(OSError, match="nobody listens"):
        turns[0].result(WITHIN_S)
    assert len(all_of(turns[1:])[0].tokens) == 30
    assert deaf.says("and ", max_tokens=5).recomputed_tokens == 0


def test_a_bug_in_the_pools_own_work_ends_its_turns_and_not_its_thread(
    together: Callable[..., tuple[Stage, PoolId]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, pool = together()
    agent = stage.sits("agent", pool)
    agent.in_step(3, lambda: [][1])
    with pytest.raises(InternalError, match="IndexError"):
        agent.step(agent.request("hello ", max_tokens=30))
    assert agent.says("and ", max_tokens=5).recomputed_tokens > 0


def test_a_pool_is_not_closed_under_anybody_and_has_no_more_seats_than_slots(
    together: Callable[..., tuple[Stage, PoolId]],
) -> None:
    stage, pool = together("llama", 2)
    agents = [stage.sits(f"agent {n}", pool) for n in range(2)]
    with pytest.raises(InternalError):
        stage.sits("one too many", pool)
    with pytest.raises(InternalError):
        stage.engine.close_pool(pool)
    assert agents[0].says("hello ", max_tokens=5).tokens
