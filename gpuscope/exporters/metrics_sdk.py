"""
Metrics through the application's own MeterProvider: its readers ask our instruments, and nothing is pushed.

Uses OpenTelemetry's public API, except to find the provider. Never sets a provider up, loads one, flushes one or shuts
one down. A synchronous `Histogram.record` costs 12 to 17 µs per value, so histograms go as observable counters in
Prometheus' classic form: `..._bucket` with the attribute `le`, `..._sum` and `..._count`. They are up-down counters,
because a Prometheus exporter would append `_total` to the names of others. Those of generations, which are few and have
OpenTelemetry's names, are true histograms.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import accumulate
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias

from gpuscope._data.metrics import BOUNDS_S, OF_GENERATIONS, OF_GENERATIONS_ON_GPU, SPECS, Histogram
from gpuscope._data.plain.values import shown
from gpuscope._log import COUNTED, WarnOnce, logger
from gpuscope._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation
    from opentelemetry.metrics import Histogram as TrueHistogram

    from gpuscope._data.metrics import DataPoint, InstrumentSpec, Snapshot

    Source: TypeAlias = Callable[[], Snapshot]

_LES = (*(f"{bound:g}" for bound in BOUNDS_S), "+Inf")
_STALE_S = 1.0


def find_provider() -> Any:
    """
    Return the application's MeterProvider, or None.

    `get_meter_provider()` won't do: where there is none, it loads the one that the environment names. `Any`, because
    what is private has no type, and applications' providers need not derive from OpenTelemetry's.
    """
    internal = sys.modules.get("opentelemetry.metrics._internal")
    return None if internal is None else vars(internal).get("_METER_PROVIDER")


class Instruments:
    """
    Our instruments of one provider, made once because a provider cannot remove them.

    They show the figures of one period of recording at a time. After its end they show its last figures, because the
    application's readers collect once more when the process ends.
    """

    def __init__(self, provider: MeterProvider) -> None:
        self._provider = provider
        self._source: Source | None = None
        self._last: Snapshot | None = None
        self._taken: tuple[Snapshot, float] | None = None
        self._warnings = WarnOnce(COUNTED)
        meter = provider.get_meter("gpuscope", __version__)
        self._true = {spec: _true_histogram(meter, spec) for spec in (*OF_GENERATIONS, *OF_GENERATIONS_ON_GPU)}
        for spec in SPECS:
            # The instrument that a reader asks first takes a snapshot, which the others then show too.
            self._make(meter, spec, fresh=spec is SPECS[0])
        logger.info("metrics go through the application's %s.", type(provider).__name__)

    def follow(self, source: Source) -> bool:
        """Show a period of recording, unless another that they show has not ended; return whether they show it."""
        if self._source is None:
            self._source, self._last, self._taken = source, None, None
        return self._source == source

    def leave(self, source: Source, last: Snapshot) -> None:
        """Keep showing the last sums of a period that has ended. Gauges end with it: they are of the present."""
        if self._source == source:
            lasting = {spec: points for spec, points in last.points.items() if spec.kind != "gauge"}
            self._source, self._last = None, replace(last, points=lasting)

    def forget(self) -> None:
        """Show nothing: this process is the child of a fork, and the figures are its parent's."""
        self._source = self._last = self._taken = None

    def record(self, values: Iterable[tuple[InstrumentSpec, Mapping[str, str], float]]) -> None:
        """Record values of true histograms: (metric, attributes, seconds)."""
        for spec, attributes, seconds in values:
            self._true[spec].record(seconds, attributes)

    def _make(self, meter: Meter, spec: InstrumentSpec, *, fresh: bool) -> None:
        if spec in self._true:
            return
        if spec.kind == "histogram":
            for suffix, observe in (("bucket", _buckets), ("sum", _sums), ("count", _counts)):
                callback = self._callback(spec, observe, fresh=fresh and suffix == "bucket")
                name = f"{spec.name}.seconds_{suffix}"
                meter.create_observable_up_down_counter(name, [callback], "", spec.description)
        else:
            create = meter.create_observable_counter if spec.kind == "sum" else meter.create_observable_gauge
            create(spec.name, [self._callback(spec, _numbers, fresh=fresh)], spec.unit, spec.description)

    def _callback(
        self, spec: InstrumentSpec, observe: Callable[[Sequence[DataPoint]], Iterator[Observation]], *, fresh: bool
    ) -> Callable[[CallbackOptions], list[Observation]]:
        def callback(_: CallbackOptions) -> list[Observation]:
            try:
                snapshot = self._snapshot(fresh=fresh)
                return [] if snapshot is None else list(observe(snapshot.points.get(spec, ())))
            except Exception as error:  # The application's reader asks: it gets an answer or none.
                self._warnings.warn("metrics", "metrics could not be observed: %s.", shown(error))
                return []

        return callback

    def _snapshot(self, *, fresh: bool) -> Snapshot | None:
        source, taken = self._source, self._taken
        if source is None:
            return self._last
        if fresh or taken is None or monotonic() - taken[1] > _STALE_S:
            taken = self._taken = source(), monotonic()
        return taken[0]


def _true_histogram(meter: Meter, spec: InstrumentSpec) -> TrueHistogram:
    try:
        return meter.create_histogram(
            spec.name, spec.unit, spec.description, explicit_bucket_boundaries_advisory=spec.bounds_s
        )
    except TypeError:  # In older versions only the application can say what the bounds are, by a view.
        return meter.create_histogram(spec.name, spec.unit, spec.description)


def _buckets(points: Sequence[DataPoint]) -> Iterator[Observation]:
    from opentelemetry.metrics import Observation

    for point, value in _histograms(points):
        for le, count in zip(_LES, accumulate(value.counts), strict=True):
            yield Observation(count, {**point.attributes, "le": le})


def _sums(points: Sequence[DataPoint]) -> Iterator[Observation]:
    from opentelemetry.metrics import Observation

    return (Observation(value.sum_s, point.attributes) for point, value in _histograms(points))


def _counts(points: Sequence[DataPoint]) -> Iterator[Observation]:
    from opentelemetry.metrics import Observation

    return (Observation(sum(value.counts), point.attributes) for point, value in _histograms(points))


def _numbers(points: Sequence[DataPoint]) -> Iterator[Observation]:
    from opentelemetry.metrics import Observation

    return (Observation(point.value, point.attributes) for point in points if not isinstance(point.value, Histogram))


def _histograms(points: Sequence[DataPoint]) -> Iterator[tuple[DataPoint, Histogram]]:
    return ((point, point.value) for point in points if isinstance(point.value, Histogram))
