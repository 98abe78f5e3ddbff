"""The dashboard's queries, answered by a real Prometheus that `conductor monitor` started beside a service at work.

Prometheus has Ray's own configuration, and the variables are replaced as Grafana does. What Grafana draws of the answers is not
covered.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.conducting import document_of
from tests.support.eventful import shortage
from tests.support.eventually import eventually
from tests.support.monitor import Monitor
from tests.support.parrot import write_parrot
from tests.support.scraping import DASHBOARD, asked_for, queries
from tests.support.shell import Shell, family, survivors
from tests.support.talk import SHIPPED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed"),
]

CONDUCTOR = "the.first+1"  #: a name that would mean something else as a pattern
SCRAPED_EVERY_S = 10  #: as Ray's configuration says
EVENTFUL_S = 5 * SCRAPED_EVERY_S
#: What Grafana makes of $__rate_interval where a panel's step is one scrape.
RATE_INTERVAL_S = 4 * SCRAPED_EVERY_S
#: What stays 0 on a slice of RAM that nobody else takes from, without layers that stream; and who waits may not be seen waiting.
MAY_BE_NOTHING = {"drift_bytes", "device_others_bytes", "home_bytes", "link_share", "estimate_error_ratio", "waiting"}


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that looked on from `began_at` on, while everything happened again and again."""

    url: str
    config: Path
    began_at: float
    generated: int  #: tokens, until all was over

    def ask(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as page:
            answer = json.load(page)
        assert answer["status"] == "success"
        return answer["data"]

    def now(self, query: str) -> float | None:
        found = self.ask("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else None

    def drawn(self, query: str, conductor: str = CONDUCTOR) -> list[dict[float, float]]:
        """Each series that a panel draws of it, from the beginning until now: its values by their times."""
        span = {"start": self.began_at, "end": time.time(), "step": SCRAPED_EVERY_S}
        found = self.ask("query_range", query=replaced(query, conductor, span["end"] - span["start"]), **span)["result"]
        values = [{at: float(text) for at, text in series["values"]} for series in found]
        return [{at: value for at, value in series.items() if math.isfinite(value)} for series in values]


def replaced(query: str, conductor: str, range_s: float) -> str:
    """Its variables replaced as Grafana does, which also escapes what means something in a pattern."""
    pattern = re.sub(r"[$^*{}\[\]+?.()|]", r"\\\\\g<0>", conductor)
    variables = {"$conductor": pattern, "$__rate_interval": f"{RATE_INTERVAL_S}s", "$__range": f"{math.ceil(range_s)}s"}
    for variable, value in variables.items():
        query = query.replace(variable, value)
    assert "$" not in query
    return query


def query_of(title: str, which: int = 0) -> str:
    return [query for panel, query in queries() if panel == title][which]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    directory = tmp_path_factory.mktemp("dashboard")
    shell = Shell(directory)
    shell.environment["RAY_metrics_report_interval_ms"] = "1000"
    models = {**SHIPPED, "endless": write_parrot(directory / "endless.gguf", "abcdefghij", ends=False)}
    config = directory / "conductor.yaml"
    document = document_of("vram_mib", directory, models, ray={"name": CONDUCTOR}, **shortage(directory))
    config.write_text(yaml.safe_dump(document))
    with service(shell, config), monitor(shell) as report:
        url, rules = report["prometheus_url"], Path(report["prometheus_config"])
        before = Prometheus(url, rules, time.time(), 0)
        eventually(lambda: before.now("sum(ray_vram_conductor_turns_total)") is not None, within_s=60, every_s=0.5)
        said = shell.run(sys.executable, "-m", "tests.support.eventful_child", str(config), str(EVENTFUL_S))
        assert said.returncode == 0, said.stderr
        after = Prometheus(url, rules, before.began_at, int(said.stdout))
        told = 'sum(ray_vram_conductor_tokens_total{kind="generated"})'
        eventually(lambda: after.now(told) == after.generated, within_s=60, every_s=0.5)
        yield after


@contextlib.contextmanager
def service(shell: Shell, config: Path) -> Iterator[None]:
    try:
        shell.ok("up", "--config", str(config))
        processes = family(shell.service_pid())
        yield
    finally:
        shell.ok("down")
    assert survivors([*processes, *shell.processes()]) == []


@contextlib.contextmanager
def monitor(shell: Shell) -> Iterator[Any]:
    begun = Monitor(shell)
    try:
        yield begun.report()
    finally:
        assert begun.end() == (0, "")


def test_it_finds_the_node_by_rays_own_configuration(prometheus: Prometheus) -> None:
    assert prometheus.config.parts[-3:] == ("metrics", "prometheus", "prometheus.yml")
    assert prometheus.now('sum(up{job="ray"})') >= 1


def test_every_query_is_answered_and_only_what_did_not_happen_is_nothing(prometheus: Prometheus) -> None:
    silent, nothing = [], set()
    for title, query in queries():
        values = [value for series in prometheus.drawn(query) for value in series.values()]
        if not values:
            silent.append((title, query))
        elif max(values) <= 0:
            nothing |= {name.removeprefix("ray_vram_conductor_") for name, _ in asked_for(query)}
    assert silent == []
    assert nothing - MAY_BE_NOTHING == set()


def test_who_chooses_another_conductor_sees_nothing_of_this_one(prometheus: Prometheus) -> None:
    [variable] = [it for it in json.loads(DASHBOARD.read_text("utf-8"))["templating"]["list"] if it["name"] == "conductor"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()  # type: ignore[union-attr]
    assert prometheus.ask(f"label/{label}/values", **{"match[]": metric}) == [CONDUCTOR]
    assert [title for title, query in queries() if any(prometheus.drawn(query, conductor="the_first1"))] == []


def test_what_is_drawn_agrees_with_itself(prometheus: Prometheus) -> None:
    [share] = prometheus.drawn(query_of("Booked, of the cap"))
    [cap] = prometheus.drawn(query_of("What is booked, and for what", 1))
    [booked] = prometheus.drawn(query_of("Booked: Ray and the ledger", 1))
    kinds = prometheus.drawn(query_of("What is booked, and for what"))
    assert share == {at: pytest.approx(booked[at] / cap[at]) for at in share}
    assert booked == {at: sum(kind[at] for kind in kinds) for at in booked}
    assert 0 < max(share.values()) <= 1
    [used], [free], _ = (prometheus.drawn(query_of("The device's own reading", which)) for which in range(3))
    assert {used[at] + free[at] for at in used} == set(prometheus.drawn(query_of("Device"))[0].values())
    for title in ("Time to first token", "Between two tokens", "Longest stall of a turn", "Whole turns"):
        [half], [most], [nearly_all] = (prometheus.drawn(query_of(title, which)) for which in range(3))
        assert all(0 < half[at] <= most[at] <= nearly_all[at] < 60 for at in half), title


def test_refusals_are_as_many_as_there_were(prometheus: Prometheus) -> None:
    counted = prometheus.now("sum(ray_vram_conductor_refusals_total)")
    shown = sum(series[max(series)] for series in prometheus.drawn(query_of("Refused, in the time shown")))
    assert counted is not None
    assert counted > 10
    assert shown == pytest.approx(counted, rel=0.2)  # an increase is extrapolated to the ends of its range
