"""Whose prompt is read in a step, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence


def portions(lacks: Sequence[int], room: int) -> list[int]:
    """Tokens of each prompt to read now, given what each lacks in the order in which they came, and room for so many.

    Whole ones, as many as fit: a piece would have to be followed by another one, in a pass over the weights of its own. Only the
    first is cut if it does not fit.
    """
    shares = [0] * len(lacks)
    left = room
    for i, lack in enumerate(lacks):
        if lack <= left or (left == room and lack):
            shares[i] = min(lack, left)
            left -= shares[i]
    return shares
