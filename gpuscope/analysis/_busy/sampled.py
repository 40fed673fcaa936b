"""
How much of the time of some calls their streams had work, from the answers of streams that were asked at random times.

What an answer says is that the stream had work *queued or running*. That bounds from above how long kernels ran: by
up to 18 points where they are short, and hardly where they are long (`benchmarks/results/busy.json`). Decides nothing.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope.analysis._busy.estimate import Share, share_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording


class _OnStream(NamedTuple):
    """What is known of one stream in some calls."""

    took_ns: int
    share: Share | None


class Sampled:
    """
    The answers in a recording.

    Args:
        recording: Any recording.
        left_out: Rows whose own time is known otherwise: their answers are not used.

    """

    def __init__(self, recording: Recording, left_out: NDArray[np.bool_]) -> None:
        self._recording = recording
        self._usable = recording.measured & ~left_out
        self.any = bool(recording.samples[self._usable].any())

    @cached_property
    def own_ns(self) -> NDArray[np.int64]:
        """How long each row's stream was in it and in no stage inside it."""
        recording = self._recording
        own_ns: NDArray[np.int64] = np.where(recording.measured, recording.gpu_end_ns - recording.gpu_start_ns, 0)
        parent = recording.parent
        inner = np.flatnonzero(recording.measured & (parent >= 0) & (recording.stream == recording.stream[parent]))
        around = parent[inner]
        # What lies outside the stage around it, as clocks may say, is not part of that stage.
        start_ns = np.maximum(recording.gpu_start_ns[inner], recording.gpu_start_ns[around])
        end_ns = np.minimum(recording.gpu_end_ns[inner], recording.gpu_end_ns[around])
        np.subtract.at(own_ns, around, np.maximum(end_ns - start_ns, 0))
        return own_ns.clip(0)

    def usable(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the rows whose answers can be used."""
        return rows[self._usable[rows]]

    def busy(self, rows: NDArray[np.int64], took_ns: int, idle_ns: int, known_ns: int) -> Share | None:
        """
        Return the part of some calls' time in which the GPU had work; None with too few answers.

        Of several streams it is that of the busiest, and the interval goes up to where they never work together.

        Args:
            rows: The calls and all stages inside them.
            took_ns: The time that they took in all.
            idle_ns: The part of that in which it is known otherwise that there was no work: in rows left out.
            known_ns: The part of that in which it is known otherwise that there was work.

        """
        inside = self.usable(rows)
        streams = [self._on(inside[self._recording.stream[inside] == each]) for each in self._streams(inside)]
        streams.sort(key=lambda each: -each.took_ns)
        if not streams or min(took_ns, streams[0].took_ns) <= 0 or (first := streams[0].share) is None:
            return None
        # Before the stream came to the calls, the GPU was busy with what was before, as far as that is known.
        unseen_ns = max(0, took_ns - streams[0].took_ns - idle_ns - known_ns)
        idle = (idle_ns + unseen_ns) / took_ns
        part = min(1.0, streams[0].took_ns / took_ns)
        share, low, high = (_clipped(1 - idle - part * (1 - each)) for each in first[:3])
        for other in streams[1:]:
            part = other.took_ns / took_ns
            known = other.share
            high = _clipped(high + part * (1.0 if known is None else known.high))
            if known is not None:
                share, low = max(share, _clipped(part * known.share)), max(low, _clipped(part * known.low))
        answers = sum(each.share.answers for each in streams if each.share is not None)
        return Share(min(share, high), min(low, share), max(high, share), answers, first.requests)

    def _streams(self, rows: NDArray[np.int64]) -> list[int]:
        found: list[int] = np.unique(self._recording.stream[rows]).tolist()
        return found

    def _on(self, rows: NDArray[np.int64]) -> _OnStream:
        recording = self._recording
        _, request = np.unique(recording.root[rows], return_inverse=True)
        count = int(request.max(initial=-1)) + 1
        answers, hits = np.zeros((2, count), np.int64)
        np.add.at(answers, request.ravel(), recording.samples[rows])
        np.add.at(hits, request.ravel(), recording.had_work[rows])
        return _OnStream(int(self.own_ns[rows].sum()), share_of(hits, answers))


def _clipped(share: float) -> float:
    return min(1.0, max(0.0, share))
