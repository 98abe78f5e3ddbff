"""Hostile files: whatever becomes of one, the conductor lives, its ledger is as it was, and a typed error says what is wrong.

A sample; `python benchmarks/mutants.py` puts a thousand to the test.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.anatomy import STRING, Anatomy
from tests.support.mutants import KINDS, LATER, ODD, Mutant, bases, mutants
from tests.support.mutations import files
from tests.support.trial import WORKED, Outcome, Trial

#: one whose chat template fails at once
SEED = 15


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    with Trial(tmp_path, patience_s=20) as trial:
        yield trial


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return bases()[0]


def wrong(mutant: Mutant, outcome: Outcome) -> list[str]:
    """What must not be, with what it came of."""
    late = [f"{outcome.seconds:.0f} s"] * (outcome.seconds > 10)
    return [f"{mutant.kind}, {mutant.what}: {word} ({outcome.message})" for word in (*outcome.wrong, *late)]


def test_the_models_that_mutants_come_from_work(trial: Trial) -> None:
    for anatomy in bases():
        outcome = trial.put(Mutant("none", anatomy.architecture, files.written(anatomy.written())))
        assert (outcome.name, outcome.turns, outcome.wrong) == (WORKED, [WORKED] * 3, [])


def test_fifty_mutants_of_all_kinds_end_in_an_error_or_work_and_nothing_is_left(trial: Trial) -> None:
    sample = list(mutants(50, seed=SEED))
    outcomes = [trial.put(mutant) for mutant in sample]
    assert [word for mutant, outcome in zip(sample, outcomes, strict=True) for word in wrong(mutant, outcome)] == []
    assert {mutant.kind for mutant in sample} == set(KINDS)
    assert 10 <= sum(outcome.name == WORKED for outcome in outcomes) <= 40
    assert trial.children == 1


def test_what_is_no_file_to_speak_of_is_refused(trial: Trial, anatomy: Anatomy) -> None:
    for what, place in files.odd_files(anatomy.copy()):
        mutant = Mutant(ODD, what, place)
        assert wrong(mutant, trial.put(mutant)) == []
    assert trial.children == 1


def test_a_file_that_changes_between_its_price_and_its_load_is_refused(trial: Trial, anatomy: Anatomy) -> None:
    for what, later in files.changes(anatomy.copy(), random.Random(0)):
        mutant = Mutant(LATER, what, files.written(anatomy.written()), later)
        outcome = trial.put(mutant)
        assert wrong(mutant, outcome) == []
        assert outcome.name in ("BadModelFile", "ModelLoadFailed"), mutant


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", marks=pytest.mark.slow),
        "{{ 9**(9**9) }}",  # holds the interpreter, at its compilation already
    ],
)
def test_a_chat_template_that_never_ends_costs_its_own_turn_only(trial: Trial, anatomy: Anatomy, template: str) -> None:
    endless = anatomy.copy()
    endless.put("tokenizer.chat_template", STRING, template.encode())
    mutant = Mutant("chat templates", template, files.written(endless.written()))
    outcome = trial.put(mutant)
    assert wrong(mutant, outcome) == []
    assert outcome.turns == [WORKED, WORKED, "ChatTemplateFailed"]
