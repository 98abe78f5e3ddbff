"""Ray's own objects for the metrics of `metric_names`: the only place that tells Ray of them."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from actors.metric_names import COUNTERS, GAUGES, HISTOGRAMS, PREFIX, Figure, Metric

#: What a counter begins at: Ray's take no 0, and added to 1 it is gone.
_NOTHING = 1e-100


class RayMetrics:
    """The label `conductor` tells the conductors of a cluster apart."""

    def __init__(self, conductor: str) -> None:
        self._conductor = conductor
        self._gauges = {name: Gauge(PREFIX + name, it.tells, _labels(it)) for name, it in GAUGES.items()}
        self._counters = {name: Counter(PREFIX + name, it.tells, _labels(it)) for name, it in COUNTERS.items()}
        self._histograms = {
            name: Histogram(PREFIX + name, it.tells, list(it.limits), _labels(it)) for name, it in HISTOGRAMS.items()
        }

    def begin(self, figure: Figure) -> None:
        name, values = figure
        self._counters[name].inc(_NOTHING, self._tags(COUNTERS[name], values))

    def set(self, figure: Figure, value: float) -> None:
        name, values = figure
        self._gauges[name].set(value, self._tags(GAUGES[name], values))

    def add(self, figure: Figure, more: int) -> None:
        name, values = figure
        self._counters[name].inc(more, self._tags(COUNTERS[name], values))

    def observe(self, figure: Figure, value: float) -> None:
        name, values = figure
        self._histograms[name].observe(value, self._tags(HISTOGRAMS[name], values))

    def _tags(self, metric: Metric, values: tuple[str, ...]) -> dict[str, str]:
        return {"conductor": self._conductor, **dict(zip(metric.labels, values, strict=True))}


def _labels(metric: Metric) -> tuple[str, ...]:
    return ("conductor", *metric.labels)
