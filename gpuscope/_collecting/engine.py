"""
One period of recording, from its first stage to its shutdown: makes the recorder and its collector, and ends them.

Knows nothing of what came before or comes after; `_runtime` decides that.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from gpuscope._collecting.aggregation.statistics import StageStatistics
from gpuscope._collecting.collector import Collector
from gpuscope._cuda.cuda_device import CudaDevice
from gpuscope._cuda.graphs.capture import OpenCaptures
from gpuscope._cuda.graphs.replay import ReplayQueue
from gpuscope._log import logger
from gpuscope._recording.ledger import Ledger
from gpuscope._recording.nvtx import open_nvtx
from gpuscope._recording.queue import RecordQueue
from gpuscope._recording.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.interfaces import Bridge, Device, Nvtx
    from gpuscope._data.record import StageRecord
    from gpuscope._data.statistics import Statistics
    from gpuscope._settings.config import Config
    from gpuscope.exporters import Exporter


def _warn_of_gevent() -> None:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        logger.warning(
            "gevent has patched `threading`, which is unsupported: gpuscope's threads are greenlets, which take turns "
            "with the program's, and NVTX ranges of greenlets close each other."
        )


class StartingQueue:
    """Stands in for a recorder's queue until the first record, which starts the collector: see `_recording.queue`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def put(self, record: StageRecord) -> bool:
        """Start the collector, step aside, and queue the record."""
        self._engine.start()
        self._engine.recorder.accept(self._engine.queue)
        return self._engine.queue.put(record)


class Engine:
    """
    A recorder and its collector. Its thread starts with the first record.

    Args:
        config: the settings.
        device: the GPUs; by default CUDA's.
        nvtx: the NVTX door; by default the package's where `config` wants it.
        clock: nanoseconds, monotonic.
        epoch_clock: nanoseconds since the epoch.
        exporters: more exporters than `config` names.
        on_provider: called when a provider of the application's is first seen.
        on_pass: called by the collector once per pass, with the recorder.
        meters: instruments made by former periods of recording, by the application's MeterProvider.

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
        meters: dict[Any, Any] | None = None,
    ) -> None:
        self.config = config
        self.queue = RecordQueue(config.queue_size)
        self.ledger = Ledger()
        self.summary = StageStatistics()
        self.ended = False
        self._lock = threading.Lock()
        self._started = False
        # As many event pairs as stages can be waiting in the queue and with the collector.
        device = device or CudaDevice(self.ledger.untimed, max_pairs=2 * config.queue_size)
        wake = threading.Event()
        self.replays = ReplayQueue(wake.set)
        self.recorder = Recorder(
            StartingQueue(self),
            replays=self.replays,
            device=device,
            ledger=self.ledger,
            open_bridge=self._open_bridge,
        )
        self.recorder.clock = clock
        self.recorder.nvtx = nvtx or (open_nvtx() if config.nvtx else None)
        if config.graph_stages:
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

        # Exporters handed in, as in tests, should see what the application's spans see.
        visible = True if self._extra_exporters else None
        return bridge.Bridge(self.config, clock=self.recorder.clock, epoch_clock=self._epoch_clock, visible=visible)

    def start(self) -> None:
        """Start the collector's thread, unless it runs or has ended."""
        with self._lock:
            starts = not self._started and not self.ended
            if starts:
                self.collector.start()
                self._started = True
        if starts:
            _warn_of_gevent()

    def wait_until_ready(self) -> None:
        """Wait for a collector that has just started to make its exporters."""
        if self._started and not self.ended:
            self.collector.ready.wait(self.config.shutdown_timeout_s)

    def flush(self, timeout_s: float, *, send: bool = True) -> bool:
        """Have everything recorded so far resolved, and sent, too; return whether that was done in time."""
        return self.collector.flush(timeout_s, send=send) if self._started and not self.ended else True

    def shutdown(self, timeout_s: float) -> bool:
        """Export what can be exported in time, count the rest as lost, and end."""
        with self._lock:
            if self.ended:
                return True
            self.ended = True
        finished = self.collector.shutdown(timeout_s) if self._started else True
        self.ledger.close("shutdown", self.queue, self.replays)
        self._retire_bridge()
        lost = self.statistics().lost
        missing = {**lost, **{k: v for k, v in self.statistics().dropped.items() if k == "queue_full"}}
        if missing:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(missing.items()))
            logger.warning("some stages were not exported: %s.", reasons)
        return finished and not lost

    def abandon(self) -> None:
        """Touch nothing any more: this process is a fork's child, and the engine is its parent's."""
        self.ended = True
        self.recorder.device.close()
        self.recorder.nvtx = None
        self.recorder.accept(RecordQueue(0))
        self._retire_bridge()

    def _retire_bridge(self) -> None:
        if self.recorder.bridge is not None:
            self.recorder.bridge.retire()

    def statistics(self) -> Statistics:
        """Return the account of this moment."""
        return self.collector.statistics()
