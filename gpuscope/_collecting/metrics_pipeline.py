"""
Which way metrics go, from the configuration and from whether the application has a MeterProvider; and when.

Aggregates every batch, hands on once an interval. Runs on the collector's thread, but for `snapshot`, which any may
ask for. A failure of its own costs metrics, never stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpuscope._collecting.aggregation.metrics import StageMetrics, account_points
from gpuscope._data.metrics import Snapshot
from gpuscope.exporters.metrics_sdk import Instruments, find_provider

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpuscope._collecting.active_exporters import ActiveExporters
    from gpuscope._data.batch import StageBatch
    from gpuscope._data.metrics import DataPoint, InstrumentSpec
    from gpuscope._data.statistics import Statistics
    from gpuscope._log import WarnOnce
    from gpuscope._settings.config import Config

_ACCOUNT_INTERVAL_NS = 5 * 10**9


class MetricsPipeline:
    """
    The metrics of one period of recording.

    Args:
        config: the settings.
        active_exporters: the exporters of spans.
        warnings: where failures are said.
        statistics: returns the account of this moment.
        clock: nanoseconds, monotonic: when exports are due.
        epoch_clock: nanoseconds since the epoch.
        meters: the instruments made so far in this process, by provider.
        on_provider: called when an application's MeterProvider is first seen.

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
        meters: dict[Any, Any],
        on_provider: Callable[[], None],
    ) -> None:
        self.way = "none"
        self._config = config
        self._active_exporters = active_exporters
        self._warnings = warnings
        self._statistics = statistics
        self._clock, self._epoch_clock = clock, epoch_clock
        self._meters = meters
        self._on_provider = on_provider
        self._start_ns = epoch_clock()
        self._stages = StageMetrics(self._start_ns)
        self._otlp: Any = None
        self._instruments: Any = None
        self._seen: tuple[Any, tuple[str, ...]] | None = None
        """The application's provider and the exporters of spans when the way was chosen last."""
        self._due_ns = clock() + int(config.metrics_interval_s * 1e9)
        self._account_due_ns = clock() + _ACCOUNT_INTERVAL_NS

    def add(self, batch: StageBatch) -> None:
        """Count every stage of a batch, sampled or not."""
        if self._wanted:
            self._guarded(self._stages.add, batch)

    def refresh(self) -> None:
        """Choose the way anew, since `auto` follows the application's provider, and hand on what is due."""
        self._guarded(self._choose)
        self._guarded(self._hand_on_what_is_due, self._clock())

    def flush(self, remaining_s: Callable[[], float]) -> None:
        """Hand on what there is, and wait for it within the time; the application's readers ask when they like."""
        self._guarded(self._write_account)
        if self._otlp is not None:
            self._guarded(self._hand_on)
            self._otlp.flush(remaining_s())

    def shutdown(self, remaining_s: Callable[[], float]) -> None:
        """Hand on the last figures, within the time that remains, and end."""
        self._guarded(self._end_interval, last=True)
        self.flush(remaining_s)
        if self._otlp is not None:
            self._otlp.shutdown(remaining_s())
        if self._instruments is not None:
            self._guarded(self._leave)

    def _guarded(self, action: Callable[..., None], *arguments: Any, **keywords: Any) -> None:
        try:
            action(*arguments, **keywords)
        except Exception as error:  # It costs metrics; the stages themselves are to be exported none the less.
            self._warnings.warn("metrics", "metrics failed: %r.", error)

    def snapshot(self, *, exemplars: bool = False) -> Snapshot:
        """Return all metrics of this moment; with exemplars those since they were last taken."""
        points = self._stages.points(exemplars=exemplars)
        return self._snapshot({**points, **account_points(self._statistics())})

    def _snapshot(self, points: Mapping[InstrumentSpec, Sequence[DataPoint]]) -> Snapshot:
        now_ns = self._epoch_clock()
        # A wall clock that was set back must not have the interval end before it begins.
        self._start_ns = min(self._start_ns, now_ns)
        return Snapshot(self._start_ns, now_ns, points)

    @property
    def _wanted(self) -> bool:
        """Whether metrics go anywhere, or will where a provider appears."""
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
                self._take(way)
            self._seen = provider, names
        if self._instruments is not None:
            self._instruments.follow(self.snapshot)

    def _take(self, way: str) -> None:
        if self._otlp is not None:
            self._otlp.shutdown(0.0)
            self._otlp = None
        if way == "otlp":
            from gpuscope.exporters.metrics_otlp import OtlpMetrics

            self._otlp = OtlpMetrics(self._config, self._active_exporters.resource())
        elif way == "sdk":
            provider = find_provider()
            # By identity, since Logfire's can't be hashed. Its instruments keep it, so its number is no other's.
            if id(provider) not in self._meters:
                self._meters[id(provider)] = Instruments(provider)
            self._instruments = self._meters[id(provider)]
            self._on_provider()

    def _hand_on_what_is_due(self, now_ns: int) -> None:
        if now_ns >= self._account_due_ns:
            self._account_due_ns = now_ns + _ACCOUNT_INTERVAL_NS
            self._stages.settle(self._epoch_clock())
            self._write_account()
        if now_ns >= self._due_ns:
            self._due_ns = now_ns + int(self._config.metrics_interval_s * 1e9)
            self._end_interval()
            if self._otlp is not None:
                self._hand_on()

    def _end_interval(self, *, last: bool = False) -> None:
        self._stages.settle(self._epoch_clock(), last=last)
        self._stages.end_interval()

    def _hand_on(self) -> None:
        self._otlp.put(self.snapshot(exemplars=True))

    def _write_account(self) -> None:
        self._active_exporters.account(self._snapshot(account_points(self._statistics())))

    def _leave(self) -> None:
        self._instruments.leave(self.snapshot, self.snapshot())
