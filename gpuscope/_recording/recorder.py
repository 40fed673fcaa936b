"""
`Recorder`: everything that the hot path reads while one period of recording is on.

Starts no thread and decides nothing; the engine fills it, and the hot path and the collector share it.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from typing import TYPE_CHECKING

from gpuscope._data.native import native
from gpuscope._recording.queue import ByteBudget

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.flight import FlightRecorder, StallWatch
    from gpuscope._data.interfaces import Bridge, Captures, Device, Queue, ReplaySink
    from gpuscope._recording.ledger import Ledger
    from gpuscope._recording.queue import RecordQueue

if TYPE_CHECKING or native is None:
    from gpuscope._data.interfaces import RecorderFields
else:
    RecorderFields = native.RecorderFields


_BYTES = 1 << 24


class Recorder(RecorderFields):
    """
    Everything that the hot path reads.

    Args:
        queue: takes the records for which `waiting` has no room; at first that is all of them.
        replays: takes the replays of CUDA graphs that have stages inside.
        device: the GPUs.
        ledger: counts what failed.
        open_bridge: opens the door to OpenTelemetry.
        budget: bounds the bytes of what stages are told.

    """

    __slots__ = ("_open", "budget", "captures", "flight_recorder", "replays", "stalls", "to_keep")
    ledger: Ledger

    def __init__(
        self,
        queue: Queue,
        *,
        replays: ReplaySink,
        device: Device,
        ledger: Ledger,
        open_bridge: Callable[[], Bridge],
        budget: ByteBudget | None = None,
    ) -> None:
        self.queue = queue
        self.waiting = deque()
        self.capacity = 0
        self.paused = False
        self.replays = replays
        self.budget = ByteBudget(_BYTES) if budget is None else budget
        self.device = device
        self.ledger = ledger
        self.clock = time.perf_counter_ns
        self.nvtx = self.bridge = self.look_for_provider = self.current_context = self.flight = None
        self.flight_recorder: FlightRecorder | None = None
        """The collector's side of the flight recorder."""
        self.stalls: StallWatch | None = None
        """Looks for stages without progress, where that is wanted."""
        self.to_keep: deque[tuple[int, bool]] | None = None
        """Ids of traces that are to be kept though no stage of theirs says so, and whether because of a failure. Any
        thread adds, the collector takes; None where all traces are kept."""
        self._open = open_bridge
        self.captures: Captures | None = None
        """The captures of CUDA graphs that are going on, where stages inside graphs are wanted."""
        # Not the global `random`: frameworks seed it alike on all ranks, so that trace ids would repeat.
        self.random_bits = random.Random(random.SystemRandom().getrandbits(256)).getrandbits  # noqa: S311
        # Span ids need only be unique; counted from a random start they are so across processes, too.
        self.span_ids = itertools.count(self.random_bits(62) + 1)

    def open_bridge(self) -> bool:
        """Open the door to OpenTelemetry; called once the application or the collector has imported that."""
        if self.bridge is None:
            self.bridge = self._open()
            self.current_context = self.bridge.current_context
            self.look_for_provider = self.bridge.look_for_provider
        return self.bridge is not None

    def accept(self, queue: RecordQueue) -> None:
        """Have records put where the collector takes them from: see `_recording.queue`."""
        self.queue, self.waiting, self.capacity = queue, queue.waiting, queue.half

    def note(self, batch: StageBatch, offset_ns: NDArray[np.int64]) -> None:
        """Have the flight recorder, if there is one, know what became of stages: see `FlightRecorder.add`."""
        if self.flight_recorder is not None:
            self.flight_recorder.add(batch, offset_ns)
        if self.stalls is not None:
            self.stalls.look(batch)

    def poll_flight(self) -> None:
        """Have it do what is due in a pass of the collector's."""
        if self.flight_recorder is not None:
            self.flight_recorder.poll()

    def end_flight(self, *, is_fork: bool = False) -> None:
        """Let go of the flight recorder and the look for stalls; the child of a fork leaves the file to its parent."""
        stalls, self.stalls = self.stalls, None
        if stalls is not None:
            (stalls.abandon if is_fork else stalls.close)()
        self.flight, flight = None, self.flight_recorder
        if flight is not None:
            self.flight_recorder = None
            (flight.abandon if is_fork else flight.close)()
