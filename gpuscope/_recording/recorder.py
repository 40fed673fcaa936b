"""
`Recorder`: everything that the hot path reads while one period of recording is on.

Starts no thread and decides nothing; the engine fills it, and the hot path and the collector share it.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from gpuscope._data.native import native

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.interfaces import Bridge, Device, Queue
    from gpuscope._recording.ledger import Ledger
    from gpuscope._recording.queue import RecordQueue

if TYPE_CHECKING or native is None:
    from gpuscope._data.interfaces import RecorderFields
else:
    RecorderFields = native.RecorderFields


class Recorder(RecorderFields):
    """
    Everything that the hot path reads.

    Args:
        queue: takes the records.
        replays: takes the replays of CUDA graphs with stages inside.
        device: the GPUs.
        ledger: counts what failed.
        open_bridge: opens the door to OpenTelemetry.

    """

    __slots__ = ("_open", "captures", "replays")
    ledger: Ledger

    def __init__(
        self,
        queue: Queue,
        *,
        replays: Any,
        device: Device,
        ledger: Ledger,
        open_bridge: Callable[[], Bridge],
    ) -> None:
        self.queue = queue
        self.waiting = deque()
        self.capacity = 0
        self.replays = replays
        self.device = device
        self.ledger = ledger
        self.clock = time.perf_counter_ns
        self.nvtx = self.bridge = self.look_for_provider = self.current_context = None
        self._open = open_bridge
        self.captures: Any = None
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
