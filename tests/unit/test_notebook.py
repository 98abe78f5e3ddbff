"""Views for notebooks: in true proportion, safe whatever names there are, and in words where HTML or pictures are missing."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from IPython.core.formatters import DisplayFormatter

from conductor import notebook
from conductor.errors import AdmissionRefused, InvalidRequest, Refusal, RefusalCode
from conductor.happenings import Happening, HistoryEntry
from conductor.types import Admission, AgentId, DecodeResult, FinishReason, LedgerEntry, MirrorState, ModelKey, ServiceClass
from conductor.units import MIB
from tests.support.views import NAMES, STATUS

ADMISSION = Admission(
    AgentId("<b>ada</b>"), ModelKey("m"), 2048, ServiceClass.SHARED, 0, 60 * MIB, 512, 20 * MIB, 80 * MIB, True, 0.5,
    ("<i>small</i>",),
)  # fmt: skip
TURN = DecodeResult(
    AgentId("<b>ada</b>"), "<script>alert(1)</script>\n\tand\x1b[2J", (1, 2), 10, 5, 3, 2, True, FinishReason.EOS, 1, 100.0, 25.0,
    50.0, 2.0, AgentId("<u>bob</u>"), True, 4 * MIB, 1, 0, 0,
)  # fmt: skip
REFUSAL = Refusal(RefusalCode.CAP, 60 * MIB, 100 * MIB, 80 * MIB, STATUS.ledger.reservations, 512)
VIEWS = (STATUS, ADMISSION, TURN, REFUSAL)


def shares(html: str) -> list[float]:
    """Of every stretch of every bar, in percent."""
    return [float(share) for share in re.findall(r"flex:0 0 ([\d.]+)%", html)]


def entry(at_s: float, mib: int) -> LedgerEntry:
    return LedgerEntry(at_s, "x", 100 * MIB, mib * MIB, 0)


def happened(number: int, at_s: float, kind: Happening, agent: str) -> HistoryEntry:
    return HistoryEntry(number, at_s, kind, agent, None, None, None, "")


# --- views --------------------------------------------------------------------------------------------------------------


def test_the_bars_are_in_true_proportion_and_on_one_scale() -> None:
    assert shares(notebook.show(STATUS).html) == [60, 20, 80], "weights and context of the cap, then what Ray has booked"


def test_more_than_the_cap_makes_the_bar_longer_instead_of_lying() -> None:
    fallen = replace(STATUS, ledger=replace(STATUS.ledger, max_bytes=40 * MIB))
    assert shares(notebook.show(fallen).html) == [75, 25, 100]


def test_a_refusal_shows_what_was_asked_for_on_top_of_what_is_booked() -> None:
    view = notebook.show(AdmissionRefused(REFUSAL))
    assert view == notebook.show(REFUSAL)
    assert shares(view.html) == pytest.approx([60 / 1.4, 20 / 1.4, 60 / 1.4], abs=1e-3)
    assert REFUSAL.line in view.html
    assert REFUSAL.line in view.text
    assert "the cap is at 71 % of the bar" in view.text
    assert "A window of 512 tokens would fit now" in view.text


def test_a_turn_shows_where_its_time_went() -> None:
    view = notebook.show(TURN)
    assert shares(view.html) == [25, 25, 50], "waited, read, made"
    assert "evicted <u>bob</u>, restored, 4.0 MiB moved" in view.text


def test_without_html_the_bar_has_a_letter_for_each_kind() -> None:
    lines = notebook.show(STATUS).text.splitlines()
    assert "[" + "w" * 29 + "c" * 9 + "·" * 10 + "] ledger: 80.0 MiB of 100 MiB booked" in lines
    assert any(line.startswith("[" + "R" * 38 + "·" * 10 + "] Ray's books, equal") for line in lines)


def test_a_booking_that_is_too_thin_for_a_letter_has_one_all_the_same() -> None:
    weights, context = STATUS.ledger.reservations
    thin = replace(STATUS.ledger, reservations=(replace(weights, bytes=100 * MIB - 1), replace(context, bytes=1)))
    text = notebook.show(replace(STATUS, ledger=thin)).text
    assert "[" + "w" * 47 + "c] ledger" in text


def test_without_a_mirror_there_are_words_instead_of_a_bar() -> None:
    alone = replace(
        STATUS, mirror=replace(STATUS.mirror, state=MirrorState.UNMIRRORED, total_mib=0, used_mib=0, note="it is off")
    )
    view = notebook.show(alone)
    assert shares(view.html) == [60, 20]
    assert "Ray's books: unmirrored, it is off" in view.text


@pytest.mark.parametrize("what", VIEWS, ids=lambda what: type(what).__name__)
def test_names_and_answers_cannot_become_html(what: notebook.views.Showable) -> None:
    html = notebook.show(what).html
    tags = set(re.findall(r"<(\w+)", html))
    assert tags <= {"div", "strong", "pre", "table", "caption", "tr", "th", "td"}
    assert html.count("<div") == html.count("</div>")
    assert html.count("<table") == html.count("</table>")


def test_names_cannot_move_the_cursor_or_add_a_row() -> None:
    view = notebook.show(STATUS)
    assert any("\x1b" in name for name in NAMES)
    assert "\x1b" not in view.text + view.html
    agents = view.text.split("agent  ")[1].split("agent  ")[0]
    assert len(agents.rstrip().splitlines()) == 1 + len(NAMES), "the head and a row for each"


def test_an_answer_keeps_its_lines_and_nothing_else_that_is_not_printed() -> None:
    assert "<script>alert(1)</script>\n\tand\N{REPLACEMENT CHARACTER}[2J" in notebook.show(TURN).text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n\tand\N{REPLACEMENT CHARACTER}[2J</pre>" in notebook.show(TURN).html


def test_several_are_shown_one_below_the_other() -> None:
    both = notebook.show(ADMISSION, TURN)
    assert both.text == f"{notebook.show(ADMISSION)}\n{notebook.show(TURN)}"
    assert "added to the ledger  80.0 MiB" in both.text


def test_what_has_no_view_is_refused() -> None:
    with pytest.raises(TypeError, match="LedgerEntry has no view here"):
        notebook.show(entry(0, 1))  # type: ignore[arg-type]


def test_a_front_end_gets_html_and_words() -> None:
    view = notebook.show(STATUS)
    assert view._repr_mimebundle_() == {"text/html": view._repr_html_(), "text/plain": repr(view)}


def test_the_extension_shows_records_by_themselves_until_it_is_unloaded() -> None:
    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    notebook.load_ipython_extension(shell)
    for what in VIEWS:
        shown, _ = shell.display_formatter.format(what)
        view = notebook.show(what)
        assert (shown["text/html"], shown["text/plain"]) == (view.html, view.text)
    notebook.unload_ipython_extension(shell)
    shown, _ = shell.display_formatter.format(ADMISSION)
    assert "text/html" not in shown
    notebook.unload_ipython_extension(shell)


# --- pictures -----------------------------------------------------------------------------------------------------------


def test_the_line_is_the_least_squares_line() -> None:
    exact = [notebook.SwapPoint(tokens, 0, 2 + 0.5 * tokens) for tokens in (10, 20, 40)]
    assert notebook.fitted(exact) == notebook.CostLine(0.5, 2, 1, 3)
    line = notebook.fitted([notebook.SwapPoint(tokens, 0, ms) for tokens, ms in ((0, 0), (0, 2), (10, 11), (10, 13))])
    assert (line.ms_per_token, line.at_none_ms) == pytest.approx((1.1, 1))
    assert line.r_squared == pytest.approx(1 - 4 / 125)
    assert str(line) == "1.00 ms + 1100.00 µs a token (R² 0.968, 4 points)"


@pytest.mark.parametrize("points", [[], [notebook.SwapPoint(8, 0, 1.0)], [notebook.SwapPoint(8, 0, 1.0)] * 2])
def test_a_line_needs_two_lengths(points: list[notebook.SwapPoint]) -> None:
    with pytest.raises(InvalidRequest, match="two lengths"):
        notebook.swap_costs(points)


def test_the_picture_of_swap_costs_has_the_points_and_the_line() -> None:
    points = [notebook.SwapPoint(tokens, 0, 1 + tokens / 100) for tokens in (100, 200, 400)]
    shown = notebook.swap_costs(points)
    measured, line = shown.figure.axes[0].lines
    assert list(measured.get_xdata()) == [100, 200, 400]
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[0, 400], pytest.approx([1, 5])]
    assert repr(shown) == str(notebook.fitted(points)) == line.get_label()


def test_the_ledger_over_time_goes_on_until_the_last_look_at_it() -> None:
    shown = notebook.ledger_over_time([entry(1, 20), entry(2, 50), entry(3, 0)], mirror=[replace(STATUS, uptime_s=4.0)])
    cap, booked, ray = shown.figure.axes[0].lines
    assert list(cap.get_ydata()) == [100] * 4
    assert [list(booked.get_xdata()), list(booked.get_ydata())] == [[1, 2, 3, 4], [20, 50, 0, 0]]
    assert [list(ray.get_xdata()), list(ray.get_ydata())] == [[4], [80]]
    assert shown.text == "at most 50.0 of 100.0 MiB booked, 0.0 in the end; 1 figures of Ray's"


def test_marks_that_would_cover_each_other_share_their_words() -> None:
    came = [
        happened(1, 1.0, Happening.ADMITTED, "ada"),
        happened(2, 1.0, Happening.LOADED, "ada"),
        happened(3, 1.01, Happening.REFUSED, "bob"),
        happened(4, 9.0, Happening.LEFT, "ada"),
    ]
    shown = notebook.ledger_over_time([entry(1, 20), entry(10, 0)], history=came)
    assert [text.get_text() for text in shown.figure.axes[0].texts] == ["ada admitted, bob refused", "ada left"]


def test_a_ledger_that_booked_nothing_has_no_picture() -> None:
    with pytest.raises(InvalidRequest, match="nothing was booked yet"):
        notebook.ledger_over_time([])


def test_a_picture_is_a_small_png_with_words_beside_it() -> None:
    shown = notebook.ledger_over_time([entry(1, 20), entry(2, 50)])
    kept, described = shown._repr_mimebundle_()
    assert kept["image/png"].startswith(b"\x89PNG")
    assert len(kept["image/png"]) < 30_000
    assert kept["text/plain"] == described["image/png"]["alt"] == repr(shown)
    assert shown == notebook.picture(shown.figure, shown.text)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'vram-conductor\[notebook\]'"):
        notebook.ledger_over_time([entry(1, 20)])


def test_importing_it_loads_neither_ray_nor_matplotlib_nor_ipython() -> None:
    program = "import sys, conductor.notebook; print({'ray', 'matplotlib', 'IPython', 'PIL'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "set()\n"
