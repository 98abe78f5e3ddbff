"""Errors cross processes: each survives pickling with its fields and its message, and says what to do."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from conductor import errors
from conductor.errors import (
    AdmissionRefused,
    BadModelFile,
    ChatTemplateFailed,
    ConductorError,
    ConfigError,
    DecodeFailed,
    DuplicateAgent,
    InternalError,
    InvalidRequest,
    ModelError,
    ModelLoadFailed,
    NotRunning,
    PathNotAllowed,
    Refusal,
    RefusalCode,
    ServiceFailed,
    TurnCancelled,
    TurnQueueFull,
    TurnTimedOut,
    UnknownAgent,
    UnknownModel,
    UnknownReservation,
    WindowFull,
    WindowRefused,
)
from conductor.types import AgentId, Kind, ModelKey, Reservation, ReservationId, ServiceClass

A = AgentId("a")


def refusal(code: RefusalCode = RefusalCode.CAP, *, largest_window: int | None = 4096) -> Refusal:
    holders = (Reservation(ReservationId("r1"), "coder", Kind.WEIGHTS, 600 << 20),)
    return Refusal(code, 512 << 20, 1 << 30, 600 << 20, holders, largest_window)


#: one of each class, and words that its message must hold
EXAMPLES: list[tuple[ConductorError, list[str]]] = [
    (ConductorError("something"), ["something"]),
    (ConfigError("/etc/conductor.yaml", "device.kind", "unknown"), ["/etc/conductor.yaml", "device.kind", "unknown"]),
    (ConfigError("/etc/conductor.yaml", "", "cannot be read"), ["/etc/conductor.yaml: cannot be read"]),
    (InvalidRequest("window", "0 is outside 1 to 9"), ["window: 0 is outside 1 to 9"]),
    (UnknownAgent("a"), ["'a'", "register"]),
    (DuplicateAgent("a"), ["'a'", "registered already"]),
    (AdmissionRefused(refusal()), ["VRAM_LEDGER_DENY", "512 MiB", "424 MiB free", "4096 tokens"]),
    (ModelError("no use"), ["no use"]),
    (UnknownModel("m", (ModelKey("coder"), ModelKey("reviewer"))), ["'m'", "coder, reviewer"]),
    (UnknownModel("m", ()), ["none"]),
    (PathNotAllowed("/etc/passwd", ("/models",)), ["/etc/passwd", "/models", "model_dirs"]),
    (PathNotAllowed("/etc/passwd", ()), ["none configured"]),
    (BadModelFile("/models/x.gguf", "is truncated"), ["/models/x.gguf: is truncated"]),
    (ModelLoadFailed("/models/x.gguf", "no memory"), ["x.gguf", "no memory"]),
    (ChatTemplateFailed("coder", "roles must alternate"), ["coder", "roles must alternate"]),
    (WindowFull(A, 512, 500, 30), ["'a'", "512", "500", "30", "reset=True"]),
    (WindowRefused(A, 4096, 5000, refusal(), "so far"), ["'a'", "4096", "5000", "512 MiB", "424 MiB free", "wait_s"]),
    (TurnTimedOut(A, 1.5, "turns of others to end"), ["'a'", "1.5 s", "turns of others"]),
    (TurnQueueFull(A, 1024), ["1024 turns", "'a'", "try again later"]),
    (TurnCancelled(A, "the agent was unregistered"), ["'a'", "the agent was unregistered"]),
    (DecodeFailed(A, "no KV slot"), ["'a'", "no KV slot", "kept"]),
    (UnknownReservation(ReservationId("r7")), ["'r7'", "released already"]),
    (ServiceFailed("Ray does not answer"), ["Ray does not answer"]),
    (NotRunning(), ["conductor up"]),
    (InternalError("two live contexts of one model"), ["internal error", "two live contexts of one model"]),
]
RETRYABLE = {DecodeFailed, AdmissionRefused, WindowRefused, TurnTimedOut, TurnQueueFull}


def tree(root: type[ConductorError] = ConductorError, depth: int = 0) -> Iterator[tuple[int, str]]:
    """(depth, name) of the classes that errors.py defines, parents before children."""
    yield depth, root.__name__
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child, depth + 1)


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawing = re.findall(r"^    ((?:[│ ]   )*)(├── |└── )?([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE)
    drawn = [(len(bars) // 4 + bool(branch), name) for bars, branch, name in drawing]
    assert drawn == list(tree())


def test_there_is_an_example_of_every_class_here() -> None:
    assert {type(error).__name__ for error, _ in EXAMPLES} == {name for _, name in tree()}


@pytest.mark.parametrize(("error", "words"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_a_message_says_what_is_wrong(error: ConductorError, words: list[str]) -> None:
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling_with_its_fields_and_its_message(error: ConductorError, protocol: int) -> None:
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert copy.args == error.args
    assert str(copy) == str(error)
    assert copy.retryable == error.retryable


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=lambda error: type(error).__name__)
def test_an_error_says_whether_the_same_call_may_succeed_later(error: ConductorError) -> None:
    assert error.retryable is (type(error) in RETRYABLE)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_the_line_of_a_refusal_is_exact() -> None:
    expected = "VRAM_LEDGER_DENY code=CAP ledger_max_bytes=1073741824 ledger_allocated_bytes=629145600 requested_bytes=536870912"
    assert AdmissionRefused(refusal()).line == expected
    assert str(AdmissionRefused(refusal())).splitlines()[0] == expected


@pytest.mark.parametrize("code", RefusalCode)
def test_a_refusal_carries_its_code_and_its_numbers(code: RefusalCode) -> None:
    refused = AdmissionRefused(refusal(code))
    assert refused.code is code
    assert f"code={code.value} " in refused.line
    assert refused.refusal.free_bytes == 424 << 20
    assert refused.refusal.holders[0].holder == "coder"


def test_only_what_never_fits_is_not_worth_another_try() -> None:
    assert {code for code in RefusalCode if not AdmissionRefused(refusal(code)).retryable} == {RefusalCode.NEVER}


@pytest.mark.parametrize(
    ("code", "window", "advice"),
    [
        (RefusalCode.CAP, 4096, "A window of 4096 tokens would fit now, or unregister an agent"),
        (RefusalCode.CAP, None, "Unregister an agent, or wait with wait_s=SECONDS."),
        (RefusalCode.TIMEOUT, None, "Unregister an agent"),
        (RefusalCode.NEVER, 4096, "even when empty. A window of 4096 tokens would fit now."),
        (RefusalCode.NEVER, None, "even when empty. Choose a smaller model."),
        (RefusalCode.QUEUE_FULL, 4096, "try again later"),
        (RefusalCode.DRIFT, None, "Other programs took memory"),
    ],
)
def test_a_refusal_advises_what_helps(code: RefusalCode, window: int | None, advice: str) -> None:
    assert advice in str(AdmissionRefused(refusal(code, largest_window=window)))


def test_a_refusal_has_a_json_form() -> None:
    assert refusal().to_json() == {
        "code": "CAP",
        "requested_bytes": 512 << 20,
        "cap_bytes": 1 << 30,
        "booked_bytes": 600 << 20,
        "holders": [{"id": "r1", "holder": "coder", "kind": "weights", "bytes": 600 << 20}],
        "largest_window": 4096,
        "waiting_ahead": 0,
        "evictable_bytes": 0,
        "fitting_class": None,
        "streaming_fits": False,
        "retry_after_s": None,
    }


def test_a_refusal_names_a_class_that_would_be_admitted() -> None:
    weaker = replace(refusal(largest_window=None), fitting_class=ServiceClass.BEST_EFFORT)
    assert "The service class best_effort would fit now, or unregister an agent" in str(AdmissionRefused(weaker))
    either = replace(refusal(), fitting_class=ServiceClass.SHARED)
    assert "A window of 4096 tokens or the service class shared would fit now" in str(AdmissionRefused(either))
