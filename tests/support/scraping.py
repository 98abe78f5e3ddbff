"""The metrics as Prometheus gets them, and as docs/metrics.md and the dashboard name them."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families

from tests.support.conducting import Conductor
from tests.support.talk import ROOT

REPORTED_WITHIN_S = 60.0
DASHBOARD = ROOT / "configs" / "grafana" / "conductor.json"
RAYS_OWN = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "conductor", "le"}
ROW = re.compile(r"\| `(ray_vram_conductor_\w+)` \| (\w+) \| ([\w`, ]*)\| \S.* \|")
PART = re.compile(r"_(bucket|sum|count)$")

#: (name, type, labels of its own)
Shape = tuple[str, str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    type: str
    labels: dict[str, str]
    value: float


def documented() -> set[Shape]:
    """Each row of the table."""
    rows = [ROW.fullmatch(line) for line in (ROOT / "docs" / "metrics.md").read_text("utf-8").splitlines() if "| `ray_" in line]
    assert all(rows)
    return {(row[1], row[2], frozenset(re.findall(r"`(\w+)`", row[3]))) for row in rows if row}


def scraped(conductor: Conductor) -> list[Sample]:
    """What this conductor's metrics are now, as a Prometheus server would get them."""
    node = ray.nodes()[0]  # type: ignore[no-untyped-call]
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30) as page:
        text = page.read().decode()
    return [
        Sample(sample.name, family.type, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("conductor") == conductor.config.ray.name
    ]


def shape(sample: Sample) -> Shape:
    own = {label for label in sample.labels if label not in RAYS_OWN and not label.startswith("otel_")}
    name = PART.sub("", sample.name) if sample.type == "histogram" else sample.name
    return name, sample.type, frozenset(own)


def total(samples: list[Sample], text: str) -> float | None:
    """The sum over all samples of a name that have the labels; None if there are none."""
    name, *pairs = text.split()
    labels = dict(pair.split("=") for pair in pairs).items()
    found = [s.value for s in samples if s.name == f"ray_vram_conductor_{name}" and labels <= s.labels.items()]
    return sum(found) if found else None


def differences(samples: list[Sample], expected: dict[str, float]) -> list[str]:
    """Where a scrape says otherwise."""
    told = {text: total(samples, text) for text in expected}
    return [f"{text}: {told[text]} is not {value}" for text, value in expected.items() if told[text] != value]


# --- the dashboard ------------------------------------------------------------------------------------------------------


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels, those within rows included."""
    top = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    return [panel for row in top for panel in (row, *row.get("panels", ()))]


def queries() -> Iterator[tuple[str, str]]:
    """(panel's title, expression) of each query."""
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def asked_for(expression: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Each metric of the conductor in a query, as the scrape spells it, with the labels that it is selected by."""
    for name, selection in re.findall(r"\b(ray_vram_conductor_\w+)(?:\{([^}]*)\})?", expression):
        yield name, frozenset(re.findall(r"(\w+)\s*[=!]~?", selection))
