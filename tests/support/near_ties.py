"""Telling llama.cpp's rounding from a mistake, where tokens differ.

A sum rounds otherwise in another company: what decodes beside an agent decides which of llama.cpp's kernels computes it. So
two runs may part where the best tokens nearly tie, and nowhere else; a cache that is wrong makes them part anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from conductor.types import ContextSpec
from tests.support.growing import Stage


def part_only_at_a_tie(
    stage: Stage, before: Sequence[int], said: Sequence[int], expected: Sequence[int], *, within: float = 0.02
) -> bool:
    """Whether both answers to `before` are the same up to a place where the logits of the two tokens are that close."""
    for n, (token, other) in enumerate(zip(said, expected, strict=False)):
        if token != other:
            logits = _logits(stage, [*before, *expected[:n]])
            return bool(logits.max() - logits[token] <= within and logits.max() - logits[other] <= within)
    return len(said) == len(expected)


def _logits(stage: Stage, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Of the next token, by a fresh context that decodes them all at once."""
    model = stage.engine._models[stage.plan.id].model
    size = len(tokens)
    context = model.context(ContextSpec(window=size, n_batch=size, n_ubatch=size), n_threads=1)
    try:
        context.batch.add(tokens, 0, 0, output=True)
        context.decode()
        context.synchronize()
        return context.logits(1)[0].copy()
    finally:
        context.close()
