"""
One period of recording, from its first stage to its shutdown: makes the recorder and its collector, and ends them.

Does not know what came before or what comes after; `_runtime` decides that.
"""

from __future__ import annotations

import threading
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

from gpuscope._collecting.aggregation.statistics import StageStatistics
from gpuscope._collecting.collector import Collector
from gpuscope._collecting.gates import Wake
from gpuscope._collecting.one_thread import warn_of_gevent
from gpuscope._cuda.cuda_device import CudaDevice
from gpuscope._cuda.graphs.capture import OpenCaptures
from gpuscope._cuda.graphs.replay import ReplayQueue
from gpuscope._data.plain.tracebacks import traceback_of
from gpuscope._data.statistics import explained
from gpuscope._interrupts import is_the_programs
from gpuscope._log import WarnOnce, forget_what_waits, later, logger, say_what_waits
from gpuscope._recording.current_stage import watch_collections
from gpuscope._recording.ledger import Ledger
from gpuscope._recording.nvtx import open_nvtx
from gpuscope._recording.queue import ByteBudget, RecordQueue
from gpuscope._recording.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.interfaces import Bridge, Device, Nvtx
    from gpuscope._data.record import StageRecord
    from gpuscope._data.statistics import Statistics
    from gpuscope._settings.config import Config
    from gpuscope.exporters import Exporter
    from gpuscope.exporters.metrics_sdk import Instruments

_LEAST_EXIT_S = 0.1
"""What the end has at exit where handing over took all the time."""


_late = RecordQueue(0)
"""Refuses the stages that end after their period. One for all periods: the account of the next one has them."""


class _Follower:
    """Opens the door to OpenTelemetry when the program has imported that, so that no stage has to import anything."""

    def __init__(self) -> None:
        self.find_engine: Callable[[], Engine | None] = lambda: None
        self.has_come = False

    def open(self, _module: object = None) -> None:
        self.has_come = True
        engine = self.find_engine()
        if engine is None or engine.ended:
            return
        try:
            engine.recorder.open_bridge()
        except Exception as error:  # OpenTelemetry is broken, or still being imported; the collector tries again.
            if is_the_programs(error):
                raise
            logger.debug("OpenTelemetry cannot be followed yet.\n%s", traceback_of(error))


_followers: list[_Follower] = []


def _follow_opentelemetry(engine: Engine) -> None:
    """Open an engine's door to OpenTelemetry, now or when the program imports that."""
    if not _followers:
        import wrapt

        _followers.append(_Follower())
        _followers[0].find_engine = weakref.ref(engine)
        wrapt.when_imported("opentelemetry.trace")(_followers[0].open)
        return
    _followers[0].find_engine = weakref.ref(engine)
    if _followers[0].has_come:
        _followers[0].open()


class StartingQueue:
    """Stands in for a recorder's queue until the first record, which starts the collector: see `_recording.queue`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def put(self, record: StageRecord) -> bool:
        """Start the collector, step aside, and queue the record."""
        engine = self._engine
        try:
            engine.start()
        except BaseException as error:  # No thread can be had, or an interrupt; the next record tries again.
            taken = engine.queue.put(record)
            if is_the_programs(error):
                raise
            return taken
        queue = engine.recorder.queue
        return (engine.queue if queue is self else queue).put(record)


class Engine:
    """
    A recorder and its collector, whose thread starts with the first record.

    Args:
        config: the settings.
        device: the GPUs; by default CUDA's.
        nvtx: opens and closes NVTX ranges; by default the package `nvtx`, where `config` wants it.
        clock: nanoseconds, monotonic.
        epoch_clock: nanoseconds since the epoch.
        exporters: more exporters than `config` names.
        on_provider: called when a TracerProvider or a MeterProvider of the application's is first seen.
        on_pass: called by the collector about once per pass, with the recorder.
        meters: instruments that earlier periods of recording made, by the `id` of the application's MeterProvider.

    """

    def __init__(
        self,
        config: Config,
        *,
        device: Device | None = None,
        nvtx: Nvtx | None = None,
        clock: Callable[[], int] = time.perf_counter_ns,
        epoch_clock: Callable[[], int] = time.time_ns,
        exporters: tuple[Exporter, ...] = (),
        on_provider: Callable[[], None] = lambda: None,
        on_pass: Callable[[Recorder], None] | None = None,
        meters: dict[int, Instruments] | None = None,
    ) -> None:
        self.config = config
        wake = Wake()
        self.queue = RecordQueue(config.queue_size, wake.set)
        self.ledger = Ledger()
        self.summary = StageStatistics()
        self._claimed_end = threading.Lock()
        """Held for ever once the period has ended; it is tried, and nobody waits for it."""
        self._closed = False
        self._complete = True
        """Whether, at its end, nothing was lost."""
        self._exit_took_s = 0.0
        self._warnings = WarnOnce(say=later)
        self._late_before = _late.stages + _late.refused
        # One pair of events for each stage that can wait in the queue, and for each that can wait with the collector.
        device = device or CudaDevice(self.ledger.untimed, max_pairs=2 * config.queue_size, sample_hz=config.sample_hz)
        self.replays = ReplayQueue(wake.set)
        self.recorder = Recorder(
            StartingQueue(self),
            replays=self.replays,
            device=device,
            ledger=self.ledger,
            open_bridge=self._open_bridge,
            budget=ByteBudget(config.queue_bytes),
        )
        self.recorder.clock = clock
        self.recorder.nvtx = nvtx or (open_nvtx() if config.nvtx else None)
        if config.graph_stages and isinstance(device, CudaDevice):  # Other devices know no graphs.
            self.recorder.captures = OpenCaptures(device, self.ledger, inline=config.graph_stages == "inline")
        self._epoch_clock = epoch_clock
        self._extra_exporters = exporters
        self.collector = Collector(
            config,
            self.recorder,
            queue=self.queue,
            wake=wake,
            summary=self.summary,
            extra_exporters=exporters,
            on_provider=on_provider,
            on_pass=on_pass,
            epoch_clock=epoch_clock,
            meters=meters,
        )

    def _open_bridge(self) -> Bridge:
        from gpuscope._otel import bridge

        # With exporters handed in, as in tests, stages stand in the application's context, whatever `config` names.
        visible = True if self._extra_exporters else None
        return bridge.Bridge(self.config, clock=self.recorder.clock, epoch_clock=self._epoch_clock, visible=visible)

    def follow_program(self) -> None:
        """Learn of the program's garbage collections, and of its import of OpenTelemetry."""
        watch_collections()
        _follow_opentelemetry(self)

    @property
    def ended(self) -> bool:
        """Whether the period is over."""
        return self._claimed_end.locked()

    def start(self) -> None:
        """
        Start the collector's thread and open the queue, unless that was done or the period has ended.

        Takes no lock: a stage in a signal handler may come here while its own thread is here. If both start a thread,
        the collector keeps one.
        """
        if self.ended:
            return
        starts = not self.collector.is_running
        if starts:
            self.collector.start()
        self.recorder.accept(self.queue)
        if self.ended:  # By another thread, meanwhile.
            self.recorder.accept(_late)
        if starts:
            # Here and not on the collector's thread: the program may end its provider before that has begun.
            self.collector.watch_provider()
            warn_of_gevent(self._warnings)

    def wait_until_ready(self) -> None:
        """Wait until a collector that has just started has made its exporters."""
        if self.collector.is_running and not self.ended:
            self.collector.ready.wait(self.config.shutdown_timeout_s)

    def flush(self, timeout_s: float, *, send: bool = True) -> bool:
        """Have everything recorded so far resolved and, with `send`, exported; return whether that was done in time."""
        if self.ended:
            return self._complete
        if self.collector.is_running:
            return self.collector.flush(timeout_s, send=send)
        found = self.statistics()  # No thread was to be had, or nothing was recorded.
        return not found.pending and not found.missing

    def hand_over(self) -> None:
        """At exit, hand everything recorded so far to the application's providers, before these end."""
        began_s = time.monotonic()
        if self.collector.is_running and not self.ended and self.collector.uses_providers:
            self.collector.hand_over(began_s + self.config.shutdown_timeout_s)
        self._exit_took_s = time.monotonic() - began_s

    def shutdown_at_exit(self) -> bool:
        """Do the same as `shutdown`, in what is left of the time for the exit."""
        timeout_s = self.config.shutdown_timeout_s
        # Threads of the program may still be at work, and the recorder stays: without this there would be no end.
        self.recorder.accept(_late)
        return self.shutdown(min(timeout_s, max(timeout_s - self._exit_took_s, _LEAST_EXIT_S)))

    def shutdown(self, timeout_s: float) -> bool:
        """Export what can be exported in time and count the rest as lost; return whether it ended and lost nothing."""
        finished = False
        if not self._claimed_end.acquire(blocking=False):
            return self._complete
        try:
            self.sample(on=False)
            if not self.collector.is_running:
                self.recorder.accept(_late)
            finished = self.collector.shutdown(timeout_s)
        finally:  # Also if the program is interrupted while it waits.
            # What ends from now on is refused, and counted; what is still on its way there is swept up by `statistics`.
            self.recorder.accept(_late)
            self._closed = True
            self._retire_bridge()
            self.recorder.end_flight()
            device = self.recorder.device
            if finished and isinstance(device, CudaDevice):
                device.release()
            missing = self.statistics().missing
            self._complete = finished and not missing
        say_what_waits()
        if missing:
            logger.warning("some stages were not exported: %s.", explained(missing))
        return self._complete

    def sample(self, *, on: bool) -> None:
        """Ask streams for work, and NVML, and look for stalls, where that is wanted at all, or do so no more."""
        sampling = (device.sampling,) if isinstance(device := self.recorder.device, CudaDevice) else ()
        for each in (self.collector.watch, self.recorder.stalls, *sampling):
            if each is not None:
                (each.start if on else each.stop)()

    def abandon(self) -> None:
        """Do nothing more: this process is the child of a fork, and the engine is its parent's."""
        self._claimed_end.acquire(blocking=False)
        forget_what_waits()
        self.recorder.device.close()
        self.recorder.end_flight(is_fork=True)
        # The hot path reads both: no range is opened any more, and no record finds room.
        self.recorder.nvtx = None
        self.recorder.accept(RecordQueue(0))
        self._retire_bridge()

    def _retire_bridge(self) -> None:
        if self.recorder.bridge is not None:
            self.recorder.bridge.retire()

    def statistics(self) -> Statistics:
        """Return the account of this moment."""
        if self._closed:
            self.ledger.close("shutdown", self.queue, self.replays)
        found, late = self.collector.statistics(), _late.stages + _late.refused - self._late_before
        if not late:
            return found
        return replace(found, recorded=found.recorded + late, dropped={**found.dropped, "after_shutdown": late})
