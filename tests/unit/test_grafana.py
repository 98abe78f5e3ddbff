"""The dashboard as a file: it asks for what is documented, and a Grafana elsewhere can show it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from actors.metric_names import COUNTERS, GAUGES, HISTOGRAMS, PREFIX
from tests.support.scraping import DASHBOARD, asked_for, documented, panels, queries

BOARD: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
ROWS = ["Memory", "Agents and turns", "Latency", "Swaps and streaming", "Refusals", "Ray's mirror"]
#: Panels are 24 columns wide together.
COLUMNS = 24


def exported() -> dict[str, set[str]]:
    """The labels of each name that a scrape may hold, those of a histogram's parts included."""
    names: dict[str, set[str]] = {}
    for name, type, labels in documented():
        parts = {"_bucket": {"le"}, "_sum": set(), "_count": set()} if type == "histogram" else {"": set()}
        for suffix, more in parts.items():
            names[name + suffix] = {"conductor", *labels, *more}
    return names


def test_the_table_is_the_code() -> None:
    declared = {f"ray_{PREFIX}{name}" for name in (*GAUGES, *HISTOGRAMS)} | {f"ray_{PREFIX}{name}_total" for name in COUNTERS}
    assert {name for name, _, _ in documented()} == declared
    labels = {name: set(labels) for name, _, labels in documented()}
    for table, suffix in ((GAUGES, ""), (COUNTERS, "_total"), (HISTOGRAMS, "")):
        assert {name: labels[f"ray_{PREFIX}{name}{suffix}"] for name in table} == {n: set(it.labels) for n, it in table.items()}
    assert all(list(it.limits) == sorted(set(it.limits)) and it.limits[0] > 0 for it in HISTOGRAMS.values())


def test_every_query_asks_for_metrics_and_labels_that_are_documented() -> None:
    known = exported()
    for title, query in queries():
        asked = list(asked_for(query))
        assert asked, title
        for name, labels in asked:
            assert name in known, title
            assert labels <= known[name], title
        grouped = {label for by in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for label in re.split(r"\s*,\s*", by)}
        shown = set().union(*(known[name] for name, _ in asked))
        assert grouped <= shown, title


def test_every_legend_names_a_label_that_its_query_keeps() -> None:
    for panel in panels():
        for target in panel.get("targets", ()):
            kept = {label for by in re.findall(r"\bby \(([^)]*)\)", target["expr"]) for label in re.split(r"\s*,\s*", by)}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]


def test_the_dashboard_shows_every_metric() -> None:
    shown = {re.sub(r"_bucket$", "", name) for _, query in queries() for name, _ in asked_for(query)}
    assert {name for name, _, _ in documented()} - shown == set()


def test_counters_are_shown_as_rates_and_histograms_by_their_quantiles() -> None:
    for title, query in queries():
        for name, _ in asked_for(query):
            rated = re.search(rf"\b(rate|increase)\({name}\{{[^}}]*\}}\[\$__\w+\]\)", query) is not None
            assert rated is name.endswith(("_total", "_bucket")), title
            assert ("histogram_quantile" in query) is name.endswith("_bucket"), title


def test_source_and_conductor_are_chosen_by_whoever_looks() -> None:
    source, conductor = BOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert (conductor["name"], conductor["type"]) == ("conductor", "query")
    assert all('conductor=~"$conductor"' in query for _, query in queries())
    told = [panel["datasource"]["uid"] for panel in panels() if panel["type"] != "row"]
    assert set(told) == {"${datasource}"}
    assert "id" not in BOARD
    assert BOARD["uid"] == "vram-conductor"


def test_rows_are_in_order_and_panels_have_a_title_a_unit_and_a_place_of_their_own() -> None:
    assert [panel["title"] for panel in panels() if panel["type"] == "row"] == ROWS
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= COLUMNS
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"]


@pytest.mark.parametrize(("suffix", "unit"), [("_bytes", "bytes"), ("_seconds_bucket", "s"), ("_ratio", "percentunit")])
def test_a_panel_has_the_unit_that_its_metrics_say(suffix: str, unit: str) -> None:
    for panel in panels():
        for target in panel.get("targets", ()):
            names = {name for name, _ in asked_for(target["expr"])}
            if " / " not in target["expr"] and any(name.endswith(suffix) for name in names):
                assert panel["fieldConfig"]["defaults"]["unit"] == unit, panel["title"]
