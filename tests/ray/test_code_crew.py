"""The code crew in a real cluster on the shipped models: three agents of its own processes, and nobody left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray.exceptions import RayTaskError

from conductor.errors import AdmissionRefused, UnknownModel
from conductor.types import DecodeResult
from pipelines.code_crew import ROLES, CodeCrew, code_in
from tests.conftest import ROOT
from tests.support.conducting import Conduct, Conductor

REQUEST = "Write a Python function `is_prime(n)` that checks whether a number is prime."


@pytest.fixture
def conductor(conduct: Conduct) -> Iterator[Conductor]:
    """With the shipped models; at the end nobody may be left."""
    conductor = conduct({role: ROOT / "models" / f"{role}.gguf" for role in ROLES})
    yield conductor
    assert conductor.is_empty()


def names(conductor: Conductor) -> list[str]:
    return [agent.id for agent in conductor.call("list")]


def test_all_three_answer_and_leave(conductor: Conductor) -> None:
    heard: list[tuple[str, DecodeResult]] = []
    with CodeCrew(conductor.handle, name="trio") as crew:
        assert names(conductor) == ["trio-coder", "trio-reviewer", "trio-documenter"]
        result = crew.run(REQUEST, on_turn=lambda role, turn: heard.append((role, turn)))
    assert names(conductor) == []
    assert "def is_prime(n)" in result.code
    assert "```" not in result.code
    assert "is_prime" in result.documentation
    assert result.review
    assert [turn.agent_id for turn in result.turns] == ["trio-coder", "trio-reviewer", "trio-documenter"]
    assert all(turn.stopped_on_eos for turn in result.turns)
    assert heard[0] == ("coder", result.turns[0])
    assert dict(heard[1:]) == {"reviewer": result.turns[1], "documenter": result.turns[2]}
    assert result.to_json().keys() == {"request", "code", "review", "documentation", "turns"}


@pytest.mark.slow
def test_nobody_stays_when_one_role_cannot_come(conductor: Conductor) -> None:
    with pytest.raises(UnknownModel) as unknown, CodeCrew(conductor.handle, models={**ROLES, "documenter": "poet"}):
        pytest.fail("a crew of two began to work")
    assert not isinstance(unknown.value, RayTaskError)
    assert unknown.value.model == "poet"
    assert names(conductor) == []
    held = conductor.call("reserve", "somebody else", 52 << 20)
    with pytest.raises(AdmissionRefused), CodeCrew(conductor.handle):
        pytest.fail("a crew that does not fit began to work")
    assert conductor.call("release", held) == 52 << 20


@pytest.mark.slow
def test_everybody_leaves_when_the_work_fails(conductor: Conductor) -> None:
    def interrupt(role: str, turn: DecodeResult) -> None:
        raise KeyboardInterrupt(role)

    with pytest.raises(KeyboardInterrupt, match="coder"), CodeCrew(conductor.handle) as crew:
        crew.run(REQUEST, on_turn=interrupt)
    assert names(conductor) == []


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Here:\n```python\nx = 1\n\ny = 2\n```\nDone.", "x = 1\n\ny = 2"),
        ("```\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```\nThat was it.", "x = 1"),
        ("```Python 3\nx = 1\n```\nThat was it.", "x = 1"),
        ("```python\nx = 1\n```\nor\n```python\nx = 2\n```", "x = 1"),
        ("```python\ndef f():\n    '''```'''\n```", "def f():\n    '''```'''"),
        ("```python\nx = 1  # cut off", "x = 1  # cut off"),
        ("```python\n```", ""),
        ("  x = 1\n", "x = 1"),
        ("", ""),
    ],
)
def test_code_is_the_first_fenced_block_or_everything(answer: str, code: str) -> None:
    assert code_in(answer) == code
