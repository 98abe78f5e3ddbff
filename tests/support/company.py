"""Agents in company: what each says alone, and whether that is what it said."""

from __future__ import annotations

from typing import Any

from tests.support.growing import Stage, Talker
from tests.support.near_ties import part_only_at_a_tie

ARCHITECTURES = ("llama", "qwen2", "gemma3", "mamba", "jamba")
SPEC: dict[str, Any] = {"window": 512, "n_batch": 32, "n_ubatch": 32}


def prompt(n: int) -> str:
    """Of four lengths."""
    return f"agent {n}: " + "the world and the model say hello. " * (1 + n % 4)


def alone(stage: Stage, prompts: dict[str, str], **options: Any) -> dict[str, tuple[int, ...]]:
    """What each says with nobody else there."""
    said = {}
    for name, text in prompts.items():
        witness = stage.talker(f"witness of {name}", **SPEC)
        said[name] = witness.says(text, **options).tokens
        witness.leaves()
    return said


def same(stage: Stage, agent: Talker, said: tuple[int, ...], expected: tuple[int, ...], *, within: float = 0.02) -> bool:
    """Whether an agent whose newest turn this is said what it says alone, but for llama.cpp's rounding."""
    before = agent.conversation.tokens[: agent.tokens - len(said)]
    return part_only_at_a_tie(stage, before, said, expected, within=within)
