"""Who may come in: one pure decision over numbers, ordered from worst to best, with the numbers that explain it.

The promise kept at admission: the weights of every admitted model, and the contexts of as many agents as may be live
at once (the largest of each model, `live_contexts` of them), fit under the cap together with everything else booked.
Whoever was admitted can therefore always have its turn, whatever the order of turns.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from conductor.types import ModelId


class Outcome(enum.IntEnum):
    """Ordered: a larger one is better for the newcomer."""

    NEVER_FITS = 0  #: not on this device, even with nobody else on it
    WAIT = 1  #: not now
    FIT = 2


@dataclass(frozen=True, slots=True)
class Decision:
    outcome: Outcome
    weights_bytes: int  #: to be booked for the model; 0 if its weights are booked already
    requested_bytes: int  #: what the newcomer adds to the ledger


def largest_contexts(contexts: Iterable[tuple[ModelId, int]]) -> dict[ModelId, int]:
    """Of each model the largest context that any of its agents may need."""
    largest: dict[ModelId, int] = {}
    for model, size in contexts:
        if size > largest.get(model, -1):
            largest[model] = size
    return largest


def promise_bytes(largest: Mapping[ModelId, int], *, live_contexts: int) -> int:
    """The most that live contexts can need at once, given `largest_contexts`.

    At most one context of a model is live, and at most `live_contexts` in all, so the worst case is the sum of the
    largest `live_contexts` among them.
    """
    return sum(heapq.nlargest(live_contexts, largest.values()))


def decide(
    *,
    cap_bytes: int,
    booked_bytes: int,
    fixed_bytes: int,
    promised_bytes: int,
    promise_bytes: int,
    context_bytes: int,
    weights_bytes: int,
    weights_are_booked: bool,
) -> Decision:
    """Decide on a newcomer that needs `weights_bytes` and, while live, `context_bytes`.

    `promised_bytes` is the promise without it, `promise_bytes` with it.

    1. What it adds is free: FIT, whatever the estimate of weights that are booked as measured says.
    2. Alone on the device (beside `fixed_bytes`, which nobody can give back) it does not fit: NEVER_FITS.
    3. Otherwise: WAIT.
    """
    weights = 0 if weights_are_booked else weights_bytes
    requested = weights + promise_bytes - promised_bytes
    if requested <= cap_bytes - booked_bytes:  # (1)
        outcome = Outcome.FIT
    elif fixed_bytes + weights_bytes + context_bytes > cap_bytes:  # (2)
        outcome = Outcome.NEVER_FITS
    else:  # (3)
        outcome = Outcome.WAIT
    return Decision(outcome, weights, requested)


def largest_window(fits: Callable[[int], bool], *, below: int, granularity: int = 256) -> int | None:
    """The longest window shorter than `below` that `fits`, in llama.cpp's steps of 256 tokens; None if none does.

    `fits` must be monotone: what fits a window fits any shorter one.
    """
    low, high = 0, max(0, (below - 1) // granularity)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * granularity) else (low, middle - 1)
    return low * granularity or None

