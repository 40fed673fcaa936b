"""
Event distances into host time: arithmetic on anchors.

No I/O, no clock of its own, no CUDA: everything is an argument. Host times are `time.perf_counter_ns()`; the batch
builder maps them to the epoch.

A stage's GPU duration is the distance between its own two events: stream-elapsed time, waiting for the host included.
Its place is the distance from an anchor. The uncertainty, which is exported with every GPU span, is half the anchor's
bracket, plus what drift and rounding may add.

Nothing runs before it is launched. Whoever calls `place` therefore moves a start that lies before its launch to it, and
flags the stage (`gpuscope.clamped`) if that was by more than the uncertainty.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpuscope._data.interfaces import Anchor

MAX_ANCHOR_AGE_NS = 8_000_000_000
"""`cuEventElapsedTime` gives a 32-bit float of milliseconds, whose step is 0.5 µs at 8 s and 4 µs at a minute."""
_FIRST_ANCHOR_AGE_NS = 50_000_000
_RETRY_NS = 20_000_000
"""How soon the next attempt follows a bracket that was too wide; the one after it takes twice as long, and so on."""
_WIDE_NS = 50_000
"""
Half of a bracket that something held up. Undisturbed ones measured 3 to 4 µs on H100 and H200; one taken during a copy
from pageable memory, which holds the driver's lock for its whole length, was off by up to 20 ms.
"""
_MISSES = 3
"""Attempts without any anchor, after which stages go out unplaced. They take some 0.4 s."""
_DRIFT_WINDOW_NS = 64_000_000_000
_UNKNOWN_DRIFT = 50e-6
"""
Assumed until it is measured. GPUs drifted 1.5 (H200) and 15 (H100) parts per million against the host, and the host's
clock may be slewed besides.
"""
_IMPLAUSIBLE_DRIFT = 1e-3
_FLOAT32_STEP = 2.0**-23
_NO_ANCHOR = "A `GpuClock` needs an anchor to place anything; call `calibrate` first."


class GpuClock:
    """
    Places one GPU's events in host time.

    The second anchor follows the first after 50 ms, and the interval doubles each time up to 8 s, so that the drift is
    known early. The drift is the slope over the anchors of about the last minute.
    """

    def __init__(self) -> None:
        self.anchor: Anchor | None = None
        self._readings: deque[tuple[int, float, int]] = deque()
        self._max_age_ns, self._retry_ns = _FIRST_ANCHOR_AGE_NS, _RETRY_NS
        self._due_ns = -1
        self._misses = 0
        self._host_ns_per_ms = self._doubt_ns_per_ms = 0.0
        self.event_cost_ns = 0
        """What a pair of events takes of a busy GPU's time: the least that was measured, 0 before."""

    def is_due(self, now_ns: int) -> bool:
        """Tell whether a new anchor should be taken."""
        return now_ns > self._due_ns

    @property
    def is_lost(self) -> bool:
        """Whether there is no anchor, and is not likely to be one soon: then durations are all that can be told."""
        return self.anchor is None and self._misses >= _MISSES

    def miss(self, now_ns: int) -> None:
        """Take notice that no anchor could be taken: the next attempt comes later, each time twice as much."""
        self._misses += 1
        self._due_ns = now_ns + self._retry_ns
        self._retry_ns = min(2 * self._retry_ns, MAX_ANCHOR_AGE_NS)

    def calibrate(self, anchor: Anchor, elapsed_ms: float | None) -> None:
        """
        Take a new anchor, unless the previous one still tells the time better.

        Args:
            anchor: the new reading.
            elapsed_ms: GPU time in milliseconds from the previous anchor to this one; None if there was none or it
                can't be told.

        """
        before, self._due_ns = self.anchor, anchor.host_ns + self._retry_ns
        if anchor.event_cost_ns:
            self.event_cost_ns = min(anchor.event_cost_ns, self.event_cost_ns or anchor.event_cost_ns)
        self._retry_ns = min(2 * self._retry_ns, MAX_ANCHOR_AGE_NS)
        usable = elapsed_ms is not None and 0 < elapsed_ms * 1e6 <= 4 * MAX_ANCHOR_AGE_NS
        if before is not None and usable and anchor.half_ns > max(_WIDE_NS, self._doubt_at(anchor, before)):
            return
        if anchor.half_ns <= _WIDE_NS:
            self._due_ns = anchor.host_ns + self._max_age_ns
            self._max_age_ns, self._retry_ns = min(2 * self._max_age_ns, MAX_ANCHOR_AGE_NS), _RETRY_NS
        if not usable:
            self._readings.clear()
        gpu_ns = self._readings[-1][1] + elapsed_ms * 1e6 if self._readings and elapsed_ms is not None else 0.0
        self._readings.append((anchor.host_ns, gpu_ns, anchor.half_ns))
        while anchor.host_ns - self._readings[0][0] > _DRIFT_WINDOW_NS:
            self._readings.popleft()
        self.anchor = anchor
        drift, doubt = self.drift
        self._host_ns_per_ms = 1e6 * (1.0 + drift)
        self._doubt_ns_per_ms = 1e6 * (doubt + _FLOAT32_STEP)

    def _doubt_at(self, later: Anchor, anchor: Anchor) -> float:
        return anchor.half_ns + (later.host_ns - anchor.host_ns) / 1e6 * self._doubt_ns_per_ms

    @property
    def drift(self) -> tuple[float, float]:
        """Host nanoseconds per GPU nanosecond, less one; and how far that may be off."""
        best = 0.0, _UNKNOWN_DRIFT
        host_b, gpu_b, half_b = self._readings[-1] if self._readings else (0, 0.0, 0)
        for host_a, gpu_a, half_a in list(self._readings)[:-1]:
            drift, doubt = (host_b - host_a) / (gpu_b - gpu_a) - 1.0, (half_a + half_b) / (gpu_b - gpu_a)
            # Over a short baseline the brackets alone make for more than any drift that was ever measured.
            if abs(drift) < _IMPLAUSIBLE_DRIFT and doubt < best[1]:
                best = drift, doubt
        return best

    @property
    def terms(self) -> tuple[int, int, float, float, int]:
        """
        What `place` and `less_events` compute with, for code that computes elsewhere.

        The anchor's host time and half its bracket, in nanoseconds; host nanoseconds per GPU millisecond; the
        uncertainty that each GPU millisecond from the anchor adds, in nanoseconds; and what a pair of events takes.

        Raises:
            RuntimeError: if there is no anchor yet.

        """
        if self.anchor is None:
            raise RuntimeError(_NO_ANCHOR)
        return self.anchor.host_ns, self.anchor.half_ns, self._host_ns_per_ms, self._doubt_ns_per_ms, self.event_cost_ns

    def place(self, end_ms: float, duration_ms: float) -> tuple[int, int, int]:
        """
        Place a stage by its end, which is near the anchor however long the stage was.

        Args:
            end_ms: GPU time from the anchor to the stage's end event; negative if that came first.
            duration_ms: GPU time between the stage's own two events, which is more exact than the distance between
                two places.

        Returns:
            Start, end and uncertainty, in host nanoseconds.

        Raises:
            RuntimeError: if there is no anchor yet.

        """
        host_ns, half_ns, host_ns_per_ms, doubt_ns_per_ms, _ = self.terms
        end_ns = host_ns + int(end_ms * host_ns_per_ms)
        uncertainty_ns = half_ns + int((abs(end_ms) + duration_ms) * doubt_ns_per_ms) + 1
        return end_ns - int(duration_ms * host_ns_per_ms), end_ns, uncertainty_ns

    def less_events(self, start_ns: int, end_ns: int, uncertainty_ns: int, left_ns: int) -> tuple[int, int] | None:
        """
        Return a stage's start and end, the end earlier by what its own two events took; None where that is not known.

        It is known where the host had left the stage before the GPU came to it: then all of its work was waiting, and
        what lies between its events is that work and the events. Else the events may lie in time in which the GPU
        waited. A stage around others is left before the GPU comes to any of them, so what is taken off it is taken off
        all of them, and none ends after it.

        Args:
            start_ns: where the stage begins on the GPU, in host nanoseconds.
            end_ns: where it ends.
            uncertainty_ns: how far off the two may be.
            left_ns: when the host left the stage.

        """
        if self.event_cost_ns == 0 or start_ns - uncertainty_ns < left_ns:
            return None
        return min(start_ns, end_ns - self.event_cost_ns), end_ns - self.event_cost_ns
