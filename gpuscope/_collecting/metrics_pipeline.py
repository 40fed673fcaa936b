"""
Which way metrics go, by the configuration and by whether the application has a MeterProvider; and when.

Counts every stage of every batch, sampled or not, and hands on one cumulative snapshot per interval. Never flushes the
application's MeterProvider or shuts it down. Runs on the collector's thread, except for `snapshot`, which any thread
may call. Its failures cost metrics, never stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ParamSpec

from gpuscope._collecting.aggregation.metrics import StageMetrics, account_points
from gpuscope._collecting.aggregation.watched import GpuMeans
from gpuscope._collecting.joins.pauses import CollectionTimes
from gpuscope._data.metrics import Snapshot
from gpuscope._data.plain.values import shown
from gpuscope._otel.provider_end import end_of
from gpuscope._recording.state import state
from gpuscope._settings.complaints import METRICS
from gpuscope.exporters.metrics_sdk import Instruments, find_provider

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpuscope._collecting.active_exporters import ActiveExporters
    from gpuscope._data.batch import FinishedGeneration, StageBatch
    from gpuscope._data.metrics import DataPoint, InstrumentSpec
    from gpuscope._data.statistics import Statistics
    from gpuscope._log import WarnOnce
    from gpuscope._settings.config import Config
    from gpuscope.exporters.metrics_otlp import OtlpMetrics

_ACCOUNT_INTERVAL_NS = 5 * 10**9

P = ParamSpec("P")


class MetricsPipeline:
    """
    The metrics of one period of recording.

    Args:
        config: the settings.
        active_exporters: the exporters of spans.
        warnings: logs each kind of failure once.
        statistics: returns the account of this moment.
        clock: nanoseconds, monotonic; tells when exports are due.
        epoch_clock: nanoseconds since the epoch.
        meters: the instruments made so far in this process, by the `id` of the application's MeterProvider.
        on_provider: called when the application's MeterProvider is first seen.
        before_its_end: called before the application ends its MeterProvider, whose readers then ask for the last time.

    """

    def __init__(
        self,
        config: Config,
        active_exporters: ActiveExporters,
        warnings: WarnOnce,
        *,
        statistics: Callable[[], Statistics],
        clock: Callable[[], int],
        epoch_clock: Callable[[], int],
        meters: dict[int, Instruments],
        on_provider: Callable[[], None],
        before_its_end: Callable[[], bool],
    ) -> None:
        self.way = "none"
        """`otlp`, `sdk` or `none`."""
        self._config = config
        self._active_exporters = active_exporters
        self._warnings = warnings
        self._statistics = statistics
        self._clock, self._epoch_clock = clock, epoch_clock
        self._meters = meters
        self._on_provider, self._before_its_end = on_provider, before_its_end
        self._start_ns = epoch_clock()
        self._stages = StageMetrics(self._start_ns)
        self._gpus = GpuMeans()
        self._collections = CollectionTimes()
        self._otlp: OtlpMetrics | None = None
        self._instruments: Instruments | None = None
        self._seen: tuple[object, tuple[str, ...]] | None = None
        """The application's provider and the names of the exporters of spans when the way was last chosen."""
        self._due_ns = clock() + int(config.metrics_interval_s * 1e9)
        self._account_due_ns = clock() + _ACCOUNT_INTERVAL_NS

    def add(self, batch: StageBatch, generations: Sequence[FinishedGeneration] = ()) -> None:
        """Count every stage of a batch, sampled or not, and generations that took part in many."""
        if self._wanted:
            self._guarded(self._count, batch, generations)

    def _count(self, batch: StageBatch, generations: Sequence[FinishedGeneration]) -> None:
        values = self._stages.add(batch, generations)
        if values and self._instruments is not None and self.way == "sdk":
            self._instruments.record(values)

    def refresh(self) -> None:
        """Choose the way again, because `auto` follows the application's provider, and hand on what is due."""
        self._guarded(self._choose)
        self._guarded(self._collections.look)
        self._guarded(self._hand_on_what_is_due, self._clock())

    def flush(self, remaining_s: Callable[[], float]) -> None:
        """Hand on what there is, and wait within the time until it has been sent."""
        # Nothing to do for the application's MeterProvider: its readers ask for instruments when they like, and
        # `force_flush` would make its Prometheus reader show every series twice.
        self._guarded(self._write_account)
        if self._otlp is not None:
            self._guarded(self._hand_on)
            self._otlp.flush(remaining_s())

    def shutdown(self, remaining_s: Callable[[], float]) -> None:
        """Hand on the last figures within the time that remains, and end."""
        self._guarded(self._end_interval, last=True)
        self.flush(remaining_s)
        if self._otlp is not None:
            self._otlp.shutdown(remaining_s())
        self._guarded(self._leave)

    def _guarded(self, action: Callable[P, None], *arguments: P.args, **keywords: P.kwargs) -> None:
        try:
            action(*arguments, **keywords)
        except BaseException as error:  # It costs metrics; the stages themselves are exported all the same.
            self._warnings.warn("metrics", "metrics failed: %s.", shown(error))

    def snapshot(self, *, exemplars: bool = False) -> Snapshot:
        """Return all metrics as of now; with `exemplars`, those since they were last taken."""
        points = {**self._stages.points(exemplars=exemplars), **self._gpus.points(), **self._collections.points()}
        return self._snapshot({**points, **account_points(self._statistics())})

    def _snapshot(self, points: Mapping[InstrumentSpec, Sequence[DataPoint]]) -> Snapshot:
        now_ns = self._epoch_clock()
        # A wall clock that was set back must not have the interval end before it begins.
        self._start_ns = min(self._start_ns, now_ns)
        return Snapshot(self._start_ns, now_ns, points)

    @property
    def _wanted(self) -> bool:
        """Whether metrics go anywhere now, or would once a provider appears."""
        config = self._config
        off = config.metrics == "auto" and config.metrics_exporter.strip().lower() == "none"
        return not (off or config.sdk_disabled or config.metrics == "none")

    def _way(self) -> str:
        config = self._config
        if not self._wanted:
            return "none"
        if config.metrics != "otlp" and find_provider() is not None:
            return "sdk"
        with_spans = "otlp" in self._active_exporters.names and not config.only_spans_have_an_endpoint
        return "otlp" if config.metrics == "otlp" or (config.metrics == "auto" and with_spans) else "none"

    def _choose(self) -> None:
        provider, names = find_provider(), self._active_exporters.names
        if self._seen is None or provider is not self._seen[0] or names is not self._seen[1]:
            way = self._way()
            if way != self.way:
                self.way = way
                self._change_to(way)
            self._seen = provider, names
        if self._instruments is not None:
            self._instruments.follow(self.snapshot)

    def _change_to(self, way: str) -> None:
        if self._otlp is not None:
            self._otlp.shutdown(0.0)
            self._otlp = None
        if way == "otlp":
            from gpuscope.exporters.metrics_otlp import OtlpMetrics

            state.complain(METRICS, self._config)
            self._otlp = OtlpMetrics(self._config, self._active_exporters.resource())
        elif way == "sdk":
            provider = find_provider()
            # By its `id`, because Logfire's cannot be hashed. Its instruments keep it alive, so no other has this `id`.
            if id(provider) not in self._meters:
                self._meters[id(provider)] = Instruments(provider)
            self._instruments = self._meters[id(provider)]
            self._on_provider()
            if (end := end_of(provider)) is not None:
                end.tell(self._before_its_end)

    def _hand_on_what_is_due(self, now_ns: int) -> None:
        if now_ns >= self._account_due_ns:
            self._account_due_ns = now_ns + _ACCOUNT_INTERVAL_NS
            self._stages.settle(self._epoch_clock())
            self._write_account()
        if now_ns >= self._due_ns:
            self._due_ns = now_ns + int(self._config.metrics_interval_s * 1e9)
            self._end_interval()
            self._hand_on()

    def _end_interval(self, *, last: bool = False) -> None:
        self._stages.settle(self._epoch_clock(), last=last)
        self._stages.end_interval()
        self._gpus.end_interval(self._statistics().gpus)

    def _hand_on(self) -> None:
        if self._otlp is not None:
            self._otlp.put(self.snapshot(exemplars=True))

    def _write_account(self) -> None:
        self._active_exporters.account(self._snapshot(account_points(self._statistics(), for_file=True)))

    def _leave(self) -> None:
        if self._instruments is not None:
            # The application's readers collect once more when the process ends, after us: the instruments keep the
            # last sums until another recording begins.
            self._instruments.leave(self.snapshot, self.snapshot())
