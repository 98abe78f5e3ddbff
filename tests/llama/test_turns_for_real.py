"""Turns as users know them: conversations, the window's end, endings, sampling. Parrots where the text matters."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conductor.backend.kv_store import KvStore
from conductor.config import parse_config
from conductor.errors import InvalidRequest, UnknownAgent, WindowFull
from conductor.gpu_conductor import GpuConductor
from conductor.types import (
    Chunk,
    DecodeResult,
    FinishReason,
)
from tests.conftest import Start
from tests.support.parrot import write_parrot
from tests.support.talk import SHIPPED, TASK, agent_of, user
from tests.support.tiny_gguf import write_tiny_gguf

# --- conversations ----------------------------------------------------------------------------------------------------


async def test_reset_begins_anew(start: Start) -> None:
    conductor = await start({"coder": SHIPPED["coder"]})
    await conductor.register("ada", "coder")
    first = await conductor.decode("ada", TASK, max_tokens=8)
    continued = await conductor.decode("ada", TASK, max_tokens=8)
    again = await conductor.decode("ada", TASK, max_tokens=8, reset=True)
    assert again.tokens == first.tokens != continued.tokens
    assert (await agent_of(conductor, "ada")).tokens == first.prompt_tokens + 8


async def test_a_decode_without_a_prompt_goes_on_where_the_last_one_ended(start: Start) -> None:
    conductor = await start({"coder": SHIPPED["coder"]})
    for name in ("ada", "bob"):
        await conductor.register(name, "coder")
    parts = [await conductor.decode("ada", TASK, max_tokens=5), *[await conductor.decode("ada", max_tokens=5) for _ in range(3)]]
    whole = await conductor.decode("bob", TASK, max_tokens=20)
    assert sum((part.tokens for part in parts), ()) == whole.tokens
    assert "".join(part.text for part in parts) == whole.text


async def test_nothing_can_be_continued_before_it_began(start: Start) -> None:
    conductor = await start({"coder": SHIPPED["coder"]})
    await conductor.register("ada", "coder")
    for call in ({}, {"prompt": "hello", "messages": [user("hello")]}):
        with pytest.raises(InvalidRequest):
            await conductor.decode("ada", **call)
    with pytest.raises(UnknownAgent):
        await conductor.decode("bob", "hello")


async def test_a_conductor_starts_itself_when_it_is_first_asked(tmp_path: Path) -> None:
    config = parse_config({"device": {"kind": "host"}, "host_budget": 0}, source="test", directory=tmp_path)
    with pytest.raises(UnknownAgent):
        await GpuConductor(config).decode("ada", "hello")


# --- the window -------------------------------------------------------------------------------------------------------


async def test_a_prompt_longer_than_the_window_leaves_the_session_as_it_was(parrot: Start) -> None:
    conductor = await parrot("abcdefghij", ends=False, window=40)
    assert (await conductor.decode("polly", "xy", max_tokens=3)).text == "abc"
    with pytest.raises(WindowFull) as refused:
        await conductor.decode("polly", "x" * 40, max_tokens=3)
    assert (refused.value.window, refused.value.held_tokens, refused.value.new_tokens) == (40, 5, 40)
    assert (await agent_of(conductor, "polly")).tokens == 5
    with pytest.raises(WindowFull):
        await conductor.decode("polly", "x" * 40, reset=True)
    assert (await conductor.decode("polly", max_tokens=3)).text == "def"


async def test_an_answer_ends_with_its_window(parrot: Start) -> None:
    conductor = await parrot("abcdefghij", ends=False, window=20)
    result = await conductor.decode("polly", "x" * 15, max_tokens=100)
    assert (result.text, result.finish_reason) == ("abcde", FinishReason.WINDOW)
    assert (await agent_of(conductor, "polly")).tokens == 20
    with pytest.raises(WindowFull):
        await conductor.decode("polly")
    assert (await conductor.decode("polly", "x" * 19, reset=True)).text == "a"


async def test_a_context_shift_goes_on_past_the_window(parrot: Start) -> None:
    conductor = await parrot("abcdefghij", ends=False, window=40)
    result = await conductor.decode("polly", "x" * 15, max_tokens=200, context_shift=True)
    assert (result.text, result.finish_reason) == ("abcdefghij" * 20, FinishReason.LENGTH)
    assert (await agent_of(conductor, "polly")).tokens <= 40
    assert (await conductor.decode("polly", "xx" * 15, max_tokens=12, context_shift=True)).text == "abcdefghijab"


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mamba"])
async def test_every_architecture_can_shift(start: Start, tmp_path: Path, architecture: str) -> None:
    """Where the cache cannot be moved the kept half is decoded again. Six layers, so that one of gemma3's does not slide."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture=architecture, sliding_window=32, n_layer=6)
    conductor = await start({"tiny": {"path": path, "context_shift": True}, "other": write_parrot(tmp_path / "o.gguf", "ab")})
    for name, model in (("ada", "tiny"), ("polly", "other")):
        await conductor.register(name, model, window=100)
    for turn in range(4):
        result = await conductor.decode("ada", f"turn {turn}", max_tokens=150)
        assert result.generated_tokens == 150 or result.stopped_on_eos
        assert (await conductor.decode("polly", "x", reset=True)).text == "ab"
        assert (await agent_of(conductor, "ada")).tokens <= 100


# --- endings ----------------------------------------------------------------------------------------------------------


async def test_each_ending_has_its_name(parrot: Start) -> None:
    conductor = await parrot("abcdefghij")
    endings = {
        FinishReason.EOS: await conductor.decode("polly", "x", reset=True),
        FinishReason.LENGTH: await conductor.decode("polly", "x", reset=True, max_tokens=4),
        FinishReason.STOP: await conductor.decode("polly", "x", reset=True, stop="f"),
    }
    assert {reason: result.finish_reason for reason, result in endings.items()} == {reason: reason for reason in endings}
    assert [result.text for result in endings.values()] == ["abcdefghij", "abcd", "abcde"]
    assert [result.stopped_on_eos for result in endings.values()] == [True, False, False]
    assert [result.generated_tokens for result in endings.values()] == [11, 4, 6]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("cde", "ab"),
        (["zz", "fg", "de"], "abc"),
        (["abX", "jk"], "abcdefghij"),
        ("a", ""),
        (["bcd", "bc"], "a"),
        ("j", "abcdefghi"),
    ],
)
async def test_stop_strings_cut_the_text_across_the_borders_of_tokens(parrot: Start, stop: Any, text: str) -> None:
    conductor = await parrot("abcdefghij")
    result = await conductor.decode("polly", "x", stop=stop)
    assert result.text == text
    chunks = [chunk async for chunk in conductor.stream("polly", "x", stop=stop, reset=True)]
    assert "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)) == text


@pytest.mark.parametrize("max_tokens", range(1, 12))
async def test_a_character_is_never_cut(parrot: Start, max_tokens: int) -> None:
    """Every token is one byte, so each length of the answer ends somewhere else in one of its characters."""
    says = "é🙂→!"
    conductor = await parrot(says)
    chunks = [chunk async for chunk in conductor.stream("polly", "x", max_tokens=max_tokens)]
    result = chunks[-1]
    assert says.startswith(result.text)
    assert len(result.text.encode()) <= max_tokens
    assert "".join(chunk.text for chunk in chunks[:-1]) == result.text
    rest = await conductor.decode("polly") if result.finish_reason is FinishReason.LENGTH else None
    assert result.text + (rest.text if rest else "") == says


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def gambler(start: Start, tmp_path: Path) -> Callable[..., Any]:
    """Draws 24 tokens after a fixed prompt, with the options given."""
    conductor = await start({"tiny": write_tiny_gguf(tmp_path / "tiny.gguf", seed=11)})
    await conductor.register("ada", "tiny", window=256)

    async def draw(**options: Any) -> DecodeResult:
        return await conductor.decode("ada", "hello world", reset=True, max_tokens=24, **options)

    return draw


async def test_a_seed_repeats_its_draws_and_another_seed_draws_others(gambler: Any) -> None:
    first = await gambler(temperature=1.5, seed=1)
    assert (await gambler(temperature=1.5, seed=1)).tokens == first.tokens
    assert (await gambler(temperature=1.5, seed=2)).tokens != first.tokens
    assert (await gambler(temperature=1.5, seed=2**32 - 2)).seed == 2**32 - 2


async def test_a_seed_that_was_drawn_is_told_and_repeats_the_turn(gambler: Any) -> None:
    first, second = await gambler(temperature=1.5), await gambler(temperature=1.5)
    assert first.seed != second.seed
    assert (await gambler(temperature=1.5, seed=first.seed)).tokens == first.tokens


async def test_greedy_takes_no_notice_of_seeds(gambler: Any) -> None:
    assert (await gambler(seed=1)).tokens == (await gambler(seed=2)).tokens


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
async def test_each_filter_alone_can_leave_only_the_likeliest(gambler: Any, narrow: dict[str, Any]) -> None:
    wide = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
    greedy = await gambler()
    assert (await gambler(**wide | narrow)).tokens == greedy.tokens
    assert (await gambler(**wide)).tokens != greedy.tokens


async def test_a_context_that_cannot_be_saved_is_closed_all_the_same_and_its_conversation_recomputed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    conductor = await start({"coder": SHIPPED["coder"], "reviewer": SHIPPED["reviewer"]}, live_contexts=1)
    await conductor.register("ada", "coder")
    await conductor.register("bob", "reviewer")
    first = await conductor.decode("ada", "import os\n", max_tokens=8)

    def broken(self: KvStore, *arguments: Any, **options: Any) -> None:
        raise OSError("no memory")

    with monkeypatch.context() as broken_arena:
        broken_arena.setattr(KvStore, "begin", broken)
        await conductor.decode("bob", "import os\n", max_tokens=2)
    again = await conductor.decode("ada", "import sys\n", max_tokens=2)
    assert again.recomputed_tokens > 0
    assert again.prompt_tokens > len(first.tokens)


async def test_a_window_whose_kv_exceeds_the_host_budget_is_admitted_with_a_warning(start: Start) -> None:
    conductor = await start({"coder": SHIPPED["coder"]}, host_budget="1MiB")
    assert any("host_budget" in warning for warning in (await conductor.register("ada", "coder")).warnings)


async def test_whoever_waits_for_anothers_place_does_not_wait_for_files_to_be_read(start: Start) -> None:
    """Before a pool's bytes are given to others the device is read: not behind models that are being loaded."""
    conductor, gate = await start(SHIPPED, live_contexts=1), threading.Event()
    for agent, model in (("ada", "coder"), ("bob", "reviewer")):
        await conductor.register(agent, model, window=256)
    await conductor.decode("ada", "import os", max_tokens=3)
    loading = [conductor._io_threads.submit(gate.wait) for _ in range(64)]
    try:
        result = await asyncio.wait_for(conductor.decode("bob", "import os", max_tokens=3), timeout=20)
        assert not any(each.done() for each in loading)
    finally:
        gate.set()
    assert result.kv_swap_evicted == "ada"
