"""
One period of recording, from its first stage to its shutdown: the recorder that the hot path sees, and its collector.

Knows nothing of what came before or comes after; `_runtime` decides that.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from gpuscope._collector import Collector
from gpuscope._compiled import RecorderFields
from gpuscope._cuda_device import CudaDevice
from gpuscope._graph_nodes import Captures
from gpuscope._ledger import Ledger, Statistics
from gpuscope._log import logger
from gpuscope._nvtx import open_nvtx
from gpuscope._queue import RecordQueue
from gpuscope.analysis._statistics import StageStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._config import Config
    from gpuscope._record import StageRecord
    from gpuscope.exporters import Exporter


class Recorder(RecorderFields):
    """What the hot path needs, and how it comes to be."""

    __slots__ = ("_open", "captures")

    def __init__(self, queue: Any, device: Any, ledger: Ledger, open_bridge: Callable[[], Any]) -> None:
        self.queue = queue
        self.waiting = ()
        self.capacity = 0
        self.device = device
        self.ledger = ledger
        self.clock = time.perf_counter_ns
        self.nvtx = self.bridge = self.look_for_provider = self.current_context = None
        self._open = open_bridge
        self.captures: Captures | None = None
        """Where stages inside CUDA graphs are wanted, those that are being captured."""
        # Not the global `random`, which frameworks seed alike on all ranks: trace ids would repeat.
        self.random_bits = random.Random(random.SystemRandom().getrandbits(256)).getrandbits  # noqa: S311
        # Span ids need to be unique only; from a random start they are so across processes too.
        self.span_ids = itertools.count(self.random_bits(62) + 1)

    def open_bridge(self) -> bool:
        """Open the door to OpenTelemetry, once the application or the collector has imported it."""
        if self.bridge is None:
            self.bridge = self._open()
            self.current_context = self.bridge.current_context
            self.look_for_provider = self.bridge.look_for_provider
        return self.bridge is not None

    def accept(self, queue: RecordQueue) -> None:
        """Put records where the collector takes them from."""
        self.queue, self.waiting, self.capacity = queue, queue.waiting, queue.capacity


def _looks_on_demand(how: str) -> Callable[[Recorder], None]:
    from gpuscope._on_demand import OnDemand

    return OnDemand(how).poll


def _warn_of_gevent() -> None:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        logger.warning(
            "gevent has patched `threading`, which is unsupported: gpuscope's threads are greenlets, which take turns "
            "with the program's, and NVTX ranges of greenlets close each other."
        )


class StartingQueue:
    """Stands where a recorder's queue will be until the first record, which starts the collector."""

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
        meters: instruments made by former periods of recording, by the application's MeterProvider.

    """

    def __init__(
        self,
        config: Config,
        *,
        device: Any = None,
        nvtx: Any = None,
        clock: Callable[[], int] = time.perf_counter_ns,
        epoch_clock: Callable[[], int] = time.time_ns,
        exporters: tuple[Exporter, ...] = (),
        on_provider: Callable[[], None] = lambda: None,
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
        device = device or CudaDevice(self.ledger, max_pairs=2 * config.queue_size)
        self.recorder = Recorder(StartingQueue(self), device, self.ledger, self._open_bridge)
        self.recorder.clock = clock
        self.recorder.nvtx = nvtx or (open_nvtx() if config.nvtx else None)
        if config.graph_stages:
            self.recorder.captures = Captures(device, self.ledger, inline=config.graph_stages == "inline")
        self._epoch_clock = epoch_clock
        self._extra_exporters = exporters
        self.collector = Collector(
            config,
            self.recorder,
            queue=self.queue,
            summary=self.summary,
            extra_exporters=exporters,
            on_provider=on_provider,
            on_pass=_looks_on_demand(config.profile) if config.profile else None,
            epoch_clock=epoch_clock,
            meters=meters,
        )

    def _open_bridge(self) -> Any:
        from gpuscope._otel import Bridge

        # Exporters handed in, as in tests, should see what the application's spans see.
        visible = True if self._extra_exporters else None
        return Bridge(self.config, clock=self.recorder.clock, epoch_clock=self._epoch_clock, visible=visible)

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
        self.ledger.close(self.queue, "shutdown")
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
