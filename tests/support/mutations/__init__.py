"""How models are made wrong, by what is wrong: the container, what a model says of itself, its words, or the file as such.

An edit changes an `Anatomy` and says in a few words how. `number` goes up with each mutant of a kind, so an edit that picks its
case by it goes through all of them; `chance` is for the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from tests.support.anatomy import Anatomy

Edit: TypeAlias = Callable[[Anatomy, random.Random, int], str]
Case = TypeVar("Case")


def pick(cases: Sequence[Case], number: int) -> Case:
    return cases[number % len(cases)]
