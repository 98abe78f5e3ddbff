"""Text from bytes in any portions, held against the whole text and `str.find`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.backend.text import TextAssembler

#: few letters, so that stop strings appear, overlap and almost appear; and characters of one to four bytes
LETTERS = "abé→🙂"
texts = st.text(LETTERS, max_size=24)
stops = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)


@st.composite
def portions(draw: st.DrawFn, of: bytes) -> list[bytes]:
    """The bytes in order, cut anywhere, empty portions among them."""
    cuts = sorted(draw(st.lists(st.integers(0, len(of)), max_size=len(of) + 2)))
    return [of[a:b] for a, b in zip([0, *cuts], [*cuts, len(of)], strict=True)]


def cut_at_first_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; of those complete at once, before the one that begins first."""
    for end in range(1, len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)], True
    return text, False


@given(data=st.data(), text=texts, stop=stops)
def test_character_by_character_the_text_ends_before_the_first_complete_stop_string(
    data: st.DataObject, text: str, stop: list[str]
) -> None:
    assembler = TextAssembler(stop)
    shown = ""
    for character in text:
        for portion in data.draw(portions(character.encode())):
            stopped = assembler.add(portion)
            shown += assembler.take()
            if stopped:
                break
        if assembler.stopped:
            break
    assert assembler.finish() == b""
    assert (shown + assembler.take(), assembler.stopped) == cut_at_first_stop(text, stop)


@given(data=st.data(), text=texts, stop=stops)
def test_in_any_portions_no_stop_string_is_ever_shown(data: st.DataObject, text: str, stop: list[str]) -> None:
    """A portion may hold several stop strings; the text ends before the first of them."""
    assembler = TextAssembler(stop)
    shown, taken = "", 0
    for portion in data.draw(portions(text.encode())):
        taken += len(portion)
        stopped = assembler.add(portion)
        shown += assembler.take()
        assert text.startswith(shown)
        if stopped:
            break
    assembler.finish()
    shown += assembler.take()
    seen = text.encode()[:taken].decode(errors="ignore")
    found = [at for s in stop if (at := seen.find(s)) >= 0]
    assert assembler.stopped == bool(found)
    assert shown == (seen[: min(found)] if found else text)


@given(data=st.data(), text=texts, stop=stops)
def test_only_what_may_become_a_stop_string_is_held_back(data: st.DataObject, text: str, stop: list[str]) -> None:
    assembler = TextAssembler(stop)
    fed, shown = b"", ""
    for portion in data.draw(portions(text.encode())):
        fed += portion
        if assembler.add(portion):
            return
        shown += assembler.take()
        held = fed.decode(errors="ignore").removeprefix(shown)
        assert held == "" or any(s.startswith(held) and s != held for s in stop)


@given(data=st.data(), raw=st.binary(max_size=40))
def test_any_bytes_become_what_python_makes_of_them_and_the_unfinished_end_is_kept(data: st.DataObject, raw: bytes) -> None:
    assembler = TextAssembler()
    for portion in data.draw(portions(raw)):
        assembler.add(portion)
    partial = assembler.finish()
    shown = assembler.take()
    assert raw.endswith(partial)
    assert len(partial) <= 3
    assert shown == raw[: len(raw) - len(partial)].decode(errors="replace")


@given(text=texts, cut=st.integers(0, 80), stop=stops)
def test_a_character_begun_in_one_turn_is_completed_in_the_next(text: str, cut: int, stop: list[str]) -> None:
    first = TextAssembler()
    first.add(text.encode()[:cut])
    partial = first.finish()
    second = TextAssembler(partial=partial)
    second.add(text.encode()[cut:])
    assert second.finish() == b""
    assert first.take() + second.take() == text
    with_stop = TextAssembler(stop, partial=partial)
    with_stop.add(text.encode()[cut:])
    with_stop.finish()
    rest = text.removeprefix(text.encode()[: max(0, cut - len(partial))].decode())
    found = [at for s in stop if (at := rest.find(s)) >= 0]
    assert with_stop.take() == (rest[: min(found)] if found else rest)


def test_what_almost_was_a_stop_string_is_shown_at_the_end() -> None:
    assembler = TextAssembler(["END."])
    assert not assembler.add(b"the END")
    assert assembler.take() == "the "
    assert assembler.finish() == b""
    assert assembler.take() == "END"


@pytest.mark.parametrize(("stop", "shown"), [(["bc", "abcd"], "a"), (["abcd", "bc"], "a"), (["d", "c"], "ab")])
def test_the_stop_string_that_is_complete_first_wins(stop: list[str], shown: str) -> None:
    assembler = TextAssembler(stop)
    for byte in b"abcd":
        if assembler.add(bytes([byte])):
            break
    assert assembler.take() == shown
