"""
The loop on the collector's thread: drain, ask, resolve, export, give events back.

Never waits for the GPU. Never waits for a network, except to flush and to shut down within a deadline: anchors would
age and the queue fill. Works in short slices with real pauses between them, because every PyTorch operator gives up the
GIL and takes it again: a thread of ours that is busy for milliseconds would make the application wait again and again.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from gpuscope._collecting.active_exporters import BY_PROVIDER, ActiveExporters
from gpuscope._collecting.flushes import Flushes
from gpuscope._collecting.gates import Gate, Wake
from gpuscope._collecting.intake import Intake
from gpuscope._collecting.keeping.onward import Onward
from gpuscope._collecting.metrics_pipeline import MetricsPipeline
from gpuscope._collecting.one_thread import OneThread
from gpuscope._data.plain.values import shown
from gpuscope._interrupts import is_the_programs
from gpuscope._log import COUNTED, WarnOnce, say_what_waits

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._collecting.aggregation.statistics import StageStatistics
    from gpuscope._data.statistics import Statistics
    from gpuscope._recording.queue import RecordQueue
    from gpuscope._recording.recorder import Recorder
    from gpuscope._settings.config import Config
    from gpuscope.exporters import Exporter
    from gpuscope.exporters.metrics_sdk import Instruments

_PAUSE_S = 0.004
"""Between slices: much longer than a slice takes, so that the application has the GIL most of the time."""
_FLUSH_PAUSE_S = 0.002
"""Between passes while somebody waits for a flush, or for the end."""
_SHARE_FOR_GPU = 0.6
"""The share of a shutdown's time in which GPU work that has not ended is still asked about."""
_SHARE_FOR_METRICS = 0.1
"""The share of the remaining time that is kept for the metrics, in case an endpoint for spans hangs."""


class Collector:
    """
    Turns a recorder's queue into exported batches, on a daemon thread named `gpuscope-collector`.

    `step` does one bounded piece of work and can be called without the thread, as the tests do.

    Args:
        config: the settings.
        recorder: whose stages they are.
        queue: where its records wait.
        wake: has the thread come before its time; set by whoever cannot wait for the next pass.
        summary: is given every batch.
        extra_exporters: more exporters than `config` names.
        on_provider: called when a TracerProvider or a MeterProvider of the application's is first seen.
        on_pass: called about once per pass, with the recorder.
        epoch_clock: nanoseconds since the epoch.
        meters: the instruments made so far in this process, by the `id` of the application's MeterProvider.

    """

    def __init__(
        self,
        config: Config,
        recorder: Recorder,
        *,
        queue: RecordQueue,
        wake: Wake,
        summary: StageStatistics,
        extra_exporters: tuple[Exporter, ...] = (),
        on_provider: Callable[[], None] = lambda: None,
        on_pass: Callable[[Recorder], None] | None = None,
        epoch_clock: Callable[[], int] = time.time_ns,
        meters: dict[int, Instruments] | None = None,
    ) -> None:
        self._config = config
        self._recorder = recorder
        self._queue = queue
        self._on_provider, self._on_pass = on_provider, on_pass or (lambda _: None)
        self._provider: object = None
        self.warnings = WarnOnce(COUNTED)
        self.active_exporters = ActiveExporters(config, recorder.ledger, self.warnings, extra=extra_exporters)
        self.metrics_pipeline = MetricsPipeline(
            config,
            self.active_exporters,
            self.warnings,
            statistics=self.statistics,
            clock=recorder.clock,
            epoch_clock=epoch_clock,
            meters={} if meters is None else meters,
            on_provider=on_provider,
            before_its_end=self.hand_over,
        )
        self._intake = Intake(config, recorder, queue, self.warnings, epoch_clock)
        self.watch, self.waiting_stages = self._intake.watch, self._intake.waiting_stages
        self._onward = Onward(
            *(config, recorder, self._intake, self.warnings),
            summary=summary,
            metrics=self.metrics_pipeline,
            exporters=self.active_exporters,
        )
        self._wake, self.come = wake, wake.set
        self._flushes = Flushes(
            self._intake,
            clock=recorder.clock,
            wake=wake.set,
            export=partial(self._export, now=True),
            send=self._send,
            pass_on=self.active_exporters.pass_on,
            missing=lambda: sum(self.statistics().missing.values()),
        )
        self._may_ask = False
        self._stop_at_s: float | None = None
        self.ready = Gate()
        """Open once the exporters are made; that takes imports and threads, refused by an interpreter that ends."""
        self._thread = OneThread("gpuscope-collector", self._run)

    # ---- any thread

    def start(self) -> None:
        """Start the thread; to do so twice is harmless."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the thread runs, or has run."""
        return self._thread.is_running

    def statistics(self) -> Statistics:
        """Return the account of this moment."""
        return self._recorder.ledger.statistics(
            *(self._queue, self._recorder.replays),
            exporters=self.active_exporters.names,
            route=self.active_exporters.route,
            observed=self._intake.observed._replace(kept=self._onward.kept),
        )

    def flush(self, timeout_s: float, *, send: bool) -> bool:
        """Have everything recorded so far resolved and, with `send`, exported; return whether that was done in time."""
        return self._flushes.wait(timeout_s, send=send)

    def hand_over(self, by_s: float | None = None) -> bool:
        """Hand everything recorded so far to the exporters, by `by_s` if that is given; return whether it was done."""
        if self._thread.is_this or not self.is_running or self._stop_at_s is not None:
            return True
        return self._flushes.hand_over(self._config.shutdown_timeout_s, _SHARE_FOR_GPU, by_s)

    @property
    def uses_providers(self) -> bool:
        """Whether anything goes to a provider of the application's, of traces or of metrics."""
        return not BY_PROVIDER.isdisjoint(self.active_exporters.names) or self.metrics_pipeline.way == "sdk"

    def watch_provider(self) -> None:
        """Hand over what there is before the application ends its provider."""
        try:
            if (bridge := self._recorder.bridge) is not None:
                bridge.watch_provider(self.hand_over)
        except Exception as error:  # The provider's own code; the stages go on.
            if is_the_programs(error):
                raise
            self.warnings.warn("provider", "the application's TracerProvider cannot be watched: %s.", shown(error))

    def shutdown(self, timeout_s: float) -> bool:
        """Export what can be exported in the time, and end the thread, if it runs; return whether it ended."""
        self._stop_at_s = time.monotonic() + timeout_s
        self._wake.set()
        if not self.is_running and len(self._queue):
            self._thread.run_here()  # No thread was to be had: early 3.12 starts none once the main one has ended.
        return self._thread.stopped.wait(timeout_s) if self.is_running else True

    # ---- the collector's thread

    def _run(self) -> None:
        self._set_up()
        while self._stop_at_s is None:
            self._wake.wait(_FLUSH_PAUSE_S if self._flushes else self._config.interval_s)
            self._pass()
        self._finish(self._stop_at_s)

    def _pass(self) -> None:
        try:
            self._drain()
            self._flushes.serve(may_ask=self._may_ask)
        except BaseException as error:  # Even a `SystemExit`: the code of the program's that we run may raise anything.
            self.warnings.warn("pass", "a pass of the collector failed: %s.", shown(error))

    def _set_up(self) -> None:
        try:
            self._refresh()
        except BaseException as error:  # Not fatal: each pass does the same again.
            self.warnings.warn("pass", "setting up the collector failed: %s.", shown(error))
        self.ready.open()

    def _prepare(self) -> None:
        self._may_ask = False
        try:
            self._refresh()
            self._recorder.device.attach()
            self._may_ask = True
            say_what_waits()
        except BaseException as error:  # The pass goes on, but asks no GPU, for which the thread may not be prepared.
            self.warnings.warn("pass", "preparing a pass of the collector failed: %s.", shown(error))

    def _tell_of_pass(self) -> None:
        try:
            self._recorder.poll_flight()
            self._on_pass(self._recorder)
        except BaseException as error:  # A deep look that cannot begin is not a reason to stop collecting.
            self.warnings.warn("look", "checking whether a deep look was asked for failed: %s.", shown(error))

    def _drain(self) -> None:
        self._prepare()
        self._tell_of_pass()
        turn_s = time.monotonic() + self._config.interval_s
        while self._intake.slice(may_ask=self._may_ask) and self._stop_at_s is None:
            if self._intake.is_full:
                self._export()
            if time.monotonic() >= turn_s or self._flushes:
                # Under constant load a pass does not end, and all the rest has its turn here.
                self._prepare()
                self._tell_of_pass()
                self._flushes.serve(may_ask=self._may_ask)
                turn_s = time.monotonic() + self._config.interval_s
            self._breathe()
        if self._flushes or self._intake.is_due:
            self._export()

    def _breathe(self) -> None:
        """Let the application have the GIL for longer than one of our slices takes."""
        if self._stop_at_s is None:
            time.sleep(_PAUSE_S)  # An event's `wait` would cost three times as much CPU.

    def step(self, *, give_up: bool = False) -> bool:
        """Do one slice and export its rows; return whether there is more to do right away."""
        self._prepare()
        more = self._intake.slice(may_ask=self._may_ask, give_up=give_up)
        self._export(now=True)
        return more

    def _refresh(self) -> None:
        """Follow the application: has it imported OpenTelemetry, has it set a provider, are metrics due?"""
        bridge = self._recorder.bridge if self._recorder.open_bridge() else None
        provider = bridge.provider if bridge is not None else None
        if provider is not self._provider:
            self._provider = provider
            self._on_provider()
            self.watch_provider()
        self.active_exporters.refresh(bridge, partial(self._export, last=True))
        self.metrics_pipeline.refresh()

    def _export(self, *, now: bool = False, last: bool = False) -> None:
        """Finish the batch and hand it on; the last of all, or for these exporters, with what is undecided."""
        self._onward.export(self._breathe, now=now or bool(self._flushes), last=last)

    def _send(self, remaining_s: Callable[[], float]) -> bool:
        sent = self.active_exporters.flush(remaining_s)
        self.metrics_pipeline.flush(remaining_s)
        return sent

    def _finish(self, deadline_s: float) -> None:
        """Export what can be, with one deadline: what is done on the GPU, then what is not, and at last the metrics."""
        started_s = time.monotonic()
        give_up_s = started_s + _SHARE_FOR_GPU * max(0.0, deadline_s - started_s)
        while time.monotonic() < deadline_s and (
            self.step() or (self._intake.pending and time.monotonic() < give_up_s)
        ):
            time.sleep(_FLUSH_PAUSE_S)
        while self._intake.pending and time.monotonic() < deadline_s:
            self.step(give_up=True)
        self._export(last=True)
        self._intake.give_up_generations()
        share = _SHARE_FOR_METRICS if self.metrics_pipeline.way == "otlp" else 0.0
        spans_s = deadline_s - share * max(0.0, deadline_s - time.monotonic())
        self.active_exporters.shutdown(lambda: max(0.0, spans_s - time.monotonic()))
        # Count whatever is still open as lost, so that the final account is complete.
        self._recorder.ledger.close("shutdown", self._queue, self._recorder.replays)
        self.metrics_pipeline.shutdown(lambda: max(0.0, deadline_s - time.monotonic()))
        self._flushes.end()
