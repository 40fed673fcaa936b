"""
How busy streams were when they were asked: for metrics by interval, for the summary with an interval of confidence.

Arithmetic only. Visits in Python the rows that have samples, of which there are as many a second as questions at most.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from gpuscope._data.batch import RowFlag

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuscope._data.batch import StageBatch

K = TypeVar("K")
_WARMUP = int(RowFlag.WARMUP)
_OPEN_REQUESTS = 64
"""Requests of which more answers may come, because they are in several batches."""
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for 95 %, by degrees of freedom from 1; beyond, 1.96 and a little."""


class Busy(NamedTuple):
    """How often the stream had work, queued or running, when asked in a stage or in those inside. Shares of 1."""

    share: float
    low: float | None
    """This and the next: where the share is with 95 % confidence, as far as requests differ; None with one request."""
    high: float | None
    samples: int
    requests: int
    """In how many requests."""


class Sums(NamedTuple):
    """Over requests: how many there are, their answers, those with work, the squares of both, and their products."""

    requests: int = 0
    asked: int = 0
    had: int = 0
    asked2: int = 0
    had2: int = 0
    both: int = 0


class RequestSamples:
    """The samples of one stage, request by request: answers within one request resemble each other."""

    __slots__ = ("_open", "_sums")

    def __init__(self) -> None:
        self._open: dict[int, tuple[int, int]] = {}
        self._sums = Sums()

    def add(self, request: int, asked: int, had_work: int) -> None:
        """Count answers of a request, which is known by its trace."""
        before = self._open.pop(request, (0, 0))
        self._open[request] = before[0] + asked, before[1] + had_work
        if len(self._open) > _OPEN_REQUESTS:
            self._sums = _with(self._sums, *self._open.pop(next(iter(self._open))))

    def busy(self) -> Busy | None:
        """Return what is known so far; None without any sample."""
        sums = self._sums
        for asked, had_work in self._open.values():
            sums = _with(sums, asked, had_work)
        requests, asked, had_work = sums[:3]
        if not asked:
            return None
        low, high = _interval(sums) if requests > 1 else (None, None)
        return Busy(had_work / asked, low, high, asked, requests)


def _with(sums: Sums, asked: int, had: int) -> Sums:
    """Return the sums with one more request."""
    one = 1, asked, had, asked * asked, had * had, asked * had
    return Sums(*map(int.__add__, sums, one))


def _interval(sums: Sums) -> tuple[float, float]:
    """
    Return the interval of a ratio of sums over requests, after Wilson.

    The variance between requests says how many independent answers there are in effect; where all requests say the same
    it is as many as there are requests.
    """
    requests, asked, had, asked2, had2, both = sums
    share = had / asked
    spread = max(0.0, had2 - 2 * share * both + share * share * asked2)
    variance = spread * requests / (requests - 1) / asked**2
    independent = share * (1 - share) / variance if variance > 0 else 0.0
    number = min(independent, asked) if independent else requests
    freedom = requests - 1
    t = _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.5 / freedom
    square = t * t / number
    middle = (share + square / 2) / (1 + square)
    half = t / (1 + square) * math.sqrt(share * (1 - share) / number + square / number / 4)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def samples_of(batch: StageBatch) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row, trace's id, asked, had work) of each row with samples that is not warm-up."""
    if batch.samples is not None and batch.had_work is not None:
        rows = np.flatnonzero((batch.samples != 0) & (batch.flags & _WARMUP == 0))
        columns = rows, batch.trace_low[rows], batch.samples[rows], batch.had_work[rows]
        yield from zip(*(column.tolist() for column in columns), strict=True)


class BusyRatios:
    """For which part of the moments of an interval streams had work: of each device, each stream, and in each stage."""

    def __init__(self) -> None:
        self.devices: dict[int, float] = {}
        """Of the last interval: any of the device's streams that were asked."""
        self.streams: dict[tuple[int, int], float] = {}
        """By device and raw handle."""
        self.stages: dict[tuple[int, int], float] = {}
        """By device and number of the stage; samples of those inside are not in it."""
        self._devices: dict[int, tuple[int, int]] = {}
        self._streams: dict[tuple[int, int], tuple[int, int]] = {}
        self._stages: dict[tuple[int, int], tuple[int, int]] = {}

    def add(self, batch: StageBatch, numbers: Sequence[int]) -> None:
        """Count a batch's samples; `numbers` has the stage's number for each of its sites."""
        for device, counts in (batch.device_samples or {}).items():
            _count(self._devices, device, *counts)
        for stream, counts in (batch.stream_samples or {}).items():
            _count(self._streams, stream, *counts)
        for row, _, asked, had_work in samples_of(batch):
            _count(self._stages, (int(batch.device[row]), numbers[batch.site[row]]), asked, had_work)

    def end_interval(self) -> None:
        """Compute the ratios of what was counted since the last call."""
        self.devices, self.streams = _ratios(self._devices), _ratios(self._streams)
        self.stages = _ratios(self._stages)
        self._devices, self._streams, self._stages = {}, {}, {}


def _ratios(counts: dict[K, tuple[int, int]]) -> dict[K, float]:
    return {key: had_work / asked for key, (asked, had_work) in counts.items() if asked}


def _count(counts: dict[K, tuple[int, int]], key: K, asked: int, had_work: int) -> None:
    before = counts.get(key, (0, 0))
    counts[key] = before[0] + asked, before[1] + had_work
