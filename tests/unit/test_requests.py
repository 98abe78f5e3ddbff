"""Bad input, refused with the argument's name before anything happens; good input, taken as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from conductor import requests
from conductor.errors import InvalidRequest
from conductor.types import DecodeRequest, Message

LONE_SURROGATE = "\ud800"


def refused(call: Callable[[], object]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as problem:
        call()
    assert type(problem.value) is InvalidRequest
    assert problem.value.problem
    assert len(str(problem.value)) < 300, "a message for people, whatever was sent"
    return problem.value


def decode(prompt: object = "hello", **options: Any) -> DecodeRequest:
    """A request whose other options are the public defaults."""
    defaults: dict[str, Any] = {
        "messages": None, "max_tokens": 128, "temperature": 0.0, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "seed": None,
        "stop": (), "reset": False, "context_shift": None,
    }  # fmt: skip
    return requests.decode_request(prompt, **{**defaults, **options})


# --- names ------------------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "", " ", "\t", "\n", "a\nb", "a\0b", "\x1b[31mred", "\u200b", "a" * 129, "a" * 10**6, LONE_SURROGATE, f"a{LONE_SURROGATE}",
    None, 7, 1.5, True, b"a", ["a"], {"a": 1}, object(),
]  # fmt: skip


@pytest.mark.parametrize("check", [requests.agent_id, requests.holder])
@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_a_name_that_is_none_is_refused(check: Callable[[object], str], name: object) -> None:
    assert refused(lambda: check(name)).argument == check.__name__


@pytest.mark.parametrize("name", ["a", "coder-1", "Ärztin", "編集者", "agent 7", "a" * 128, "a/b:c@d", "🤖"])
def test_a_name_may_be_any_printable_text(name: str) -> None:
    assert requests.agent_id(name) == name
    assert requests.holder(name) == name


# --- numbers ----------------------------------------------------------------------------------------------------------

NO_NUMBERS = ["x", "1", None, [], {}, b"1", 1j, object()]


@pytest.mark.parametrize("window", [0, -1, 2**31, 2**63, -(2**31), True, False, 1.0, math.nan, *NO_NUMBERS])
def test_a_window_is_a_whole_number_of_tokens(window: object) -> None:
    assert refused(lambda: requests.window(window)).argument == "window"


def test_the_shortest_and_the_longest_window_are_taken() -> None:
    assert requests.window(1) == 1
    assert requests.window(2**31 - 1) == 2**31 - 1


@pytest.mark.parametrize("priority", [10**6 + 1, -(10**6) - 1, True, 0.5, *NO_NUMBERS])
def test_a_priority_is_a_whole_number_within_reason(priority: object) -> None:
    assert refused(lambda: requests.priority(priority)).argument == "priority"


@pytest.mark.parametrize("wait", [-1, -0.001, math.nan, math.inf, -math.inf, True, *NO_NUMBERS])
def test_patience_is_finite_and_not_negative(wait: object) -> None:
    assert refused(lambda: requests.wait_s(wait)).argument == "wait_s"


@pytest.mark.parametrize("bytes", [0, -1, 2**63, True, 1.5, *NO_NUMBERS])
def test_bytes_to_reserve_are_at_least_one(bytes: object) -> None:
    assert refused(lambda: requests.bytes_(bytes)).argument == "bytes"


def test_numbers_at_their_limits_are_taken() -> None:
    assert [requests.priority(p) for p in (-(10**6), 0, 10**6)] == [-(10**6), 0, 10**6]
    assert [requests.wait_s(w) for w in (0, 0.5, 10)] == [0.0, 0.5, 10.0]
    assert [requests.bytes_(b) for b in (1, 2**63 - 1)] == [1, 2**63 - 1]


BAD_OPTIONS = {
    "max_tokens": [0, -1, 2**31, True, 1.0, math.nan, *NO_NUMBERS],
    "temperature": [math.nan, math.inf, -math.inf, -0.1, -1, True, *NO_NUMBERS],
    "top_k": [-1, 2**31, True, 0.5, *NO_NUMBERS],
    "top_p": [-0.1, 1.1, math.nan, math.inf, True, *NO_NUMBERS],
    "min_p": [-0.1, 1.1, math.nan, math.inf, True, *NO_NUMBERS],
    "seed": [-1, 2**32 - 1, True, 0.5, *(bad for bad in NO_NUMBERS if bad is not None)],
    "reset": [0, 1, None, "true", []],
    "context_shift": [0, 1, "true", []],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in BAD_OPTIONS.items() for value in values])
def test_an_option_of_a_turn_that_makes_no_sense_is_refused_by_name(option: str, value: object) -> None:
    assert refused(lambda: decode(**{option: value})).argument == option


def test_options_at_their_limits_are_taken() -> None:
    low = decode(max_tokens=1, temperature=0, top_k=0, top_p=0, min_p=0, seed=0)
    high = decode(max_tokens=2**31 - 1, temperature=1e6, top_k=2**31 - 1, top_p=1, min_p=1, seed=2**32 - 2, context_shift=True)
    assert (low.max_tokens, low.temperature, low.top_k, low.seed) == (1, 0.0, 0, 0)
    assert isinstance(low.temperature, float)
    assert (high.top_p, high.min_p, high.seed, high.context_shift) == (1.0, 1.0, 2**32 - 2, True)


def test_the_public_defaults_are_those_of_the_record() -> None:
    assert decode() == DecodeRequest(prompt="hello")


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [5, b"bytes", ["text"], True, LONE_SURROGATE, f"good {LONE_SURROGATE} bad"])
def test_a_prompt_is_text(prompt: object) -> None:
    assert refused(lambda: decode(prompt)).argument == "prompt"


def test_a_lone_surrogate_is_named_by_its_position() -> None:
    assert "position 5" in refused(lambda: decode(f"good {LONE_SURROGATE}")).problem


@pytest.mark.parametrize("prompt", ["", " ", "\0", "naïve", "🤖" * 1000])
def test_any_text_is_a_prompt(prompt: str) -> None:
    assert decode(prompt).prompt == prompt


def test_neither_prompt_nor_messages_continues_the_conversation() -> None:
    assert decode(None) == DecodeRequest()


def test_prompt_and_messages_together_are_one_too_many() -> None:
    assert refused(lambda: decode("hello", messages=[{"role": "user", "content": "hello"}])).argument == "prompt"


@pytest.mark.parametrize(
    ("messages", "argument"),
    [
        ([], "messages"),
        ((), "messages"),
        ("hello", "messages"),
        (b"hello", "messages"),
        (5, "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        (iter([{"role": "user", "content": "x"}]), "messages"),
        (["hello"], "messages[0]"),
        ([None], "messages[0]"),
        ([{"role": "user"}], "messages[0]"),
        ([{"content": "x"}], "messages[0]"),
        ([("user", "x")], "messages[0]"),
        ([{"role": "user", "content": "x"}, {}], "messages[1]"),
        ([{"role": 5, "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content"),
        ([{"role": "user", "content": LONE_SURROGATE}], "messages[0].content"),
        ([{"role": "user", "content": "x"}, {"role": LONE_SURROGATE, "content": "x"}], "messages[1].role"),
    ],
)
def test_messages_are_a_list_of_role_and_content(messages: object, argument: str) -> None:
    assert refused(lambda: decode(None, messages=messages)).argument == argument


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ""}],
        ({"role": "system", "content": "Be brief.", "name": "extra"}, {"role": "user", "content": ""}),
        [Message("system", "Be brief."), Message("user", "")],
    ],
)
def test_messages_may_be_mappings_or_records(messages: object) -> None:
    assert decode(None, messages=messages).messages == (Message("system", "Be brief."), Message("user", ""))


BAD_STOPS = ["", [""], ["a", ""], 5, [5], [None], b"stop", {"a"}, [b"a"], LONE_SURROGATE, ["a", LONE_SURROGATE]]


@pytest.mark.parametrize("stop", BAD_STOPS)
def test_a_stop_that_could_not_stop_anything_is_refused(stop: object) -> None:
    assert refused(lambda: decode(stop=stop)).argument == "stop"


@pytest.mark.parametrize(
    ("stop", "stops"), [(None, ()), ((), ()), ([], ()), ("END", ("END",)), (["a", "b"], ("a", "b")), (("\n",), ("\n",))]
)
def test_a_stop_is_one_string_or_several(stop: object, stops: tuple[str, ...]) -> None:
    assert decode(stop=stop).stop == stops
