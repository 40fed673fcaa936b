"""
Whether streams have work, asked many times a second: owns the thread in C (`csrc/sampler.c`) and takes its answers.

Without the parts in C nothing is asked. Asks only about streams that cannot go away. Creates no context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpuscope._data.native import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope._cuda.driver import Driver
    from gpuscope._cuda.timed_stream import TimedStream

ANSWER = np.dtype(
    [
        ("at_ns", np.int64),
        ("stream", np.uint64),
        ("device", np.int32),
        ("open", np.int32),
        ("round", np.uint32),
        ("had_work", np.int32),
    ]
)
"""
One answer, as in `csrc/sampler.h`: when it was, on the records' clock; about which stream of which device; how many of
our stages were open on it; the number of the round, in which all streams in use are asked; and whether it had work.
"""
NO_ANSWERS: NDArray[np.void] = np.zeros(0, ANSWER)
_KEPT_S, _LEAST_KEPT, _MOST_KEPT = 16, 1024, 65_536
"""The ring has room for so many seconds of one stream; the collector empties it about once a second."""
_STOP_NS = 100_000_000
"""The thread ends within a millisecond, unless the driver keeps it; then nobody waits longer than this."""


class StreamSampler:
    """
    The sampler of one device.

    Args:
        hz: how often a second it asks, on average; 0 for never.

    """

    def __init__(self, hz: float) -> None:
        self.hz = hz
        self.why_off = ""
        """Why nothing is asked although that was wanted."""
        self._sampler: Any = None  # Of `native`, which has no stubs.
        self._is_wanted = hz > 0
        self._has_streams = False
        if hz > 0 and not hasattr(native, "StreamSampler"):
            self.why_off = "the parts in C are not in use"

    @property
    def is_on(self) -> bool:
        """Whether answers may come."""
        return self._sampler is not None

    def open(self, driver: Driver) -> None:
        """Get ready to ask this driver. Starts nothing: the first stream does."""
        if self.hz > 0 and not self.why_off and self._sampler is None:
            capacity = int(min(max(self.hz * _KEPT_S, _LEAST_KEPT), _MOST_KEPT))
            try:
                addresses = driver.addresses_to_sample()
                self._sampler = native.StreamSampler(*addresses, int(1e9 / self.hz), capacity)
            except Exception:  # A driver without these functions, or no memory: all else goes on.
                self.why_off = "the driver lacks what it needs"

    def watch(self, timed_stream: TimedStream) -> None:
        """Ask about a stream from now on, unless it may go away."""
        if self._sampler is not None and self._sampler.watch(timed_stream, timed_stream.context.value or 0):
            self._has_streams = True
            self._start()

    def unwatch(self, timed_stream: TimedStream) -> None:
        """Ask about a stream no more."""
        if self._sampler is not None:
            self._sampler.unwatch(timed_stream)

    def start(self) -> None:
        """Ask again, after `stop`."""
        self._is_wanted = self.hz > 0
        self._start()

    def _start(self) -> None:
        if self._sampler is not None and self._is_wanted and self._has_streams and not self._sampler.start():
            self.why_off = "no thread was to be had"

    def stop(self) -> None:
        """Ask nothing until `start`; the thread ends."""
        self._is_wanted = False
        if self._sampler is not None:
            self._sampler.stop(_STOP_NS)

    def take(self) -> NDArray[np.void]:
        """Return the answers since the last call, oldest first."""
        taken = b"" if self._sampler is None else self._sampler.take()
        return np.frombuffer(taken, ANSWER) if taken else NO_ANSWERS

    def counts(self) -> dict[str, int]:
        """Return what was asked since the beginning, and what came of it; nothing where nothing could be asked."""
        found: dict[str, int] = {} if self._sampler is None else self._sampler.counts()
        return found
