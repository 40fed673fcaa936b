"""
Running totals and the last calls of each stage: what a summary is made from.

Bounded in memory, however long the program runs. Knows neither batches nor tables, and takes no lock: its owner does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._collecting.aggregation.sampled import RequestSamples
from gpuscope._data.stage_order import Place

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope._collecting.aggregation.groups import Group

RECENT_CALLS = 4096
"""How many calls of a stage percentiles look back on."""
RECENT_WARMUPS = 64
"""How many warm-up calls are kept, for stages that have made no others."""


class Ring:
    """The last calls of one stage. Starts small, because of many stages most are seldom called."""

    __slots__ = ("_block", "_limit", "_next", "size")

    def __init__(self, limit: int) -> None:
        # A mantissa of 24 bits is finer than any clock here, at half the memory.
        self._block = np.empty((3, min(limit, 32)), np.float32)
        self._limit = limit
        self._next = 0
        self.size = 0

    def append(self, block: NDArray[np.float64]) -> None:
        """Add calls, the columns of `block`; where the ring is full, they replace the oldest."""
        block = block[:, -self._limit :]
        count = block.shape[1]
        self._make_room(self.size + count)
        capacity = self._block.shape[1]
        before_end = min(count, capacity - self._next)
        self._block[:, self._next : self._next + before_end] = block[:, :before_end]
        if before_end < count:
            self._block[:, : count - before_end] = block[:, before_end:]
        self._next = (self._next + count) % capacity
        self.size = min(self.size + count, capacity)

    def _make_room(self, wanted: int) -> None:
        capacity = self._block.shape[1]
        if wanted <= capacity or capacity == self._limit:
            return
        larger = np.empty((3, min(self._limit, max(wanted, 2 * capacity))), np.float32)
        larger[:, : self.size] = self._block[:, : self.size]
        self._block, self._next = larger, self.size

    def copy(self) -> NDArray[np.float32]:
        """Return the calls held, in no particular order."""
        return np.array(self._block[:, : self.size])


class CallTotals:
    """The warm-up calls of one stage, or the others: totals since the start, and the last calls."""

    __slots__ = ("count", "gpu_ms", "host_ms", "recent", "requests", "requests_ms")

    def __init__(self, limit: int) -> None:
        self.count = 0
        self.host_ms = 0.0
        self.gpu_ms = 0.0
        self.requests = 0
        self.requests_ms = 0.0
        self.recent = Ring(limit)

    def add(self, group: Group) -> None:
        """Count a group of calls."""
        self.count += group.block.shape[1]
        self.host_ms += group.host_ms
        self.gpu_ms += group.gpu_ms
        self.requests += group.requests
        self.requests_ms += group.requests_ms
        self.recent.append(group.block)


class Tally(Place):
    """All that is kept of one stage within one kind of request."""

    __slots__ = ("awaited_id", "awaited_start_ns", "errors", "sampled", "steady", "warmup")

    def __init__(self, name: str, root: str, first_start_ns: int) -> None:
        super().__init__(name, root, first_start_ns)
        self.errors = 0
        self.steady = CallTotals(RECENT_CALLS)
        self.warmup = CallTotals(RECENT_WARMUPS)
        self.sampled = RequestSamples()
        """Of its calls after warm-up, with the stages inside."""
        self.awaited_id = 0
        """Span id of the stage around one call, whose row has not come yet; 0 if none is awaited."""
        self.awaited_start_ns = 0
        """When that call started."""

    @property
    def calls(self) -> int:
        """All calls, warm-up or not."""
        return self.steady.count + self.warmup.count

    @property
    def measured(self) -> CallTotals:
        """The calls to judge by: those after the warm-up, if there are any."""
        return self.steady if self.steady.count else self.warmup

    def total_ms(self) -> tuple[float, float]:
        """Return the host and the GPU time of all calls, assuming that the warm-up calls took as long as the others."""
        measured = self.measured
        factor = self.calls / measured.count if measured.count else 0.0
        return measured.host_ms * factor, measured.gpu_ms * factor

    def request_ms(self) -> float:
        """Return the host time of all requests, assuming that the warm-up calls took as long as the others."""
        measured = self.steady if self.steady.requests else self.warmup
        requests = self.steady.requests + self.warmup.requests
        return measured.requests_ms * requests / measured.requests if measured.requests else 0.0
