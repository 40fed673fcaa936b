"""
Event distances into host time: arithmetic on anchors.

No I/O, no clock of its own, no CUDA: everything is an argument. Host times are `time.perf_counter_ns()`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

MAX_ANCHOR_AGE_NS = 8_000_000_000
"""`cuEventElapsedTime` gives a 32-bit float of milliseconds, whose step is 0.5 µs at 8 s and 4 µs at a minute."""
_FIRST_ANCHOR_AGE_NS = 500_000_000
_DRIFT_WINDOW_NS = 64_000_000_000
_UNKNOWN_DRIFT = 5e-6
"""Assumed until it is measured; measured GPUs drifted 1.3 to 1.7 parts per million against the host."""
_IMPLAUSIBLE_DRIFT = 1e-3
_FLOAT32_STEP = 2.0**-23
_NO_ANCHOR = "A `GpuClock` needs an anchor to place anything; call `calibrate` first."


@dataclass(frozen=True, slots=True)
class Anchor:
    """One paired reading of the host and GPU clocks: the event completed at `host_ns`, plus or minus `half_ns`."""

    event: Any
    host_ns: int
    half_ns: int


class GpuClock:
    """
    Places one GPU's events in host time.

    An anchor is followed by the next after half a second, then after twice as long each time up to 8 s, so that the
    drift is known early. The drift is the slope over the anchors of about the last minute.
    """

    def __init__(self) -> None:
        self.anchor: Anchor | None = None
        self._readings: deque[tuple[int, float, int]] = deque()
        self._max_age_ns = _FIRST_ANCHOR_AGE_NS
        self._host_ns_per_ms = self._doubt_ns_per_ms = 0.0

    def is_due(self, now_ns: int) -> bool:
        """Tell whether a new anchor is needed before anything is placed."""
        return self.anchor is None or now_ns - self.anchor.host_ns > self._max_age_ns

    def calibrate(self, anchor: Anchor, elapsed_ms: float | None) -> None:
        """
        Take a new anchor.

        Args:
            anchor: the new reading.
            elapsed_ms: GPU time from the anchor before to this one, or None if there was none or it can't be told.

        """
        if self.anchor is not None:
            self._max_age_ns = min(2 * self._max_age_ns, MAX_ANCHOR_AGE_NS)
        usable = elapsed_ms is not None and 0 < elapsed_ms * 1e6 <= 4 * MAX_ANCHOR_AGE_NS
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

    @property
    def drift(self) -> tuple[float, float]:
        """Host nanoseconds a GPU nanosecond, less one; and how far that may be off."""
        if len(self._readings) > 1:
            (host_a, gpu_a, half_a), (host_b, gpu_b, half_b) = self._readings[0], self._readings[-1]
            drift = (host_b - host_a) / (gpu_b - gpu_a) - 1.0
            doubt = (half_a + half_b) / (gpu_b - gpu_a)
            # Over a short baseline the brackets alone make for more than any drift that was ever measured.
            if abs(drift) < _IMPLAUSIBLE_DRIFT and doubt < _UNKNOWN_DRIFT:
                return drift, doubt
        return 0.0, _UNKNOWN_DRIFT

    @property
    def terms(self) -> tuple[int, int, float, float]:
        """What `place` computes with, for whoever computes elsewhere; needs an anchor."""
        if self.anchor is None:
            raise RuntimeError(_NO_ANCHOR)
        return self.anchor.host_ns, self.anchor.half_ns, self._host_ns_per_ms, self._doubt_ns_per_ms

    def place(self, end_ms: float, duration_ms: float) -> tuple[int, int, int]:
        """
        Place a stage by its end, which is the closer of its events to the anchor however long the stage was.

        Args:
            end_ms: GPU time from the anchor to the stage's end event; negative if that came first.
            duration_ms: GPU time between the stage's own two events, the more exact of the two.

        Returns:
            Start, end and uncertainty, in host nanoseconds.

        """
        host_ns, half_ns, host_ns_per_ms, doubt_ns_per_ms = self.terms
        end_ns = host_ns + int(end_ms * host_ns_per_ms)
        uncertainty_ns = half_ns + int(abs(end_ms) * doubt_ns_per_ms) + 1
        return end_ns - int(duration_ms * 1e6), end_ns, uncertainty_ns
